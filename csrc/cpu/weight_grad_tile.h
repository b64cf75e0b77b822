// The register tile of the weight's gradient, written once over a vector type V: the sums of C input channels and NV
// vectors of output channels stay in registers while the positions pass. Included by one translation unit per ISA,
// inside its flags; everything here has internal linkage.
#pragma once

#include "core/count.h"
#include "cpu/weight_grad_kernel.h"

namespace rnp::cpu {
namespace {

// First float of vector v, where panels are `step` apart.
template <class V>
constexpr int64_t vector_at(int v, int64_t step) {
  constexpr int kPanelVectors = kGradLanes / V::kWidth;
  return v / kPanelVectors * step + v % kPanelVectors * V::kWidth;
}

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
        for (int v = 0; v < NV; ++v) lanes[v] = V::load(g + vector_at<V>(v, a.g_panel_step));
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
      float* to = a.sums + c * kGradLanes + vector_at<V>(v, a.sums_panel_step);
      V::store(to, V::add(V::load(to), acc[c][v]));
    }
  }
}

template <class V, int C, int NV>
void add_weight_grad_channels(WeightGradTiles& t) {
  t.tile[C - 1] = &weight_grad_tile<V, C, NV>;
  if constexpr (C > 1) add_weight_grad_channels<V, C - 1, NV>(t);
}

// Tiles of NV vectors by 1…C input channels.
template <class V, int C, int NV>
WeightGradTiles weight_grad_tiles() {
  WeightGradTiles t = {};
  t.lanes = NV * V::kWidth;
  t.max_channels = C;
  add_weight_grad_channels<V, C, NV>(t);
  return t;
}

}  // namespace
}  // namespace rnp::cpu
