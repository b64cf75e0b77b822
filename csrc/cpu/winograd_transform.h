// Winograd's transforms, written once over a vector type V of microkernel_tile.h's kind. Included by one translation
// unit per ISA, inside its flags; everything here has internal linkage.
//
// The lanes of a vector are channels, so no step mixes them. Sums and products are spelled as V::fma, V::add and V::mul
// where rounding counts: one channel of one tile is the same operations whatever tile, sample or batch it is in.
#pragma once

#include "core/winograd.h"
#include "cpu/microkernel_tile.h"
#include "cpu/winograd_filter.h"
#include "cpu/winograd_kernels.h"

namespace rnp::cpu {
namespace {

template <class V>
RNP_INLINE typename V::T splat(double x) {
  return static_cast<float>(x) - typename V::T{};
}

template <class V, int kTile, int kTaps>
struct Winograd {
  using T = typename V::T;
  using P = WinogradPoints<kTaps>;
  static constexpr int kEdge = kTile + kTaps - 1, kWidth = V::kWidth;

  static RNP_INLINE T sub(T a, T b) { return a - b; }
  static RNP_INLINE T fma(double a, T b, T c) { return V::fma(splat<V>(a), b, c); }

  // B^T d
  static RNP_INLINE void input(const T (&d)[kEdge], T (&t)[kEdge]) {
    if constexpr (kTile == 2) {
      t[0] = sub(d[0], d[2]);
      t[1] = V::add(d[1], d[2]);
      t[2] = sub(d[2], d[1]);
      t[3] = sub(d[1], d[3]);
    } else if constexpr (kTaps == 4) {
      T e[kEdge - 1];  // (x - 1) d; the rest is as for the other points
      RNP_UNROLL
      for (int i = 0; i < kEdge - 1; ++i) e[i] = sub(d[i + 1], d[i]);
      const T u = fma(-P::q, e[2], e[4]), v = fma(-P::q, e[1], e[3]);
      const T w = fma(-P::p, e[2], e[4]), z = fma(-P::p, e[1], e[3]);
      t[0] = fma(-(P::p + P::q), e[2], V::add(e[0], e[4]));
      t[1] = fma(P::a, v, u);
      t[2] = fma(-P::a, v, u);
      t[3] = fma(P::b, z, w);
      t[4] = fma(-P::b, z, w);
      t[5] = fma(-(P::p + P::q), d[3], V::add(d[1], d[5]));
      t[6] = fma(-(P::p + P::q), e[3], V::add(e[1], e[5]));
    } else {
      const T u = fma(-P::q, d[2], d[4]), v = fma(-P::q, d[1], d[3]);
      const T w = fma(-P::p, d[2], d[4]), z = fma(-P::p, d[1], d[3]);
      t[0] = fma(-(P::p + P::q), d[2], V::add(d[0], d[4]));
      t[1] = fma(P::a, v, u);
      t[2] = fma(-P::a, v, u);
      t[3] = fma(P::b, z, w);
      t[4] = fma(-P::b, z, w);
      t[5] = fma(-(P::p + P::q), d[3], V::add(d[1], d[5]));
    }
  }

  // A^T m
  static RNP_INLINE void output(const T (&m)[kEdge], T (&y)[kTile]) {
    if constexpr (kTile == 2) {
      y[0] = V::add(V::add(m[0], m[1]), m[2]);
      y[1] = sub(sub(m[1], m[2]), m[3]);
    } else {
      const T s1 = V::add(m[1], m[2]), d1 = sub(m[1], m[2]), s2 = V::add(m[3], m[4]), d2 = sub(m[3], m[4]);
      if constexpr (kTaps == 4) {  // m[5] belongs to the point 1
        y[0] = V::add(V::add(m[0], m[5]), V::add(s1, s2));
        y[1] = fma(P::b, d2, fma(P::a, d1, m[5]));
        y[2] = fma(P::q, s2, fma(P::p, s1, m[5]));
        y[3] = fma(P::b * P::q, d2, fma(P::a * P::p, d1, V::add(m[5], m[6])));
      } else {
        y[0] = V::add(V::add(m[0], s1), s2);
        y[1] = fma(P::b, d2, V::mul(splat<V>(P::a), d1));
        y[2] = fma(P::q, s2, V::mul(splat<V>(P::p), s1));
        y[3] = fma(P::b * P::q, d2, fma(P::a * P::p, d1, m[5]));
      }
    }
  }

  template <bool kFull>
  static RNP_INLINE void input_vector(const float* const* pixels, int64_t c, typename V::Mask mask, float* v,
                                      int64_t point_step) {
    T half[kEdge][kEdge];
    RNP_UNROLL
    for (int x = 0; x < kEdge; ++x) {
      T d[kEdge], t[kEdge];
      RNP_UNROLL
      for (int y = 0; y < kEdge; ++y) {
        const float* from = pixels[y * kEdge + x] + c;
        d[y] = kFull ? V::load(from) : V::masked_load(from, mask);
      }
      input(d, t);
      RNP_UNROLL
      for (int y = 0; y < kEdge; ++y) half[y][x] = t[y];
    }
    RNP_UNROLL
    for (int y = 0; y < kEdge; ++y) {
      T t[kEdge];
      input(half[y], t);
      RNP_UNROLL
      for (int x = 0; x < kEdge; ++x) V::store(v + (y * kEdge + x) * point_step, t[x]);
    }
  }

  // The pixels of a tile that its left neighbour has not read: 36 runs of cache lines, which no hardware prefetcher
  // follows. Folded pixels are in the caches, having just been written there.
  static RNP_INLINE void fetch(const float* const* pixels, int64_t c) {
    RNP_UNROLL
    for (int y = 0; y < kEdge; ++y) RNP_UNROLL
    for (int x = 2; x < kEdge; ++x) __builtin_prefetch(pixels[y * kEdge + x] + c);
  }

  static void transform_input(const WinogradInputArgs& a) {
    const int64_t whole = a.channels / kWidth * kWidth;
    const typename V::Mask mask = V::mask(static_cast<int>(a.channels - whole));
    for (int64_t t = 0; t < a.tiles; ++t) {
      const float* const* pixels = a.pixels + t * kEdge * kEdge;
      const float* const* next = t + 1 < a.tiles ? pixels + kEdge * kEdge : pixels;
      float* v = a.v + t * a.tile_step;
      for (int64_t c = 0; c < whole; c += kWidth) {
        if (kTaps == 3 && c % 16 == 0) fetch(next, c);
        input_vector<true>(pixels, c, mask, v + c, a.point_step);
      }
      if (whole < a.channels) input_vector<false>(pixels, whole, mask, v + whole, a.point_step);
    }
  }

  // A^T m of the columns of a tile.
  static RNP_INLINE void output_columns(const WinogradOutputArgs& a, const float* m, T (&half)[kTile][kEdge]) {
    RNP_UNROLL
    for (int x = 0; x < kEdge; ++x) {
      T d[kEdge], y[kTile];
      RNP_UNROLL
      for (int i = 0; i < kEdge; ++i) d[i] = V::load(m + (i * kEdge + x) * a.point_step);
      output(d, y);
      RNP_UNROLL
      for (int i = 0; i < kTile; ++i) half[i][x] = y[i];
    }
  }

  // The maxima of 2 x 2 outputs. The activation is monotone, so the largest is activated instead of all four, unless
  // their sum is wanted: it is taken in the order of output_vector, and has its bits.
  template <bool kStream, bool kSum>
  static RNP_INLINE void pooled_vector(const WinogradOutputArgs& a, const WinogradTile& tile, const float* m, int64_t c,
                                       typename V::Mask mask) {
    T half[kTile][kEdge];
    output_columns(a, m, half);
    const T scale = tile.scale ? V::masked_load(tile.scale + c, mask) : V::zero();
    const T bias = tile.bias ? V::masked_load(tile.bias + c, mask) : V::zero();
    [[maybe_unused]] T sum = V::zero();
    RNP_UNROLL
    for (int i = 0; i < kTile; i += 2) {
      if (i >= tile.rows) break;
      T y[2][kTile];
      RNP_UNROLL
      for (int k = 0; k < 2; ++k) {
        output(half[i + k], y[k]);
        RNP_UNROLL
        for (int j = 0; j < kTile; ++j) {
          if (j >= tile.cols) break;
          T& value = y[k][j];
          if (tile.scale) value = V::mul(value, scale);
          if (tile.bias) value = V::add(value, bias);
          if constexpr (kSum) {
            if (a.relu) value = V::relu(value);
            sum = V::add(sum, value);
          }
        }
      }
      float* out = tile.out + i / 2 * a.out_row_step + c;
      RNP_UNROLL
      for (int j = 0; j < kTile; j += 2, out += a.out_col_step) {
        if (j >= tile.cols) break;
        T value = V::larger(V::larger(y[0][j], y[0][j + 1]), V::larger(y[1][j], y[1][j + 1]));
        if (!kSum && a.relu) value = V::relu(value);
        if constexpr (kStream) {
          V::stream(out, value);
        } else {
          V::masked_store(out, mask, value);
        }
      }
    }
    if constexpr (kSum) V::masked_store(tile.sum + c, mask, sum);
  }

  template <bool kStream>
  static RNP_INLINE void output_vector(const WinogradOutputArgs& a, const WinogradTile& tile, const float* m, int64_t c,
                                       typename V::Mask mask) {
    T half[kTile][kEdge];
    output_columns(a, m, half);
    const T scale = tile.scale ? V::masked_load(tile.scale + c, mask) : V::zero();
    const T bias = tile.bias ? V::masked_load(tile.bias + c, mask) : V::zero();
    T sum = V::zero();
    for (int i = 0; i < tile.rows; ++i) {
      T y[kTile];
      output(half[i], y);
      float* out = tile.out + i * a.out_row_step + c;
      const float* residual = tile.residual ? tile.residual + i * a.residual_row_step + c : nullptr;
      RNP_UNROLL
      for (int j = 0; j < kTile; ++j) {
        if (j >= tile.cols) break;
        T value = y[j];
        if (tile.scale) value = V::mul(value, scale);
        if (tile.bias) value = V::add(value, bias);
        if (residual) value = V::add(value, V::masked_load(residual + j * a.residual_col_step, mask));
        if (a.relu) value = V::relu(value);
        if constexpr (kStream) {
          V::stream(out + j * a.out_col_step, value);
        } else {
          V::masked_store(out + j * a.out_col_step, mask, value);
        }
        sum = V::add(sum, value);
      }
    }
    if (tile.sum) V::masked_store(tile.sum + c, mask, sum);
  }

  template <bool kStream, bool kPool>
  static RNP_INLINE void output_tiles(const WinogradOutputArgs& a) {
    for (int64_t t = 0; t < a.tile_count; ++t) {
      const float* m = a.m + t * PackedLayout::kLanes;
      for (int c = 0; c < a.live; c += kWidth) {
        if constexpr (kPool) {
          if (a.tiles[t].sum) {
            pooled_vector<kStream, true>(a, a.tiles[t], m + c, a.channel0 + c, V::mask(a.live - c));
          } else {
            pooled_vector<kStream, false>(a, a.tiles[t], m + c, a.channel0 + c, V::mask(a.live - c));
          }
        } else {
          output_vector<kStream>(a, a.tiles[t], m + c, a.channel0 + c, V::mask(a.live - c));
        }
      }
    }
  }

  static void transform_output(const WinogradOutputArgs& a) {
    if constexpr (V::kStreams) {
      if (a.stream) return a.pool ? output_tiles<true, true>(a) : output_tiles<true, false>(a);
    }
    a.pool ? output_tiles<false, true>(a) : output_tiles<false, false>(a);
  }
};

template <class V>
RNP_INLINE WinogradKernels winograd_kernels() {
  using F2 = Winograd<V, 2, 3>;
  using F4 = Winograd<V, 4, 3>;
  using Folded = Winograd<V, 4, 4>;
  return {{&F2::transform_input, &F4::transform_input, &Folded::transform_input},
          {&F2::transform_output, &F4::transform_output, &Folded::transform_output},
          {&transform_filters<4, 3>, &transform_filters<6, 3>, &transform_filters<7, 4>}};
}

}  // namespace
}  // namespace rnp::cpu
