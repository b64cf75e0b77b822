// Binding of prefix_conv2d_weight_grad on CUDA: check, device guard, allocate, parameters, current stream, launch,
// check.
#include "cuda/launch.h"
#include "cuda/tensors.h"

namespace rnp::cuda {
namespace {

constexpr const char* kOp = "prefix_conv2d_weight_grad";

Tensor weight_grad_cuda(const Tensor& grad, const Tensor& input, const std::vector<int64_t>& weight_size,
                        const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                        const std::vector<int64_t>& dilation, int64_t groups, const OptionalTensor& in_prefix,
                        const OptionalTensor& out_prefix) {
  check_device(kOp, "input", input, grad);
  const DType dtype = dtype_of(kOp, "grad_output", grad);
  STD_TORCH_CHECK(input.scalar_type() == grad.scalar_type(), kOp, ": input must have grad_output's dtype ",
                  torch::headeronly::toString(grad.scalar_type()), "; got ",
                  torch::headeronly::toString(input.scalar_type()));
  const ConvShape s = checked_shape(kOp, sizes_of(input), weight_size, stride, padding, dilation, groups);
  check_size(kOp, "grad_output", grad, {s.n, s.c_out, s.out_h, s.out_w});
  const torch::stable::accelerator::DeviceGuard guard(grad.get_device_index());
  const OptionalTensor in = checked_indices(kOp, "in_prefix", in_prefix, s.n, grad);
  const OptionalTensor out = checked_indices(kOp, "out_prefix", out_prefix, s.n, grad);
  Tensor result = empty_on(grad, weight_size, grad.scalar_type());
  if (s.n == 0) return torch::stable::zero_(result);
  Device device;
  check_launch(kOp, current_device(&device));
  WeightGradArgs a = weight_grad_args(s, device.multiprocessors);
  Tensor partial =
      empty_on(grad, {a.splits * a.elements()}, dtype == DType::kFloat64 ? ScalarType::Double : ScalarType::Float);
  a.grad = grad.const_data_ptr(), a.grad_stride = strides_of(grad);
  a.input = input.const_data_ptr(), a.input_stride = strides_of(input);
  a.in_prefix = indices(in), a.out_prefix = indices(out);
  a.partial = partial.mutable_data_ptr(), a.weight_grad = result.mutable_data_ptr();
  check_launch(kOp, launch_weight_grad(a, dtype, current_stream(grad)));
  return result;
}

}  // namespace
}  // namespace rnp::cuda

STABLE_TORCH_LIBRARY_IMPL(rnp, CUDA, m) {
  m.impl("prefix_conv2d_weight_grad", TORCH_BOX(&rnp::cuda::weight_grad_cuda));
}
