// What the bindings of the CPU operators share: reading and describing torch tensors.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "core/parallel.h"
#include "core/prefix_conv2d.h"
#include "torch_views.h"

namespace rnp::cpu {

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

inline void check_cpu(const char* op, const char* name, const torch::stable::Tensor& t) {
  STD_TORCH_CHECK(t.is_cpu(), op, ": ", name, " must be on the CPU like the input");
}

// (top, bottom, left, right).
inline void check_paddings(const char* op, const std::vector<int64_t>& padding) {
  for (int64_t pad : padding) {
    STD_TORCH_CHECK(pad >= 0, op, ": padding must not be negative; got ", pad);
    STD_TORCH_CHECK(pad < kEndOfPadding, op, ": padding must be less than 2^61; got ", pad);
  }
}

// An int32 vector with one entry per sample, read and checked against [0, limit].
inline std::vector<int32_t> checked_indices(const char* op, const char* name,
                                            const std::optional<torch::stable::Tensor>& t, int64_t n, int64_t limit) {
  std::vector<int32_t> out;
  if (!t) return out;
  check_cpu(op, name, *t);
  STD_TORCH_CHECK(t->scalar_type() == torch::headeronly::ScalarType::Int, op, ": ", name, " must be int32; got ",
                  torch::headeronly::toString(t->scalar_type()));
  STD_TORCH_CHECK(t->dim() == 1 && t->size(0) == n, op, ": ", name, " must have shape (", n, ",); got ", text(*t));
  const int32_t* data = static_cast<const int32_t*>(t->const_data_ptr());
  const int64_t step = t->stride(0);
  out.resize(static_cast<size_t>(n) + 1);  // never empty: an empty vector means "absent"
  for (int64_t i = 0; i < n; ++i) {
    const int32_t v = data[i * step];
    STD_TORCH_CHECK(v >= 0 && v <= limit, op, ": ", name, " must lie in 0…", limit, "; got ", v, " for sample ", i);
    out[static_cast<size_t>(i)] = v;
  }
  return out;
}

}  // namespace rnp::cpu
