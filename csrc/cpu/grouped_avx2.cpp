// AVX2 + FMA kernels of convolutions with few channels a group.
#if defined(__x86_64__)
#include <immintrin.h>

#include "cpu/grouped_tile.h"

namespace rnp::cpu {
namespace {

struct V256 {
  using T = __m256;
  using Mask = __m256i;
  static constexpr int kWidth = 8, kRegisters = 16;
  static constexpr bool kMasksAreFree = false;
  static constexpr bool kStreams = false;

  static RNP_INLINE T zero() { return _mm256_setzero_ps(); }
  static RNP_INLINE T load(const float* p) { return _mm256_loadu_ps(p); }
  static RNP_INLINE void store(float* p, T v) { _mm256_storeu_ps(p, v); }
  static RNP_INLINE T set1(float v) { return _mm256_set1_ps(v); }
  static RNP_INLINE T fma(T a, T b, T c) { return _mm256_fmadd_ps(a, b, c); }
  static RNP_INLINE T add(T a, T b) { return _mm256_add_ps(a, b); }
  static RNP_INLINE T mul(T a, T b) { return _mm256_mul_ps(a, b); }
  // maxps returns its second operand where either is NaN.
  static RNP_INLINE T relu(T v) { return _mm256_max_ps(_mm256_setzero_ps(), v); }
  static RNP_INLINE Mask mask(int live) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(live), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  }
  static RNP_INLINE Mask range(int first, int last) { return _mm256_andnot_si256(mask(first), mask(last)); }
  static RNP_INLINE T masked_load(const float* p, Mask m) { return _mm256_maskload_ps(p, m); }
  // vmaskmovps stores are slow on some processors: full vectors go the plain way.
  static RNP_INLINE void masked_store(float* p, Mask m, T v) {
    if (_mm256_movemask_ps(_mm256_castsi256_ps(m)) == 0xff) return store(p, v);
    _mm256_maskstore_ps(p, m, v);
  }
};

struct BFloat16 {
  static RNP_INLINE __m256 widen(const uint16_t* p) {
    const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
  }
  static RNP_INLINE void narrow(__m256 v, uint16_t* p) {
    const __m256i bits = _mm256_castps_si256(v), high = _mm256_srli_epi32(bits, 16);
    const __m256i odd = _mm256_and_si256(high, _mm256_set1_epi32(1));
    const __m256i up = _mm256_add_epi32(_mm256_add_epi32(bits, odd), _mm256_set1_epi32(0x7fff));
    const __m256i quiet = _mm256_or_si256(high, _mm256_set1_epi32(0x40));
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    const __m256i rounded = _mm256_blendv_epi8(_mm256_srli_epi32(up, 16), quiet, nan);
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(rounded, rounded), 0x08);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
  }
};

struct Float16 {
  static RNP_INLINE __m256 widen(const uint16_t* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static RNP_INLINE void narrow(__m256 v, uint16_t* p) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
  }
};

}  // namespace

const GroupedKernels& avx2_grouped_kernels() {
  static const GroupedKernels kernels = grouped_kernels<V256, BFloat16, Float16>();
  return kernels;
}

}  // namespace rnp::cpu
#endif
