#include "support/fault_storage.h"

#include <vector>

#include "base/math.h"

namespace imgfuse::test {

void FaultStorage::fail_call(uint64_t n, ErrorCode code, Fault fault) {
  Lock lock(mutex_);
  plan_ = Plan{n, code, fault};
  fired_ = false;
}

void FaultStorage::heal() {
  Lock lock(mutex_);
  plan_.reset();
}

bool FaultStorage::fired() const {
  Lock lock(mutex_);
  return fired_;
}

Result<> FaultStorage::before(Call call, HostRange) {
  Lock lock(mutex_);
  if (!plan_ || !plan_->fault.calls.contains(call)) return {};
  if (plan_->calls_left > 0 && --plan_->calls_left > 0) return {};
  const ErrorCode code = plan_->code;
  if (!plan_->fault.later) plan_.reset();
  fired_ = true;
  return fail(code, "a failure made by the test");
}

Result<> FaultStorage::write(HostOffset offset, std::span<const ConstBytes> parts) {
  bool torn = false;
  {
    Lock lock(mutex_);
    torn = plan_ && plan_->fault.torn;
  }
  Result<> result = InterceptedStorage::write(offset, parts);
  if (result || !torn) return result;
  std::vector<std::byte> all;
  for (const ConstBytes part : parts) all.insert(all.end(), part.begin(), part.end());
  const uint64_t front_end = round_up(offset.bytes() + all.size() / 2, 512);
  const ConstBytes front = ConstBytes(all).first(std::min<uint64_t>(all.size(), front_end - offset.bytes()));
  IMG_TRY(inner().write(offset, front));
  return result;
}

}  // namespace imgfuse::test
