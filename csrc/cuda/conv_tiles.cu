// Every tile of sm_80, compiled for every architecture, and the launch of any tile. RNP_SM90: whether the library has
// those of sm_90a (hopper_tiles.cu).
#include <cuda_runtime.h>

#include <algorithm>

#include "cuda/conv_kernel.h"
#include "cuda/launch.h"

namespace rnp::cuda {
namespace {

template <typename Tile, int kBlocks>
__global__ void __launch_bounds__(kThreads, kBlocks) conv_tile_kernel(const __grid_constant__ ConvArgs p) {
  extern __shared__ __align__(128) char shared[];
  conv_block<Tile>(p, shared);
}

// A persistent grid: as many blocks as fit at once, never more than there can be tiles.
template <typename Tile, int kBlocks>
cudaError_t launch(const ConvArgs& args, int multiprocessors, cudaStream_t stream) {
  const auto kernel = conv_tile_kernel<Tile, kBlocks>;
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Tile::kSharedBytes);
  int resident = 0;
  if (error == cudaSuccess)
    error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, kernel, kThreads, Tile::kSharedBytes);
  if (error != cudaSuccess) return error;
  const int64_t fitting = int64_t{std::max(resident, 1)} * multiprocessors;
  const int grid = static_cast<int>(std::max<int64_t>(1, std::min(fitting, args.cut.most_tiles())));
  kernel<<<grid, kThreads, Tile::kSharedBytes, stream>>>(args);
  return cudaGetLastError();
}

}  // namespace

const char* current_device(Device* out) {
  int device = 0, major = 0, minor = 0;
  cudaError_t error = cudaGetDevice(&device);
  const auto ask = [&](int* value, cudaDeviceAttr what) {
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(value, what, device);
  };
  ask(&out->multiprocessors, cudaDevAttrMultiProcessorCount);
  ask(&major, cudaDevAttrComputeCapabilityMajor);
  ask(&minor, cudaDevAttrComputeCapabilityMinor);
  out->hopper = RNP_SM90 && major == 9 && minor == 0;  // sm_90a code runs on 9.0 alone
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

const char* launch_tile(const TileLaunch& what, int multiprocessors, void* stream) {
#if RNP_SM90
  if (is_hopper(what.tile)) return launch_hopper_tile(what, multiprocessors, stream);
#endif
  cudaError_t error = cudaErrorInvalidValue;
  switch (what.tile) {
#define RNP_LAUNCH(name, T, math, BM, BN, blocks, registers)                                                      \
  case TileName::name:                                                                                            \
    error = launch<Tile<T, math, BM, BN>, blocks>(what.args, multiprocessors, static_cast<cudaStream_t>(stream)); \
    break;
    RNP_CUDA_TILES(RNP_LAUNCH)
#undef RNP_LAUNCH
    default:
      break;
  }
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace rnp::cuda
