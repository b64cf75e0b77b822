// Small groups in bfloat16 and float16.
#pragma once

#include "core/parallel.h"
#include "core/prefix_conv2d.h"

namespace rnp::cpu {

// grouped_conv2d of a tensor of 16 bits, by the kernels of float32: a band of rows is widened, convolved and rounded
// while it lies in L2. row_sums (n, out_h, c_out), zeroed, or null.
void grouped_half(const PrefixConv2dParams& params, const Threads& threads, float* row_sums);

}  // namespace rnp::cpu
