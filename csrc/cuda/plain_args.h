// Parameters of the kernels around the tile kernel: order of the batch, packing, means, and the plain kernels, which
// compute anything (float64, depthwise, kernels of more than 16 taps along an axis) one output element a thread.
#pragma once

#include <cstdint>

#include "core/prefix_conv2d.h"
#include "cuda/conv_args.h"

namespace rnp::cuda {

struct OrderArgs {
  int32_t n = 0, c_in = 0, c_out = 0;
  const int32_t *in_prefix = nullptr, *out_prefix = nullptr;
  int32_t *sample = nullptr, *in = nullptr, *out = nullptr;  // (n)
  int32_t* ticket = nullptr;                                 // set to 0
  // gpu::live_samples of every block of channels of the cut; filled where one block sorts.
  gpu::Cut cut;
  int32_t* live = nullptr;  // (groups, blocks)

  // A batch that one thread block sorts in shared memory: its keys are (out, in, sample) in 64 bits.
  static constexpr int32_t kSampleBits = 10, kChannelBits = 27;
  RNP_HD bool one_block() const {
    constexpr int32_t kMost = (1 << kChannelBits) - 1;
    return n <= 1 << kSampleBits && c_in <= kMost && c_out <= kMost;
  }
  RNP_HD int64_t blocks() const { return int64_t{cut.groups} * cut.blocks(); }
  int64_t workspace() const { return 3 * int64_t{n} + 1 + blocks(); }  // elements of the arrays
  // The arrays follow each other from `at` on.
  void place(int32_t* at) { sample = at, in = at + n, out = at + 2 * n, ticket = at + 3 * n, live = at + 3 * n + 1; }
};

// The order that a launch was given, as its kernel reads it.
inline void use_order(ConvArgs& a, const OrderArgs& o) {
  a.order_sample = o.sample, a.order_in = o.in, a.order_out = o.out, a.ticket = o.ticket;
  a.order_live = o.one_block() ? o.live : nullptr;
}

struct PackArgs {
  PackedTiles layout;
  const void* weight = nullptr;
  // Of group, output channel and input channel of the packed convolution, and of the kernel's two axes. An input
  // gradient exchanges the roles of the channels.
  int64_t group_stride = 0, out_stride = 0, in_stride = 0, y_stride = 0, x_stride = 0;
  void* packed = nullptr;
};

// A copy of an input of few channels in which what a row of the kernel reads for one output is one run of memory:
// (n, rows, columns, pixel), the channels padded to pieces of 16 bytes, the padding of the map written out, zeros
// beyond the input prefix. Then the convolution is one of (kh x 1) over the channels of `kw` neighbouring pixels, of
// which each output's begin some pixels behind the last one's: ConvArgs::input has overlapping pixels.
//
// Column c is input column c - left; where that does not put the taps of an output side by side (dilation along x), or
// copies much that nobody reads (a stride longer than the kernel), every output has a window of `kw` columns of its
// own.
struct UnfoldArgs {
  int64_t n = 0, rows = 0, columns = 0;
  int32_t pixel_pieces = 1;                    // of 16 bytes; 1 or 2
  int32_t window = 1, step = 1, dilation = 1;  // columns of a window; input columns between windows, and within one
  int32_t top = 0, left = 0;                   // input row and column of (0, 0), negated
  int32_t c_in = 0, h = 0, w = 0;
  const void* input = nullptr;
  Strides4 input_stride;
  const int32_t* in_prefix = nullptr;  // (n)
  void* unfolded = nullptr;            // aligned to 16

  static constexpr int kRun = 128;  // pieces of a line that a warp copies at a time
  RNP_HD int64_t pieces() const { return n * rows * columns * pixel_pieces; }
  RNP_HD int64_t runs() const { return (columns * pixel_pieces + kRun - 1) / kRun; }  // of a line
};

// Input row of tap k for output row o: (o · step + offset + k · tap) / divisor, where that is a whole number.
struct PlainAxis {
  int32_t step = 1, offset = 0, tap = 1, divisor = 1;
};

struct PlainArgs {
  int64_t n = 0;
  int32_t groups = 1, group_in = 1, group_out = 1, kh = 1, kw = 1;
  int32_t h = 0, w = 0, out_h = 0, out_w = 0;
  PlainAxis y, x;
  const void* input = nullptr;
  Strides4 input_stride;
  const void* weight = nullptr;
  int64_t group_stride = 0, out_stride = 0, in_stride = 0, y_stride = 0, x_stride = 0;  // as in PackArgs
  const int32_t *in_prefix = nullptr, *out_prefix = nullptr, *row = nullptr;
  int32_t lines = 1;
  const void *scale = nullptr, *bias = nullptr;  // float32, or float64 beside float64
  int64_t scale_row_stride = 0, bias_row_stride = 0;
  const void* residual = nullptr;
  Strides4 residual_stride;
  bool relu = false, zero_tail = true;
  void* output = nullptr;
  Strides4 output_stride;
};

struct MeanArgs {
  int64_t n = 0, positions = 0;
  int32_t channels = 0, out_w = 0;
  const void* output = nullptr;
  Strides4 output_stride;
  const int32_t* out_prefix = nullptr;  // not null where the tail is skipped: channels beyond it have the mean 0
  float* mean = nullptr;                // (n, channels)
};

// dW[o][c][ky][kx] = Σ over samples and positions of grad[o] · input[c]. Work is cut into `splits` runs of samples,
// each with its own partial sums, added in order afterwards: deterministic.
struct WeightGradArgs {
  int64_t n = 0;
  int32_t groups = 1, group_in = 1, group_out = 1, kh = 1, kw = 1;
  int32_t h = 0, w = 0, out_h = 0, out_w = 0;
  int32_t stride_h = 1, stride_w = 1, pad_top = 0, pad_left = 0, dilation_h = 1, dilation_w = 1;
  const void *grad = nullptr, *input = nullptr;
  Strides4 grad_stride, input_stride;
  const int32_t *in_prefix = nullptr, *out_prefix = nullptr;
  int32_t splits = 1;
  void* partial = nullptr;      // (splits, elements of the weight) float32, or float64 beside float64
  void* weight_grad = nullptr;  // contiguous

  int64_t elements() const { return int64_t{groups} * group_out * group_in * kh * kw; }
};

}  // namespace rnp::cuda
