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
#include "torch_views.h"

namespace rnp::cuda {

using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

using rnp::text;

inline std::string text(const std::vector<int64_t>& sizes) {
  std::string out = "(";
  for (size_t d = 0; d < sizes.size(); ++d) out += (d ? ", " : "") + std::to_string(sizes[d]);
  return out + ")";
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
