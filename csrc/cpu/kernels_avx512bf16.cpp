// Kernels for processors that multiply bfloat16 (AVX512-BF16): the register tiles of kernels_avx512.cpp, in which a
// float of input and weights is a word of two neighbouring channels and a multiply-add (vdpbf16ps) adds both products
// to a float32 sum. A channels_last input needs no preparation: its channel pairs are words as they stand.
//
// vdpbf16ps takes subnormal inputs as zero and flushes subnormal results to zero; vcvtneps2bf16, which stores the
// output rounded to nearest even, takes subnormal sums as zero. Elsewhere subnormals are kept. In which order a pair's
// two products are added is the processor's affair: bits may differ from one processor model to another, never from
// call to call.
#if defined(__x86_64__)
#include <immintrin.h>

// GCC 12 warns about its own _mm512_undefined_ps.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"

#include "cpu/microkernel_tile.h"
#include "cpu/pairs_vector.h"

namespace rnp::cpu {
namespace {

struct Pairs256 {
  using T = __m256;
  using Mask = __mmask8;
  static constexpr int kWidth = 8;
  static constexpr bool kPairs = true, kFusedBroadcast = true, kStreams = false;

  static RNP_INLINE T zero() { return _mm256_setzero_ps(); }
  static RNP_INLINE T load(const float* p) { return _mm256_loadu_ps(p); }
  static RNP_INLINE void store(float* p, T v) { _mm256_storeu_ps(p, v); }
  static RNP_INLINE T add(T a, T b) { return _mm256_add_ps(a, b); }
  static RNP_INLINE T mul(T a, T b) { return _mm256_mul_ps(a, b); }
  static RNP_INLINE T relu(T v) { return _mm256_max_ps(_mm256_setzero_ps(), v); }
  static RNP_INLINE Mask mask(int live) {
    return static_cast<Mask>(live >= 8 ? 0xff : (1u << (live < 0 ? 0 : live)) - 1);
  }
  static RNP_INLINE T load_half(const float* p, Mask m) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_maskz_loadu_epi16(m, p)), 16));
  }
  static RNP_INLINE void store_half(float* p, Mask m, T v) {
    __m128i halves;
    asm("vcvtneps2bf16 %1, %0" : "=v"(halves) : "v"(v));
    _mm_mask_storeu_epi16(p, m, halves);
  }
  template <int c>
  static RNP_INLINE T fma_broadcast(const char* x, const ColSteps& s, T w, T acc) {
    RNP_DOT_BROADCAST("%{1to8%}");
  }
};

template <class V, int NV>
void add_tiles(TileWidth& width) {
  add_columns<V, NV, 14>(width);
  add_shape<V, NV, 2, 7>(width);
  add_shape<V, NV, 2, 6>(width);
  add_shape<V, NV, 2, 5>(width);
  add_shape<V, NV, 2, 4>(width);
  add_shape<V, NV, 3, 4>(width);
  add_shape<V, NV, 4, 3>(width);
  add_shape<V, NV, 2, 3>(width);
  add_shape<V, NV, 2, 2>(width);
}

}  // namespace

const Kernels& avx512bf16_kernels() {
  static const Kernels kernels = [] {
    Kernels k = {};  // no depthwise, no Winograd: those convert to float32
    k.widths = 3;
    k.pointwise = k.paired_pointwise = 1;
    k.max_cols = 14;
    add_tiles<Pairs256, 1>(k.width[0]);
    add_tiles<Pairs512, 1>(k.width[1]);
    add_tiles<Pairs512, 2>(k.width[2]);
    k.copy_pixels = avx512_kernels().copy_pixels;
    return k;
  }();
  return kernels;
}

}  // namespace rnp::cpu
#endif
