// From sums to the output: scale and bias tables, residual, ReLU, and the channels beyond the prefix.
#pragma once

#include "cuda/rows.h"

namespace rnp::cuda {

// What finishes one row's sums, from one of its channels on; null where there is none.
template <typename T>
struct Finish {
  const float *scale, *bias;
  const T* residual;
  int64_t step;  // of the residual, from channel to channel

  // `line` of the tables, `at` the offset of the row's channel 0 in the residual.
  RNP_DEVICE Finish(const ConvArgs& p, int32_t line, int64_t at, int32_t channel) {
    scale = p.scale ? p.scale + line * p.scale_row_stride + channel : nullptr;
    bias = p.bias ? p.bias + line * p.bias_row_stride + channel : nullptr;
    step = p.residual_stride.c;
    residual = p.residual ? static_cast<const T*>(p.residual) + at + channel * step : nullptr;
  }

  // Product and sum are fused by name, not by the compiler's leave: every kernel must make the same bits of a sum.
  RNP_DEVICE float operator()(const ConvArgs& p, int e, float v) const {
    v = multiply_add(v, scale ? scale[e] : 1.0f, bias ? bias[e] : 0.0f);
    if (residual) v += widen(residual[e * step]);
    return p.relu ? relu(v) : v;
  }
};

template <typename T>
RNP_DEVICE float finish(const ConvArgs& p, int32_t line, int64_t residual, int32_t channel, float v) {
  return Finish<T>(p, line, residual, channel)(p, 0, v);
}

// Four neighbouring elements in one store where the address allows it, else `count` of them one by one.
template <typename T>
RNP_DEVICE void store_four(T* to, const T (&v)[4], int count) {
  union {
    T element[4];
    uint32_t word[sizeof(T)];
  } out;
  RNP_UNROLL
  for (int e = 0; e < 4; ++e) out.element[e] = v[e];
  if (count >= 4 && (reinterpret_cast<uintptr_t>(to) & (4 * sizeof(T) - 1)) == 0) {
    if constexpr (sizeof(T) == 2)
      *reinterpret_cast<uint64_t*>(to) = out.word[0] | static_cast<uint64_t>(out.word[1]) << 32;
    else
      *reinterpret_cast<Vec16*>(to) = Vec16{{out.word[0], out.word[1], out.word[2], out.word[3]}};
  } else {
    for (int e = 0; e < 4; ++e)
      if (e < count) to[e] = out.element[e];
  }
}

// Where a slab of sums goes: channels first … first + width - 1 of the tensor, which are slab … of the tile.
struct Slab {
  const float* sums;  // (kRows, kStride)
  int32_t slab, first;
};

// `threads` threads store kRows rows of kWidth channels, in the dtype of the tensors.
template <typename T, int kRows, int kWidth, int kStride>
RNP_DEVICE void store_slab(const ConvArgs& p, const Row* rows, const Slab& s, int thread, int threads) {
  T* output = static_cast<T*>(p.output);
  if (p.output_stride.c == 1) {  // neighbouring threads write one row's channels, four each
    for (int i = thread; i < kRows * (kWidth / 4); i += threads) {
      const int r = i / (kWidth / 4), c = i % (kWidth / 4) * 4;
      const Row& row = rows[r];
      const int count = row.out_live - s.slab - c;
      if (count <= 0) continue;
      const Finish<T> finished(p, row.line, row.residual, s.first + c);
      T v[4];
      RNP_UNROLL
      for (int e = 0; e < 4; ++e) v[e] = narrow<T>(e < count ? finished(p, e, s.sums[r * kStride + c + e]) : 0.0f);
      store_four(output + row.output + s.first + c, v, count);
    }
  } else {  // neighbouring threads write neighbouring pixels of one channel
    for (int i = thread; i < kRows * kWidth; i += threads) {
      const int r = i % kRows, c = i / kRows;
      const Row& row = rows[r];
      if (c + s.slab >= row.out_live) continue;
      output[row.output + (s.first + c) * p.output_stride.c] =
          narrow<T>(finish<T>(p, row.line, row.residual, s.first + c, s.sums[r * kStride + c]));
    }
  }
}

// Channels beyond the prefix, zero or what the residual leaves there, 16 bytes at a time (ConvArgs::vectors). A warp
// takes a slice of one sample's (pixel, piece) pairs, and four pieces a lane at a time: in ResNet's blocks this moves
// more bytes than the convolution, and with one element a lane it took an H200 three times as long.
template <typename T>
RNP_DEVICE void write_tail_vectors(const ConvArgs& p, int thread, int threads) {
  constexpr int32_t kPiece = 16 / static_cast<int32_t>(sizeof(T)), kBatch = 4;
  const int lane = thread & 31, warps = threads / 32;
  const int64_t workers = block_count() * warps, positions = int64_t{p.out_h} * p.out_w;
  const int32_t pieces = p.c_out / kPiece;
  // About four slices for each warp, none shorter than a batch.
  const int64_t wanted = gpu::quotient(4 * workers + p.cut.n - 1, p.cut.n > 0 ? p.cut.n : 1);
  const int64_t most = gpu::quotient(positions * pieces, 32 * kBatch) + 1;
  const int64_t slices = wanted < most ? wanted : most;
  for (int64_t unit = block_index() * warps + thread / 32; unit < p.cut.n * slices; unit += workers) {
    const int64_t n = gpu::quotient(unit, slices), slice = unit - n * slices;
    const int32_t live = gpu::clamp_prefix(p.out_prefix[n], p.c_out), first = live / kPiece, count = pieces - first;
    if (count == 0) continue;
    const int64_t total = positions * count, length = gpu::quotient(total + slices - 1, slices);
    const int64_t end = (slice + 1) * length < total ? (slice + 1) * length : total;
    for (int64_t at = slice * length + lane; at < end; at += 32 * kBatch) {
      Vec16 v[kBatch] = {};
      T* to[kBatch];
      int32_t channel[kBatch];
      RNP_UNROLL
      for (int b = 0; b < kBatch; ++b) {
        const int64_t i = at + b * 32 < end ? at + b * 32 : at;  // the last ones write twice what they write
        const int64_t pixel = gpu::quotient(i, count);
        channel[b] = (first + static_cast<int32_t>(i - pixel * count)) * kPiece;
        int64_t offset =
            n * p.output_stride.n + pixel * p.output_stride.w;  // the residual's too: its strides are alike
        if (!p.dense) {
          const int64_t oy = gpu::quotient(pixel, p.out_w);
          offset = n * p.output_stride.n + oy * p.output_stride.h + (pixel - oy * p.out_w) * p.output_stride.w;
        }
        to[b] = static_cast<T*>(p.output) + offset + channel[b];
        if (p.residual) v[b] = *reinterpret_cast<const Vec16*>(static_cast<const T*>(p.residual) + offset + channel[b]);
      }
      RNP_UNROLL
      for (int b = 0; b < kBatch; ++b) {
        if (p.relu) v[b] = larger_of(T{}, v[b], Vec16{});
        if (channel[b] >= live) {
          *reinterpret_cast<Vec16*>(to[b]) = v[b];
        } else {
          RNP_ROLL
          for (int32_t e = live - channel[b]; e < kPiece; ++e) {
            const T* const from = static_cast<const T*>(p.residual) + (to[b] - static_cast<T*>(p.output)) + e;
            const float one = p.residual ? widen(*from) : 0.0f;
            to[b][e] = narrow<T>(p.relu ? relu(one) : one);
          }
        }
      }
    }
  }
}

// Channels beyond the prefix: zero, or what the residual leaves there. Dealt out in whole positions, a warp each.
template <typename T>
RNP_DEVICE void write_tails(const ConvArgs& p, int thread, int threads) {
  if (p.vectors) return write_tail_vectors<T>(p, thread, threads);
  const int lane = thread & 31, warps = threads / 32;
  const int64_t step = block_count() * warps, positions = int64_t{p.out_h} * p.out_w;
  for (int64_t i = block_index() * warps + thread / 32; i < p.cut.n * positions; i += step) {
    const int64_t n = i / positions;
    const int32_t live = gpu::clamp_prefix(p.out_prefix[n], p.c_out);
    if (live == p.c_out) continue;
    const int32_t pixel = static_cast<int32_t>(i - n * positions), oy = pixel / p.out_w, ox = pixel - oy * p.out_w;
    T* to = static_cast<T*>(p.output) + n * p.output_stride.n + oy * p.output_stride.h + ox * p.output_stride.w;
    const T* residual = static_cast<const T*>(p.residual);
    if (residual) residual += n * p.residual_stride.n + oy * p.residual_stride.h + ox * p.residual_stride.w;
    for (int32_t c = live + lane; c < p.c_out; c += 32) {
      float v = residual ? widen(residual[c * p.residual_stride.c]) : 0.0f;
      if (p.relu) v = relu(v);
      to[c * p.output_stride.c] = narrow<T>(v);
    }
  }
}

// The second pass of a launch whose K was split: adds the segments of every live output in their order, as the one-pass
// kernel does in registers, and finishes them; the channels beyond the prefix too. A warp for each position.
template <typename T>
RNP_DEVICE void sum_segments_block(const ConvArgs& p) {
  const int32_t positions = static_cast<int32_t>(p.cut.positions), segment = p.segment_chunks * kPackChannels<T>;
  const int64_t rows = p.cut.n * p.cut.positions, elements = rows * p.c_out;
  const int warps = thread_count() / 32;
  for (int64_t row = block_index() * warps + thread_index() / 32; row < rows; row += block_count() * warps) {
    const int64_t n = gpu::quotient(row, positions);
    const int32_t live_out = p.out_prefix ? gpu::clamp_prefix(p.out_prefix[n], p.c_out) : p.c_out;
    const int32_t live_in = p.in_prefix ? gpu::clamp_prefix(p.in_prefix[n], p.c_in) : p.c_in;
    const int32_t line = p.row ? gpu::clamp_prefix(p.row[n], p.lines - 1) : 0, end = p.zero_tail ? p.c_out : live_out;
    const int32_t pixel = static_cast<int32_t>(row - n * positions), oy = pixel / p.out_w, ox = pixel - oy * p.out_w;
    const int64_t residual = n * p.residual_stride.n + oy * p.residual_stride.h + ox * p.residual_stride.w;
    T* const to = static_cast<T*>(p.output) + n * p.output_stride.n + oy * p.output_stride.h + ox * p.output_stride.w;
    for (int32_t c = thread_index() & 31; c < end; c += 32) {
      float v = 0;
      if (c < live_out) {
        const float* part = p.partial + row * p.c_out + c;
        for (int32_t at = 0; at < live_in; at += segment, part += elements) v = at == 0 ? *part : v + *part;
        v = finish<T>(p, line, residual, c, v);
      } else {
        if (p.residual) v = widen(static_cast<const T*>(p.residual)[residual + c * p.residual_stride.c]);
        if (p.relu) v = relu(v);
      }
      to[c * p.output_stride.c] = narrow<T>(v);
    }
  }
}

}  // namespace rnp::cuda
