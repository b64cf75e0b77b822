// The machine under the kernels where there is no GPU: one thread block at a time, every thread a coroutine.
//
// Made to find mistakes, not to be fast. A copy under way holds NaN at its destination and lands only when its own
// thread waits for it; threads run in an order that changes with the seed, so what a barrier should have ordered goes
// wrong without one; alignment, bounds of shared memory and bank conflicts of ldmatrix are checked; a barrier that some
// threads never reach is an error. Implemented in csrc/tests/emulator.cpp.
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
void copy_async(void* shared, const void* global, int bytes);
void commit_copies();
void wait_copies(int most);
void load_matrices(uint32_t* r, const void* shared_row, bool transposed);
void multiply_matrices(BFloat16, float* d, const uint32_t* a, uint32_t b0, uint32_t b1);
void multiply_matrices(Float16, float* d, const uint32_t* a, uint32_t b0, uint32_t b1);
void multiply_matrices(float, float* d, const uint32_t* a, uint32_t b0, uint32_t b1);
uint32_t to_tf32(uint32_t float_bits);

struct Statistics {
  int64_t matrix_products = 0;  // mma instructions of a warp
  int64_t bank_conflicts = 0;   // extra wavefronts of ldmatrix
  int64_t copied_bytes = 0;     // read by asynchronous copies
};

// Runs body(shared memory) as `blocks` blocks of `threads` threads, one block after the other. Throws
// std::runtime_error where the kernel breaks a rule of the machine.
Statistics launch(int64_t blocks, int threads, size_t shared_bytes, uint64_t seed,
                  const std::function<void(char*)>& body);

}  // namespace rnp::cuda::emulator
