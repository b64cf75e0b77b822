// Which convolutions torch's own run faster than ours at full width.
#pragma once

#include "core/prefix_conv2d.h"

namespace rnp {

enum class Stock : int32_t {
  kNone,    // ours is the faster one
  kOneDnn,  // aten::mkldnn_convolution
  kGemm,    // aten::_slow_conv2d_forward: one matrix product for each sample
};

// How bfloat16 is multiplied, by oneDNN in this process or by ours in a layer: not at all, by converting (oneDNN
// then 1.8 to 2.9 times slower than ours, which converts too; depthwise 1.2 times faster), in pairs (AVX512-BF16), or
// by matrix tiles (AMX).
enum class StockBFloat16 : int32_t { kNone, kConverted, kPairs, kTiles };

// What oneDNN can run in this process; nothing until rnp_kernels has asked torch.
void set_stock_dtypes(bool float32, StockBFloat16 bfloat16, bool float16);

// The one place of the rule; bench/dropin.py measures it. It never looks at the batch size: a sample of full width
// takes the same path in every batch, and both stock functions give it the same bits there, whatever the number of
// threads (tests/test_prefix_conv2d_invariance.py). aten::convolution would not: it chooses by the batch size.
//
// `ours`: how our kernels multiply bfloat16 in this layer (cpu::bfloat16_in_use).
Stock stock_path(const ConvShape& shape, DType dtype, bool channels_last, StockBFloat16 ours);

// Whether oneDNN, and so torch, computes this layer as it should.
bool onednn_is_right(const ConvShape& shape, DType dtype);

// Whether its gradients are right too.
bool onednn_grads_are_right(const ConvShape& shape, DType dtype);

// The same for a step of training: forward and both gradients, float32, full width. bench/dropin.py --training measures
// it. kOneDnn: as torch chooses, which is oneDNN but for small samples alone.
Stock training_path(const ConvShape& shape, bool channels_last);

// The same for the gradients in bfloat16 at full width, each by itself: whether ours is the faster one. That of the
// weight is a sum over the batch, so its rule looks at the batch.
bool our_input_grad_wins(const ConvShape& shape, bool channels_last, StockBFloat16 ours);
bool our_weight_grad_wins(const ConvShape& shape, bool channels_last, StockBFloat16 ours);

}  // namespace rnp
