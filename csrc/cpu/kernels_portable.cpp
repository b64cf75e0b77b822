// Portable kernels: the compiler's 4-wide vectors, at the baseline instruction set. Up to 5 pixels x 8 channels: 10
// accumulators, 2 weights, 1 broadcast and 1 product of 16 registers.
#include "cpu/copy_pixels_tile.h"
#include "cpu/microkernel_tile.h"
#include "cpu/plane_pointwise_tile.h"
#include "cpu/pointwise_tile.h"
#include "cpu/winograd_transform.h"

namespace rnp::cpu {
namespace {

struct V128 {
  typedef float T __attribute__((vector_size(16)));
  typedef float Unaligned __attribute__((vector_size(16), aligned(4), may_alias));
  using Mask = int;  // live lanes, 0…4
  static constexpr int kWidth = 4;
  static constexpr bool kFusedBroadcast = false, kStreams = false;

  static RNP_INLINE T zero() { return T{}; }
  static RNP_INLINE T load(const float* p) { return *reinterpret_cast<const Unaligned*>(p); }
  static RNP_INLINE void store(float* p, T v) { *reinterpret_cast<Unaligned*>(p) = v; }
  static RNP_INLINE T fma(T a, T b, T c) { return c + a * b; }
  static RNP_INLINE T add(T a, T b) { return a + b; }
  static RNP_INLINE T mul(T a, T b) { return a * b; }
  static RNP_INLINE T larger(T a, T b) { return (a > b) | (a != a) ? a : b; }  // NaN wins
  static RNP_INLINE T relu(T v) { return v < zero() ? zero() : v; }            // a NaN is not below zero: it stays
  static RNP_INLINE Mask mask(int live) { return live < 0 ? 0 : (live > 4 ? 4 : live); }
  static RNP_INLINE T masked_load(const float* p, Mask m) {
    if (m == 4) return load(p);
    T out = zero();
    for (int i = 0; i < m; ++i) out[i] = p[i];
    return out;
  }
  static RNP_INLINE void masked_store(float* p, Mask m, T v) {
    if (m == 4) return store(p, v);
    for (int i = 0; i < m; ++i) p[i] = v[i];
  }

  template <int c>
  static RNP_INLINE T broadcast(const char* x, const ColSteps& s) {
    constexpr int scale = c == 0 ? 1 : (c & -c), odd = c / scale;
    const float v = *reinterpret_cast<const float*>(c == 0 ? x : x + s.odd<odd>() * scale);
    return T{v, v, v, v};
  }
};

}  // namespace

const Kernels& portable_kernels() {
  static const Kernels kernels = [] {
    Kernels k = {};
    k.widths = 2;
    k.pointwise = k.paired_pointwise = 1;
    k.max_cols = 5;
    k.sum_kernel_rows = true;
    add_columns<V128, 1, 5>(k.width[0]);
    add_columns<V128, 2, 5>(k.width[1]);
    add_pointwise<V128, 1, 5>(k.width[0]);
    add_pointwise<V128, 2, 5>(k.width[1]);
    k.copy_pixels = &copy_pixels<V128>;
    k.winograd = winograd_kernels<V128>();
    add_planes<V128, 5>(k);
    return k;
  }();
  return kernels;
}

}  // namespace rnp::cpu
