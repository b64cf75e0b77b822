// The interface between the driver of the weight's gradient (weight_grad.cpp) and its per-ISA kernels. Plain structs
// only, for the reason given in microkernel.h.
#pragma once

#include <cstdint>

#include "cpu/microkernel.h"

namespace rnp::cpu {

// Channels of a panel of grad_output (a row of the sums) and of the input (a line of a cache).
constexpr int64_t kGradLanes = 32, kGradPanel = 16;

// For each channel c < channels of an input panel and each lane of one or two panels of grad_output:
//   sums[c][lane] += sum over images, rows and columns of x[image][row][col][c] * g[image][row][col][lane]
// The sum over the positions is one chain of its own, added to `sums` at the end.
struct WeightGradArgs {
  const float* x;
  int64_t x_image_step, x_row_step, x_col_step;  // floats
  const float* g;
  int64_t g_image_step, g_row_step;  // floats; columns are kGradLanes apart
  int64_t images, rows, cols;
  float* sums;                            // rows of kGradLanes
  int64_t g_panel_step, sums_panel_step;  // floats to the second panel; unused where there is one
};

using WeightGradKernel = void (*)(const WeightGradArgs&);

// Tiles of one width.
struct WeightGradTiles {
  int lanes;                          // 0: there are none
  int max_channels;                   // of one call
  WeightGradKernel tile[kGradPanel];  // [channels - 1], channels 1…max_channels
};

struct WeightGradKernels {
  WeightGradTiles narrow, broad;  // up to kGradLanes lanes, one twice the other
  WeightGradTiles pair;           // two panels at once
  Transpose transpose;            // null: element by element

  const WeightGradTiles& for_lanes(int64_t lanes) const { return lanes > narrow.lanes ? broad : narrow; }
};

const WeightGradKernels& portable_weight_grad_kernels();
#if defined(__x86_64__)
const WeightGradKernels& avx2_weight_grad_kernels();
const WeightGradKernels& avx512_weight_grad_kernels();
#endif

}  // namespace rnp::cpu
