// The best stock convolution, through the dispatcher.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <vector>

#include "core/stock.h"

namespace rnp::cpu {

// The convolution that `path` (not kNone) names, with the geometry of `shape`, whose paddings are even.
torch::stable::Tensor stock_conv2d(const torch::stable::Tensor& input, const torch::stable::Tensor& weight,
                                   const std::optional<torch::stable::Tensor>& bias, const ConvShape& shape,
                                   Stock path);

}  // namespace rnp::cpu
