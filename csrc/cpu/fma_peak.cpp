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

#if defined(RNP_AMX)
// Four sums of 16 x 16, each 16 words a time; a fresh configuration has cleared all registers.
int64_t avx512amx(int64_t rounds) {
  struct alignas(64) {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
  } config;
  asm volatile("ldtilecfg %0" ::"m"(config));
  for (int64_t i = 0; i < rounds; ++i)
    asm volatile(
        "tdpbf16ps %%tmm4, %%tmm6, %%tmm0\n\ttdpbf16ps %%tmm5, %%tmm6, %%tmm1\n\t"
        "tdpbf16ps %%tmm4, %%tmm7, %%tmm2\n\ttdpbf16ps %%tmm5, %%tmm7, %%tmm3" ::);
  asm volatile("tilerelease" ::);
  return rounds * 4 * 16 * 16 * 32;
}
#endif
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
#if defined(RNP_AMX)
  if (isa == Isa::kAvx512Amx) return avx512amx(rounds);
#endif
  if (isa >= Isa::kAvx512Bf16) return avx512bf16(rounds);
#endif
  return fma_peak(isa, rounds);
}

}  // namespace rnp::cpu
