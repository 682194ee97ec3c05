#include "core/flusher.h"

namespace imgfuse {

Result<> Flusher::flush() {
  {
    Lock lock(mutex_);
    const uint64_t wanted = begun_ + 1;  // a cycle that runs already may have made its cut too early
    while (begun_ != done_) {
      ended_.wait(lock);
      if (done_ >= wanted) return latch_.check();
    }
    if (done_ >= wanted) return latch_.check();
    ++begun_;
  }
  Result<> result = run_cycle();
  Lock lock(mutex_);
  ++done_;
  ended_.notify_all();
  return result;
}

Result<> Flusher::run_cycle() {
  IMG_TRY(latch_.check());
  client_.cut();
  Result<> result;
  bool unflushed = true;  // guest data
  for (unsigned stage = 0; result && stage < stages_; ++stage) {
    Result<bool> wrote = client_.write_stage(stage);
    if (!wrote) {
      result = fail(std::move(wrote).error());
      break;
    }
    unflushed = unflushed || *wrote;
    if (!unflushed || (stage + 1 < stages_ && !client_.needs_barrier(stage))) continue;
    result = storage_.flush();
    unflushed = false;
  }
  if (!result) latch_.set(result.error());
  client_.end_cycle(result.has_value());
  return result;
}

uint64_t Flusher::cycles() const {
  Lock lock(mutex_);
  return done_;
}

}  // namespace imgfuse
