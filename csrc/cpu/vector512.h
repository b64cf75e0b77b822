// What 512-bit vectors of float32 have in common, whatever they multiply. Included, like microkernel_tile.h, by
// translation units compiled for AVX-512.
#pragma once

#include <immintrin.h>

#include "cpu/microkernel_tile.h"

namespace rnp::cpu {
namespace {

// Assembly only to fix the address form of a pixel (ColSteps): left alone, GCC 12 precomputes fourteen addresses and
// spills them. The memory operand is there for the compiler alone: it says that the instruction reads.
template <class T, int c, int kBytes>
RNP_INLINE T broadcast_at(const char* x, const ColSteps& s) {
  T out;
  const auto& line = *reinterpret_cast<const char(*)[1]>(x);
  if constexpr (c == 0) {
    asm("vbroadcastss %c2(%1), %0" : "=v"(out) : "r"(x), "i"(kBytes), "m"(line));
  } else {
    constexpr int scale = c & -c, odd = c / scale;
    asm("vbroadcastss %c4(%1,%2,%c3), %0" : "=v"(out) : "r"(x), "r"(s.odd<odd>()), "i"(scale), "i"(kBytes), "m"(line));
  }
  return out;
}

struct Vector512 {
  using T = __m512;
  using Mask = __mmask16;
  static constexpr int kWidth = 16;
  static constexpr bool kFusedBroadcast = true;

  static RNP_INLINE T zero() { return _mm512_setzero_ps(); }
  static RNP_INLINE T load(const float* p) { return _mm512_loadu_ps(p); }
  static RNP_INLINE void store(float* p, T v) { _mm512_storeu_ps(p, v); }
  static RNP_INLINE T add(T a, T b) { return _mm512_add_ps(a, b); }
  static RNP_INLINE T mul(T a, T b) { return _mm512_mul_ps(a, b); }
  // maxps returns its second operand where either is NaN: a NaN stays.
  static RNP_INLINE T relu(T v) { return _mm512_max_ps(_mm512_setzero_ps(), v); }
  static RNP_INLINE Mask mask(int live) {
    return static_cast<Mask>(live >= 16 ? 0xffff : (1u << (live < 0 ? 0 : live)) - 1);
  }
  template <int c, int kBytes = 0>
  static RNP_INLINE T broadcast(const char* x, const ColSteps& s) {
    return broadcast_at<T, c, kBytes>(x, s);
  }
};

}  // namespace
}  // namespace rnp::cpu
