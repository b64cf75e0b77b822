// 1x1 kernels on contiguous NCHW: a matrix product whose lanes are neighbouring pixels of a plane, so that nothing is
// gathered into pixels on the way in or scattered on the way out. It reads the weights as they are, not their packed
// copy.
#pragma once

#include <functional>

#include "core/parallel.h"
#include "core/prefix_conv2d.h"
#include "cpu/microkernel.h"

namespace rnp::cpu {

// Whether a call is one of a plane_products layer (core/packing.h) in that layout.
bool multiplies_planes(const PrefixConv2dParams& p);

// A call of which that holds. `scratch` gives memory for all threads; `row_sums` (n, out_h, c_out), or null, receives
// those of the output.
void plane_pointwise(const PrefixConv2dParams& p, const Kernels& kernels, const Threads& threads,
                     const std::function<float*(size_t)>& scratch, float* row_sums);

}  // namespace rnp::cpu
