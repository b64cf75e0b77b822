// What one launch of the tile kernel computes: a convolution over a regular grid of outputs whose taps along each axis
// are a list. Forward, and the input gradient (one launch for each residue of the stride), are both of this form.
#pragma once

#include <cstdint>

#include "core/prefix_conv2d.h"
#include "cuda/tiles.h"

namespace rnp::cuda {

// How the sm_90a kernel may see a layer whose outputs step by one: a sample's map, with the zeros around it that taps
// reach, is a stream of rows `pitch` pixels long, and output (oy, ox) is position oy · pitch + ox of it. Then a tap is
// a distance in the stream, the same for all outputs, and what a tile needs of a chunk for all taps are its own
// positions and `halo` more. Zeros behind a row are those before the next, and those below a sample those above the
// next. Positions that are no output are computed and dropped.
struct Stream {
  int32_t pitch = 0;  // 0: the layer has none
  int32_t rows = 0;   // of a sample
  int32_t halo = 0;
  int64_t positions() const { return int64_t{rows} * pitch; }
};

// Taps along one axis: input row (column) `delta` + i · `delta_step` of tap i, seen from output 0, and which of the
// kernel's taps it is.
struct Axis {
  int32_t count = 0;  // at most kMaxTaps
  int32_t step = 1;   // input rows (columns) from one output to the next
  int32_t delta = 0, delta_step = 0;
  int32_t tap = 0, tap_step = 0;
};

// The packed weights: [group][chunk][tap][out channel][128 bytes of channels], zeros beyond the channels of a group.
// What a stage needs, any run of output channels for one chunk and tap, is one run of memory, for every tile: one copy
// serves all of them. In the row of output channel o piece i of 16 bytes stands at i ^ o % 8, the swizzle of wgmma, so
// that one bulk copy brings a tile of weights as the matrix unit reads it; the sm_80 kernel takes half a row, piece by
// piece.
//
// Channels fewer than one step would leave most of it empty, so there K runs over `run` taps and their channels
// together, `pixel` elements to a tap, and that many taps count as one:
//   unfolded  one group: a row of the kernel, each tap's channels padded to pieces of 16 bytes. The launch reads a copy
//             of the input in which they are neighbours (UnfoldArgs).
//   flat      several groups: the whole kernel, without padding; the launch gathers element by element.
// Layer and dtype decide, never the input or the dilation: weights are packed before those are known.
struct PackedTiles {
  int32_t groups = 1, group_in = 1, group_out = 1, kh = 1, kw = 1, element = 4;  // element: bytes
  bool may_run = true;                                                           // over taps

  bool few() const { return may_run && group_in * element < kStepBytes; }
  bool unfolded() const { return few() && groups == 1 && kw > 1; }
  bool flat() const { return few() && groups > 1; }
  int32_t run() const { return unfolded() ? kw : (flat() ? kh * kw : 1); }
  int32_t pixel() const { return unfolded() ? (group_in * element + 15) / 16 * 16 / element : group_in; }
  int32_t chunk() const { return kPackBytes / element; }
  int32_t taps() const { return kh * kw / run(); }
  int32_t chunks() const { return (run() * pixel() + chunk() - 1) / chunk(); }
  int64_t elements() const { return int64_t{groups} * chunks() * taps() * group_out * chunk(); }
};

// The input as the copy engine's im2col mode sees it (cuTensorMapEncodeIm2col): the first pixels of all outputs are the
// box from `lower` to size - 1 + `upper`, in steps; a tap is an offset into it. Corners and steps are (w, h).
struct Im2colBox {
  bool possible = false;
  const void* base = nullptr;
  int64_t c = 0, w = 0, h = 0, n = 0;
  int64_t w_stride = 0, h_stride = 0, n_stride = 0;  // bytes
  int32_t lower[2] = {}, upper[2] = {}, step[2] = {1, 1};
};

struct ConvArgs {
  gpu::Cut cut;  // n, positions, groups, channels of a group, tile
  int32_t h = 0, w = 0, out_h = 0, out_w = 0;
  int32_t c_in = 0, c_out = 0;
  Axis y, x;

  const void* input = nullptr;
  Strides4 input_stride;
  const void* packed = nullptr;  // PackedTiles
  int32_t chunks = 0, taps = 0, kernel_w = 0;
  bool flat = false, gather = false;  // gather: elements are fetched one by one

  // sm_90a: how K is summed (segment_chunks in tiles.h). Where K is split, segments are tiles of their own (tile number
  // t is segment t mod splits of tile t / splits) and leave their sums in `partial`, [segment][sample][pixel][channel].
  int32_t segment_chunks = 0, splits = 1;
  float* partial = nullptr;
  int32_t box_lower_w = 0, box_lower_h = 0;
  bool use_tma = false;  // the input has an Im2colBox
  // sm_90a: the input of a chunk is kept for all taps. cut.positions are those of the stream; a window holds as many, a
  // multiple of eight, and window_stages stages of weights fit beside two of them. 0: each tap fetches its input.
  int32_t window_rows = 0, window_stages = 0, pitch = 0;

  const int32_t *in_prefix = nullptr, *out_prefix = nullptr;  // (n)
  // Order of the batch, and the number of the next tile to take; null where no prefix is given.
  const int32_t *order_sample = nullptr, *order_in = nullptr, *order_out = nullptr, *order_live = nullptr;
  int32_t* ticket = nullptr;

  const int32_t* row = nullptr;  // (n)
  int32_t lines = 1;
  const float *scale = nullptr, *bias = nullptr;  // (c_out), or (lines, c_out)
  int64_t scale_row_stride = 0, bias_row_stride = 0;
  const void* residual = nullptr;
  Strides4 residual_stride;
  bool relu = false, zero_tail = true;

  void* output = nullptr;
  Strides4 output_stride;
  // 16 bytes of channels may be stored, and read from the residual, in one piece; residual and output have the
  // same strides, and so have the tables.
  bool vectors = false;
  bool dense = false;  // pixels of the output, and of the residual, are equally far apart across the ends of rows
};

}  // namespace rnp::cuda
