// Runs every registered test, or those whose name contains the argument. Exit status 0 only if all ran and passed.
#include <cstring>

#include "tests/check.h"

int main(int argc, char** argv) {
  int ran = 0;
  for (const rnp::tests::Test& test : rnp::tests::all_tests()) {
    if (argc > 1 && !std::strstr(test.name, argv[1])) continue;
    const int before = rnp::tests::failures();
    test.run();
    ++ran;
    std::printf("%s %s\n", rnp::tests::failures() == before ? "ok  " : "FAIL", test.name);
    std::fflush(stdout);
  }
  std::printf("%d tests, %d failed checks\n", ran, rnp::tests::failures());
  return ran > 0 && rnp::tests::failures() == 0 ? 0 : 1;
}
