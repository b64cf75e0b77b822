// Exact counting of multiply-accumulates, as DESIGN.md defines them.
#pragma once

#include "core/prefix_conv2d.h"

namespace rnp {

// MACs of one sample: in-prefix x out-prefix x kernel area x output positions; with groups, the live inputs and outputs
// of each group. Padding taps count, as usual in the literature.
int64_t conv_macs(const ConvShape& shape, int64_t in_prefix, int64_t out_prefix);

}  // namespace rnp
