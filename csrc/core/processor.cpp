#include "core/processor.h"

namespace rnp {
namespace {

Processor detect() {
#if defined(__x86_64__)
  const bool intel = __builtin_cpu_is("intel");
  const bool zen4 = __builtin_cpu_is("amdfam19h");  // those of the family that have AVX-512
  return {.paired_multiply_adds = !zen4, .follows_rows = intel, .slow_past_l2 = intel, .wide_product = intel};
#else
  return {};
#endif
}

Processor& current() {
  static Processor processor = detect();
  return processor;
}

}  // namespace

const Processor& processor() { return current(); }

void set_processor(const Processor& processor) { current() = processor; }

}  // namespace rnp
