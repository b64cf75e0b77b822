// One decision of the agent for a batch of samples: standardise the pooled features, encode, one GRU step, decode,
// argmax.
//
//   code   = relu(W_e · ((pooled − mean) · inv_std) + b_e)
//   hidden = GRU([code, one-hot(previous action)], hidden)          gates in torch's order: reset, update, new
//   q      = W_d · hidden + b_d,   action = argmax_i [q_i + (i − 1) · shift], ties to the smaller i
//
// Samples are independent, each in one fixed order of operations: the bits of a sample do not depend on its batch.
#pragma once

#include <cstdint>

namespace rnp::cpu {

// Row-major float32; null means absent where it says so.
struct AgentStepParams {
  int64_t samples = 0, features = 0, code = 0, hidden = 0, actions = 0;
  int64_t channels = 0;  // out_prefix = ceil(action · channels / actions)
  float shift = 0;

  const float* pooled = nullptr;                                   // (samples, features)
  const float* hidden_in = nullptr;                                // (samples, hidden), null: zeros
  const int32_t* previous = nullptr;                               // (samples), 1…actions, null: none yet
  const float *mean = nullptr, *inv_std = nullptr;                 // (features)
  const float *encoder_weight = nullptr, *encoder_bias = nullptr;  // (code, features), (code)
  const float* weight_ih = nullptr;                                // (3 · hidden, input)
  int64_t input = 0;                                               // code, or code + actions with the one-hot columns
  const float* weight_hh = nullptr;                                // (3 · hidden, hidden)
  const float *bias_ih = nullptr, *bias_hh = nullptr;              // (3 · hidden)
  const float *decoder_weight = nullptr, *decoder_bias = nullptr;  // (actions, hidden), (actions)

  float* hidden_out = nullptr;    // (samples, hidden)
  float* q = nullptr;             // (samples, actions)
  int32_t* action = nullptr;      // (samples), 1…actions
  int32_t* out_prefix = nullptr;  // (samples)
};

// Floats that `agent_step` needs as scratch.
int64_t agent_step_scratch(const AgentStepParams& p);

// Samples begin … end − 1. Different ranges may run at once, each with scratch of its own.
void agent_step(const AgentStepParams& p, int64_t begin, int64_t end, float* scratch);

}  // namespace rnp::cpu
