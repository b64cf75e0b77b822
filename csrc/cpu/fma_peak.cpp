#include "cpu/fma_peak.h"

#include <bit>

// The body is inlined into one function per instruction set.
#define RNP_INLINE inline __attribute__((always_inline))

namespace rnp::cpu {
namespace {

// Enough chains to hide the latency of two units, few enough to stay in registers. The factor 1/2 and the constant 1
// keep every sum between 0 and 2.
template <typename V, int kChains>
RNP_INLINE int64_t chains(int64_t rounds) {
  V sum[kChains];
#pragma GCC unroll 32
  for (int c = 0; c < kChains; ++c) sum[c] = V{} + static_cast<float>(c) / kChains;
  V half = V{} + 0.5f, one = V{} + 1.0f;
  for (int64_t i = 0; i < rounds; ++i) {
#pragma GCC unroll 32
    for (int c = 0; c < kChains; ++c) sum[c] = sum[c] * half + one;
  }
#pragma GCC unroll 32
  for (int c = 0; c < kChains; ++c) asm volatile("" ::"m"(sum[c]));  // the sums are wanted
  return rounds * kChains * static_cast<int64_t>(sizeof(V) / sizeof(float));
}

typedef float V128 __attribute__((vector_size(16)));
int64_t portable(int64_t rounds) { return chains<V128, 12>(rounds); }

#if defined(__x86_64__)
typedef float V256 __attribute__((vector_size(32)));
typedef float V512 __attribute__((vector_size(64)));
__attribute__((target("avx2,fma"))) int64_t avx2(int64_t rounds) { return chains<V256, 12>(rounds); }
__attribute__((target("avx512f"))) int64_t avx512(int64_t rounds) { return chains<V512, 24>(rounds); }

// The words hold 1/4 and 1/4, so that a sum grows by 1/8 until rounding keeps it where it is.
__attribute__((target("avx512f"))) int64_t avx512bf16(int64_t rounds) {
  constexpr int kChains = 24;
  V512 sum[kChains];
#pragma GCC unroll 32
  for (int c = 0; c < kChains; ++c) sum[c] = V512{};
  V512 words = V512{} + std::bit_cast<float>(uint32_t{0x3e803e80});
  for (int64_t i = 0; i < rounds; ++i) {
#pragma GCC unroll 32
    for (int c = 0; c < kChains; ++c) {
      V512 next = sum[c];  // an operand in the array itself would keep the array in memory
      asm("vdpbf16ps %1, %1, %0" : "+v"(next) : "v"(words));
      sum[c] = next;
    }
  }
#pragma GCC unroll 32
  for (int c = 0; c < kChains; ++c) asm volatile("" ::"m"(sum[c]));
  return rounds * kChains * 32;
}
#endif

}  // namespace

int64_t fma_peak(Isa isa, int64_t rounds) {
#if defined(__x86_64__)
  if (isa >= Isa::kAvx512) return avx512(rounds);
  if (isa == Isa::kAvx2) return avx2(rounds);
#endif
  return portable(rounds);
}

int64_t bfloat16_peak(Isa isa, int64_t rounds) {
#if defined(__x86_64__)
  if (isa == Isa::kAvx512Bf16) return avx512bf16(rounds);
#endif
  return fma_peak(isa, rounds);
}

}  // namespace rnp::cpu
