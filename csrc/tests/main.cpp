// Runs every registered test, or those whose name contains the argument, or (`--half 0`, `--half 1`) every second one,
// so that two processes share them. Exit status 0 only if all ran and passed.
#include <cstdlib>
#include <cstring>

#include "tests/check.h"

int main(int argc, char** argv) {
  const bool halves = argc > 2 && std::strcmp(argv[1], "--half") == 0;
  int number = 0, ran = 0;
  for (const rnp::tests::Test& test : rnp::tests::all_tests()) {
    if (halves ? number++ % 2 != std::atoi(argv[2]) : argc > 1 && !std::strstr(test.name, argv[1])) continue;
    const int before = rnp::tests::failures();
    test.run();
    ++ran;
    std::printf("%s %s\n", rnp::tests::failures() == before ? "ok  " : "FAIL", test.name);
    std::fflush(stdout);
  }
  std::printf("%d tests, %d failed checks\n", ran, rnp::tests::failures());
  return ran > 0 && rnp::tests::failures() == 0 ? 0 : 1;
}
