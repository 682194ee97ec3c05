#define DOCTEST_CONFIG_IMPLEMENT
#include <doctest/doctest.h>

#include <cstdlib>

/// IMG_WITHOUT: patterns of cases that are left out, separated by commas, as -tce has them.
int main(int argc, char** argv) {
  doctest::Context context(argc, argv);
  if (const char* without = std::getenv("IMG_WITHOUT")) context.addFilter("test-case-exclude", without);
  return context.run();
}
