// What the bindings of the CPU operators share: reading and describing torch tensors.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <functional>
#include <string>

#include "core/parallel.h"
#include "core/prefix_conv2d.h"

namespace rnp::cpu {

// The shape, for messages.
inline std::string text(const torch::stable::Tensor& t) {
  std::string out = "(";
  for (int64_t d = 0; d < t.dim(); ++d) out += (d ? ", " : "") + std::to_string(t.size(d));
  return out + ")";
}

inline Strides4 strides_of(const torch::stable::Tensor& t) {
  return {t.stride(0), t.stride(1), t.stride(2), t.stride(3)};
}

// `what` (operator and argument) must be of this dtype and on the CPU.
inline void check_dtype(const char* op, const char* name, const torch::stable::Tensor& t,
                        torch::headeronly::ScalarType dtype) {
  STD_TORCH_CHECK(t.is_cpu(), op, ": ", name, " must be on the CPU like the input");
  STD_TORCH_CHECK(t.scalar_type() == dtype, op, ": ", name, " must be ", torch::headeronly::toString(dtype), "; got ",
                  torch::headeronly::toString(t.scalar_type()));
}

// torch's own pool, as large as torch.set_num_threads says.
inline Threads torch_threads() {
  Threads threads;
  threads.count = static_cast<int>(torch::stable::get_num_threads());
  threads.run = [](int workers, const std::function<void(int)>& body) {
    torch::stable::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) body(static_cast<int>(i));
    });
  };
  return threads;
}

}  // namespace rnp::cpu
