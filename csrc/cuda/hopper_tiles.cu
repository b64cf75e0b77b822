// Every tile of sm_90a, compiled for that architecture alone, and their launch.
#include <cuda.h>
#include <cuda_runtime.h>

#include <algorithm>

#include "cuda/hopper_kernel.h"
#include "cuda/launch.h"

namespace rnp::cuda {
namespace {

struct Maps {
  CUtensorMap of_size[kBoxSizes];
};

template <typename Tile>
__global__ void __launch_bounds__(kHopperThreads, 1)
    hopper_tile_kernel(const __grid_constant__ ConvArgs p, const __grid_constant__ Maps maps) {
  extern __shared__ __align__(1024) char shared[];
  hopper_block<Tile>(p, maps.of_size, shared);
}

template <typename T>
__global__ void __launch_bounds__(256) sum_segments_kernel(const __grid_constant__ ConvArgs p) {
  sum_segments_block<T>(p);
}

// The driver's cuTensorMapEncodeIm2col, without linking the driver; null where it has none.
decltype(&cuTensorMapEncodeIm2col) encoder() {
  void* found = nullptr;
  cudaDriverEntryPointQueryResult result;
#if CUDART_VERSION >= 12050
  const cudaError_t error =
      cudaGetDriverEntryPointByVersion("cuTensorMapEncodeIm2col", &found, 12000, cudaEnableDefault, &result);
#else
  const cudaError_t error = cudaGetDriverEntryPoint("cuTensorMapEncodeIm2col", &found, cudaEnableDefault, &result);
#endif
  if (error != cudaSuccess || result != cudaDriverEntryPointSuccess) return nullptr;
  return reinterpret_cast<decltype(&cuTensorMapEncodeIm2col)>(found);
}

// False where the driver refuses: the kernel then fetches by cp.async, with the same result.
bool encode(const Im2colBox& b, int element, Maps* maps) {
  static const auto call = encoder();
  if (!call) return false;
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>(b.c), static_cast<cuuint64_t>(b.w), static_cast<cuuint64_t>(b.h),
                              static_cast<cuuint64_t>(b.n)};
  const cuuint64_t strides[] = {static_cast<cuuint64_t>(b.w_stride), static_cast<cuuint64_t>(b.h_stride),
                                static_cast<cuuint64_t>(b.n_stride)};
  const cuuint32_t steps[] = {1, static_cast<cuuint32_t>(b.step[0]), static_cast<cuuint32_t>(b.step[1]), 1};
  // Elements are moved, never read: integers of their size. As TFLOAT32 the copy engine would round them, and cp.async
  // does not: a sample's bits would depend on its company.
  const CUtensorMapDataType type = element == 2 ? CU_TENSOR_MAP_DATA_TYPE_UINT16 : CU_TENSOR_MAP_DATA_TYPE_UINT32;
  for (int i = 0; i < kBoxSizes; ++i)
    if (call(maps->of_size + i, type, 4, const_cast<void*>(b.base), sizes, strides, b.lower, b.upper,
             static_cast<cuuint32_t>(kPackBytes / element), 1u << i, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
             CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
             CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) != CUDA_SUCCESS)
      return false;
  return true;
}

// A persistent grid: a block to each multiprocessor, never more than there can be tiles. Then the sum of the segments.
template <typename Tile>
cudaError_t launch(const TileLaunch& what, int multiprocessors, cudaStream_t stream) {
  TileLaunch own = what;
  ConvArgs& args = own.args;
  Maps maps = {};
  if (args.use_tma && !encode(own.box, Tile::kElement, &maps)) {
    // Windows have no other way to come.
    if (args.window_rows > 0) set_hopper_tile(own, {args.cut.bm, args.cut.bn}, false);
    args.use_tma = false;
  }
  const auto kernel = hopper_tile_kernel<Tile>;
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Tile::kSharedBytes);
  if (error != cudaSuccess) return error;
  const int64_t tiles = args.cut.most_tiles() * args.splits;
  const int grid = static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(multiprocessors, tiles)));
  kernel<<<grid, kHopperThreads, Tile::kSharedBytes, stream>>>(args, maps);
  error = cudaGetLastError();
  if (error != cudaSuccess || !args.partial) return error;
  const int64_t blocks = (args.cut.n * args.cut.positions + 7) / 8;  // a warp for each position
  sum_segments_kernel<typename Tile::T>
      <<<static_cast<int>(std::min<int64_t>(blocks, int64_t{multiprocessors} * 16)), 256, 0, stream>>>(args);
  return cudaGetLastError();
}

}  // namespace

const char* launch_hopper_tile(const TileLaunch& what, int multiprocessors, void* stream) {
  cudaError_t error = cudaErrorInvalidValue;
  switch (what.tile) {
#define RNP_LAUNCH(name, T, BN, registers)                                                       \
  case TileName::name:                                                                           \
    error = launch<HopperTile<T, BN>>(what, multiprocessors, static_cast<cudaStream_t>(stream)); \
    break;
    RNP_HOPPER_TILES(RNP_LAUNCH)
#undef RNP_LAUNCH
    default:
      break;
  }
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace rnp::cuda
