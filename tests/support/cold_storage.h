// A storage of which nothing is in memory.
#pragma once

#include "base/no_wait.h"
#include "support/intercepted_storage.h"

namespace imgfuse::test {

/// Who does not want to wait gets nothing from it.
class ColdStorage final : public InterceptedStorage {
 public:
  using InterceptedStorage::InterceptedStorage;

 private:
  Result<> before(Call call, HostRange) override {
    if (NoWait* const hurried = NoWait::current(); hurried && call == Call::read) return hurried->miss();
    return {};
  }
};

}  // namespace imgfuse::test
