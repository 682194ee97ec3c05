// Unwrapping of results in tests.
#pragma once

#include <doctest/doctest.h>

#include "imgfuse/error.h"

namespace imgfuse::test {

/// The value of a result that has to be one; otherwise the test case ends here, with the error's text.
template <class T>
T must(Result<T> result) {
  if (!result) FAIL(result.error().text());
  if constexpr (!std::is_void_v<T>) return std::move(*result);
}

}  // namespace imgfuse::test
