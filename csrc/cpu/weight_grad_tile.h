// The register tile of the weight's gradient, written once over a vector type V: the sums of C input channels and NV
// vectors of output channels stay in registers while the positions pass. Included by one translation unit per ISA,
// inside its flags; everything here has internal linkage.
#pragma once

#include "core/count.h"
#include "cpu/weight_grad_kernel.h"

namespace rnp::cpu {
namespace {

template <class V, int C, int NV>
void weight_grad_tile(const WeightGradArgs& a) {
  using T = typename V::T;
  T acc[C][NV];
#pragma GCC unroll 16
  for (int c = 0; c < C; ++c) {
#pragma GCC unroll 16
    for (int v = 0; v < NV; ++v) acc[c][v] = V::zero();
  }
  for (int64_t i = 0; i < a.images; ++i) {
    for (int64_t r = 0; r < a.rows; ++r) {
      const float* x = a.x + i * a.x_image_step + r * a.x_row_step;
      const float* g = a.g + i * a.g_image_step + r * a.g_row_step;
      for (int64_t n = a.cols; n > 0; --n) {
        RNP_COUNT_FMA(C * NV * V::kWidth);
        T lanes[NV];
#pragma GCC unroll 16
        for (int v = 0; v < NV; ++v) lanes[v] = V::load(g + v * V::kWidth);
#pragma GCC unroll 16
        for (int c = 0; c < C; ++c) {
          const T b = V::broadcast(x + c);
#pragma GCC unroll 16
          for (int v = 0; v < NV; ++v) acc[c][v] = V::fma(b, lanes[v], acc[c][v]);
        }
        x += a.x_col_step;
        g += kGradLanes;
      }
    }
  }
#pragma GCC unroll 16
  for (int c = 0; c < C; ++c) {
#pragma GCC unroll 16
    for (int v = 0; v < NV; ++v) {
      float* to = a.sums + c * kGradLanes + v * V::kWidth;
      V::store(to, V::add(V::load(to), acc[c][v]));
    }
  }
}

// Eight pixels of eight channels at a time; the last ones once more where the pixels are no multiple of eight.
template <class V>
void transpose_planes(const float* from, int64_t channel_stride, int64_t count, int64_t step, float* to) {
  typedef float T __attribute__((vector_size(32)));
  typedef float Unaligned __attribute__((vector_size(32), aligned(4), may_alias));
  static_assert(kGradPanel == 8);
  for (int64_t next = 0; next < count; next += 8) {
    const int64_t x = next + 8 <= count ? next : count - 8;
    T r[8], pairs[8], fours[8];
#pragma GCC unroll 8
    for (int c = 0; c < 8; ++c) r[c] = *reinterpret_cast<const Unaligned*>(from + c * channel_stride + x);
#pragma GCC unroll 8
    for (int c = 0; c < 8; c += 2) {  // pixels 0, 1, 4, 5 and 2, 3, 6, 7 of two channels
      pairs[c] = __builtin_shufflevector(r[c], r[c + 1], 0, 8, 1, 9, 4, 12, 5, 13);
      pairs[c + 1] = __builtin_shufflevector(r[c], r[c + 1], 2, 10, 3, 11, 6, 14, 7, 15);
    }
#pragma GCC unroll 8
    for (int h = 0; h < 8; h += 4) {  // pixels i and i + 4 of four channels
#pragma GCC unroll 8
      for (int i = 0; i < 2; ++i) {
        fours[h + 2 * i] = __builtin_shufflevector(pairs[h + i], pairs[h + i + 2], 0, 1, 8, 9, 4, 5, 12, 13);
        fours[h + 2 * i + 1] = __builtin_shufflevector(pairs[h + i], pairs[h + i + 2], 2, 3, 10, 11, 6, 7, 14, 15);
      }
    }
#pragma GCC unroll 8
    for (int i = 0; i < 4; ++i) {
      float* pixel = to + (x + i) * step;
      *reinterpret_cast<Unaligned*>(pixel) = __builtin_shufflevector(fours[i], fours[i + 4], 0, 1, 2, 3, 8, 9, 10, 11);
      *reinterpret_cast<Unaligned*>(pixel + 4 * step) =
          __builtin_shufflevector(fours[i], fours[i + 4], 4, 5, 6, 7, 12, 13, 14, 15);
    }
  }
}

template <class V, int C>
void add_weight_grad_channels(WeightGradKernels& k) {
  k.tile[0][C - 1] = &weight_grad_tile<V, C, 1>;
  k.tile[1][C - 1] = &weight_grad_tile<V, C, 2>;
  if constexpr (C > 1) add_weight_grad_channels<V, C - 1>(k);
}

// Both variants for 1…C input channels.
template <class V, int C>
WeightGradKernels weight_grad_kernels() {
  WeightGradKernels k = {};
  k.lanes = 2 * V::kWidth;
  k.half_lanes = V::kWidth;
  k.max_channels = C;
  add_weight_grad_channels<V, C>(k);
  if constexpr (V::kWidth >= 8) k.transpose = &transpose_planes<V>;
  return k;
}

}  // namespace
}  // namespace rnp::cpu
