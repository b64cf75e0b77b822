// What follows the sums: scale, bias, residual, activation, cast and layout, for outputs that the tile kernels do not
// store themselves; the channels beyond the prefix; the means.
#pragma once

#include "core/schedule.h"
#include "cpu/microkernel.h"

namespace rnp::cpu {

// Sums of a block of channels: sums[row][col * col_step + channel], rows row_step apart.
struct SumsView {
  const float* sums;
  int64_t row_step, col_step;
};

// Output pixels of sample n: `rows` x `cols`, from (row0, col0) on, row_step and col_step apart.
struct Patch {
  int64_t n, row0, rows, col0, cols;
  int64_t row_step = 1, col_step = 1;
};

// Output channels [channel0, channel0 + count) of the patch from their sums.
void finish_patch(const PrefixConv2dParams& p, const Patch& patch, int64_t channel0, int64_t count,
                  const SumsView& view, Transpose transpose);

// Channels [channel0, channel1) lie beyond the prefix: activation(residual), or 0, or nothing where the tail is
// skipped.
void fill_tail(const PrefixConv2dParams& p, int64_t n, int64_t row0, int64_t row1, int64_t channel0, int64_t channel1);

// row_sums[c] of each row = sum over the row's columns of the output as stored, columns in order.
void sum_rows(const PrefixConv2dParams& p, int64_t n, int64_t row0, int64_t row1, int64_t channel0, int64_t channel1,
              float* row_sums);

// pooled = sum over rows, in order, / positions. row_sums is (n, out_h, c_out).
void finish_pooled(const PrefixConv2dParams& p, const float* row_sums, int64_t n);

}  // namespace rnp::cpu
