#include "cpu/stock_torch.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/stableivalue_conversions.h>

#include <array>

namespace rnp::cpu {

using torch::stable::Tensor;

Tensor stock_conv2d(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias, const ConvShape& s,
                    Stock path) {
  using torch::stable::detail::from;
  const std::vector<int64_t> padding = {s.pad_top, s.pad_left}, stride = {s.stride_h, s.stride_w},
                             dilation = {s.dilation_h, s.dilation_w}, kernel = {s.kh, s.kw};
  // at::_convolution would do this; oneDNN takes the bias for an array.
  std::optional<Tensor> row;
  if (bias) row = torch::stable::contiguous(*bias);
  std::array<StableIValue, 7> stack;
  const char* name = "aten::mkldnn_convolution";
  if (path == Stock::kGemm) {
    name = "aten::_slow_conv2d_forward";
    stack = {from(input), from(weight), from(kernel), from(row), from(stride), from(padding), 0};
  } else {
    stack = {from(input), from(weight), from(row), from(padding), from(stride), from(dilation), from(s.groups)};
  }
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(name, "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

}  // namespace rnp::cpu
