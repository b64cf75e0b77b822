// The weight gradient, compiled, and its launch.
#include <cuda_runtime.h>

#include <algorithm>

#include "cuda/launch.h"
#include "cuda/weight_grad_kernel.h"

namespace rnp::cuda {
namespace {

template <typename T>
__global__ void __launch_bounds__(kThreads, 3) weight_grad_kernel(const __grid_constant__ WeightGradArgs p) {
  extern __shared__ __align__(128) char shared[];
  WeightGradBlock<T>(p, shared).run();
}

template <typename T>
__global__ void __launch_bounds__(256)
    weight_grad_sum_kernel(const __grid_constant__ WeightGradArgs p, int64_t elements) {
  weight_grad_sum_block<T>(p, elements);
}

template <typename T>
cudaError_t launch(const WeightGradArgs& p, cudaStream_t stream) {
  constexpr int kBytes = WeightGradBlock<T>::kSharedBytes;
  const cudaError_t error =
      cudaFuncSetAttribute(weight_grad_kernel<T>, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  if (error != cudaSuccess) return error;
  const int64_t blocks = weight_grad_tiles(p) * p.splits, elements = p.elements();
  if (blocks > (int64_t{1} << 31) - 1) return cudaErrorInvalidConfiguration;
  weight_grad_kernel<T><<<static_cast<int>(blocks), kThreads, kBytes, stream>>>(p);
  weight_grad_sum_kernel<T>
      <<<static_cast<int>(std::min<int64_t>(4096, (elements + 255) / 256)), 256, 0, stream>>>(p, elements);
  return cudaGetLastError();
}

}  // namespace

const char* launch_weight_grad(const WeightGradArgs& p, DType dtype, void* stream) {
  const auto to = static_cast<cudaStream_t>(stream);
  const cudaError_t error = dtype == DType::kFloat64    ? launch<double>(p, to)
                            : dtype == DType::kBFloat16 ? launch<BFloat16>(p, to)
                            : dtype == DType::kFloat16  ? launch<Float16>(p, to)
                                                        : launch<float>(p, to);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace rnp::cuda
