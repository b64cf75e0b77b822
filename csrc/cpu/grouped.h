// Convolutions with few channels a group (PackedLayout::small_groups), depthwise among them, and in contiguous NCHW
// those of few input channels.
#pragma once

#include <functional>

#include "core/parallel.h"
#include "core/prefix_conv2d.h"

namespace rnp::cpu {

// Whether a convolution without groups is done here: by layer and layout, never by batch or prefix.
bool runs_in_planes(const PrefixConv2dParams& params);

// float32, bfloat16 or float16. `scratch` gives memory of the calling thread; row_sums (n, out_h, c_out), zeroed, or
// null.
void grouped_conv2d(const PrefixConv2dParams& params, const Threads& threads,
                    const std::function<float*(size_t)>& scratch, float* row_sums);

}  // namespace rnp::cpu
