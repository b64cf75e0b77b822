// A vector of float32 sums whose multiply-add takes two bfloat16 of each lane, and which loads and stores bfloat16.
// Included, like microkernel_tile.h, by translation units compiled for AVX-512.
#pragma once

#include <immintrin.h>

#include "cpu/microkernel_tile.h"

namespace rnp::cpu {
namespace {

// Assembly fixes the address form of a pixel, as in kernels_avx512.cpp. `broadcast`: {1to16} or {1to8}.
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

struct Pairs512 {
  using T = __m512;
  using Mask = __mmask16;
  static constexpr int kWidth = 16;
  static constexpr bool kPairs = true, kFusedBroadcast = true, kStreams = false;

  static RNP_INLINE T zero() { return _mm512_setzero_ps(); }
  static RNP_INLINE T load(const float* p) { return _mm512_loadu_ps(p); }
  static RNP_INLINE void store(float* p, T v) { _mm512_storeu_ps(p, v); }
  static RNP_INLINE T fma(T a, T b, T c) {
    asm("vdpbf16ps %1, %2, %0" : "+v"(c) : "v"(a), "v"(b));
    return c;
  }
  static RNP_INLINE T add(T a, T b) { return _mm512_add_ps(a, b); }
  static RNP_INLINE T mul(T a, T b) { return _mm512_mul_ps(a, b); }
  static RNP_INLINE T relu(T v) { return _mm512_max_ps(_mm512_setzero_ps(), v); }  // a NaN stays
  static RNP_INLINE Mask mask(int live) {
    return static_cast<Mask>(live >= 16 ? 0xffff : (1u << (live < 0 ? 0 : live)) - 1);
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
  static RNP_INLINE T broadcast(const char* x, const ColSteps& s) {
    T out;
    const auto& line = *reinterpret_cast<const char(*)[1]>(x);
    if constexpr (c == 0) {
      asm("vbroadcastss (%1), %0" : "=v"(out) : "r"(x), "m"(line));
    } else {
      constexpr int scale = c & -c, odd = c / scale;
      asm("vbroadcastss (%1,%2,%c3), %0" : "=v"(out) : "r"(x), "r"(s.odd<odd>()), "i"(scale), "m"(line));
    }
    return out;
  }
  template <int c>
  static RNP_INLINE T fma_broadcast(const char* x, const ColSteps& s, T w, T acc) {
    RNP_DOT_BROADCAST("%{1to16%}");
  }
};

}  // namespace
}  // namespace rnp::cpu
