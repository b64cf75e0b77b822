// AVX-512 kernels: up to 14 pixels x 32 channels, 28 accumulators + 2 weights + 1 broadcast of the 32 registers; tiles
// of 16 and of 8 channels; and wide ones, up to 6 pixels x 64 channels, 24 + 4 + 1.
#if defined(__x86_64__)
#include <immintrin.h>

// GCC 12 warns about its own _mm512_undefined_ps.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"

#include "cpu/copy_pixels_tile.h"
#include "cpu/microkernel_tile.h"
#include "cpu/plane_pointwise_tile.h"
#include "cpu/pointwise_tile.h"
#include "cpu/transpose_tile.h"
#include "cpu/vector512.h"
#include "cpu/winograd_transform.h"

namespace rnp::cpu {
namespace {

struct V512 : Vector512 {
  static constexpr bool kStreams = true;

  static RNP_INLINE void stream(float* p, T v) { _mm512_stream_ps(p, v); }
  static RNP_INLINE T fma(T a, T b, T c) { return _mm512_fmadd_ps(a, b, c); }
  static RNP_INLINE T fma_in_place(T a, T b, T c) {
    asm("vfmadd231ps %1, %2, %0" : "+v"(c) : "v"(a), "v"(b));
    return c;
  }
  static RNP_INLINE T larger(T a, T b) {  // NaN wins; vmaxps gives its second operand then
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q), _mm512_max_ps(a, b), a);
  }
  static RNP_INLINE T masked_load(const float* p, Mask m) { return _mm512_maskz_loadu_ps(m, p); }
  static RNP_INLINE void masked_store(float* p, Mask m, T v) { _mm512_mask_storeu_ps(p, m, v); }
  using Vector512::broadcast;
  static RNP_INLINE T broadcast(const char* x) { return _mm512_set1_ps(*reinterpret_cast<const float*>(x)); }
  template <int c>
  static RNP_INLINE T fma_broadcast(const char* x, const ColSteps& s, T w, T acc) {
    const auto& line = *reinterpret_cast<const char(*)[1]>(x);
    if constexpr (c == 0) {
      asm("vfmadd231ps (%1)%{1to16%}, %2, %0" : "+v"(acc) : "r"(x), "v"(w), "m"(line));
    } else {
      constexpr int scale = c & -c, odd = c / scale;
      asm("vfmadd231ps (%1,%3,%c4)%{1to16%}, %2, %0"
          : "+v"(acc)
          : "r"(x), "v"(w), "r"(s.odd<odd>()), "i"(scale), "m"(line));
    }
    return acc;
  }
  template <int kBytes>
  static RNP_INLINE T fma_broadcast_at(const char* x, T w, T acc) {
    const float& pixel = *reinterpret_cast<const float*>(x + kBytes);
    asm("vfmadd231ps %1%{1to16%}, %2, %0" : "+v"(acc) : "m"(pixel), "v"(w));
    return acc;
  }
};

// Half a vector, for the last 8 channels of a prefix: two such multiply-adds run in the time of one of 16 channels.
struct V512Half {
  using T = __m256;
  using Mask = __mmask8;
  static constexpr int kWidth = 8;
  static constexpr bool kFusedBroadcast = true, kStreams = false;

  static RNP_INLINE T zero() { return _mm256_setzero_ps(); }
  static RNP_INLINE T load(const float* p) { return _mm256_loadu_ps(p); }
  static RNP_INLINE void store(float* p, T v) { _mm256_storeu_ps(p, v); }
  static RNP_INLINE T add(T a, T b) { return _mm256_add_ps(a, b); }
  static RNP_INLINE T mul(T a, T b) { return _mm256_mul_ps(a, b); }
  static RNP_INLINE T relu(T v) { return _mm256_max_ps(_mm256_setzero_ps(), v); }
  static RNP_INLINE T larger(T a, T b) {
    return _mm256_mask_blend_ps(_mm256_cmp_ps_mask(a, a, _CMP_UNORD_Q), _mm256_max_ps(a, b), a);
  }
  static RNP_INLINE Mask mask(int live) {
    return static_cast<Mask>(live >= 8 ? 0xff : (1u << (live < 0 ? 0 : live)) - 1);
  }
  static RNP_INLINE T masked_load(const float* p, Mask m) { return _mm256_maskz_loadu_ps(m, p); }
  static RNP_INLINE void masked_store(float* p, Mask m, T v) { _mm256_mask_storeu_ps(p, m, v); }

  template <int c>
  static RNP_INLINE T fma_broadcast(const char* x, const ColSteps& s, T w, T acc) {
    const auto& line = *reinterpret_cast<const char(*)[1]>(x);
    if constexpr (c == 0) {
      asm("vfmadd231ps (%1)%{1to8%}, %2, %0" : "+v"(acc) : "r"(x), "v"(w), "m"(line));
    } else {
      constexpr int scale = c & -c, odd = c / scale;
      asm("vfmadd231ps (%1,%3,%c4)%{1to8%}, %2, %0"
          : "+v"(acc)
          : "r"(x), "v"(w), "r"(s.odd<odd>()), "i"(scale), "m"(line));
    }
    return acc;
  }
  template <int kBytes>
  static RNP_INLINE T fma_broadcast_at(const char* x, T w, T acc) {
    const float& pixel = *reinterpret_cast<const float*>(x + kBytes);
    asm("vfmadd231ps %1%{1to8%}, %2, %0" : "+v"(acc) : "m"(pixel), "v"(w));
    return acc;
  }
};

template <class V, int NV>
void add_tiles(TileWidth& width) {
  add_columns<V, NV, 14>(width);
  add_pointwise<V, NV, 14>(width);
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

const Kernels& avx512_kernels() {
  static const Kernels kernels = [] {
    Kernels k = {};
    k.widths = 3;
    // A multiply-add a vector and a broadcast of its own: as fast on Zen 4, where the 28 stores at the end of a tile of
    // 32 channels hold up the next tile (85 cycles; the 14 of this one: 5). On Emerald Rapids 0.77 of the wider tile.
    k.pointwise = 1;
    k.paired_pointwise = 2;
    k.max_cols = 14;
    k.streams = true;
    add_tiles<V512Half, 1>(k.width[0]);
    add_tiles<V512, 1>(k.width[1]);
    add_tiles<V512, 2>(k.width[2]);
    add_panels<V512Half, 1, V512, 14>(k.width[0]);
    add_panels<V512, 1, V512, 14>(k.width[1]);
    add_panels<V512, 2, V512, 14>(k.width[2]);
    k.copy_panel = &copy_panel<V512>;
    k.copy_pixels = &copy_pixels<V512>;
    k.transpose = &transpose;
    k.winograd = winograd_kernels<V512>();
    add_planes<V512, 14>(k);
    // 10 reads for 24 multiply-adds instead of 16 for 28. On Emerald Rapids, where another thread of the core takes its
    // share of reads and of what is decoded, 0.86 of the multiply-add peak instead of 0.77, with weights from L2 0.83
    // instead of 0.73 (bench/NOTES.md, "Two processors").
    k.wide_cols = 6;
    add_columns<V512, 4, 6>(k.wide);
    add_pointwise<V512, 4, 6>(k.wide);
    add_panels<V512, 4, V512, 6>(k.wide);
    return k;
  }();
  return kernels;
}

}  // namespace rnp::cpu
#endif
