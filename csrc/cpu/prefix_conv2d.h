// CPU kernels of prefix_conv2d. Torch-free: arguments are checked by the binding (prefix_conv2d_torch.cpp).
#pragma once

#include <string>

#include "core/parallel.h"
#include "core/prefix_conv2d.h"

namespace rnp::cpu {

// Computes one call. Throws std::bad_alloc, nothing else; the large scratch is taken before anything is written.
void prefix_conv2d(const PrefixConv2dParams& params, const Threads& threads);

// The plain kernel: any dtype, any strides; float64's only one, and the yardstick of the others in the C++ tests.
void prefix_conv2d_plain(const PrefixConv2dParams& params, const Threads& threads);

// For people (RNP_LOG=1): the instruction set in use and the register tile that covers most of this layer's output.
std::string describe_kernel(const ConvShape& shape, DType dtype);

}  // namespace rnp::cpu
