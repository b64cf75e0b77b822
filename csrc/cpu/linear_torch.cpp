// Binding of linear on the CPU: check every argument, allocate, fill the plain struct, run.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <optional>

#include "cpu/linear.h"
#include "cpu/scratch.h"
#include "cpu/torch_common.h"

namespace rnp::cpu {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr const char* kOp = "linear: ";
constexpr int64_t kProductsOfThread = 1 << 17;  // some microseconds: what a thread must have to do

Tensor linear_cpu(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
                  const std::optional<Tensor>& in_prefix, int64_t channel_inputs) {
  STD_TORCH_CHECK(input.dim() == 2 && weight.dim() == 2 && input.size(1) == weight.size(1), kOp,
                  "input and weight must be (N, C) and (K, C) of one C; got ", input.dim(), " and ", weight.dim(),
                  " dimensions, last sizes ", input.dim() > 0 ? input.size(input.dim() - 1) : 0, " and ",
                  weight.dim() > 0 ? weight.size(weight.dim() - 1) : 0);
  for (const Tensor& t : {input, weight})
    STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float, kOp, "input and weight must be Float; got ",
                    torch::headeronly::toString(t.scalar_type()));
  LinearParams p;
  p.samples = input.size(0), p.inputs = input.size(1), p.outputs = weight.size(0);
  const Tensor x = torch::stable::contiguous(input), w = torch::stable::contiguous(weight);
  std::optional<Tensor> b;
  if (bias) {
    STD_TORCH_CHECK(
        bias->is_cpu() && bias->scalar_type() == ScalarType::Float && bias->dim() == 1 && bias->size(0) == p.outputs,
        kOp, "bias must be Float of shape (K,) = (", p.outputs, ",) on the CPU");
    b = torch::stable::contiguous(*bias);
    p.bias = static_cast<const float*>(b->const_data_ptr());
  }
  std::vector<int64_t> live;
  if (in_prefix) {
    STD_TORCH_CHECK(channel_inputs > 0 && p.inputs % channel_inputs == 0, kOp,
                    "channel_inputs must be positive and divide the inputs; got ", channel_inputs, " and ", p.inputs);
    for (int32_t channels : checked_indices("linear", "in_prefix", in_prefix, p.samples, p.inputs / channel_inputs))
      live.push_back(channels * channel_inputs);
    p.live = live.data();
  }
  Tensor output = torch::stable::empty({p.samples, p.outputs}, ScalarType::Float);
  p.input = static_cast<const float*>(x.const_data_ptr());
  p.weight = static_cast<const float*>(w.const_data_ptr());
  p.output = static_cast<float*>(output.mutable_data_ptr());
  if (p.samples == 0 || p.outputs == 0) return output;
  const LinearOrder order = linear_order(p);
  const int64_t parts = (p.outputs + kLinearOutputs - 1) / kLinearOutputs;
  const int64_t products = std::max<int64_t>(1, p.samples * p.inputs * kLinearOutputs);
  torch::stable::parallel_for(
      0, parts, std::max<int64_t>(1, kProductsOfThread / products), [&](int64_t begin, int64_t end) {
        static thread_local ScratchMemory scratch;
        float* memory = scratch.get(static_cast<size_t>(linear_scratch(p)));
        for (int64_t part = begin; part < end; ++part)
          linear(p, order, part * kLinearOutputs, std::min(p.outputs, (part + 1) * kLinearOutputs), memory);
      });
  return output;
}

STABLE_TORCH_LIBRARY_IMPL(rnp, CPU, m) { m.impl("linear", TORCH_BOX(&linear_cpu)); }

}  // namespace
}  // namespace rnp::cpu
