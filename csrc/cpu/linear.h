// The classifier of a network: input x weight^T + bias, float32, for few samples and many weights.
//
// A library's matrix product takes a batch of 8 at a third of the speed at which the weights can be read; this one
// reads each weight once for up to 64 samples. Weights stay as torch keeps them: nothing is packed. A sample's sums run
// over its live inputs in one order, so it has the same bits alone and in any batch.
#pragma once

#include <cstdint>
#include <vector>

namespace rnp::cpu {

struct LinearParams {
  int64_t samples = 0, inputs = 0, outputs = 0;
  const float* input = nullptr;   // (samples, inputs)
  const float* weight = nullptr;  // (outputs, inputs)
  const float* bias = nullptr;    // (outputs), null: none
  float* output = nullptr;        // (samples, outputs)
  // (samples): inputs of each that count, the rest are 0 and are not read; null: all.
  const int64_t* live = nullptr;

  int64_t live_of(int64_t sample) const { return live ? live[sample] : inputs; }
};

// Samples that share each reading of the weights, most live inputs first.
using LinearOrder = std::vector<int64_t>;
LinearOrder linear_order(const LinearParams& p);

constexpr int64_t kLinearOutputs = 32;  // of one part of the work

// Floats of scratch, on a cache line's boundary, that a worker needs.
int64_t linear_scratch(const LinearParams& p);

// Outputs [begin, end), at most kLinearOutputs of them, of all samples. `order` is linear_order's.
void linear(const LinearParams& p, const LinearOrder& order, int64_t begin, int64_t end, float* scratch);

}  // namespace rnp::cpu
