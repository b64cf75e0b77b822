// The interface between the driver (matrix_item.cpp) and kernels that multiply whole matrices: 16 pixels x 16 words of
// input by 16 words x 16 output channels of the packed weights, as they lie in memory. Plain structs only, as in
// microkernel.h.
#pragma once

#include <cstdint>

namespace rnp::cpu {

struct TileArgs;

constexpr int64_t kMatrix = 16;                       // pixels, words or output channels of a matrix
constexpr int64_t kMatrixSums = kMatrix * 2 * kMatrix;  // floats of a matrix of pixels, for two of channels

// Whole matrices along the words: chunks of 16 that lie side by side in every pixel, and under each other in the
// weights.
struct MatrixRun {
  int64_t x;  // words from the first pixel's first
  int64_t w;  // words from the first of the weights
  int64_t chunks;
};

// An output pixel of a pass, and where its sums are: floats from those of the first pixel of its pair of matrices.
struct MatrixPixel {
  int32_t sums, row, col;
};

// Pixels whose sums are complete but not yet stored: that is done between the products of the next matrices, for which
// it is no work of the units that multiply.
struct MatrixPending {
  alignas(64) float sums[2][2 * kMatrixSums];
  int filled = 0;  // which of the two was written last
  const MatrixPixel* next = nullptr;
  int64_t left = 0;
};

// One or two matrices of pixels by one or two of output channels.
struct MatrixArgs {
  const float* x[2];
  int64_t x_step;  // bytes between pixels
  const float* w;
  int64_t w_step;  // bytes between words
  const MatrixRun* runs;
  int64_t run_count;
  int64_t chunks;  // of all runs

  // Sums of earlier input-channel blocks, [pixel][32]: read unless `first`, written unless `finish`.
  bool first;
  float* partial[2];

  // What follows the sums of the last block; null where the driver does it. Output and residual are those of pixel
  // (0, 0). The same in all calls from one flush to the next.
  const TileArgs* finish;
  const MatrixPixel* pixels;
  int64_t pixel_count;
};

struct MatrixKernels {
  void (*multiply[2][2])(const MatrixArgs&, MatrixPending&);  // [matrices of pixels - 1][of channels - 1]
  void (*flush[2])(const TileArgs& finish, MatrixPending&);   // [matrices of channels - 1]
  // The thread's matrix registers are configured between these two only: whoever runs after us pays nothing for them.
  void (*start)();
  void (*stop)();
};

}  // namespace rnp::cpu
