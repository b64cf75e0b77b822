// The machine under the kernels where there is no GPU: one thread block at a time, every thread a coroutine.
//
// Made to find mistakes, not to be fast. A copy under way holds NaN at its destination and lands only when its own
// thread waits for it; threads run in an order that changes with the seed, so what a barrier should have ordered goes
// wrong without one; alignment, bounds of shared memory and bank conflicts of ldmatrix are checked; a barrier that some
// threads never reach is an error. Implemented in csrc/tests/emulator.cpp and, for Hopper, emulator_hopper.cpp.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>

#include "core/half.h"

namespace rnp::cuda::emulator {

int thread();
int threads();
int64_t block();
int64_t blocks();
void barrier();
float xor_lane(float v, int mask);
int32_t max_in_warp(int32_t v);
int32_t from_lane(int32_t v, int lane);
uint32_t ballot(bool v);
void copy_async(void* shared, const void* global, int bytes);
void commit_copies();
void wait_copies(int most);
void load_matrices(uint32_t* r, const void* shared_row, bool transposed);
void store_matrices(void* shared_row, const uint32_t* r);
void multiply_matrices(BFloat16, float* d, const uint32_t* a, uint32_t b0, uint32_t b1);
void multiply_matrices(Float16, float* d, const uint32_t* a, uint32_t b0, uint32_t b1);
void multiply_matrices(float, float* d, const uint32_t* a, uint32_t b0, uint32_t b1);
uint32_t to_tf32(uint32_t float_bits);
void check_aligned(const void* global, size_t alignment);

// ---- Hopper: barriers of shared memory, the copy engine, wgmma ----
//
// A bulk copy lands some time after its issue and holds NaN until then. wgmma reads its operands between issue and
// wait: they must have landed, must be published (fence.proxy.async after that, by a thread that knows), and must still
// be the same bytes when the wait ends; the registers of its sums hold NaN in between.

// What cuTensorMapEncodeIm2col is told of a tensor; sizes are (c, w, h, n), strides bytes.
struct TensorMap {
  const char* base = nullptr;
  int64_t size[4] = {}, stride[4] = {};
  int32_t lower[2] = {}, upper[2] = {}, step[2] = {};  // (w, h)
  int32_t element = 2;                                 // bytes
  int32_t channels = 64, pixels = 128;                 // of one copy
};

uint32_t shared_address(const void* p);
void init_barrier(uint64_t* barrier, int arrivals);
void publish_barriers();
void arrive(uint64_t* barrier, int count);
void arrive_after_copies(uint64_t* barrier);
void expect_bytes(uint64_t* barrier, uint32_t bytes);
void wait_barrier(uint64_t* barrier, uint32_t parity);
void sync_warp();
void sync_threads(int number, int threads);
void wrote(const void* shared);  // an ordinary store, which is not published yet
void publish_writes();
void copy_bulk(void* shared, const void* global, uint32_t bytes, uint64_t* barrier);
void copy_im2col(void* shared, const TensorMap& map, uint64_t* barrier, int32_t c, int32_t w, int32_t h, int32_t n,
                 int32_t offset_w, int32_t offset_h);
void begin_products();
void commit_products();
void wait_products(int most);
void multiply_warpgroup(BFloat16, int width, float* d, uint64_t a, uint64_t b);
void multiply_warpgroup(Float16, int width, float* d, uint64_t a, uint64_t b);
void multiply_warpgroup(float, int width, float* d, uint64_t a, uint64_t b);  // TF32

struct Statistics {
  int64_t matrix_products = 0;  // mma instructions of a warp
  int64_t bank_conflicts = 0;   // extra wavefronts of ldmatrix and stmatrix
  int64_t copied_bytes = 0;     // read by asynchronous copies
  int64_t bulk_bytes = 0;       // brought by copy_bulk
  int64_t im2col_bytes = 0;     // brought by copy_im2col, zeros beyond the tensor included
  int64_t group_products = 0;   // wgmma instructions, counted once for each warp
};

// Runs body(shared memory) as `blocks` blocks of `threads` threads, one block after the other. Throws
// std::runtime_error where the kernel breaks a rule of the machine.
Statistics launch(int64_t blocks, int threads, size_t shared_bytes, uint64_t seed,
                  const std::function<void(char*)>& body);

}  // namespace rnp::cuda::emulator
