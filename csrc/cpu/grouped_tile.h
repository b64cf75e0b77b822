// Convolution with few channels a group, written once over a vector type V; included by one translation unit per ISA.
// Two forms: lanes are channels (channels_last), or lanes are positions of a padded plane (contiguous NCHW).
//
// Either way an output element is one chain of multiply-adds in the order (kernel row, kernel column, input channel);
// where a group is wider than a vector, (kernel row, vector of inputs, kernel column, input channel).
#pragma once

#include <utility>

#include "core/count.h"
#include "cpu/evens.h"
#include "cpu/grouped_kernels.h"

#define RNP_INLINE inline __attribute__((always_inline))
#define RNP_UNROLL _Pragma("GCC unroll 32")

namespace rnp::cpu {
namespace {

// ---- Lanes are channels --------------------

// Lane l takes element l / OG * IG + g: the g-th input of its group.
template <class V, int IG, int OG, int g, int... l>
RNP_INLINE typename V::T of_group(typename V::T x, std::integer_sequence<int, l...>) {
  return __builtin_shufflevector(x, x, (l / OG * IG + g)...);
}

template <class V, int K, int S, int IG, int OG>
struct LaneRow {
  using T = typename V::T;
  static constexpr int kWidth = V::kWidth;
  static constexpr int kColumns = 8;                              // of a tile, at most
  static constexpr int kVectors = OG > kWidth ? OG / kWidth : 1;  // of input that a vector of outputs reads
  static constexpr int kInputs = IG / kVectors;                   // of each group and vector

  // Whether the weights of a kernel row fit in registers beside C sums; else they are read for each column.
  // Permutations across halves of a vector need registers of their own.
  template <int C>
  static constexpr bool kKept = OG <= 4 && K * kInputs + C + (OG > 1 ? 3 : 2) <= V::kRegisters;
  static constexpr int kBlock = 16;  // lanes of the packed weights
  static constexpr int kLine = 64 / sizeof(float);

  template <int C>
  using Weights = T[kKept<C> ? K * kInputs : 1];  // of a kernel row, where they are kept

  template <int C, int k, int g>
  static RNP_INLINE T weight(const Weights<C>& kept, const float* w) {
    if constexpr (kKept<C>) return kept[k * kInputs + g];
    return V::load(w + (k * IG + g) * kBlock);
  }

  // Taps of input column j: x meets kernel column k in output column (j - k) / S.
  template <int C, int j, int g, int k>
  static RNP_INLINE void taps(T (&acc)[C], T x, const Weights<C>& kept, const float* w) {
    if constexpr (k < K) {
      if constexpr ((j - k) % S == 0 && j >= k && (j - k) / S < C) {
        RNP_COUNT_FMA(kWidth);
        acc[(j - k) / S] = V::fma(x, weight<C, k, g>(kept, w), acc[(j - k) / S]);
      }
      taps<C, j, g, k + 1>(acc, x, kept, w);
    }
  }

  template <int C, int j, int g>
  static RNP_INLINE void inputs(T (&acc)[C], T x, const Weights<C>& kept, const float* w) {
    if constexpr (g < kInputs) {
      T one = x;
      if constexpr (OG > 1) one = of_group<V, kInputs, OG / kVectors, g>(x, std::make_integer_sequence<int, kWidth>());
      taps<C, j, g, 0>(acc, one, kept, w);
      inputs<C, j, g + 1>(acc, x, kept, w);
    }
  }

  // Input columns of a tile; bit j of `inside` says that column j is one of the image.
  template <int C>
  static constexpr int kSpan = (C - 1) * S + K;

  template <int C, int j, bool kEdge, bool kFull>
  static RNP_INLINE void columns(T (&acc)[C], const float* x, int64_t x_col_step, uint32_t inside,
                                 const Weights<C>& kept, const float* w, typename V::Mask in) {
    if constexpr (j < kSpan<C>) {
      if (!kEdge || (inside & (1u << j))) {
        if constexpr (!kKept<C>) asm volatile("" ::: "memory");  // kept all the same, they would be spilled
        inputs<C, j, 0>(acc, kFull ? V::load(x) : V::masked_load(x, in), kept, w);
      }
      x += x_col_step;
      asm("" : "+r"(x));  // one address that moves on: multiples of the step, each in a register, would spill others
      columns<C, j + 1, kEdge, kFull>(acc, x, x_col_step, inside, kept, w, in);
    }
  }

  template <int C, bool kEdge, bool kFull>
  static __attribute__((noinline)) void tile(const LaneRowArgs& a, int64_t first) {
    T acc[C];
    RNP_UNROLL
    for (int c = 0; c < C; ++c) acc[c] = V::zero();
    const int64_t col = first * S - a.pad_left, x_col_step = a.x_col_step;
    uint32_t inside = 0;
    if constexpr (kEdge) {
      const auto bits = [](int64_t n) { return n <= 0 ? 0u : (1u << (n < kSpan<C> ? n : kSpan<C>)) - 1; };
      inside = bits(a.width - col) & ~bits(-col);
    }
    typename V::Mask in[kVectors];
    RNP_UNROLL
    for (int v = 0; v < kVectors; ++v) in[v] = V::mask(a.in_live - v * kWidth);
    const float* x = a.x + col * x_col_step;
    const float* w = a.w;
    for (int64_t r = a.in_live > 0 ? a.rows : 0; r > 0; --r, x += a.x_row_step, w += K * IG * kBlock) {
      RNP_UNROLL
      for (int v = 0; v < kVectors; ++v) {
        const float* weights = w + v * kInputs * kBlock;
        Weights<C> kept;
        if constexpr (kKept<C>) {
          RNP_UNROLL
          for (int k = 0; k < K; ++k)
            RNP_UNROLL for (int g = 0; g < kInputs; ++g) kept[k * kInputs + g] =
                V::load(weights + (k * IG + g) * kBlock);
        }
        columns<C, 0, kEdge, kFull>(acc, x + v * kWidth, x_col_step, inside, kept, weights, in[v]);
      }
    }
    finish<C, kFull>(acc, a, first);
  }

  template <int C, bool kFull>
  static RNP_INLINE void finish(T (&acc)[C], const LaneRowArgs& a, int64_t first) {
    const auto out = V::mask(a.out_live);
    const auto load = [&](const float* p) { return kFull ? V::load(p) : V::masked_load(p, out); };
    if (a.scale) {
      const T scale = load(a.scale);
      RNP_UNROLL
      for (int c = 0; c < C; ++c) acc[c] = V::mul(acc[c], scale);
    }
    if (a.bias) {
      const T bias = load(a.bias);
      RNP_UNROLL
      for (int c = 0; c < C; ++c) acc[c] = V::add(acc[c], bias);
    }
    if (a.residual) {
      const float* residual = a.residual + first * a.residual_col_step;
      RNP_UNROLL
      for (int c = 0; c < C; ++c, residual += a.residual_col_step) acc[c] = V::add(acc[c], load(residual));
    }
    if (a.relu) {
      RNP_UNROLL
      for (int c = 0; c < C; ++c) acc[c] = V::relu(acc[c]);
    }
    float* to = a.out + first * a.out_col_step;
    if constexpr (V::kStreams) {
      if (a.stream && a.out_live >= kWidth) {
        RNP_UNROLL
        for (int c = 0; c < C; ++c, to += a.out_col_step) V::stream(to, acc[c]);
        return;
      }
    }
    RNP_UNROLL
    for (int c = 0; c < C; ++c, to += a.out_col_step) kFull ? V::store(to, acc[c]) : V::masked_store(to, out, acc[c]);
  }

  // Tiles exist for these numbers of columns: each twice or thrice, at the cost of a build's time and the library's
  // size.
  static constexpr int narrower(int columns) { return columns == 8 ? 7 : columns == 7 ? 4 : columns / 2; }

  // Returns how many columns it did: at most `count`.
  template <int C>
  static RNP_INLINE int64_t run(const LaneRowArgs& a, int64_t first, int64_t count) {
    if constexpr (C > 1) {
      if (count < C) return run<narrower(C)>(a, first, count);
    }
    const int64_t left = first * S - a.pad_left;
    if (left < 0 || left + kSpan<C> > a.width) {
      tile<C, true, false>(a, first);
    } else if (!V::kMasksAreFree && a.in_live >= kWidth * kVectors && a.out_live >= kWidth) {
      tile<C, false, !V::kMasksAreFree>(a, first);
    } else {
      tile<C, false, false>(a, first);
    }
    return C;
  }

  // Asks for what lies below a tile of `count` columns: its share of the rows ahead, for the vectors that read a cache
  // line from its start. Inline: GCC 12 takes a function that does nothing but prefetch for one without effect, and
  // drops the call.
  static RNP_INLINE void look_ahead(const LaneRowArgs& a, int64_t input, int64_t first, int64_t count) {
    if (a.ahead_rows == 0 || input % kLine != 0 || input >= a.in_live) return;
    const int64_t end = (first + count) * S < a.width ? (first + count) * S : a.width;
    for (int64_t r = 0; r < a.ahead_rows; ++r)
      for (int64_t col = first * S; col < end; ++col)
        __builtin_prefetch(a.ahead + r * a.ahead_row_step + col * a.x_col_step + input);
  }

  static void row(const LaneRowArgs& all) {
    for (int64_t first = 0; first < all.cols;) {
      const int64_t left = all.cols - first, tiles = (left + kColumns - 1) / kColumns;
      const int64_t count = (left + tiles - 1) / tiles;  // tiles of nearly equal width, or somewhat narrower
      if (all.channels <= kWidth) {
        look_ahead(all, 0, first, count);
        first += run<kColumns>(all, first, count);
        continue;
      }
      LaneRowArgs a = all;
      int64_t done = 0;
      for (int64_t c = all.channel; c < all.channel + all.channels; c += kWidth) {
        const int64_t input = c / OG * IG - all.channel / OG * IG, output = c - all.channel;
        a.x = all.x + input;
        a.w = all.w + output / kBlock * all.w_block + output % kBlock;
        a.out = all.out + output;
        a.residual = all.residual ? all.residual + output : nullptr;
        a.scale = all.scale ? all.scale + output : nullptr;
        a.bias = all.bias ? all.bias + output : nullptr;
        a.in_live = all.in_live - static_cast<int>(input);
        a.out_live = static_cast<int>(all.channels - output);
        look_ahead(all, input, first, count);
        done = run<kColumns>(a, first, count);
      }
      first += done;
    }
  }
};

// ---- Lanes are positions --------------------

template <class V, int NV, int OC>
RNP_INLINE void plane_tile(const PlaneArgs& a, int64_t at) {
  using T = typename V::T;
  T acc[OC][NV];
  RNP_UNROLL
  for (int o = 0; o < OC; ++o) RNP_UNROLL for (int v = 0; v < NV; ++v) acc[o][v] = V::zero();
  const float* w = a.w;
  for (int64_t t = 0; t < a.taps; ++t, w += OC) {
    const float* x = a.x + a.offset[t] + at;
    RNP_COUNT_FMA(OC * NV * V::kWidth);
    if constexpr (OC == 1) {
      const T weight = V::set1(*w);
      RNP_UNROLL
      for (int v = 0; v < NV; ++v) acc[0][v] = V::fma(V::load(x + v * V::kWidth), weight, acc[0][v]);
    } else {
      T values[NV];
      RNP_UNROLL
      for (int v = 0; v < NV; ++v) values[v] = V::load(x + v * V::kWidth);
      RNP_UNROLL
      for (int o = 0; o < OC; ++o) {
        const T weight = V::set1(w[o]);
        RNP_UNROLL
        for (int v = 0; v < NV; ++v) acc[o][v] = V::fma(values[v], weight, acc[o][v]);
      }
    }
  }
  RNP_UNROLL
  for (int o = 0; o < OC; ++o)
    RNP_UNROLL for (int v = 0; v < NV; ++v) V::store(a.sums + o * a.sums_step + at + v * V::kWidth, acc[o][v]);
}

template <class V, int NV, int OC>
RNP_INLINE void plane_tiles(const PlaneArgs& a, int64_t at) {
  for (; a.length - at > (NV - 1) * V::kWidth; at += NV * V::kWidth) plane_tile<V, NV, OC>(a, at);
  if constexpr (NV > 1) plane_tiles<V, NV / 2, OC>(a, at);
}

template <class V>
void planes(const PlaneArgs& a) {
  constexpr bool kMany = V::kRegisters >= 32;
  if (a.outputs == 4) return plane_tiles<V, kMany ? 4 : 2, 4>(a, 0);
  if (a.outputs == 2) return plane_tiles<V, kMany ? 8 : 4, 2>(a, 0);
  plane_tiles<V, 8, 1>(a, 0);
}

// to[x] = from[x * S], x < pitch, where x * S lies in [begin, end), else 0. Writes whole vectors.
template <class V, int S>
RNP_INLINE void plane_row(const float* from, int64_t begin, int64_t end, int64_t pitch, float* to) {
  const auto load = [&](int64_t at) {
    const int64_t first = begin - at, last = end - at;
    if (first <= 0 && last >= V::kWidth) return V::load(from + at);
    return V::masked_load(from + at, V::range(static_cast<int>(first < 0           ? 0
                                                               : first > V::kWidth ? V::kWidth
                                                                                   : first),
                                              static_cast<int>(last < 0           ? 0
                                                               : last > V::kWidth ? V::kWidth
                                                                                  : last)));
  };
  for (int64_t x = 0; x < pitch; x += V::kWidth) {
    if constexpr (S == 1) {
      V::store(to + x, load(x));
    } else {
      V::store(to + x, evens<V>(load(2 * x), load(2 * x + V::kWidth), std::make_integer_sequence<int, V::kWidth>()));
    }
  }
}

// All planes of one input channel. Rows are written in the order of memory: whole vectors spill over into the next.
template <class V>
RNP_INLINE void channel_planes(const PlaneBandArgs& a, const float* input, float* to) {
  for (int64_t v = 0; v < a.row_phases; ++v)
    for (int64_t h = 0; h < a.col_phases; ++h) {
      const int64_t x0 = a.col_phase[h] - a.pad_left;  // the image is [-x0, width - x0) seen from there
      for (int64_t r = 0; r < a.plane_rows; ++r, to += a.pitch) {
        const int64_t y = a.first_row + r * a.stride_h + a.row_phase[v];
        if (y < 0 || y >= a.height) {
          for (int64_t x = 0; x < a.pitch; x += V::kWidth) V::store(to + x, V::zero());
        } else {
          const float* from = input + y * a.x_row_step + x0;
          if (a.stride_w == 1) {
            plane_row<V, 1>(from, -x0, a.width - x0, a.pitch, to);
          } else {
            plane_row<V, 2>(from, -x0, a.width - x0, a.pitch, to);
          }
        }
      }
    }
}

template <class V>
RNP_INLINE void finish_plane(const PlaneBandArgs& a, int64_t channel, const float* sums) {
  using T = typename V::T;
  const T scale = V::set1(a.scale ? a.scale[channel] : 1.0f), bias = V::set1(a.bias ? a.bias[channel] : 0.0f);
  float* out = a.out + channel * a.out_channel_step;
  const float* residual = a.residual ? a.residual + channel * a.residual_channel_step : nullptr;
  for (int64_t r = 0; r < a.rows; ++r, sums += a.pitch, out += a.out_row_step) {
    for (int64_t x = 0; x < a.cols; x += V::kWidth) {
      const auto mask = V::mask(static_cast<int>(a.cols - x < V::kWidth ? a.cols - x : V::kWidth));
      T v = V::load(sums + x);
      if (a.scale) v = V::mul(v, scale);
      if (a.bias) v = V::add(v, bias);
      if (residual) v = V::add(v, V::masked_load(residual + r * a.residual_row_step + x, mask));
      if (a.relu) v = V::relu(v);
      V::masked_store(out + x, mask, v);
    }
  }
}

template <class V>
void plane_band(const PlaneBandArgs& a) {
  for (int64_t g = 0; g < a.groups; ++g) {
    const int64_t inputs = a.in_live - g * a.icg < a.icg ? a.in_live - g * a.icg : a.icg;
    const int64_t outputs = a.out_live - g * a.ocg < a.ocg ? a.out_live - g * a.ocg : a.ocg;
    if (outputs <= 0) return;
    const int64_t used = inputs < 0 ? 0 : inputs;
    float* to = a.planes;
    for (int64_t ic = 0; ic < used; ++ic, to += a.channel_floats)
      channel_planes<V>(a, a.x + (g * a.icg + ic) * a.x_channel_step, to);
    PlaneArgs p = {};
    p.x = a.planes;
    p.offset = a.offset;
    p.taps = a.area * used;
    p.w = a.weights;
    p.length = a.length;
    p.sums = a.sums;
    p.sums_step = a.sums_step;
    if (used < a.icg) p.offset = a.partial_offset;
    for (int64_t o = 0; o < outputs; o += p.outputs) {
      p.outputs = outputs - o >= 4 ? 4 : outputs - o >= 2 ? 2 : 1;
      float* w = a.weights;
      const float* filter[4];
      int64_t step[4];
      for (int64_t i = 0; i < p.outputs; ++i) {
        const int64_t c = a.w_first + g * a.ocg + o + i;
        filter[i] = a.w + c / a.w_lanes * a.w_block + c % a.w_lanes;
        step[i] = c < a.w_narrow ? a.w_lanes : 16;
      }
      for (int64_t t = 0; t < a.area; ++t)
        for (int64_t ic = 0; ic < used; ++ic)
          for (int64_t i = 0; i < p.outputs; ++i) *w++ = filter[i][(t * a.icg + ic) * step[i]];
      planes<V>(p);
      for (int64_t i = 0; i < p.outputs; ++i) finish_plane<V>(a, g * a.ocg + o + i, a.sums + i * a.sums_step);
    }
  }
}

// ---- 16 bits --------------------

// H has a vector's worth of V::kWidth conversions.
template <class V, class H>
void widen(const uint16_t* from, int64_t count, float* to) {
  int64_t i = 0;
  for (; i + V::kWidth <= count; i += V::kWidth) V::store(to + i, H::widen(from + i));
  if (i == count) return;
  uint16_t rest[V::kWidth] = {};
  for (int64_t k = i; k < count; ++k) rest[k - i] = from[k];
  V::masked_store(to + i, V::mask(static_cast<int>(count - i)), H::widen(rest));
}

template <class V, class H>
void narrow(const float* from, int64_t count, uint16_t* to) {
  int64_t i = 0;
  for (; i + V::kWidth <= count; i += V::kWidth) H::narrow(V::load(from + i), to + i);
  if (i == count) return;
  uint16_t rest[V::kWidth];
  H::narrow(V::masked_load(from + i, V::mask(static_cast<int>(count - i))), rest);
  for (int64_t k = i; k < count; ++k) to[k] = rest[k - i];
}

// ---- All of them --------------------

template <class V, int K, int S>
RNP_INLINE void add_groups(LaneRowKernel (&to)[kLaneGroups]) {
  to[0] = &LaneRow<V, K, S, 1, 1>::row;
  if constexpr (K == 3) {
    to[1] = &LaneRow<V, K, S, 2, 2>::row;
    to[2] = &LaneRow<V, K, S, 4, 4>::row;
    to[3] = &LaneRow<V, K, S, 8, 8>::row;
    to[4] = &LaneRow<V, K, S, 1, 2>::row;
  }
}

template <class V, class BFloat16, class Float16>
GroupedKernels grouped_kernels() {
  GroupedKernels k = {};
  k.lanes = V::kWidth;
  k.streams = V::kStreams;
  add_groups<V, 3, 1>(k.lane_row[0][0]);
  add_groups<V, 3, 2>(k.lane_row[0][1]);
  add_groups<V, 5, 1>(k.lane_row[1][0]);
  add_groups<V, 5, 2>(k.lane_row[1][1]);
  add_groups<V, 7, 1>(k.lane_row[2][0]);
  k.planes = &planes<V>;
  k.plane_band = &plane_band<V>;
  k.bfloat16 = {&widen<V, BFloat16>, &narrow<V, BFloat16>};
  k.float16 = {&widen<V, Float16>, &narrow<V, Float16>};
  return k;
}

}  // namespace
}  // namespace rnp::cpu
