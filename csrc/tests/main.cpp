// Runs every registered test, or those whose name contains the argument, or (`--part 2 24`) every 24th from the
// third on, so that processes share them. Exit status 0 only if all ran and passed.
#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <cstring>

#include "tests/check.h"

int main(int argc, char** argv) {
  const bool shared = argc > 3 && std::strcmp(argv[1], "--part") == 0;
  const int part = shared ? std::atoi(argv[2]) : 0, parts = shared ? std::max(1, std::atoi(argv[3])) : 1;
  int number = 0, ran = 0;
  for (const rnp::tests::Test& test : rnp::tests::all_tests()) {
    const bool named = argc < 2 || std::strstr(test.name, argv[1]) != nullptr;
    if (shared ? number++ % parts != part : !named) continue;
    const int before = rnp::tests::failures();
    const auto start = std::chrono::steady_clock::now();
    test.run();
    ++ran;
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
    std::printf("%s %s (%.1f s)\n", rnp::tests::failures() == before ? "ok  " : "FAIL", test.name, seconds.count());
    std::fflush(stdout);
  }
  std::printf("%d tests, %d failed checks\n", ran, rnp::tests::failures());
  return ran > 0 && rnp::tests::failures() == 0 ? 0 : 1;
}
