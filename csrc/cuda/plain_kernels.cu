// The kernels around the tile kernel, compiled, and their launches.
#include <cuda_runtime.h>

#include <algorithm>

#include "cuda/launch.h"
#include "cuda/plain_kernels.h"

namespace rnp::cuda {
namespace {

constexpr int kPlainThreads = 256;
constexpr int kMeanThreads = 128;
constexpr int64_t kMostBlocks = int64_t{1} << 30;  // of a grid

__global__ void __launch_bounds__(kThreads) order_kernel(const __grid_constant__ OrderArgs p) { order_block(p); }

__global__ void __launch_bounds__(1 << OrderArgs::kSampleBits) sort_kernel(const __grid_constant__ OrderArgs p) {
  extern __shared__ __align__(8) char shared[];
  sort_block(p, shared);
}

template <typename T>
__global__ void __launch_bounds__(kPlainThreads)
    pack_kernel(const __grid_constant__ PackArgs p, int64_t elements, int32_t chunks, int32_t taps, int32_t chunk,
                int32_t run, int32_t pixel) {
  pack_block<T>(p, elements, chunks, taps, chunk, run, pixel);
}

template <typename T>
__global__ void __launch_bounds__(kPlainThreads) unfold_kernel(const __grid_constant__ UnfoldArgs p) {
  unfold_block<T>(p);
}

template <typename T>
__global__ void __launch_bounds__(kPlainThreads, 3) plain_conv_kernel(const __grid_constant__ PlainArgs p) {
  plain_block<T>(p);
}

template <typename T>
__global__ void __launch_bounds__(kMeanThreads) mean_kernel(const __grid_constant__ MeanArgs p) {
  __shared__ Sum<T> sums[kMeanThreads];
  mean_block<T>(p, reinterpret_cast<char*>(sums));
}

const char* last_error() {
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

int grid_for(int64_t threads, int block, int64_t most) {
  return static_cast<int>(std::max<int64_t>(1, std::min(most, (threads + block - 1) / block)));
}

}  // namespace

const char* launch_order(const OrderArgs& p, void* stream) {
  if (p.one_block()) {
    int threads = 32;
    while (threads < p.n) threads *= 2;
    sort_kernel<<<1, threads, threads * sizeof(uint64_t), static_cast<cudaStream_t>(stream)>>>(p);
    return last_error();
  }
  order_kernel<<<grid_for(p.n, kThreads, kMostBlocks), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(p);
  return last_error();
}

const char* launch_pack(const PackArgs& p, void* stream) {
  const PackedTiles& l = p.layout;
  const int grid = grid_for(l.elements(), kPlainThreads, 4096);
  const auto kernel = l.element == 2 ? pack_kernel<BFloat16> : pack_kernel<float>;  // moved, not read: size is all
  kernel<<<grid, kPlainThreads, 0, static_cast<cudaStream_t>(stream)>>>(p, l.elements(), l.chunks(), l.taps(),
                                                                        l.chunk(), l.run(), l.pixel());
  return last_error();
}

const char* launch_unfold(const UnfoldArgs& p, int element, int multiprocessors, void* stream) {
  const int grid = grid_for(p.n * p.rows * p.runs() * 32, kPlainThreads, int64_t{multiprocessors} * 32);
  const auto kernel = element == 2 ? unfold_kernel<BFloat16> : unfold_kernel<float>;
  kernel<<<grid, kPlainThreads, 0, static_cast<cudaStream_t>(stream)>>>(p);
  return last_error();
}

const char* launch_plain(const PlainArgs& p, DType dtype, int multiprocessors, void* stream) {
  const int64_t elements = p.n * p.groups * p.group_out * p.out_h * p.out_w;
  const int grid = grid_for(elements, kPlainThreads, int64_t{multiprocessors} * 32);
  const auto kernel = dtype == DType::kFloat64    ? plain_conv_kernel<double>
                      : dtype == DType::kBFloat16 ? plain_conv_kernel<BFloat16>
                      : dtype == DType::kFloat16  ? plain_conv_kernel<Float16>
                                                  : plain_conv_kernel<float>;
  kernel<<<grid, kPlainThreads, 0, static_cast<cudaStream_t>(stream)>>>(p);
  return last_error();
}

const char* launch_mean(const MeanArgs& p, DType dtype, void* stream) {
  const int64_t items = p.n * ((p.channels + 31) / 32);
  const int grid = grid_for(items, 1, kMostBlocks);
  const auto kernel = dtype == DType::kFloat64    ? mean_kernel<double>
                      : dtype == DType::kBFloat16 ? mean_kernel<BFloat16>
                      : dtype == DType::kFloat16  ? mean_kernel<Float16>
                                                  : mean_kernel<float>;
  kernel<<<grid, kMeanThreads, 0, static_cast<cudaStream_t>(stream)>>>(p);
  return last_error();
}

}  // namespace rnp::cuda
