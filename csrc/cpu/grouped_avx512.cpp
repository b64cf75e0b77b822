// AVX-512 kernels of convolutions with few channels a group.
#if defined(__x86_64__)
#include <immintrin.h>

// GCC 12 warns about its own _mm512_undefined_ps.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"

#include "cpu/grouped_tile.h"

namespace rnp::cpu {
namespace {

struct V512 {
  using T = __m512;
  using Mask = __mmask16;
  static constexpr int kWidth = 16, kRegisters = 32;
  static constexpr bool kMasksAreFree = true;
  static constexpr bool kStreams = true;

  static RNP_INLINE T zero() { return _mm512_setzero_ps(); }
  static RNP_INLINE T load(const float* p) { return _mm512_loadu_ps(p); }
  static RNP_INLINE void store(float* p, T v) { _mm512_storeu_ps(p, v); }
  static RNP_INLINE void stream(float* p, T v) { _mm512_stream_ps(p, v); }
  static RNP_INLINE T set1(float v) { return _mm512_set1_ps(v); }
  static RNP_INLINE T fma(T a, T b, T c) { return _mm512_fmadd_ps(a, b, c); }
  static RNP_INLINE T add(T a, T b) { return _mm512_add_ps(a, b); }
  static RNP_INLINE T mul(T a, T b) { return _mm512_mul_ps(a, b); }
  // maxps returns its second operand where either is NaN.
  static RNP_INLINE T relu(T v) { return _mm512_max_ps(_mm512_setzero_ps(), v); }
  static RNP_INLINE Mask mask(int live) {
    return static_cast<Mask>(live >= 16 ? 0xffff : (1u << (live < 0 ? 0 : live)) - 1);
  }
  static RNP_INLINE Mask range(int first, int last) { return static_cast<Mask>(mask(last) & ~mask(first)); }
  static RNP_INLINE T masked_load(const float* p, Mask m) { return _mm512_maskz_loadu_ps(m, p); }
  static RNP_INLINE void masked_store(float* p, Mask m, T v) { _mm512_mask_storeu_ps(p, m, v); }
};

struct BFloat16 {
  static RNP_INLINE __m512 widen(const uint16_t* p) {
    const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
  }
  static RNP_INLINE void narrow(__m512 v, uint16_t* p) {
    const __m512i bits = _mm512_castps_si512(v), high = _mm512_srli_epi32(bits, 16);
    const __m512i odd = _mm512_and_si512(high, _mm512_set1_epi32(1));
    const __m512i up = _mm512_add_epi32(_mm512_add_epi32(bits, odd), _mm512_set1_epi32(0x7fff));
    const __m512i quiet = _mm512_or_si512(high, _mm512_set1_epi32(0x40));
    const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    const __m512i rounded = _mm512_mask_mov_epi32(_mm512_srli_epi32(up, 16), nan, quiet);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(rounded));
  }
};

struct Float16 {
  static RNP_INLINE __m512 widen(const uint16_t* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static RNP_INLINE void narrow(__m512 v, uint16_t* p) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
  }
};

}  // namespace

const GroupedKernels& avx512_grouped_kernels() {
  static const GroupedKernels kernels = grouped_kernels<V512, BFloat16, Float16>();
  return kernels;
}

}  // namespace rnp::cpu
#endif
