// The weight gradient: for each tap a matrix product over (sample, pixel), one thread block's view.
//
//   dW[o][c] = Σ over live samples and pixels of grad[o] · input[c]
//
// A block takes 64 output channels by 64 input channels of one group and tap, and one run of samples. Samples that have
// no live channel in the block's rows or columns are skipped, and within a sample K is its pixels, 32 at a time. The
// order of the additions depends on the prefixes, the batch and the number of runs alone: deterministic.
#pragma once

#include "cuda/device.h"
#include "cuda/plain_kernels.h"

namespace rnp::cuda {

template <typename T>
struct WeightGradBlock {
  static constexpr bool kMatrix = sizeof(T) == 2;
  static constexpr int kSide = 64, kPixels = 32, kStages = 3;
  static constexpr int kRowBytes = kSide * static_cast<int>(sizeof(T)), kRowPieces = kRowBytes / 16;
  static constexpr int kPiece = 16 / static_cast<int>(sizeof(T));
  static constexpr int kOperandBytes = kPixels * kRowBytes;
  static constexpr int kSharedBytes = kStages * 2 * kOperandBytes;
  static constexpr int kSums = 32;  // of one thread: 64 x 64 over 128 threads

  // The pixels of one stage: up to 32 of sample n from `pixel` on.
  struct Run {
    int64_t n, pixel;
  };

  const WeightGradArgs& p;
  char* shared;
  int32_t group, tap_y, tap_x, first_out, first_in;
  int64_t last_sample;
  Sum<T> sums[kSums];

  RNP_DEVICE WeightGradBlock(const WeightGradArgs& args, char* memory) : p(args), shared(memory) {}

  RNP_DEVICE static int piece_at(int pixel, int piece) { return pixel * kRowBytes + ((piece ^ (pixel & 7)) << 4); }
  RNP_DEVICE int64_t positions() const { return int64_t{p.out_h} * p.out_w; }

  RNP_DEVICE int32_t live(const int32_t* prefix, int64_t n, int32_t size, int32_t first) const {
    const int32_t total = p.groups * size;
    const int32_t all = prefix ? gpu::clamp_prefix(prefix[n], total) : total;
    const int32_t rest = gpu::live_of_group(all, group, size) - first;
    return rest < kSide ? rest : kSide;
  }
  RNP_DEVICE int32_t live_out(int64_t n) const { return live(p.out_prefix, n, p.group_out, first_out); }
  RNP_DEVICE int32_t live_in(int64_t n) const { return live(p.in_prefix, n, p.group_in, first_in); }

  RNP_DEVICE Run first_live(int64_t n) const {
    while (n < last_sample && (live_out(n) <= 0 || live_in(n) <= 0)) ++n;
    return {n, 0};
  }
  RNP_DEVICE Run next(const Run& at) const {
    return at.pixel + kPixels < positions() ? Run{at.n, at.pixel + kPixels} : first_live(at.n + 1);
  }

  // One 16-byte piece: `left` live channels from `from` on, the others zero.
  RNP_DEVICE void fetch_piece(char* to, const void* tensor, int64_t from, int64_t step, int32_t left) {
    const T* source = static_cast<const T*>(tensor) + (left > 0 ? from : 0);
    const bool straight = step == 1 && (left <= 0 || (reinterpret_cast<uintptr_t>(source) & 15) == 0);
    if (straight && left > 0) {
      copy_async(to, source, left < kPiece ? left * static_cast<int>(sizeof(T)) : 16);
      return;
    }
    union {
      T element[kPiece];
      Vec16 all;
    } piece;
    RNP_UNROLL
    for (int e = 0; e < kPiece; ++e) piece.element[e] = e < left ? source[e * step] : T{};
    *reinterpret_cast<Vec16*>(to) = piece.all;
  }

  RNP_DEVICE void fetch(const Run& at, int stage) {
    char* grad = shared + stage * 2 * kOperandBytes;
    char* input = grad + kOperandBytes;
    const int32_t outs = live_out(at.n), ins = live_in(at.n);
    for (int i = thread_index(); i < kPixels * kRowPieces; i += thread_count()) {
      const int row = i / kRowPieces, piece = i % kRowPieces;
      const int64_t pixel = at.pixel + row;
      const int32_t oy = static_cast<int32_t>(pixel / p.out_w),
                    ox = static_cast<int32_t>(pixel - int64_t{oy} * p.out_w);
      const int32_t y = oy * p.stride_h - p.pad_top + tap_y * p.dilation_h;
      const int32_t x = ox * p.stride_w - p.pad_left + tap_x * p.dilation_w;
      const bool inside = pixel < positions() && y >= 0 && y < p.h && x >= 0 && x < p.w;
      const int64_t out_channel = int64_t{group} * p.group_out + first_out + piece * kPiece;
      const int64_t in_channel = int64_t{group} * p.group_in + first_in + piece * kPiece;
      fetch_piece(grad + piece_at(row, piece), p.grad,
                  at.n * p.grad_stride.n + out_channel * p.grad_stride.c + oy * p.grad_stride.h + ox * p.grad_stride.w,
                  p.grad_stride.c, inside ? outs - piece * kPiece : 0);
      fetch_piece(input + piece_at(row, piece), p.input,
                  at.n * p.input_stride.n + in_channel * p.input_stride.c + y * p.input_stride.h + x * p.input_stride.w,
                  p.input_stride.c, inside ? ins - piece * kPiece : 0);
    }
  }

  // Warps 2 by 2, each 32 output by 32 input channels.
  RNP_DEVICE void multiply(int stage) {
    const char* grad = shared + stage * 2 * kOperandBytes;
    const char* input = grad + kOperandBytes;
    if constexpr (kMatrix) {
      const int lane = thread_index() & 31, warp = thread_index() >> 5, matrix = lane >> 3, line = lane & 7;
      RNP_UNROLL
      for (int step = 0; step < kPixels / 16; ++step) {
        uint32_t a[2][4], b[2][4];
        RNP_UNROLL
        for (int m = 0; m < 2; ++m) {  // stored by pixel: matrices (k, channel), transposed on the way
          const int channel = (warp >> 1) * 32 + m * 16 + (matrix & 1) * 8,
                    pixel = step * 16 + (matrix >> 1) * 8 + line;
          load_matrices_transposed(a[m], grad + piece_at(pixel, channel / 8));
        }
        RNP_UNROLL
        for (int n = 0; n < 2; ++n) {
          const int channel = (warp & 1) * 32 + n * 16 + (matrix >> 1) * 8, pixel = step * 16 + (matrix & 1) * 8 + line;
          load_matrices_transposed(b[n], input + piece_at(pixel, channel / 8));
        }
        RNP_UNROLL
        for (int i = 0; i < 8; ++i) {  // i: (16 output channels, 16 input channels, half of them)
          float(&d)[4] = *reinterpret_cast<float(*)[4]>(&sums[i * 4]);
          multiply_matrices(T{}, d, a[i >> 2], b[i >> 1 & 1][(i & 1) * 2], b[i >> 1 & 1][(i & 1) * 2 + 1]);
        }
      }
    } else {  // thread (m, n) of 16 x 8 owns output channels 4 m … and input channels n + 8 j
      const int m = thread_index() >> 3, n = thread_index() & 7;
      for (int k = 0; k < kPixels; ++k) {
        Sum<T> a[4], b[8];
        RNP_UNROLL
        for (int i = 0; i < 4; ++i) a[i] = element(grad, k, m * 4 + i);
        RNP_UNROLL
        for (int j = 0; j < 8; ++j) b[j] = element(input, k, n + 8 * j);
        RNP_UNROLL
        for (int i = 0; i < 32; ++i) sums[i] = multiply_add(a[i >> 3], b[i & 7], sums[i]);
      }
    }
  }
  RNP_DEVICE static Sum<T> element(const char* operand, int pixel, int channel) {
    return widen(reinterpret_cast<const T*>(operand + piece_at(pixel, channel / kPiece))[channel % kPiece]);
  }

  RNP_DEVICE void store(int64_t split) {
    Sum<T>* to = static_cast<Sum<T>*>(p.partial) + split * p.groups * p.group_out * p.group_in * p.kh * p.kw;
    RNP_UNROLL
    for (int i = 0; i < kSums; ++i) {
      int o, c;
      if constexpr (kMatrix) {
        const int lane = thread_index() & 31, warp = thread_index() >> 5;
        o = (warp >> 1) * 32 + (i >> 4) * 16 + (i >> 1 & 1) * 8 + (lane >> 2);
        c = (warp & 1) * 32 + (i >> 3 & 1) * 16 + (i >> 2 & 1) * 8 + (lane & 3) * 2 + (i & 1);
      } else {
        o = (thread_index() >> 3) * 4 + (i >> 3);
        c = (thread_index() & 7) + 8 * (i & 7);
      }
      o += first_out, c += first_in;
      if (o < p.group_out && c < p.group_in)
        to[(((int64_t{group} * p.group_out + o) * p.group_in + c) * p.kh + tap_y) * p.kw + tap_x] = sums[i];
    }
  }

  RNP_DEVICE void run() {
    const int32_t outs = (p.group_out + kSide - 1) / kSide, ins = (p.group_in + kSide - 1) / kSide;
    int64_t rest = block_index();
    tap_x = static_cast<int32_t>(rest % p.kw), rest /= p.kw;
    tap_y = static_cast<int32_t>(rest % p.kh), rest /= p.kh;
    first_in = static_cast<int32_t>(rest % ins) * kSide, rest /= ins;
    first_out = static_cast<int32_t>(rest % outs) * kSide, rest /= outs;
    group = static_cast<int32_t>(rest % p.groups);
    const int64_t split = rest / p.groups;
    last_sample = p.n * (split + 1) / p.splits;
    RNP_UNROLL
    for (int i = 0; i < kSums; ++i) sums[i] = 0;
    Run fetched = first_live(p.n * split / p.splits), used = fetched;
    RNP_UNROLL
    for (int stage = 0; stage < kStages - 1; ++stage) {
      if (fetched.n < last_sample) fetch(fetched, stage), fetched = next(fetched);
      commit_copies();
    }
    int reading = 0, writing = kStages - 1;
    while (used.n < last_sample) {
      wait_copies<kStages - 2>();
      sync_block();  // the stage has landed for all, and the one before it is free
      if (fetched.n < last_sample) fetch(fetched, writing), fetched = next(fetched);
      commit_copies();
      multiply(reading);
      used = next(used);
      reading = reading + 1 == kStages ? 0 : reading + 1;
      writing = writing + 1 == kStages ? 0 : writing + 1;
    }
    wait_copies<0>();
    store(split);
  }
};

// Adds the partial sums of the runs of samples, in their order.
template <typename T>
RNP_DEVICE void weight_grad_sum_block(const WeightGradArgs& p, int64_t elements) {
  const int64_t step = block_count() * thread_count();
  for (int64_t i = block_index() * thread_count() + thread_index(); i < elements; i += step) {
    const Sum<T>* from = static_cast<const Sum<T>*>(p.partial) + i;
    Sum<T> sum = 0;
    for (int32_t s = 0; s < p.splits; ++s) sum += from[s * elements];
    static_cast<T*>(p.weight_grad)[i] = narrow_to<T>(sum);
  }
}

}  // namespace rnp::cuda
