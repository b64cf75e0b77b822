// The interface between the driver (matrix_item.cpp) and kernels that multiply whole matrices: 16 pixels x 16 words of
// input by 16 words x 16 output channels of the packed weights, as they lie in memory. Plain structs only, as in
// microkernel.h.
#pragma once

#include <cstdint>

namespace rnp::cpu {

struct TileArgs;

constexpr int64_t kMatrix = 16;                         // pixels, words or output channels of a matrix
constexpr int64_t kMatrixSums = kMatrix * 2 * kMatrix;  // floats of a tile: 16 pixels, two matrices of channels

// A part of the sums: some chunks of 16 words of one record for each pixel, and of as many words of the weights.
struct MatrixRun {
  int64_t x;  // records from the pixel's own
  int64_t w;  // words from the first of the weights
};

// Some neighbouring output pixels of a row, 1, 2 or 4, and where their sums are: floats from those of the first pixel
// of their pair of matrices.
struct MatrixPixels {
  int32_t sums, count, row, col;
};

// Some pixels of 16 whose records are a step apart.
struct MatrixTile {
  int64_t record;      // of the first
  int64_t first, end;  // of the pass's pixels: those that are outputs; others are records between two rows, or none
  int64_t row0, row1;  // output rows that they lie in
  int64_t run0, run1;  // the runs that do not lie in the padding for all of them
};

// What the calls of one pass over an item's pixels have in common: a block of input channels, a block of output
// channels.
struct MatrixPass {
  const float* x;
  // Bytes between neighbouring records, between those of neighbouring pixels, and between chunks of a record.
  int64_t record, x_step, chunk_step;
  const float* w;
  int64_t w_step;  // bytes between words
  const MatrixRun* runs;
  int64_t chunks;  // of each run

  // Sums of earlier input-channel blocks, [tile][pixel][32]: read unless `first`, written unless `finish`.
  bool first;
  float* partial;

  // What follows the sums of the last block; null where the driver does it. Output and residual are those of pixel
  // (0, 0).
  const TileArgs* finish;

  const MatrixTile* tiles;
  const MatrixPixels* pixels;

  // Meanwhile lines that a later pass will read come into L2: this many for each chunk.
  int64_t ahead_share;
};

// Between calls: pixels whose sums are complete but not yet stored. That is done between the products of the next
// matrices, for which it is no work of the unit that multiplies.
struct MatrixPending {
  // Apart by more than a page: loads of the one would wait for stores at the same offset of the other.
  alignas(64) float sums[2][2 * kMatrixSums + 64];
  int filled = 0;  // which of the two was written last
  const MatrixPixels* next = nullptr;
  const MatrixPixels* end = nullptr;
  const char* ahead = nullptr;  // lines to fetch
  int64_t ahead_left = 0;
};

struct MatrixKernels {
  // [tiles - 1][matrices of channels - 1]: tiles `tile` and, of two, the next.
  void (*multiply[2][2])(const MatrixPass&, int64_t tile, MatrixPending&);
  void (*flush[2])(const TileArgs& finish, MatrixPending&);  // [matrices of channels - 1]
  // The thread's matrix registers are configured between these two only: whoever runs after us pays nothing for them.
  void (*start)();
  void (*stop)();
};

}  // namespace rnp::cpu
