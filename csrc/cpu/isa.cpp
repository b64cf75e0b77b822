#include "cpu/isa.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(RNP_AMX)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace rnp::cpu {
namespace {

// Whether there are matrix registers that multiply bfloat16, and this process may use them. Linux makes room for their
// 8 KB in a thread's saved state only once the process has asked for it; asking again changes nothing.
bool may_use_matrices() {
#if defined(RNP_AMX)
  static const bool allowed = [] {
    if (!has_matrices()) return false;
    constexpr long kArchReqXcompPerm = 0x1023, kTileData = 18;
    return syscall(SYS_arch_prctl, kArchReqXcompPerm, kTileData) == 0;
  }();
  return allowed;
#else
  return false;
#endif
}

bool supported(Isa isa) {
#if defined(__x86_64__) || defined(_M_X64)
  // These builtins also ask the operating system whether it saves the wide registers.
  if (isa == Isa::kAvx512Amx) return supported(Isa::kAvx512Bf16) && may_use_matrices();
  if (isa == Isa::kAvx512Bf16) return supported(Isa::kAvx512) && __builtin_cpu_supports("avx512bf16");
  if (isa == Isa::kAvx512)
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("fma");
  if (isa == Isa::kAvx2)
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
#endif
  return isa == Isa::kPortable;
}

Isa choose(const std::string& name) {
  const std::vector<Isa> all = available_isas();
  if (name.empty() || name == "auto") return all.back();
  std::string names = "auto";
  for (Isa isa : all) {
    if (name == isa_name(isa)) return isa;
    names += std::string(", ") + isa_name(isa);
  }
  throw std::runtime_error("set_isa: this machine offers " + names + "; got '" + name + "'");
}

std::atomic<int> chosen{-1};

}  // namespace

bool has_matrices() {
#if defined(__x86_64__)
  unsigned a = 0, b = 0, c = 0, d = 0;
  constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & kBf16) != 0 && (d & kTile) != 0;
#else
  return false;
#endif
}

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::kAvx512Amx:
      return "avx512amx";
    case Isa::kAvx512Bf16:
      return "avx512bf16";
    case Isa::kAvx512:
      return "avx512";
    case Isa::kAvx2:
      return "avx2";
    case Isa::kPortable:
      break;
  }
  return "portable";
}

std::vector<Isa> available_isas() {
  std::vector<Isa> out;
  for (Isa isa : {Isa::kPortable, Isa::kAvx2, Isa::kAvx512, Isa::kAvx512Bf16, Isa::kAvx512Amx})
    if (supported(isa)) out.push_back(isa);
  return out;
}

Isa current_isa() {
  const int now = chosen.load(std::memory_order_relaxed);
  if (now >= 0) return static_cast<Isa>(now);
  const char* wanted = std::getenv("RNP_ISA");
  const Isa isa = choose(wanted ? wanted : "auto");
  chosen.store(static_cast<int>(isa), std::memory_order_relaxed);
  return isa;
}

void set_isa(const std::string& name) { chosen.store(static_cast<int>(choose(name)), std::memory_order_relaxed); }

}  // namespace rnp::cpu
