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

inline DType dtype_of(const char* op, const char* name, const torch::stable::Tensor& t) {
  switch (t.scalar_type()) {
    case torch::headeronly::ScalarType::Float:
      return DType::kFloat32;
    case torch::headeronly::ScalarType::Double:
      return DType::kFloat64;
    case torch::headeronly::ScalarType::BFloat16:
      return DType::kBFloat16;
    case torch::headeronly::ScalarType::Half:
      return DType::kFloat16;
    default:
      STD_TORCH_CHECK(false, op, ": ", name, " must be float32, float64, bfloat16 or float16; got ",
                      torch::headeronly::toString(t.scalar_type()));
  }
  return DType::kFloat32;
}

// torch's own rule (is_channels_last_strides_2d): ambiguous strides count as contiguous.
inline bool is_channels_last(const torch::stable::Tensor& t) {
  int64_t least = 0;
  if (t.stride(1) == 0) return false;
  for (int d : {1, 3, 2, 0}) {
    if (t.size(d) == 0 || t.stride(d) < least) return false;
    if (d == 0 && least == t.stride(1)) return false;
    least = t.stride(d) * (t.size(d) > 1 ? t.size(d) : 1);
  }
  return true;
}

inline void check_cpu(const char* op, const char* name, const torch::stable::Tensor& t) {
  STD_TORCH_CHECK(t.is_cpu(), op, ": ", name, " must be on the CPU like the input");
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
