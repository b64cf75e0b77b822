// The choice of the instruction set.
#include "cpu/isa.h"

#include "tests/check.h"

namespace rnp::cpu {
namespace {

struct Restore {  // leaves the process as it found it
  Isa before = current_isa();
  ~Restore() { set_isa(isa_name(before)); }
};

TEST(isa_portable_is_always_there_and_first) {
  const auto isas = available_isas();
  CHECK(!isas.empty());
  CHECK(isas.front() == Isa::kPortable);
  for (size_t i = 1; i < isas.size(); ++i) CHECK(isas[i - 1] < isas[i]);
}

TEST(isa_each_can_be_forced_by_its_name) {
  const Restore restore;
  for (Isa isa : available_isas()) {
    set_isa(isa_name(isa));
    CHECK(current_isa() == isa);
  }
}

TEST(isa_auto_takes_the_best) {
  const Restore restore;
  set_isa("portable");
  set_isa("auto");
  CHECK(current_isa() == available_isas().back());
}

TEST(isa_an_unknown_name_is_refused_and_changes_nothing) {
  const Restore restore;
  set_isa("portable");
  const std::string message = test::message_of([] { set_isa("sse9"); });
  CHECK(message.find("'sse9'") != std::string::npos);
  CHECK(message.find("portable") != std::string::npos);
  CHECK(current_isa() == Isa::kPortable);
}

}  // namespace
}  // namespace rnp::cpu
