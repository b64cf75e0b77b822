// What the CUDA bindings share: checks of tensors, their plain views, the current stream. Torch's stable ABI only.
#pragma once

#define USE_CUDA  // shim.h declares aoti_torch_get_current_cuda_stream only then
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>
#include <string>
#include <vector>

#include "core/prefix_conv2d.h"

namespace rnp::cuda {

using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

inline std::string text(const std::vector<int64_t>& sizes) {
  std::string out = "(";
  for (size_t d = 0; d < sizes.size(); ++d) out += (d ? ", " : "") + std::to_string(sizes[d]);
  return out + ")";
}

inline std::string text(const Tensor& t) {
  std::vector<int64_t> sizes;
  for (int64_t d = 0; d < t.dim(); ++d) sizes.push_back(t.size(d));
  return text(sizes);
}

inline DType dtype_of(const char* op, const char* name, const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::Double:
      return DType::kFloat64;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    case ScalarType::Half:
      return DType::kFloat16;
    default:
      STD_TORCH_CHECK(false, op, ": ", name, " must be float32, float64, bfloat16 or float16; got ",
                      torch::headeronly::toString(t.scalar_type()));
  }
  return DType::kFloat32;
}

inline Strides4 strides_of(const Tensor& t) { return {t.stride(0), t.stride(1), t.stride(2), t.stride(3)}; }

// torch's own rule (is_channels_last_strides_2d): ambiguous strides count as contiguous.
inline bool is_channels_last(const Tensor& t) {
  int64_t least = 0;
  if (t.stride(1) == 0) return false;
  for (int d : {1, 3, 2, 0}) {
    if (t.size(d) == 0 || t.stride(d) < least) return false;
    if (d == 0 && least == t.stride(1)) return false;
    least = t.stride(d) * (t.size(d) > 1 ? t.size(d) : 1);
  }
  return true;
}

inline void check_device(const char* op, const char* name, const Tensor& t, const Tensor& like) {
  STD_TORCH_CHECK(t.is_cuda() && t.get_device_index() == like.get_device_index(), op, ": ", name,
                  " must be on the input's device, cuda:", static_cast<int>(like.get_device_index()));
}

inline void check_size(const char* op, const char* name, const Tensor& t, const std::vector<int64_t>& sizes) {
  STD_TORCH_CHECK(text(t) == text(sizes), op, ": ", name, " must have shape ", text(sizes), "; got ", text(t));
}

// An int32 vector with one entry a sample, contiguous on the device; the kernels clamp its values.
inline OptionalTensor checked_indices(const char* op, const char* name, const OptionalTensor& t, int64_t n,
                                      const Tensor& like) {
  if (!t) return std::nullopt;
  check_device(op, name, *t, like);
  STD_TORCH_CHECK(t->scalar_type() == ScalarType::Int, op, ": ", name, " must be int32; got ",
                  torch::headeronly::toString(t->scalar_type()));
  check_size(op, name, *t, {n});
  return torch::stable::contiguous(*t);
}

inline const int32_t* indices(const OptionalTensor& t) {
  return t ? static_cast<const int32_t*>(t->const_data_ptr()) : nullptr;
}

inline Tensor empty_on(const Tensor& like, const std::vector<int64_t>& sizes, ScalarType dtype,
                       bool channels_last = false) {
  return torch::stable::empty({sizes.data(), sizes.size()}, dtype, std::nullopt, like.device(), std::nullopt,
                              channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
}

inline void* current_stream(const Tensor& t) {
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
  return stream;
}

inline void check_launch(const char* op, const char* error) {
  STD_TORCH_CHECK(error == nullptr, op, ": ", error ? error : "");
}

// The geometry of a convolution of `input` (N, C, H, W) by `weight` (O, C / groups, KH, KW), given by their sizes.
ConvShape checked_shape(const char* op, const std::vector<int64_t>& input, const std::vector<int64_t>& weight,
                        const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                        const std::vector<int64_t>& dilation, int64_t groups);

std::vector<int64_t> sizes_of(const Tensor& t);

// Runs the planned kernels of one call: `p` without `packed`; `packed` the pack of this role, or nothing to pack here.
void run_convolution(const char* op, PrefixConv2dParams p, bool input_grad, int64_t lines, const Tensor& like,
                     const OptionalTensor& packed);

}  // namespace rnp::cuda
