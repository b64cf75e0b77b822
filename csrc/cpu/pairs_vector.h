// A vector of float32 sums whose multiply-add takes two bfloat16 of each lane, and which loads and stores bfloat16.
// Included, like microkernel_tile.h, by translation units compiled for AVX-512.
#pragma once

#include "cpu/vector512.h"

namespace rnp::cpu {
namespace {

// Assembly fixes the address form of a pixel, as in vector512.h. `broadcast`: {1to16} or {1to8}.
#define RNP_DOT_BROADCAST(broadcast)                                                    \
  const auto& line = *reinterpret_cast<const char(*)[1]>(x);                            \
  if constexpr (c == 0) {                                                               \
    asm("vdpbf16ps (%1)" broadcast ", %2, %0" : "+v"(acc) : "r"(x), "v"(w), "m"(line)); \
  } else {                                                                              \
    constexpr int scale = c & -c, odd = c / scale;                                      \
    asm("vdpbf16ps (%1,%3,%c4)" broadcast ", %2, %0"                                    \
        : "+v"(acc)                                                                     \
        : "r"(x), "v"(w), "r"(s.odd<odd>()), "i"(scale), "m"(line));                    \
  }                                                                                     \
  return acc

struct Pairs512 : Vector512 {
  static constexpr bool kPairs = true, kStreams = false;

  static RNP_INLINE T fma(T a, T b, T c) {
    asm("vdpbf16ps %1, %2, %0" : "+v"(c) : "v"(a), "v"(b));
    return c;
  }
  static RNP_INLINE T load_half(const float* p, Mask m) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(m, p)), 16));
  }
  static RNP_INLINE void store_half(float* p, Mask m, T v) {
    __m256i halves;
    asm("vcvtneps2bf16 %1, %0" : "=v"(halves) : "v"(v));
    _mm256_mask_storeu_epi16(p, m, halves);
  }
  template <int c>
  static RNP_INLINE T fma_broadcast(const char* x, const ColSteps& s, T w, T acc) {
    RNP_DOT_BROADCAST("%{1to16%}");
  }
};

}  // namespace
}  // namespace rnp::cpu
