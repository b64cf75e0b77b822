// Bindings of agent_step and max_pool2d on CUDA: check, device guard, allocate, parameters, current stream, launch,
// check.
#include <limits>
#include <tuple>

#include "cuda/agent_args.h"
#include "cuda/tensors.h"
#include "torch_text.h"

namespace rnp::cuda {
namespace {

constexpr const char* kAgent = "agent_step";
constexpr const char* kPool = "max_pool2d";

std::tuple<Tensor, Tensor, Tensor, Tensor> agent_step_cuda(const Tensor& pooled, const OptionalTensor& hidden,
                                                           const OptionalTensor& previous_action, const Tensor& mean,
                                                           const Tensor& inv_std, const Tensor& encoder_weight,
                                                           const Tensor& encoder_bias, const Tensor& weight_ih,
                                                           const Tensor& weight_hh, const Tensor& bias_ih,
                                                           const Tensor& bias_hh, const Tensor& decoder_weight,
                                                           const Tensor& decoder_bias, double shift, int64_t channels) {
  STD_TORCH_CHECK(pooled.dim() == 2 && encoder_weight.dim() == 2 && weight_ih.dim() == 2 && weight_hh.dim() == 2 &&
                      decoder_weight.dim() == 2,
                  kAgent, ": pooled and the weights must be 2-D");
  const int64_t samples = pooled.size(0), features = pooled.size(1), code = encoder_weight.size(0);
  const int64_t state = weight_hh.size(1), actions = decoder_weight.size(0), input = weight_ih.size(1);
  const int64_t gates = 3 * state;
  STD_TORCH_CHECK(actions > 0 && channels >= 0 && channels <= std::numeric_limits<int32_t>::max(), kAgent,
                  ": needs at least one action and channels in 0…2^31-1; got ", actions, " and ", channels);
  STD_TORCH_CHECK(input == code || input == code + actions, kAgent, ": weight_ih must have code or code + k columns (",
                  code, " or ", code + actions, "); got ", input);
  STD_TORCH_CHECK(!previous_action || input == code + actions, kAgent,
                  ": previous_action needs its k columns in weight_ih; got ", input, " columns");
  const torch::stable::accelerator::DeviceGuard guard(pooled.get_device_index());
  std::vector<Tensor> keep;
  const auto floats = [&](const char* name, const Tensor& t, const std::vector<int64_t>& sizes) {
    check_device(kAgent, name, t, pooled);
    STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float, kAgent, ": ", name, " must be Float; got ",
                    torch::headeronly::toString(t.scalar_type()));
    check_size(kAgent, name, t, sizes);
    keep.push_back(torch::stable::contiguous(t));
    return static_cast<const float*>(keep.back().const_data_ptr());
  };
  AgentStepArgs p;
  p.samples = samples, p.features = static_cast<int32_t>(features), p.code = static_cast<int32_t>(code);
  p.hidden = static_cast<int32_t>(state), p.actions = static_cast<int32_t>(actions);
  p.input = static_cast<int32_t>(input), p.channels = static_cast<int32_t>(channels);
  p.shift = static_cast<float>(shift);
  p.pooled = floats("pooled", pooled, {samples, features});
  p.mean = floats("mean", mean, {features});
  p.inv_std = floats("inv_std", inv_std, {features});
  p.encoder_weight = floats("encoder_weight", encoder_weight, {code, features});
  p.encoder_bias = floats("encoder_bias", encoder_bias, {code});
  p.weight_ih = floats("weight_ih", weight_ih, {gates, input});
  p.weight_hh = floats("weight_hh", weight_hh, {gates, state});
  p.bias_ih = floats("bias_ih", bias_ih, {gates});
  p.bias_hh = floats("bias_hh", bias_hh, {gates});
  p.decoder_weight = floats("decoder_weight", decoder_weight, {actions, state});
  p.decoder_bias = floats("decoder_bias", decoder_bias, {actions});
  if (hidden) p.hidden_in = floats("hidden", *hidden, {samples, state});
  const OptionalTensor previous = checked_indices(kAgent, "previous_action", previous_action, samples, pooled);
  p.previous = indices(previous);
  Tensor hidden_out = empty_on(pooled, {samples, state}, ScalarType::Float);
  Tensor q = empty_on(pooled, {samples, actions}, ScalarType::Float);
  Tensor action = empty_on(pooled, {samples}, ScalarType::Int);
  Tensor out_prefix = empty_on(pooled, {samples}, ScalarType::Int);
  p.hidden_out = static_cast<float*>(hidden_out.mutable_data_ptr());
  p.q = static_cast<float*>(q.mutable_data_ptr());
  p.action = static_cast<int32_t*>(action.mutable_data_ptr());
  p.out_prefix = static_cast<int32_t*>(out_prefix.mutable_data_ptr());
  if (samples > 0) check_launch(kAgent, launch_agent_step(p, current_stream(pooled)));
  return {hidden_out, q, action, out_prefix};
}

Tensor max_pool2d_cuda(const Tensor& input, const OptionalTensor& prefix, const std::vector<int64_t>& kernel,
                       const std::vector<int64_t>& stride, const std::vector<int64_t>& padding, const Text& tail) {
  const ScalarType type = input.scalar_type();
  STD_TORCH_CHECK(
      input.dim() == 4 && (type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half),
      kPool, ": input must be Float, BFloat16 or Half (N, C, H, W); got ", torch::headeronly::toString(type), " ",
      text(input));
  STD_TORCH_CHECK(kernel.size() == 2 && stride.size() == 2 && padding.size() == 2, kPool,
                  ": kernel, stride and padding must be two integers each");
  STD_TORCH_CHECK(tail.value == "zero" || tail.value == "skip", kPool, ": tail must be \"zero\" or \"skip\"; got ",
                  tail.value);
  for (size_t i = 0; i < 2; ++i) {
    STD_TORCH_CHECK(kernel[i] > 0 && stride[i] > 0, kPool, ": kernel and stride must be positive; got ", kernel[i],
                    " and ", stride[i]);
    STD_TORCH_CHECK(padding[i] >= 0 && 2 * padding[i] <= kernel[i], kPool,
                    ": padding must be at most half the kernel; got ", padding[i], " and ", kernel[i]);
  }
  const int64_t n = input.size(0), c = input.size(1), h = input.size(2), w = input.size(3);
  const int64_t out_h = conv_output_size(h, kernel[0], stride[0], padding[0], padding[0], 1);
  const int64_t out_w = conv_output_size(w, kernel[1], stride[1], padding[1], padding[1], 1);
  STD_TORCH_CHECK(out_h > 0 && out_w > 0, kPool, ": the window must fit into the padded input; got input ", h, " x ", w,
                  ", window ", kernel[0], " x ", kernel[1]);
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max() / 4;
  for (int64_t size : {c, h, w, kernel[0], kernel[1], stride[0], stride[1]})
    STD_TORCH_CHECK(size <= kMost, kPool, ": sizes may be at most ", kMost, "; got ", size);
  const torch::stable::accelerator::DeviceGuard guard(input.get_device_index());
  const OptionalTensor live = checked_indices(kPool, "prefix", prefix, n, input);
  const Tensor dense = torch::stable::contiguous(input, MemoryFormat::ChannelsLast);
  Tensor output = empty_on(input, {n, c, out_h, out_w}, type, true);
  MaxPoolArgs p;
  p.n = n, p.c = static_cast<int32_t>(c), p.h = static_cast<int32_t>(h), p.w = static_cast<int32_t>(w);
  p.out_h = static_cast<int32_t>(out_h), p.out_w = static_cast<int32_t>(out_w);
  p.kernel_h = static_cast<int32_t>(kernel[0]), p.kernel_w = static_cast<int32_t>(kernel[1]);
  p.stride_h = static_cast<int32_t>(stride[0]), p.stride_w = static_cast<int32_t>(stride[1]);
  p.pad_h = static_cast<int32_t>(padding[0]), p.pad_w = static_cast<int32_t>(padding[1]);
  p.input = dense.const_data_ptr();
  p.prefix = indices(live), p.zero_tail = tail.value == "zero";
  p.output = output.mutable_data_ptr();
  if (output.numel() > 0)
    check_launch(kPool, launch_max_pool2d(p, dtype_of(kPool, "input", input), current_stream(input)));
  return output;
}

}  // namespace
}  // namespace rnp::cuda

STABLE_TORCH_LIBRARY_IMPL(rnp, CUDA, m) {
  m.impl("agent_step", TORCH_BOX(&rnp::cuda::agent_step_cuda));
  m.impl("max_pool2d", TORCH_BOX(&rnp::cuda::max_pool2d_cuda));
}
