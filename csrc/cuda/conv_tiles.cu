// Every tile of tiles.h, compiled, and their launch.
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

const char* multiprocessors(int* count) {
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(count, cudaDevAttrMultiProcessorCount, device);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

const char* launch_tile(const TileLaunch& what, int multiprocessors, void* stream) {
  cudaError_t error = cudaErrorInvalidValue;
  switch (what.tile) {
#define RNP_LAUNCH(name, T, math, gather, BM, BN, blocks, registers)                                                  \
  case TileName::name:                                                                                                \
    error =                                                                                                           \
        launch<Tile<T, math, gather, BM, BN>, blocks>(what.args, multiprocessors, static_cast<cudaStream_t>(stream)); \
    break;
    RNP_CUDA_TILES(RNP_LAUNCH)
#undef RNP_LAUNCH
    case TileName::kCount:
      break;
  }
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace rnp::cuda
