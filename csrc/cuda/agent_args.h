// Parameters of the agent's step and of max-pooling on CUDA; pointers are of the device.
#pragma once

#include <cstdint>

#include "core/prefix_conv2d.h"

namespace rnp::cuda {

// As cpu/agent_step.h, whose formulas these are; row-major float32, null means absent where it says so.
struct AgentStepArgs {
  int64_t samples = 0;
  int32_t features = 0, code = 0, hidden = 0, actions = 0, input = 0;  // input: columns of weight_ih
  int32_t channels = 0;                                                // out_prefix = ceil(action · channels / actions)
  float shift = 0;
  const float* pooled = nullptr;      // (samples, features)
  const float* hidden_in = nullptr;   // (samples, hidden), null: zeros
  const int32_t* previous = nullptr;  // (samples), 1…actions, clamped; null: none yet
  const float *mean = nullptr, *inv_std = nullptr;
  const float *encoder_weight = nullptr, *encoder_bias = nullptr;
  const float *weight_ih = nullptr, *weight_hh = nullptr, *bias_ih = nullptr, *bias_hh = nullptr;
  const float *decoder_weight = nullptr, *decoder_bias = nullptr;
  float *hidden_out = nullptr, *q = nullptr;
  int32_t *action = nullptr, *out_prefix = nullptr;

  int64_t shared_floats() const { return int64_t{features} + code + 7 * int64_t{hidden} + actions; }
};

// input (n, h, w, c) and output (n, out_h, out_w, c) dense channels_last; windows are clipped at the border.
struct MaxPoolArgs {
  int64_t n = 0;
  int32_t c = 0, h = 0, w = 0, out_h = 0, out_w = 0;
  int32_t kernel_h = 1, kernel_w = 1, stride_h = 1, stride_w = 1, pad_h = 0, pad_w = 0;
  const void* input = nullptr;
  const int32_t* prefix = nullptr;  // (n), null: all channels
  bool zero_tail = false;
  void* output = nullptr;

  // Whether channels can be moved by 16 bytes.
  bool pieces(int element) const {
    const uintptr_t either = reinterpret_cast<uintptr_t>(input) | reinterpret_cast<uintptr_t>(output);
    return c % (16 / element) == 0 && either % 16 == 0;
  }
};

constexpr int kAgentThreads = 256;

// Null, or CUDA's message where the launch failed.
const char* launch_agent_step(const AgentStepArgs& args, void* stream);
const char* launch_max_pool2d(const MaxPoolArgs& args, DType dtype, void* stream);  // float32 and halves

}  // namespace rnp::cuda
