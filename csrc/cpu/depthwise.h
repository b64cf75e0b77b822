// Depthwise convolution (one input and one output channel per group): vectorised over channels.
#pragma once

#include <functional>

#include "core/parallel.h"
#include "core/prefix_conv2d.h"
#include "cpu/microkernel.h"

namespace rnp::cpu {

// `scratch` gives memory of the calling thread; row_sums (n, out_h, c_out), zeroed, or null.
void depthwise(const PrefixConv2dParams& params, const Kernels& kernels, const Threads& threads,
               const std::function<float*(size_t)>& scratch, float* row_sums);

}  // namespace rnp::cpu
