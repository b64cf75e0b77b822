// AVX2 + FMA kernels: up to 6 pixels x 16 channels, 12 accumulators + 2 weights + 1 broadcast of the 16 registers.
#if defined(__x86_64__)
#include <immintrin.h>

#include "cpu/copy_pixels_tile.h"
#include "cpu/microkernel_tile.h"
#include "cpu/plane_pointwise_tile.h"
#include "cpu/pointwise_tile.h"
#include "cpu/transpose_tile.h"
#include "cpu/winograd_transform.h"

namespace rnp::cpu {
namespace {

struct V256 {
  using T = __m256;
  using Mask = __m256i;
  static constexpr int kWidth = 8;
  static constexpr bool kFusedBroadcast = false, kStreams = true;

  static RNP_INLINE T zero() { return _mm256_setzero_ps(); }
  static RNP_INLINE T load(const float* p) { return _mm256_loadu_ps(p); }
  static RNP_INLINE void store(float* p, T v) { _mm256_storeu_ps(p, v); }
  static RNP_INLINE void stream(float* p, T v) { _mm256_stream_ps(p, v); }
  static RNP_INLINE T fma(T a, T b, T c) { return _mm256_fmadd_ps(a, b, c); }
  static RNP_INLINE T add(T a, T b) { return _mm256_add_ps(a, b); }
  static RNP_INLINE T mul(T a, T b) { return _mm256_mul_ps(a, b); }
  // maxps returns its second operand where either is NaN.
  static RNP_INLINE T relu(T v) { return _mm256_max_ps(_mm256_setzero_ps(), v); }
  static RNP_INLINE T larger(T a, T b) {  // NaN wins; vmaxps gives its second operand then
    return _mm256_blendv_ps(_mm256_max_ps(a, b), a, _mm256_cmp_ps(a, a, _CMP_UNORD_Q));
  }
  static RNP_INLINE Mask mask(int live) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(live), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  }
  static RNP_INLINE T masked_load(const float* p, Mask m) { return _mm256_maskload_ps(p, m); }
  // vmaskmovps stores are slow on some processors: full vectors go the plain way.
  static RNP_INLINE void masked_store(float* p, Mask m, T v) {
    if (_mm256_movemask_ps(_mm256_castsi256_ps(m)) == 0xff) return store(p, v);
    _mm256_maskstore_ps(p, m, v);
  }

  template <int c>
  static RNP_INLINE T broadcast(const char* x, const ColSteps& s) {
    if constexpr (c == 0) {
      return _mm256_broadcast_ss(reinterpret_cast<const float*>(x));
    } else {
      constexpr int scale = c & -c, odd = c / scale;
      return _mm256_broadcast_ss(reinterpret_cast<const float*>(x + s.odd<odd>() * scale));
    }
  }
};

template <int NV>
void add_tiles(TileWidth& width) {
  add_columns<V256, NV, 6>(width);
  add_pointwise<V256, NV, 6>(width);
  add_shape<V256, NV, 2, 3>(width);
  add_shape<V256, NV, 3, 2>(width);
  add_shape<V256, NV, 2, 2>(width);
}

}  // namespace

const Kernels& avx2_kernels() {
  static const Kernels kernels = [] {
    Kernels k = {};
    k.widths = 2;
    k.pointwise = k.paired_pointwise = 1;
    k.max_cols = 6;
    k.streams = true;
    add_tiles<1>(k.width[0]);
    add_tiles<2>(k.width[1]);
    k.copy_pixels = &copy_pixels<V256>;
    k.transpose = &transpose;
    k.winograd = winograd_kernels<V256>();
    add_planes<V256, 6>(k);
    return k;
  }();
  return kernels;
}

}  // namespace rnp::cpu
#endif
