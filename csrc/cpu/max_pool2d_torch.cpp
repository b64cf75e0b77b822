// Binding of max_pool2d on the CPU: check every argument, allocate, fill the plain struct, run.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <string>
#include <vector>

#include "core/prefix_conv2d.h"
#include "cpu/max_pool2d.h"
#include "torch_text.h"

namespace rnp::cpu {
namespace {

using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr const char* kOp = "max_pool2d: ";

Tensor max_pool2d_cpu(const Tensor& input, const std::optional<Tensor>& prefix, const std::vector<int64_t>& kernel,
                      const std::vector<int64_t>& stride, const std::vector<int64_t>& padding, const Text& tail) {
  STD_TORCH_CHECK(input.dim() == 4, kOp, "input must be (N, C, H, W); got ", input.dim(), " dimensions");
  STD_TORCH_CHECK(input.scalar_type() == ScalarType::Float, kOp, "input must be Float; got ",
                  torch::headeronly::toString(input.scalar_type()));
  STD_TORCH_CHECK(kernel.size() == 2 && stride.size() == 2 && padding.size() == 2, kOp,
                  "kernel, stride and padding must be two integers each");
  STD_TORCH_CHECK(tail.value == "zero" || tail.value == "skip", kOp, "tail must be \"zero\" or \"skip\"; got ",
                  tail.value);
  for (int i = 0; i < 2; ++i) {
    STD_TORCH_CHECK(kernel[i] > 0 && stride[i] > 0, kOp, "kernel and stride must be positive; got ", kernel[i], " and ",
                    stride[i]);
    STD_TORCH_CHECK(padding[i] >= 0 && 2 * padding[i] <= kernel[i], kOp,
                    "padding must be at most half the kernel; got ", padding[i], " and ", kernel[i]);
  }
  MaxPoolParams p;
  p.n = input.size(0), p.c = input.size(1), p.h = input.size(2), p.w = input.size(3);
  p.kernel_h = kernel[0], p.kernel_w = kernel[1], p.stride_h = stride[0], p.stride_w = stride[1];
  p.pad_h = padding[0], p.pad_w = padding[1];
  p.out_h = conv_output_size(p.h, p.kernel_h, p.stride_h, p.pad_h, p.pad_h, 1);
  p.out_w = conv_output_size(p.w, p.kernel_w, p.stride_w, p.pad_w, p.pad_w, 1);
  STD_TORCH_CHECK(p.out_h > 0 && p.out_w > 0, kOp, "the window must fit into the padded input; got input ", p.h, " x ",
                  p.w, ", window ", p.kernel_h, " x ", p.kernel_w);
  const Tensor dense = torch::stable::contiguous(input, MemoryFormat::ChannelsLast);
  std::optional<Tensor> sizes;
  if (prefix) {
    STD_TORCH_CHECK(
        prefix->is_cpu() && prefix->scalar_type() == ScalarType::Int && prefix->dim() == 1 && prefix->size(0) == p.n,
        kOp, "prefix must be int32 of shape (N,) = (", p.n, ",) on the CPU");
    sizes = torch::stable::contiguous(*prefix);
    p.prefix = static_cast<const int32_t*>(sizes->const_data_ptr());
    for (int64_t s = 0; s < p.n; ++s)
      STD_TORCH_CHECK(p.prefix[s] >= 0 && p.prefix[s] <= p.c, kOp, "prefix must lie in 0...", p.c, "; got ",
                      p.prefix[s], " at sample ", s);
  }
  Tensor output = torch::stable::empty({p.n, p.c, p.out_h, p.out_w}, ScalarType::Float, std::nullopt, std::nullopt,
                                       std::nullopt, MemoryFormat::ChannelsLast);
  p.zero_tail = tail.value == "zero";
  p.input = static_cast<const float*>(dense.const_data_ptr());
  p.output = static_cast<float*>(output.mutable_data_ptr());
  const int64_t rows = p.n * p.out_h, row_reads = p.out_w * p.kernel_h * p.kernel_w * p.c;
  if (rows > 0 && p.c > 0)
    torch::stable::parallel_for(0, rows, std::max<int64_t>(1, 65536 / row_reads),
                                [&](int64_t begin, int64_t end) { max_pool2d(p, begin, end); });
  return output;
}

STABLE_TORCH_LIBRARY_IMPL(rnp, CPU, m) { m.impl("max_pool2d", TORCH_BOX(&max_pool2d_cpu)); }

}  // namespace
}  // namespace rnp::cpu
