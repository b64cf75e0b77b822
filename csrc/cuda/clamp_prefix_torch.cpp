// Binding of clamp_prefix to torch: check, device guard, allocate, current stream, launch, launch check.
#define USE_CUDA  // shim.h declares aoti_torch_get_current_cuda_stream only then
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <limits>

#include "cuda/clamp_prefix.h"

namespace {

using torch::stable::Tensor;

Tensor clamp_prefix(const Tensor& prefix, int64_t limit) {
  STD_TORCH_CHECK(prefix.scalar_type() == torch::headeronly::ScalarType::Int && prefix.dim() == 1,
                  "rnp::clamp_prefix: prefix must be a 1-D int32 tensor, got ", prefix.dim(), " dimensions");
  STD_TORCH_CHECK(limit >= 0 && limit <= std::numeric_limits<int32_t>::max(),
                  "rnp::clamp_prefix: limit must be 0…2^31-1, got ", limit);
  const torch::stable::accelerator::DeviceGuard guard(prefix.get_device_index());
  const Tensor input = torch::stable::contiguous(prefix);
  Tensor output = torch::stable::empty_like(input);
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(prefix.get_device_index(), &stream));
  const char* error = rnp::cuda::clamp_prefix(static_cast<const int32_t*>(input.const_data_ptr()),
                                              static_cast<int32_t*>(output.mutable_data_ptr()), input.numel(),
                                              static_cast<int32_t>(limit), stream);
  STD_TORCH_CHECK(error == nullptr, "rnp::clamp_prefix: ", error);
  return output;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(rnp, CUDA, m) { m.impl("clamp_prefix", TORCH_BOX(&clamp_prefix)); }
