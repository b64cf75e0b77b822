// Register tiles of 1x1 kernels on contiguous NCHW: C output channels x NV vectors of pixels. Beside the other tiles
// the operands have changed places: a weight is broadcast, and lanes are neighbouring pixels of a panel.
#pragma once

#include <utility>

#include "cpu/evens.h"
#include "cpu/microkernel_tile.h"

namespace rnp::cpu {
namespace {

template <class V, int C, int NV>
struct PlaneTile {
  using T = typename V::T;
  using Plain = Tile<V, 1, C, NV>;

  static void compute(const PlaneTileArgs& a) {
    T acc[1][C][NV];
    RNP_UNROLL
    for (int c = 0; c < C; ++c) RNP_UNROLL for (int v = 0; v < NV; ++v) acc[0][c][v] = V::zero();
    if (a.last && !a.stream) {  // the lines to be written arrive while the sums are computed
      Plain::each_pixel(0, a.out_step, [&](int, int, int64_t channel) RNP_LAMBDA {
        RNP_UNROLL
        for (int v = 0; v < NV; v += 16 / V::kWidth) __builtin_prefetch(Plain::at(a.out, channel, v), 1);
      });
    }
    asm volatile("" ::: "memory");  // see Tile::compute
    const ColSteps s(a.w_step * static_cast<int64_t>(sizeof(float)));
    typename Plain::Ahead none;
    Plain::template run<0, 1, 0, C>(acc, a.w, a.x, a.count, NV * V::kWidth, 0, s, none);
    asm volatile("" ::: "memory");
    finish(acc, a);
  }

  // Of the channel: one value in all lanes.
  static RNP_INLINE T all_lanes(const float* p) {
    return V::template broadcast<0>(reinterpret_cast<const char*>(p), ColSteps(0));
  }

  static RNP_INLINE void finish(T (&acc)[1][C][NV], const PlaneTileArgs& a) {
    const auto partial = [&](int c, int v) RNP_LAMBDA { return a.partial + (c * NV + v) * V::kWidth; };
    if (!a.first) {
      RNP_UNROLL
      for (int c = 0; c < C; ++c)
        RNP_UNROLL for (int v = 0; v < NV; ++v) acc[0][c][v] = V::add(V::load(partial(c, v)), acc[0][c][v]);
    }
    if (!a.last) {
      RNP_UNROLL
      for (int c = 0; c < C; ++c) RNP_UNROLL for (int v = 0; v < NV; ++v) V::store(partial(c, v), acc[0][c][v]);
      return;
    }
    if (a.scale) {
      RNP_UNROLL
      for (int c = 0; c < C; ++c)
        RNP_UNROLL for (int v = 0; v < NV; ++v) acc[0][c][v] = V::mul(acc[0][c][v], all_lanes(a.scale + c));
    }
    if (a.bias) {
      RNP_UNROLL
      for (int c = 0; c < C; ++c)
        RNP_UNROLL for (int v = 0; v < NV; ++v) acc[0][c][v] = V::add(acc[0][c][v], all_lanes(a.bias + c));
    }
    typename V::Mask mask[NV];
    RNP_UNROLL
    for (int v = 0; v < NV; ++v) mask[v] = V::mask(a.pixels - v * V::kWidth);
    if (a.residual) {
      Plain::each_pixel(0, a.residual_step, [&](int, int c, int64_t channel) RNP_LAMBDA {
        RNP_UNROLL
        for (int v = 0; v < NV; ++v)
          acc[0][c][v] = V::add(acc[0][c][v], V::masked_load(Plain::at(a.residual, channel, v), mask[v]));
      });
    }
    if (a.relu) {
      RNP_UNROLL
      for (int c = 0; c < C; ++c) RNP_UNROLL for (int v = 0; v < NV; ++v) acc[0][c][v] = V::relu(acc[0][c][v]);
    }
    if constexpr (V::kStreams) {
      if (a.stream && a.pixels == NV * V::kWidth) {
        Plain::each_pixel(0, a.out_step, [&](int, int c, int64_t channel) RNP_LAMBDA {
          RNP_UNROLL
          for (int v = 0; v < NV; ++v) V::stream(Plain::at(a.out, channel, v), acc[0][c][v]);
        });
        return;
      }
    }
    Plain::each_pixel(0, a.out_step, [&](int, int c, int64_t channel) RNP_LAMBDA {
      RNP_UNROLL
      for (int v = 0; v < NV; ++v) V::masked_store(Plain::at(a.out, channel, v), mask[v], acc[0][c][v]);
    });
  }
};

// A run of `count` floats, whole vectors and the rest.
template <class V>
RNP_INLINE void copy_run(const float* from, int64_t count, float* to) {
  int64_t i = 0;
  for (; i + V::kWidth <= count; i += V::kWidth) V::store(to + i, V::load(from + i));
  if (i < count) V::store(to + i, V::masked_load(from + i, V::mask(static_cast<int>(count - i))));
}

// Panels of `channels` planes, [panel][channel][panel's pixels], from `pixels` neighbouring pixels of each. The last
// panel is a vector wide where that is enough; its lanes behind the last pixel hold zeros.
template <class V>
void copy_planes(const float* from, int64_t plane_step, int64_t channels, int64_t pixels, float* to) {
  constexpr int64_t kPanel = 2 * V::kWidth;
  for (int64_t c = 0; c < channels; ++c, from += plane_step) {
    for (int64_t i = 0; i < pixels; i += kPanel) {
      const int64_t left = pixels - i, width = left > V::kWidth ? kPanel : V::kWidth;
      copy_run<V>(from + i, left < width ? left : width, to + i * channels + c * width);
    }
  }
}

// Every second of neighbouring floats: `count` of them.
template <class V>
void copy_every_second(const float* from, int64_t count, float* to) {
  int64_t i = 0;
  for (; i + V::kWidth < count; i += V::kWidth) {  // not the last: the float behind it may not be there
    const auto a = V::load(from + 2 * i), b = V::load(from + 2 * i + V::kWidth);
    V::store(to + i, evens<V>(a, b, std::make_integer_sequence<int, V::kWidth>()));
  }
  for (; i < count; ++i) to[i] = from[2 * i];
}

template <class V, int C>
RNP_INLINE void add_plane_tiles(Kernels& k) {
  k.plane[0][C - 1] = &PlaneTile<V, C, 1>::compute;
  k.plane[1][C - 1] = &PlaneTile<V, C, 2>::compute;
  if constexpr (C > 1) add_plane_tiles<V, C - 1>(k);
}

template <class V, int C>
RNP_INLINE void add_planes(Kernels& k) {
  k.plane_lanes = V::kWidth;
  k.copy_planes = &copy_planes<V>;
  k.copy_every_second = &copy_every_second<V>;
  add_plane_tiles<V, C>(k);
}

}  // namespace
}  // namespace rnp::cpu
