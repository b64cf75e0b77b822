// A test framework of one header. TEST(name) { CHECK(condition) << "what was seen"; } registers itself; main() is in
// main.cpp.
#pragma once

#include <cstdio>
#include <exception>
#include <sstream>
#include <string>
#include <vector>

namespace rnp::tests {

struct Test {
  const char* name;
  void (*run)();
};

inline std::vector<Test>& all_tests() {
  static std::vector<Test> tests;
  return tests;
}

inline int& failures() {
  static int count = 0;
  return count;
}

struct Register {
  Register(const char* name, void (*run)()) { all_tests().push_back({name, run}); }
};

// Collects a message and reports when it goes out of scope. The first 20 failures are printed.
class Failure {
 public:
  Failure(const char* file, int line, const char* condition) {
    text_ << file << ":" << line << ": " << condition << ": ";
  }
  ~Failure() {
    if (++failures() <= 20) std::fprintf(stderr, "%s\n", text_.str().c_str());
  }
  template <typename T>
  Failure& operator<<(const T& value) {
    text_ << value;
    return *this;
  }

 private:
  std::ostringstream text_;
};

}  // namespace rnp::tests

namespace rnp::test {

// The message of the exception that f throws; empty if it throws none.
template <typename F>
std::string message_of(F&& f) {
  try {
    f();
  } catch (const std::exception& error) {
    return error.what();
  }
  return "";
}

}  // namespace rnp::test

#define TEST(name)                                                        \
  static void test_##name();                                              \
  static const rnp::tests::Register register_##name(#name, &test_##name); \
  static void test_##name()

#define CHECK(condition) \
  if (condition) {       \
  } else                 \
    rnp::tests::Failure(__FILE__, __LINE__, #condition)

#define CHECK_EQUAL(a, b) CHECK((a) == (b)) << (a) << " and " << (b)
