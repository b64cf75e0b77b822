// Binding of agent_step on the CPU: check every argument, allocate, fill the plain struct, run.
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "cpu/agent_step.h"
#include "cpu/torch_common.h"

namespace rnp::cpu {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// Checks dtype, device and shape (rows, columns), or (rows) where columns < 0; keeps a contiguous tensor in `keep`.
const void* checked(std::vector<Tensor>& keep, const char* name, const Tensor& t, ScalarType dtype, int64_t rows,
                    int64_t columns) {
  check_dtype("agent_step", name, t, dtype);
  const bool matrix = columns >= 0;
  STD_TORCH_CHECK(t.dim() == (matrix ? 2 : 1) && t.size(0) == rows && (!matrix || t.size(1) == columns),
                  "agent_step: ", name, " must have shape (", rows, matrix ? ", " + std::to_string(columns) : "",
                  "); got ", text(t));
  if (t.is_contiguous()) return t.const_data_ptr();
  keep.push_back(torch::stable::contiguous(t));
  return keep.back().const_data_ptr();
}

std::tuple<Tensor, Tensor, Tensor, Tensor> agent_step_cpu(const Tensor& pooled, const OptionalTensor& hidden,
                                                          const OptionalTensor& previous_action, const Tensor& mean,
                                                          const Tensor& inv_std, const Tensor& encoder_weight,
                                                          const Tensor& encoder_bias, const Tensor& weight_ih,
                                                          const Tensor& weight_hh, const Tensor& bias_ih,
                                                          const Tensor& bias_hh, const Tensor& decoder_weight,
                                                          const Tensor& decoder_bias, double shift, int64_t channels) {
  constexpr ScalarType kFloat = ScalarType::Float;
  STD_TORCH_CHECK(pooled.dim() == 2 && encoder_weight.dim() == 2 && weight_ih.dim() == 2 && weight_hh.dim() == 2 &&
                      decoder_weight.dim() == 2,
                  "agent_step: pooled and the weights must be 2-D");
  AgentStepParams p;
  p.samples = pooled.size(0);
  p.features = pooled.size(1);
  p.code = encoder_weight.size(0);
  p.hidden = weight_hh.size(1);
  p.actions = decoder_weight.size(0);
  p.input = weight_ih.size(1);
  p.channels = channels;
  p.shift = static_cast<float>(shift);
  const int64_t gates = 3 * p.hidden;
  STD_TORCH_CHECK(p.actions > 0 && channels >= 0, "agent_step: needs at least one action and channels >= 0; got ",
                  p.actions, " and ", channels);
  STD_TORCH_CHECK(p.input == p.code || p.input == p.code + p.actions,
                  "agent_step: weight_ih must have code or code + k columns (", p.code, " or ", p.code + p.actions,
                  "); got ", p.input);
  STD_TORCH_CHECK(!previous_action || p.input == p.code + p.actions,
                  "agent_step: previous_action needs its k columns in weight_ih; got ", p.input, " columns");
  std::vector<Tensor> keep;
  auto floats = [&](const char* name, const Tensor& t, int64_t rows, int64_t columns = -1) {
    return static_cast<const float*>(checked(keep, name, t, kFloat, rows, columns));
  };
  p.pooled = floats("pooled", pooled, p.samples, p.features);
  p.mean = floats("mean", mean, p.features);
  p.inv_std = floats("inv_std", inv_std, p.features);
  p.encoder_weight = floats("encoder_weight", encoder_weight, p.code, p.features);
  p.encoder_bias = floats("encoder_bias", encoder_bias, p.code);
  p.weight_ih = floats("weight_ih", weight_ih, gates, p.input);
  p.weight_hh = floats("weight_hh", weight_hh, gates, p.hidden);
  p.bias_ih = floats("bias_ih", bias_ih, gates);
  p.bias_hh = floats("bias_hh", bias_hh, gates);
  p.decoder_weight = floats("decoder_weight", decoder_weight, p.actions, p.hidden);
  p.decoder_bias = floats("decoder_bias", decoder_bias, p.actions);
  if (hidden) p.hidden_in = floats("hidden", *hidden, p.samples, p.hidden);
  if (previous_action) {
    p.previous =
        static_cast<const int32_t*>(checked(keep, "previous_action", *previous_action, ScalarType::Int, p.samples, -1));
    for (int64_t s = 0; s < p.samples; ++s)
      STD_TORCH_CHECK(p.previous[s] >= 1 && p.previous[s] <= p.actions, "agent_step: previous_action must lie in 1...",
                      p.actions, "; got ", p.previous[s], " at sample ", s);
  }
  Tensor hidden_out = torch::stable::empty({p.samples, p.hidden}, kFloat);
  Tensor q = torch::stable::empty({p.samples, p.actions}, kFloat);
  Tensor action = torch::stable::empty({p.samples}, ScalarType::Int);
  Tensor out_prefix = torch::stable::empty({p.samples}, ScalarType::Int);
  p.hidden_out = static_cast<float*>(hidden_out.mutable_data_ptr());
  p.q = static_cast<float*>(q.mutable_data_ptr());
  p.action = static_cast<int32_t*>(action.mutable_data_ptr());
  p.out_prefix = static_cast<int32_t*>(out_prefix.mutable_data_ptr());

  const auto run = [&](int64_t begin, int64_t end) {
    std::vector<float> scratch(static_cast<size_t>(agent_step_scratch(p)));
    agent_step(p, begin, end, scratch.data());
  };
  constexpr int64_t kSamplesWorthAThread = 64;  // some microseconds
  if (p.samples > 0) torch::stable::parallel_for(0, p.samples, kSamplesWorthAThread, run);
  return {hidden_out, q, action, out_prefix};
}

STABLE_TORCH_LIBRARY_IMPL(rnp, CPU, m) { m.impl("agent_step", TORCH_BOX(&agent_step_cpu)); }

}  // namespace
}  // namespace rnp::cpu
