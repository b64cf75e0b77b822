// Register tiles of 1x1 kernels. Input channels pass in chunks of 16, one cache line of each pixel, and between two
// chunks a tile does what later tiles need: it asks for the lines of a tile to come, or copies those of the next one.
//
// Why here: multiply-adds leave two thirds of the issue slots empty, so a line now and then is free. Fifty prefetches
// before a tile are not: they fill the miss buffers that the tile's own loads wait for, and cost 4 to 9 % of a layer.
#pragma once

#include "cpu/microkernel_tile.h"

namespace rnp::cpu {
namespace {

constexpr int64_t kChunk = kPanelChunk;

// Pixels read where they lie in the input tensor.
template <class V, int C, int NV>
struct PointwiseTile {
  using T = typename V::T;
  using Plain = Tile<V, 1, C, NV>;

  static RNP_INLINE void clear(T (&acc)[1][C][NV], const TileArgs& a) {
    RNP_UNROLL
    for (int c = 0; c < C; ++c) RNP_UNROLL for (int v = 0; v < NV; ++v) acc[0][c][v] = V::zero();
    if (a.last && !a.stream) {  // the lines to be written arrive while the sums are computed
      Plain::each_pixel(0, a.out_col_step, [&](int, int, int64_t pixel) RNP_LAMBDA {
        RNP_UNROLL
        for (int v = 0; v < NV; v += 16 / V::kWidth) __builtin_prefetch(Plain::at(a.out, pixel, v), 1);
      });
    }
    asm volatile("" ::: "memory");  // see Tile::compute
  }

  static void compute(const PointwiseArgs& p) {
    const TileArgs& a = p.tile;
    T acc[1][C][NV];
    clear(acc, a);
    const char* x[1] = {reinterpret_cast<const char*>(a.x)};
    const float* w = a.w;
    const ColSteps s(a.x_col_step * static_cast<int64_t>(sizeof(float)));
    if constexpr (Plain::kWide) {
      typename Plain::Ahead ahead(a);
      // Channels left when no more of the tile to come are asked for, and its next ones.
      const int64_t end = p.count - p.ahead_count;
      const char* pixels = reinterpret_cast<const char*>(p.ahead);
      Plain::template wide_channels<0, 1, 0, C>(acc, x, w, p.count, s, a.w_block_step, ahead,
                                                [&](int64_t left) RNP_LAMBDA {
                                                  if (left <= end || (p.count - left) % kChunk != 0) return;
                                                  prefetch<0>(pixels, s);
                                                  pixels += kChunk * sizeof(float);
                                                });
      return Plain::finish(acc, a);
    }
    for (;;) {
      // What is rarely needed is read again, as in Tile::compute: there is no register for it.
      asm volatile("" ::: "memory");
      const int64_t done = (x[0] - reinterpret_cast<const char*>(a.x)) / static_cast<int64_t>(sizeof(float));
      int64_t count = p.count - done;
      if (count <= 0) break;
      if (done < p.ahead_count) prefetch<0>(reinterpret_cast<const char*>(p.ahead + done), s);
      for (count = count < kChunk ? count : kChunk; count > 0; --count) {
        T weights[NV];
        RNP_UNROLL
        for (int v = 0; v < NV; ++v) weights[v] = V::load(w + v * V::kWidth);
        Plain::template rows<0, 1, 0, C>(acc, x, weights, s);
        x[0] += sizeof(float);
        w += a.w_step;
      }
    }
    Plain::finish(acc, a);
  }

  // Into L2: L1 holds what the tile itself reads, and pixels far apart share its sets.
  template <int c>
  static RNP_INLINE void prefetch(const char* pixel, const ColSteps& s) {
    if constexpr (c < C) {
      constexpr int scale = c == 0 ? 1 : c & -c;
      __builtin_prefetch(pixel + (c == 0 ? 0 : s.odd<c / scale>() * scale), 0, 2);
      prefetch<c + 1>(pixel, s);
    }
  }
};

template <class V, int NV, int C>
RNP_INLINE void add_pointwise(TileWidth& width) {
  width.pointwise[C - 1] = &PointwiseTile<V, C, NV>::compute;
  if constexpr (C > 1) add_pointwise<V, NV, C - 1>(width);
}

// Pixels read from a panel, [chunk][pixel][16]: where they lie 4 KB apart they share one set of L1, and where a tile
// spans rows of a strided layer no one step leads from each to the next. While a tile multiplies one panel it fills the
// next tile's.

// One chunk of each of C pixels; the channels from `left` on are not read, the panel holds zeros for them.
template <class V, int C>
RNP_INLINE void copy_chunk(const float* const* from, int64_t offset, int64_t left, float* to) {
  static_assert(V::kWidth == kChunk);
  const auto mask = V::mask(static_cast<int>(left < kChunk ? left : kChunk));
  RNP_UNROLL
  for (int c = 0; c < C; ++c) V::store(to + c * kChunk, V::masked_load(from[c] + offset, mask));
}

template <class V>
void copy_panel(const float* const* from, int64_t count, float* to) {
  for (int64_t i = 0; i < count; i += kChunk, to += kChunk * kMaxCols) copy_chunk<V, kMaxCols>(from, i, count - i, to);
}

// V, NV: the vectors of output channels. VC: that of the copies.
template <class V, int NV, class VC, int C>
struct PanelTile {
  using T = typename V::T;
  static constexpr bool kWide = Tile<V, 1, C, NV>::kWide;

  template <int c>
  static RNP_INLINE void columns(T (&row)[1][C][NV], const char* x, const T (&w)[NV]) {
    if constexpr (c < C) {
      RNP_COUNT_FMA(NV * V::kWidth);
      constexpr int kPixel = c * kChunk * static_cast<int>(sizeof(float));
      if constexpr (NV == 1) {
        row[0][c][0] = V::template fma_broadcast_at<kPixel>(x, w[0], row[0][c][0]);
      } else {
        const T b = V::broadcast(x + kPixel);
        RNP_UNROLL
        for (int v = 0; v < NV; ++v)
          row[0][c][v] = Tile<V, 1, C, NV>::template multiply_add<kWide>(b, w[v], row[0][c][v]);
      }
      columns<c + 1>(row, x, w);
    }
  }

  // Input channels k … k1 - 1 behind x and w; of a wide tile the weights lie in two blocks.
  template <int k, int k1>
  static RNP_INLINE void channels(T (&acc)[1][C][NV], const char* x, const float* w, const TileArgs& a) {
    if constexpr (k < k1) {
      constexpr int kFirst = kWide ? NV / 2 : NV;
      T weights[NV];
      RNP_UNROLL
      for (int v = 0; v < kFirst; ++v) weights[v] = V::load(w + k * kBlock + v * V::kWidth);
      RNP_UNROLL
      for (int v = kFirst; v < NV; ++v)
        weights[v] = V::load(w + a.w_block_step + k * kBlock + (v - kFirst) * V::kWidth);
      columns<0>(acc, x + k * sizeof(float), weights);
      channels<k + 1, k1>(acc, x, w, a);
    }
  }

  static void compute(const PointwiseArgs& p) {
    const TileArgs& a = p.tile;
    T acc[1][C][NV];
    PointwiseTile<V, C, NV>::clear(acc, a);
    const float* w = a.w;
    for (int64_t chunk = 0;; ++chunk) {
      asm volatile("" ::: "memory");  // see above
      int64_t left = p.count - chunk * kChunk;
      if (left <= 0) break;
      if (chunk * kChunk < p.copy_count)
        copy_chunk<VC, C>(p.from, p.offset + chunk * kChunk, p.copy_count - chunk * kChunk,
                          p.to + chunk * kChunk * kMaxCols);
      if (chunk * kChunk < p.ahead_count) {
        RNP_UNROLL
        for (int c = 0; c < C; ++c) __builtin_prefetch(p.ahead_pixels[c] + p.offset + chunk * kChunk, 0, 2);
      }
      const char* x = reinterpret_cast<const char*>(a.x + chunk * kChunk * kMaxCols);
      left = left < kChunk ? left : kChunk;
      if constexpr (kWide) {
        for (; left >= 4; left -= 4, x += 4 * sizeof(float), w += 4 * kBlock) channels<0, 4>(acc, x, w, a);
      }
      _Pragma("GCC unroll 1") for (; left > 0; --left) {
        channels<0, 1>(acc, x, w, a);
        x += sizeof(float);
        w += a.w_step;
      }
    }
    Tile<V, 1, C, NV>::finish(acc, a);
  }
};

template <class V, int NV, class VC, int C>
RNP_INLINE void add_panels(TileWidth& width) {
  width.panel[C - 1] = &PanelTile<V, NV, VC, C>::compute;
  if constexpr (C > 1) add_panels<V, NV, VC, C - 1>(width);
}

}  // namespace
}  // namespace rnp::cpu
