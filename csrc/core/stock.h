// Which convolutions torch's own (oneDNN's, through aten::mkldnn_convolution) runs faster than ours at full width.
#pragma once

#include "core/prefix_conv2d.h"

namespace rnp {

// What oneDNN can run in this process; all false until rnp_kernels has asked torch.
void set_stock_dtypes(bool float32, bool bfloat16, bool float16);

// The one place of the rule; bench/dropin.py measures it. It never looks at the batch size: a sample of full width
// takes the same path in every batch, and oneDNN gives it the same bits there.
bool prefers_stock(const ConvShape& shape, DType dtype, bool channels_last);

}  // namespace rnp
