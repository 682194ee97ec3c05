// A disk whose changes somebody wants to know of.
#pragma once

#include <functional>

#include "layer/forwarding.h"

namespace imgfuse::test {

/// Tells of every change after it was made, whether it succeeded or not, and before its caller knows: who copies a
/// range and is not told of a change to it after he began to read has read what it holds.
class Tracking final : public layer::Forwarding {
 public:
  /// Called by any number of threads at once.
  using Changed = std::function<void(GuestRange)>;
  Tracking(Disk& below, Changed changed) : Forwarding(below), changed_(std::move(changed)) {}

 private:
  Result<> do_write(GuestOffset offset, ConstBytes data) override {
    return tell({offset, data.size()}, below().write(offset, data));
  }
  Result<> do_write_zeroes(GuestRange range, Zeroing zeroing) override {
    return tell(range, below().write_zeroes(range, zeroing));
  }
  Result<> do_forget(GuestRange range) override { return tell(range, below().forget(range)); }

  Result<> tell(GuestRange range, Result<> result) {
    changed_(range);
    return result;
  }

  const Changed changed_;
};

}  // namespace imgfuse::test
