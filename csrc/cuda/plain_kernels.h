// The kernels around the tile kernel, one thread block's view; see plain_args.h.
#pragma once

#include "cuda/device.h"
#include "cuda/plain_args.h"

namespace rnp::cuda {

template <typename T>
struct Accumulate {
  using type = float;
};
template <>
struct Accumulate<double> {
  using type = double;
};
template <typename T>
using Sum = typename Accumulate<T>::type;

template <typename T>
RNP_DEVICE T narrow_to(Sum<T> v) {
  if constexpr (sizeof(T) == 8)
    return v;
  else
    return narrow<T>(v);
}
RNP_DEVICE double multiply_add(double a, double b, double c) { return a * b + c; }

// For any batch: thread i of the launch finds the place of sample i; no exchange between threads, so any number of
// blocks will do.
RNP_DEVICE void order_block(const OrderArgs& p) {
  const int64_t first = block_index() * thread_count() + thread_index();
  if (first == 0) *p.ticket = 0;
  if (first >= p.n) return;
  const int32_t i = static_cast<int32_t>(first);
  const int32_t place = gpu::place_of(i, p.n, p.in_prefix, p.out_prefix, p.c_in, p.c_out);
  p.sample[place] = i;
  p.in[place] = p.in_prefix ? gpu::clamp_prefix(p.in_prefix[i], p.c_in) : p.c_in;
  p.out[place] = p.out_prefix ? gpu::clamp_prefix(p.out_prefix[i], p.c_out) : p.c_out;
}

// The same by one block of a power of two of threads, at least one for each sample: a bitonic sort of 64-bit keys in
// shared memory. Comparing each sample with each other took 80 microseconds on an H200 for 256 of them.
RNP_DEVICE void sort_block(const OrderArgs& p, char* shared) {
  constexpr int kIn = OrderArgs::kSampleBits, kOut = kIn + OrderArgs::kChannelBits;
  uint64_t* keys = reinterpret_cast<uint64_t*>(shared);
  const int i = thread_index(), threads = thread_count();
  uint64_t own = ~uint64_t{0};
  if (i < p.n) {
    const int32_t in = p.in_prefix ? gpu::clamp_prefix(p.in_prefix[i], p.c_in) : p.c_in;
    const int32_t out = p.out_prefix ? gpu::clamp_prefix(p.out_prefix[i], p.c_out) : p.c_out;
    own = static_cast<uint64_t>(p.c_out - out) << kOut | static_cast<uint64_t>(p.c_in - in) << kIn |
          static_cast<uint64_t>(i);
  }
  keys[i] = own;
  if (i == 0) *p.ticket = 0;
  for (int size = 2; size <= threads; size *= 2)
    for (int step = size / 2; step > 0; step /= 2) {
      sync_block();
      const uint64_t other = keys[i ^ step];
      sync_block();
      const bool keep_less = ((i & step) == 0) == ((i & size) == 0);
      if ((other < own) == keep_less) own = other;
      keys[i] = own;
    }
  sync_block();
  if (i < p.n) {
    constexpr uint64_t kChannels = (uint64_t{1} << OrderArgs::kChannelBits) - 1;
    p.sample[i] = static_cast<int32_t>(own & ((1 << kIn) - 1));
    p.in[i] = p.c_in - static_cast<int32_t>(own >> kIn & kChannels);
    p.out[i] = p.c_out - static_cast<int32_t>(own >> kOut);
  }
  for (int32_t b = i; b < p.blocks(); b += threads) {
    const int32_t group = b / p.cut.blocks();
    const int64_t first = int64_t{group} * p.cut.group_out + int64_t{b - group * p.cut.blocks()} * p.cut.bn;
    const uint64_t bound = static_cast<uint64_t>(p.c_out - first) << kOut;  // keys below it: out > first
    int32_t low = 0, high = p.n;
    while (low < high) {
      const int32_t middle = (low + high) / 2;
      if (keys[middle] < bound)
        low = middle + 1;
      else
        high = middle;
    }
    p.live[b] = low;
  }
}

template <typename T>
RNP_DEVICE void pack_block(const PackArgs& p, int64_t elements, int32_t chunks, int32_t taps, int32_t chunk,
                           int32_t run, int32_t pixel) {
  const int64_t step = block_count() * thread_count();
  for (int64_t i = block_index() * thread_count() + thread_index(); i < elements; i += step) {
    int64_t rest = i;
    constexpr int32_t kPiece = 16 / static_cast<int32_t>(sizeof(T));
    const int32_t place = static_cast<int32_t>(rest % chunk);
    rest /= chunk;
    const int32_t o = static_cast<int32_t>(rest % p.layout.group_out);
    const int32_t k = (place / kPiece ^ (o & 7)) * kPiece + place % kPiece;  // PackedTiles: pieces are swizzled
    rest /= p.layout.group_out;
    const int32_t first_tap = static_cast<int32_t>(rest % taps) * run;
    rest /= taps;
    const int32_t at = static_cast<int32_t>(rest % chunks) * chunk + k;
    const int64_t group = rest / chunks;
    const int32_t in_run = at / pixel, channel = at - in_run * pixel, tap = first_tap + in_run;
    T v{};
    if (channel < p.layout.group_in && in_run < run)
      v = static_cast<const T*>(p.weight)[group * p.group_stride + o * p.out_stride + channel * p.in_stride +
                                          tap / p.layout.kw * p.y_stride + tap % p.layout.kw * p.x_stride];
    static_cast<T*>(p.packed)[i] = v;
  }
}

// The copy that UnfoldArgs describes: a warp takes a run of one line, each lane a few pieces of it, all loaded before
// the first is stored. Neighbouring lanes write neighbours, and read neighbouring pixels of either layout; elements are
// moved, so their size is all that matters of T.
template <typename T>
RNP_DEVICE void unfold_block(const UnfoldArgs& p) {
  constexpr int32_t kPiece = 16 / static_cast<int32_t>(sizeof(T)), kLanes = 32;
  union Piece {
    T element[kPiece];
    Vec16 all;
  };
  const int64_t of_line = p.columns * p.pixel_pieces, runs = p.runs(), all = p.n * p.rows * runs;
  const int32_t lane = thread_index() % kLanes;
  const int64_t step = block_count() * (thread_count() / kLanes);
  for (int64_t run = block_index() * (thread_count() / kLanes) + thread_index() / kLanes; run < all; run += step) {
    const int64_t line = gpu::quotient(run, runs), n = gpu::quotient(line, p.rows), y = line - n * p.rows - p.top;
    const int64_t first = (run - line * runs) * UnfoldArgs::kRun + lane;
    const int32_t live = p.in_prefix ? gpu::clamp_prefix(p.in_prefix[n], p.c_in) : p.c_in;
    const T* const input = static_cast<const T*>(p.input) + n * p.input_stride.n + y * p.input_stride.h;
    Piece pieces[UnfoldArgs::kRun / kLanes];
    RNP_UNROLL
    for (int i = 0; i < UnfoldArgs::kRun / kLanes; ++i) {
      const int64_t at = first + i * kLanes, column = at >> (p.pixel_pieces - 1);
      const int64_t window = p.window == 1 ? column : gpu::quotient(column, p.window);
      const int64_t x = window * p.step + (column - window * p.window) * p.dilation - p.left;
      pieces[i].all = {};
      if (at < of_line && x >= 0 && x < p.w && y >= 0 && y < p.h) {
        const int32_t channel = static_cast<int32_t>(at & (p.pixel_pieces - 1)) * kPiece;
        const T* const from = input + x * p.input_stride.w + channel * p.input_stride.c;
        RNP_UNROLL
        for (int32_t e = 0; e < kPiece; ++e)
          if (e < live - channel) pieces[i].element[e] = from[e * p.input_stride.c];
      }
    }
    Vec16* const to = static_cast<Vec16*>(p.unfolded) + line * of_line;
    RNP_UNROLL
    for (int i = 0; i < UnfoldArgs::kRun / kLanes; ++i)
      if (const int64_t at = first + i * kLanes; at < of_line) to[at] = pieces[i].all;
  }
}

// The input row of a tap, or -1.
RNP_DEVICE int32_t input_at(const PlainAxis& axis, int32_t out, int32_t k, int32_t size) {
  const int32_t t = out * axis.step + axis.offset + k * axis.tap;
  if (t < 0) return -1;
  const int32_t at = axis.divisor == 1 ? t : t / axis.divisor;
  return at * axis.divisor == t && at < size ? at : -1;
}

template <typename T>
RNP_DEVICE void plain_block(const PlainArgs& p) {
  const int32_t channels = p.groups * p.group_out;
  const int64_t positions = int64_t{p.out_h} * p.out_w, elements = p.n * channels * positions;
  const int64_t step = block_count() * thread_count();
  for (int64_t i = block_index() * thread_count() + thread_index(); i < elements; i += step) {
    int32_t c;
    int64_t pixel, n;
    if (p.output_stride.c == 1) {  // neighbouring threads write neighbouring elements
      c = static_cast<int32_t>(i % channels);
      pixel = i / channels % positions;
      n = i / channels / positions;
    } else {
      pixel = i % positions;
      c = static_cast<int32_t>(i / positions % channels);
      n = i / positions / channels;
    }
    const int32_t oy = static_cast<int32_t>(pixel / p.out_w), ox = static_cast<int32_t>(pixel % p.out_w);
    const bool live = !p.out_prefix || c < p.out_prefix[n];
    if (!live && !p.zero_tail) continue;
    Sum<T> sum = 0;
    if (live) {
      const int32_t group = c / p.group_out, total = p.groups * p.group_in;
      const int32_t in_live =
          gpu::live_of_group(p.in_prefix ? gpu::clamp_prefix(p.in_prefix[n], total) : total, group, p.group_in);
      const T* input =
          static_cast<const T*>(p.input) + n * p.input_stride.n + int64_t{group} * p.group_in * p.input_stride.c;
      const T* weight =
          static_cast<const T*>(p.weight) + group * p.group_stride + (c - group * p.group_out) * p.out_stride;
      for (int32_t ky = 0; ky < p.kh; ++ky) {
        const int32_t y = input_at(p.y, oy, ky, p.h);
        for (int32_t kx = 0; y >= 0 && kx < p.kw; ++kx) {
          const int32_t x = input_at(p.x, ox, kx, p.w);
          if (x < 0) continue;
          const T* from = input + y * p.input_stride.h + x * p.input_stride.w;
          const T* by = weight + ky * p.y_stride + kx * p.x_stride;
          Sum<T> part = 0;  // one sum for each tap: the rounding error grows with its length
          for (int32_t k = 0; k < in_live; ++k)
            part = multiply_add(widen(from[k * p.input_stride.c]), widen(by[k * p.in_stride]), part);
          sum += part;
        }
      }
      const int64_t line = p.row ? gpu::clamp_prefix(p.row[n], p.lines - 1) : 0;
      if (p.scale) sum *= static_cast<const Sum<T>*>(p.scale)[line * p.scale_row_stride + c];
      if (p.bias) sum += static_cast<const Sum<T>*>(p.bias)[line * p.bias_row_stride + c];
    }
    if (p.residual)
      sum += widen(static_cast<const T*>(p.residual)[n * p.residual_stride.n + c * p.residual_stride.c +
                                                     oy * p.residual_stride.h + ox * p.residual_stride.w]);
    if (p.relu) sum = sum > 0 ? sum : (sum != sum ? sum : Sum<T>{0});
    static_cast<T*>(
        p.output)[n * p.output_stride.n + c * p.output_stride.c + oy * p.output_stride.h + ox * p.output_stride.w] =
        narrow_to<T>(sum);
  }
}

// Means over positions of the output as stored. A block of 128 threads takes 32 channels of one sample: warp w adds the
// positions w, w + 4, … of each, and the four sums are added in order. The order depends on the layer alone. (A tile's
// own sums cannot serve: where a tile begins within a sample depends on the batch.)
template <typename T>
RNP_DEVICE void mean_block(const MeanArgs& p, char* shared) {
  Sum<T>* sums = reinterpret_cast<Sum<T>*>(shared);  // (4, 32)
  const int lane = thread_index() & 31, warp = thread_index() >> 5;
  const int32_t runs = (p.channels + 31) / 32;
  for (int64_t item = block_index(); item < p.n * runs; item += block_count()) {
    const int64_t n = item / runs;
    const int32_t c = static_cast<int32_t>(item % runs) * 32 + lane;
    const int32_t live = p.out_prefix ? gpu::clamp_prefix(p.out_prefix[n], p.channels) : p.channels;
    Sum<T> sum = 0;
    if (c < live) {
      const T* from = static_cast<const T*>(p.output) + n * p.output_stride.n + c * p.output_stride.c;
      for (int64_t i = warp; i < p.positions; i += 4)
        sum += widen(from[i / p.out_w * p.output_stride.h + i % p.out_w * p.output_stride.w]);
    }
    sums[thread_index()] = sum;
    sync_block();
    if (warp == 0 && c < p.channels) {
      const Sum<T> total = ((sums[lane] + sums[32 + lane]) + sums[64 + lane]) + sums[96 + lane];
      p.mean[n * p.channels + c] = static_cast<float>(total / static_cast<Sum<T>>(p.positions));
    }
    sync_block();
  }
}

}  // namespace rnp::cuda
