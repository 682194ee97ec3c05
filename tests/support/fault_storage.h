// FaultStorage: fails the call it is told to fail.
#pragma once

#include <optional>

#include "base/mutex.h"
#include "support/intercepted_storage.h"
#include "support/random.h"

namespace imgfuse::test {

struct Fault {
  CallSet calls;       ///< which calls count, and may fail
  bool torn = false;   ///< a write that fails has already written the front half of its sectors
  bool later = false;  ///< all later calls of these kinds fail as well
};

/// Thread-safe. Fails nothing until told to.
class FaultStorage final : public InterceptedStorage {
 public:
  using InterceptedStorage::InterceptedStorage;

  /// The n-th call from now (1 is the next) fails.
  void fail_call(uint64_t n, ErrorCode code, Fault fault = {}) EXCLUDES(mutex_);
  /// No call fails any more.
  void heal() EXCLUDES(mutex_);
  /// Whether a call has failed since fail_call(): false means that n lay past the last call.
  bool fired() const EXCLUDES(mutex_);

  using InterceptedStorage::write;
  Result<> write(HostOffset offset, std::span<const ConstBytes> parts) override;

 private:
  struct Plan {
    uint64_t calls_left;
    ErrorCode code;
    Fault fault;
  };
  Result<> before(Call call, HostRange range) override EXCLUDES(mutex_);

  mutable Mutex mutex_;
  std::optional<Plan> plan_ GUARDED_BY(mutex_);
  bool fired_ GUARDED_BY(mutex_) = false;
};

/// Loops that let one call after the other fail go on by so many: 1, or IMG_FAULT_STEP where failing is not what is
/// tested.
inline uint64_t fault_step() { return from_environment("IMG_FAULT_STEP", 1); }

}  // namespace imgfuse::test
