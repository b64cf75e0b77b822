// The agent's step and max-pooling, compiled, and their launches.
#include <cuda_runtime.h>

#include <algorithm>

#include "cuda/agent_kernels.h"

namespace rnp::cuda {
namespace {

constexpr int kPoolThreads = 256;
constexpr int64_t kMostBlocks = 65535;

__global__ void __launch_bounds__(kAgentThreads) agent_step_kernel(const __grid_constant__ AgentStepArgs p) {
  extern __shared__ float agent_shared[];
  agent_step_block(p, agent_shared);
}

__global__ void __launch_bounds__(kPoolThreads) max_pool2d_kernel(const __grid_constant__ MaxPoolArgs p) {
  max_pool2d_block(p);
}

const char* text(cudaError_t error) { return error == cudaSuccess ? nullptr : cudaGetErrorString(error); }

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

const char* launch_max_pool2d(const MaxPoolArgs& p, void* stream) {
  const int64_t elements = p.n * p.out_h * p.out_w * p.c;
  const int grid = static_cast<int>(std::min((elements + kPoolThreads - 1) / kPoolThreads, kMostBlocks));
  max_pool2d_kernel<<<grid, kPoolThreads, 0, static_cast<cudaStream_t>(stream)>>>(p);
  return text(cudaGetLastError());
}

}  // namespace rnp::cuda
