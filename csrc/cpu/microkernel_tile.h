// The register tile, written once over a vector type V. Included by one translation unit per ISA, inside its flags;
// everything here has internal linkage.
//
// GCC 12 keeps the accumulators in registers only if every loop over them is unrolled and induction variables are left
// alone (-fno-ivopts): tests/test_cpu_disassembly.py looks.
#pragma once

#include "core/count.h"
#include "cpu/inlining.h"
#include "cpu/microkernel.h"

namespace rnp::cpu {
namespace {

// Byte steps to pixels 1, 3, 5 … 13: every column c < 15 is one of them times 1, 2, 4 or 8, an x86 address.
struct ColSteps {
  int64_t s1, s3, s5, s7, s9, s11, s13;

  explicit RNP_INLINE ColSteps(int64_t s)
      : s1(s), s3(3 * s), s5(5 * s), s7(7 * s), s9(9 * s), s11(11 * s), s13(13 * s) {}

  template <int kOdd>
  RNP_INLINE int64_t odd() const {
    if constexpr (kOdd == 1) return s1;
    if constexpr (kOdd == 3) return s3;
    if constexpr (kOdd == 5) return s5;
    if constexpr (kOdd == 7) return s7;
    if constexpr (kOdd == 9) return s9;
    if constexpr (kOdd == 11) return s11;
    return s13;
  }
};

// Vectors whose multiply-add takes two bfloat16 of each lane say kPairs, and load and store bfloat16 (load_half,
// store_half) where others load and store float.
template <class V>
constexpr bool multiplies_pairs() {
  if constexpr (requires { V::kPairs; }) return V::kPairs;
  return false;
}

constexpr int kBlock = 32;  // PackedLayout::kLanes

template <class V, int R, int C, int NV>
struct Tile {
  using T = typename V::T;
  static constexpr int kWidth = V::kWidth;
  static constexpr bool kPairs = multiplies_pairs<V>();
  static constexpr int64_t kStored = kPairs ? 2 : 4;  // bytes of an element of output and residual
  // Two blocks of packed weights at once: every second half of `w` comes from the block behind. Few columns, so that
  // loops are short and unrolled.
  static constexpr bool kWide = NV * kWidth > kBlock;
  static constexpr int kUnroll = kWide ? 4 : 1;
  // Weights are asked for 4 KB ahead, into L2, where they may come from past it and reads are not what bounds a tile:
  // on Emerald Rapids Winograd's 256 channels at 14x14 go from 0.9 to 1.5 of oneDNN's speed (bench/NOTES.md, "Two
  // processors"); 8 and 16 KB ahead, or into L1, gain less. Wide tiles are told what to ask for (TileArgs::ahead).
  static constexpr int64_t kAhead = NV * kWidth == kBlock ? 1024 : 0;

  // In place: in unrolled loops GCC 12 gives sums other registers from one multiply-add to the next, and spills them.
  template <bool kInPlace>
  static RNP_INLINE T multiply_add(T b, T w, T acc) {
    if constexpr (kInPlace) return V::fma_in_place(b, w, acc);
    if constexpr (!kInPlace) return V::fma(b, w, acc);
  }

  // acc of columns [c0, c1) of one row += x * w, one input channel, `k` behind x. The recursion replaces a loop over c:
  // the column is a compile-time constant in the address.
  template <int c, int c1, int k = 0>
  static RNP_INLINE void columns(T (&row)[C][NV], const char* x, const T (&w)[NV], const ColSteps& s) {
    if constexpr (c < c1) {
      RNP_COUNT_FMA(NV * kWidth * (kPairs ? 2 : 1));
      if constexpr (NV == 1 && V::kFusedBroadcast) {
        row[c][0] = V::template fma_broadcast<c>(x, s, w[0], row[c][0]);
      } else {
        T b;
        if constexpr (k == 0) b = V::template broadcast<c>(x, s);
        if constexpr (k > 0) b = V::template broadcast<c, k * sizeof(float)>(x, s);
        RNP_UNROLL
        for (int v = 0; v < NV; ++v) row[c][v] = multiply_add<kWide>(b, w[v], row[c][v]);
      }
      columns<c + 1, c1, k>(row, x, w, s);
    }
  }

  template <int r, int r1, int c0, int c1, int k = 0>
  static RNP_INLINE void rows(T (&acc)[R][C][NV], const char* const (&x)[R], const T (&w)[NV], const ColSteps& s) {
    if constexpr (r < r1) {
      columns<c0, c1, k>(acc[r], x[r], w, s);
      rows<r + 1, r1, c0, c1, k>(acc, x, w, s);
    }
  }

  // Wide tiles: input channels k … k1 - 1 behind x, each of whose weights lie in two blocks.
  template <int r0, int r1, int c0, int c1, int k, int k1>
  static RNP_INLINE void channels(T (&acc)[R][C][NV], const char* const (&x)[R], const float* w, const float* w1,
                                  const ColSteps& s) {
    if constexpr (k < k1) {
      constexpr int kHalf = NV / 2;
      T weights[NV];
      RNP_UNROLL
      for (int v = 0; v < kHalf; ++v) weights[v] = V::load(w + k * kBlock + v * kWidth);
      RNP_UNROLL
      for (int v = 0; v < kHalf; ++v) weights[kHalf + v] = V::load(w1 + k * kBlock + v * kWidth);
      rows<r0, r1, c0, c1, k>(acc, x, weights, s);
      channels<r0, r1, c0, c1, k + 1, k1>(acc, x, w, w1, s);
    }
  }

  // Weights to come, of which some lines are asked for before any kUnroll input channels.
  struct Ahead {
    const float* at = nullptr;
    int32_t lines = 0, burst = 0;

    RNP_INLINE Ahead() {}
    explicit RNP_INLINE Ahead(const TileArgs& a) : at(a.ahead), lines(a.ahead_lines), burst(a.ahead_burst) {}

    RNP_INLINE void ask() {
      if (lines <= 0) return;
      lines -= burst;
      _Pragma("GCC unroll 1") for (int32_t i = burst; i > 0; --i, at += 16) __builtin_prefetch(at, 0, 2);
    }
  };

  // `count` input channels; before any kUnroll of them meanwhile(those left) is called. w and x move along.
  template <int r0, int r1, int c0, int c1, class F>
  static RNP_INLINE void wide_channels(T (&acc)[R][C][NV], const char* (&x)[R], const float* w, int64_t count,
                                       const ColSteps& s, int64_t block_step, Ahead& ahead, F&& meanwhile) {
    for (; count >= kUnroll; count -= kUnroll) {
      meanwhile(count);
      channels<r0, r1, c0, c1, 0, kUnroll>(acc, x, w, w + block_step, s);
      ahead.ask();
      RNP_UNROLL
      for (int r = 0; r < R; ++r) x[r] += kUnroll * sizeof(float);
      w += kUnroll * kBlock;
    }
    _Pragma("GCC unroll 1") for (; count > 0; --count) {
      channels<r0, r1, c0, c1, 0, 1>(acc, x, w, w + block_step, s);
      RNP_UNROLL
      for (int r = 0; r < R; ++r) x[r] += sizeof(float);
      w += kBlock;
    }
  }

  // `w_step`: of wide tiles, whose input channels are kBlock apart, from a block of output channels to the next.
  template <int r0, int r1, int c0, int c1>
  static RNP_INLINE void run(T (&acc)[R][C][NV], const float* from, const float* w, int64_t count, int64_t w_step,
                             int64_t row_step, const ColSteps& s, Ahead& ahead) {
    if constexpr (r0 < r1 && c0 < c1) {
      const char* x[R];
      RNP_UNROLL
      for (int r = 0; r < R; ++r) x[r] = reinterpret_cast<const char*>(from + r * row_step);
      if constexpr (kWide) return wide_channels<r0, r1, c0, c1>(acc, x, w, count, s, w_step, ahead, [](int64_t) {});
      for (; count > 0; --count) {
        T weights[NV];
        RNP_UNROLL
        for (int v = 0; v < NV; ++v) weights[v] = V::load(w + v * kWidth);
        if constexpr (kAhead) {
          RNP_UNROLL
          for (int v = 0; v < NV; ++v) __builtin_prefetch(w + kAhead + v * kWidth, 0, 2);
        }
        rows<r0, r1, c0, c1>(acc, x, weights, s);
        RNP_UNROLL
        for (int r = 0; r < R; ++r) x[r] += sizeof(float);
        w += w_step;
      }
    }
  }

  template <int r0, int r1>
  static RNP_INLINE void by_columns(T (&acc)[R][C][NV], int skip, const float* x, const float* w, const Run& run_,
                                    const TileArgs& a, const ColSteps& s, Ahead& ahead) {
    const int64_t w_step = kWide ? a.w_block_step : a.w_step;
    if (skip == kSkipNone) {
      run<r0, r1, 0, C>(acc, x, w, run_.count, w_step, a.x_row_step, s, ahead);
    } else if (skip == kSkipFirstCol) {
      run<r0, r1, 1, C>(acc, x, w, run_.count, w_step, a.x_row_step, s, ahead);
    } else {
      run<r0, r1, 0, C - 1>(acc, x, w, run_.count, w_step, a.x_row_step, s, ahead);
    }
  }

  // f(r, c, pixel) for every pixel of the tile: r and c are compile-time constants, `pixel` its byte offset. Offsets
  // are computed when they are needed and forgotten: kept, they would take the registers of the hot loop.
  template <int64_t kBytes = sizeof(float), class F>
  static RNP_INLINE void each_pixel(int64_t row_step, int64_t col_step, F&& f) {
    const ColSteps s(col_step * kBytes);
    each_row<0>(row_step * kBytes, s, f);
  }
  template <int r, class F>
  static RNP_INLINE void each_row(int64_t row_bytes, const ColSteps& s, F&& f) {
    if constexpr (r < R) {
      each_col<r, 0>(r * row_bytes, s, f);
      each_row<r + 1>(row_bytes, s, f);
    }
  }
  template <int r, int c, class F>
  static RNP_INLINE void each_col(int64_t row_bytes, const ColSteps& s, F&& f) {
    if constexpr (c < C) {
      constexpr int scale = c == 0 ? 1 : c & -c;
      f(r, c, row_bytes + (c == 0 ? 0 : s.odd<c / scale>() * scale));
      each_col<r, c + 1>(row_bytes, s, f);
    }
  }
  template <int64_t kBytes = sizeof(float)>
  static RNP_INLINE float* at(float* base, int64_t bytes, int v) {
    return reinterpret_cast<float*>(reinterpret_cast<char*>(base) + bytes + v * kWidth * kBytes);
  }
  template <int64_t kBytes = sizeof(float)>
  static RNP_INLINE const float* at(const float* base, int64_t bytes, int v) {
    return reinterpret_cast<const float*>(reinterpret_cast<const char*>(base) + bytes + v * kWidth * kBytes);
  }
  static RNP_INLINE float* partial_at(const TileArgs& a, int64_t bytes, int v) {
    constexpr int kVectors = kBlock / kWidth;  // of a block
    return at(a.partial, bytes, v % kVectors) + v / kVectors * a.partial_block_step;
  }
  static RNP_INLINE T load_stored(const float* p, typename V::Mask mask) {
    if constexpr (kPairs) return V::load_half(p, mask);
    if constexpr (!kPairs) return V::masked_load(p, mask);
  }
  static RNP_INLINE void store_stored(float* p, typename V::Mask mask, T v) {
    if constexpr (kPairs) V::store_half(p, mask, v);
    if constexpr (!kPairs) V::masked_store(p, mask, v);
  }

  static void compute(const TileArgs& a) {
    T acc[R][C][NV];
    RNP_UNROLL
    for (int r = 0; r < R; ++r)
      RNP_UNROLL for (int c = 0; c < C; ++c) RNP_UNROLL for (int v = 0; v < NV; ++v) acc[r][c][v] = V::zero();
    if (a.last && !a.stream) {  // the lines to be written arrive while the sums are computed
      each_pixel<kStored>(a.out_row_step, a.out_col_step, [&](int, int, int64_t pixel) RNP_LAMBDA {
        RNP_UNROLL
        for (int v = 0; v < NV; ++v) __builtin_prefetch(at<kStored>(a.out, pixel, v), 1);
      });
    }
    Ahead ahead(a);
    for (int64_t i = 0; i < a.run_count; ++i) {
      // Read the arguments again for every run: kept, they spill into vector registers, and the way back from there
      // waits behind the multiply-adds of a whole tile, so that the loads of the next tile start late.
      asm volatile("" ::: "memory");
      const Run& run_ = a.runs[i];
      const float* x = a.x + run_.x;
      const float* w = a.w + run_.w;
      const ColSteps s(a.x_col_step * static_cast<int64_t>(sizeof(float)));
      if constexpr (R == 1) {
        by_columns<0, 1>(acc, run_.skip, x, w, run_, a, s, ahead);
      } else if (run_.skip < kSkipFirstRow) {
        by_columns<0, R>(acc, run_.skip, x, w, run_, a, s, ahead);
      } else if (run_.skip < kSkipLastRow) {
        by_columns<1, R>(acc, run_.skip - kSkipFirstRow, x, w, run_, a, s, ahead);
      } else {
        by_columns<0, R - 1>(acc, run_.skip - kSkipLastRow, x, w, run_, a, s, ahead);
      }
    }
    finish(acc, a);
  }

  static RNP_INLINE void finish(T (&acc)[R][C][NV], const TileArgs& a) {
    if (!a.first) {
      each_pixel(a.partial_row_step, a.partial_col_step, [&](int r, int c, int64_t pixel) RNP_LAMBDA {
        RNP_UNROLL
        for (int v = 0; v < NV; ++v) acc[r][c][v] = V::add(V::load(partial_at(a, pixel, v)), acc[r][c][v]);
      });
    }
    if (!a.last) {
      each_pixel(a.partial_row_step, a.partial_col_step, [&](int r, int c, int64_t pixel) RNP_LAMBDA {
        RNP_UNROLL
        for (int v = 0; v < NV; ++v) V::store(partial_at(a, pixel, v), acc[r][c][v]);
      });
      return;
    }
    typename V::Mask mask[NV];
    RNP_UNROLL
    for (int v = 0; v < NV; ++v) mask[v] = V::mask(a.live - v * kWidth);
    if (a.scale) {
      RNP_UNROLL
      for (int v = 0; v < NV; ++v) {
        const T scale = V::load(a.scale + v * kWidth);
        RNP_UNROLL
        for (int r = 0; r < R; ++r) RNP_UNROLL for (int c = 0; c < C; ++c) acc[r][c][v] = V::mul(acc[r][c][v], scale);
      }
    }
    if (a.bias) {
      RNP_UNROLL
      for (int v = 0; v < NV; ++v) {
        const T bias = V::load(a.bias + v * kWidth);
        RNP_UNROLL
        for (int r = 0; r < R; ++r) RNP_UNROLL for (int c = 0; c < C; ++c) acc[r][c][v] = V::add(acc[r][c][v], bias);
      }
    }
    if (a.residual) {
      each_pixel<kStored>(a.residual_row_step, a.residual_col_step, [&](int r, int c, int64_t pixel) RNP_LAMBDA {
        RNP_UNROLL
        for (int v = 0; v < NV; ++v)
          acc[r][c][v] = V::add(acc[r][c][v], load_stored(at<kStored>(a.residual, pixel, v), mask[v]));
      });
    }
    if (a.relu) {
      RNP_UNROLL
      for (int r = 0; r < R; ++r)
        RNP_UNROLL for (int c = 0; c < C; ++c) RNP_UNROLL for (int v = 0; v < NV; ++v) acc[r][c][v] =
            V::relu(acc[r][c][v]);
    }
    if constexpr (V::kStreams && NV * V::kWidth >= 16) {
      if (a.stream) {
        each_pixel(a.out_row_step, a.out_col_step, [&](int r, int c, int64_t pixel) RNP_LAMBDA {
          RNP_UNROLL
          for (int v = 0; v < NV; ++v) V::stream(at(a.out, pixel, v), acc[r][c][v]);
        });
        return;
      }
    }
    each_pixel<kStored>(a.out_row_step, a.out_col_step, [&](int r, int c, int64_t pixel) RNP_LAMBDA {
      RNP_UNROLL
      for (int v = 0; v < NV; ++v) store_stored(at<kStored>(a.out, pixel, v), mask[v], acc[r][c][v]);
    });
  }
};

template <class V, int NV, int R, int C>
RNP_INLINE void add_shape(TileWidth& width) {
  width.tile[R - 1][C - 1] = &Tile<V, R, C, NV>::compute;
}

// One-row tiles of 1…C pixels.
template <class V, int NV, int C>
RNP_INLINE void add_columns(TileWidth& width) {
  width.lanes = NV * V::kWidth;
  add_shape<V, NV, 1, C>(width);
  if constexpr (C > 1) add_columns<V, NV, C - 1>(width);
}

}  // namespace
}  // namespace rnp::cpu
