// The agent's step and max-pooling, compiled, and their launches.
#include <cuda_runtime.h>

#include <algorithm>

#include "cuda/agent_kernels.h"

namespace rnp::cuda {
namespace {

constexpr int kPoolThreads = 256;
constexpr int64_t kMostBlocks = 65535, kMostPoolBlocks = int64_t{1} << 30;

__global__ void __launch_bounds__(kAgentThreads) agent_step_kernel(const __grid_constant__ AgentStepArgs p) {
  extern __shared__ float agent_shared[];
  agent_step_block(p, agent_shared);
}

template <typename T, bool kPieces>
__global__ void __launch_bounds__(kPoolThreads) max_pool2d_kernel(const __grid_constant__ MaxPoolArgs p) {
  max_pool2d_block<T, kPieces>(p);
}

const char* text(cudaError_t error) { return error == cudaSuccess ? nullptr : cudaGetErrorString(error); }

template <typename T>
const char* launch_pool(const MaxPoolArgs& p, cudaStream_t stream) {
  constexpr int kElement = static_cast<int>(sizeof(T));
  const bool pieces = p.pieces(kElement);
  const int64_t threads = p.n * p.out_h * p.out_w * (pieces ? p.c / (16 / kElement) : p.c);
  const int grid = static_cast<int>(std::min((threads + kPoolThreads - 1) / kPoolThreads, kMostPoolBlocks));
  const auto kernel = pieces ? max_pool2d_kernel<T, true> : max_pool2d_kernel<T, false>;
  kernel<<<grid, kPoolThreads, 0, stream>>>(p);
  return text(cudaGetLastError());
}

}  // namespace

const char* launch_agent_step(const AgentStepArgs& p, void* stream) {
  const int64_t bytes = p.shared_floats() * 4;
  if (bytes > 96 * 1024) return "features, code and hidden state of one sample must fit into 96 KB of shared memory";
  const cudaError_t error =
      cudaFuncSetAttribute(agent_step_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
  if (error != cudaSuccess) return text(error);
  const int grid = static_cast<int>(std::min(p.samples, kMostBlocks));
  agent_step_kernel<<<grid, kAgentThreads, static_cast<size_t>(bytes), static_cast<cudaStream_t>(stream)>>>(p);
  return text(cudaGetLastError());
}

const char* launch_max_pool2d(const MaxPoolArgs& p, DType dtype, void* stream) {
  switch (dtype) {
    case DType::kFloat32:
      return launch_pool<float>(p, static_cast<cudaStream_t>(stream));
    case DType::kBFloat16:
      return launch_pool<BFloat16>(p, static_cast<cudaStream_t>(stream));
    case DType::kFloat16:
      return launch_pool<Float16>(p, static_cast<cudaStream_t>(stream));
    case DType::kFloat64:
      break;
  }
  return "no kernel for float64";
}

}  // namespace rnp::cuda
