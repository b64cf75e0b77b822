// The interface between the driver of convolutions with few channels a group (grouped.cpp) and its per-ISA kernels.
// Plain structs only, as in microkernel.h.
#pragma once

#include <cstdint>

namespace rnp::cpu {

// One output row of some output channels, channels contiguous in memory, a vector of them at a time; `channel` is the
// first, on a vector's boundary. Output channel c reads input channels c / OG * IG + g, g < IG: IG inputs and OG
// outputs a group. Pointers are to the first channel of each, `in_live` counts from there.
struct LaneRowArgs {
  int64_t channel, channels;
  const float* x;      // column 0 of the first kernel row that meets the input
  int64_t rows;        // kernel rows that do
  int64_t x_row_step;  // floats between them
  int64_t x_col_step, width, pad_left;
  const float* w;   // [16 output channels][kernel row][kernel column][g][16], from a block's first lane or its middle
  int64_t w_block;  // floats between blocks
  int64_t cols;     // output columns
  int in_live, out_live;  // channels that may be read, and that are written (`channels` of them)
  float* out;
  const float* scale;
  const float* bias;
  const float* residual;
  int64_t out_col_step, residual_col_step;
  bool relu;
  bool stream;  // whole vectors are stored past the caches; they are whole, aligned lines (kernels that `stream`)
  const float* ahead;  // column 0 of the input rows that the next output row reads first, to be asked for meanwhile
  int64_t ahead_rows, ahead_row_step;
};
using LaneRowKernel = void (*)(const LaneRowArgs&);

// Kernels exist for these.
constexpr int kLaneGroups = 5;  // (IG, OG): (1, 1), (2, 2), (4, 4), (8, 8), (1, 2)
constexpr int kLaneWidths = 3;  // kernel columns 3; 5 and 7 for depthwise; strides 1 and 2 (7: 1), dilation 1

// sums[o][i] = sum over t of w[t][o] * x[offset[t] + i] for o < outputs (1, 2 or 4), i < length rounded up to a vector.
struct PlaneArgs {
  const float* x;
  const int64_t* offset;
  int64_t taps;
  const float* w;  // [tap][outputs]
  int64_t outputs, length;
  float* sums;
  int64_t sums_step;
};

// A band of output rows of some groups, float32, columns contiguous, strides of 1 or 2 along the row: each group's
// planes (plane_geometry.h) are written, multiplied, and finished. Pointers are to the first group's channels.
struct PlaneBandArgs {
  const float* x;
  int64_t x_channel_step, x_row_step, height, width;
  int64_t first_row;  // input row of plane row 0, phase 0; may be negative
  int64_t stride_h, stride_w, pad_left;
  int64_t row_phases, col_phases;
  const int64_t* row_phase;
  const int64_t* col_phase;
  int64_t plane_rows, pitch, channel_floats;
  const int64_t* offset;          // [tap][input channel of a group]
  const int64_t* partial_offset;  // of the one group with fewer live inputs
  int64_t area, icg, ocg, groups, in_live, out_live;
  // [block of output channels][tap][input channel][lanes of a block], of all groups. Blocks from channel `w_narrow` on
  // have 16 lanes, whatever the others have.
  const float* w;
  int64_t w_lanes, w_narrow;
  int64_t w_block, w_first;  // floats between blocks; the first group's first output channel
  float* out;
  const float* scale;
  const float* bias;
  const float* residual;
  int64_t out_channel_step, out_row_step, residual_channel_step, residual_row_step;
  bool relu;
  int64_t rows, cols, length;
  float* planes;  // memory for them, the sums and one set of weights
  float* sums;
  int64_t sums_step;
  float* weights;
};

// Between 16 bits and float32, `count` values side by side; rounded to nearest, ties to even.
struct HalfConversion {
  void (*widen)(const uint16_t* from, int64_t count, float* to);
  void (*narrow)(const float* from, int64_t count, uint16_t* to);
};

struct GroupedKernels {
  int lanes;     // of a vector
  bool streams;  // knows LaneRowArgs::stream
  LaneRowKernel lane_row[kLaneWidths][2][kLaneGroups];
  void (*planes)(const PlaneArgs&);
  void (*plane_band)(const PlaneBandArgs&);
  HalfConversion bfloat16, float16;
};

const GroupedKernels& portable_grouped_kernels();
#if defined(__x86_64__)
const GroupedKernels& avx2_grouped_kernels();
const GroupedKernels& avx512_grouped_kernels();
#endif
const GroupedKernels& grouped_kernels_in_use();  // those of the ISA in use

}  // namespace rnp::cpu
