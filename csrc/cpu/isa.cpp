#include "cpu/isa.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

namespace rnp {
namespace {

constexpr Isa kAll[] = {Isa::kPortable, Isa::kAvx2, Isa::kAvx512};
constexpr int kUnset = -1;

std::atomic<int> current{kUnset};

Isa Best() {
  Isa best = Isa::kPortable;
  for (Isa isa : kAll) {
    if (IsaSupported(isa)) best = isa;
  }
  return best;
}

std::string SupportedNames() {
  std::string names;
  for (Isa isa : SupportedIsas()) names += (names.empty() ? "" : ", ") + std::string(IsaName(isa));
  return names;
}

// `where` names who asked, for the message: "RNP_ISA" or "set_isa".
Isa Parse(const std::string& name, const char* where) {
  if (name == "auto") return Best();
  for (Isa isa : kAll) {
    if (name != IsaName(isa)) continue;
    if (!IsaSupported(isa)) {
      throw std::runtime_error(std::string(where) + ": this machine or build has no '" + name + "' (it has " +
                               SupportedNames() + ")");
    }
    return isa;
  }
  throw std::runtime_error(std::string(where) + ": unknown instruction set '" + name +
                           "', expected auto, portable, avx2 or avx512");
}

Isa Default() {
  const char* forced = std::getenv("RNP_ISA");
  return forced != nullptr && forced[0] != '\0' ? Parse(forced, "RNP_ISA") : Best();
}

}  // namespace

const char* IsaName(Isa isa) {
  switch (isa) {
    case Isa::kPortable:
      return "portable";
    case Isa::kAvx2:
      return "avx2";
    case Isa::kAvx512:
      return "avx512";
  }
  throw std::logic_error("IsaName: not an instruction set: " + std::to_string(static_cast<int>(isa)));
}

// __builtin_cpu_supports asks cpuid and, for the wide registers, xgetbv: what the operating system does not save counts
// as absent.
bool IsaSupported(Isa isa) {
  switch (isa) {
    case Isa::kPortable:
      return true;
#if defined(__x86_64__)
    case Isa::kAvx2:
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    case Isa::kAvx512:
      return IsaSupported(Isa::kAvx2) && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#else
    case Isa::kAvx2:
    case Isa::kAvx512:
      return false;
#endif
  }
  throw std::logic_error("IsaSupported: not an instruction set: " + std::to_string(static_cast<int>(isa)));
}

std::vector<Isa> SupportedIsas() {
  std::vector<Isa> supported;
  for (Isa isa : kAll) {
    if (IsaSupported(isa)) supported.push_back(isa);
  }
  return supported;
}

// Two threads that meet here first both store the same value.
Isa CurrentIsa() {
  int isa = current.load(std::memory_order_relaxed);
  if (isa == kUnset) {
    isa = static_cast<int>(Default());
    current.store(isa, std::memory_order_relaxed);
  }
  return static_cast<Isa>(isa);
}

void SetIsa(const std::string& name) {
  const Isa isa = name == "auto" ? Default() : Parse(name, "set_isa");
  current.store(static_cast<int>(isa), std::memory_order_relaxed);
}

std::vector<CpuFeature> CpuFeatures() {
#if defined(__x86_64__)
#define RNP_FEATURE(name) {name, static_cast<bool>(__builtin_cpu_supports(name))}
  return {RNP_FEATURE("sse4.2"),   RNP_FEATURE("avx"),        RNP_FEATURE("avx2"),      RNP_FEATURE("fma"),
          RNP_FEATURE("f16c"),     RNP_FEATURE("avx512f"),    RNP_FEATURE("avx512bw"),  RNP_FEATURE("avx512dq"),
          RNP_FEATURE("avx512vl"), RNP_FEATURE("avx512vnni"), RNP_FEATURE("avx512bf16")};
#undef RNP_FEATURE
#else
  return {};
#endif
}

}  // namespace rnp
