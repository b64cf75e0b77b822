// Convolutions with few channels a group (PackedLayout::small_groups), depthwise among them.
#pragma once

#include <functional>

#include "core/parallel.h"
#include "core/prefix_conv2d.h"

namespace rnp::cpu {

// `scratch` gives memory of the calling thread; row_sums (n, out_h, c_out), zeroed, or null.
void grouped_conv2d(const PrefixConv2dParams& params, const Threads& threads,
                    const std::function<float*(size_t)>& scratch, float* row_sums);

}  // namespace rnp::cpu
