#include <cuda_runtime.h>

#include "cuda/clamp_prefix.h"

namespace rnp::cuda {
namespace {

constexpr int kThreads = 256;

// One block for each 256 samples up to this many; beyond it every thread takes several.
constexpr int64_t kMaxBlocks = 1024;

__global__ void clamp_prefix_kernel(const int32_t* prefix, int32_t* output, int64_t count, int32_t limit) {
  const int64_t step = int64_t{gridDim.x} * blockDim.x;
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < count; i += step) {
    output[i] = min(max(prefix[i], 0), limit);
  }
}

}  // namespace

const char* clamp_prefix(const int32_t* prefix, int32_t* output, int64_t count, int32_t limit, void* stream) {
  if (count == 0) return nullptr;  // an empty grid is a launch error
  const int64_t blocks = (count + kThreads - 1) / kThreads;
  const int grid = static_cast<int>(blocks < kMaxBlocks ? blocks : kMaxBlocks);
  clamp_prefix_kernel<<<grid, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(prefix, output, count, limit);
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace rnp::cuda
