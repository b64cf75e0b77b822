// The interface between the Winograd driver (winograd.cpp) and the per-ISA transforms. Plain structs only, as in
// microkernel.h.
#pragma once

#include <cstdint>

namespace rnp::cpu {

// V[point][tile][channel] = B^T d B of each tile and channel.
struct WinogradInputArgs {
  const float* const* pixels;  // [tile][edge * edge]: channel 0 of each input pixel, or of a line of zeros
  int64_t tiles, channels;
  float* v;
  int64_t point_step, tile_step;  // floats; a tile's line is written in whole vectors of 16 channels
};

struct WinogradTile {
  float* out;  // channel 0 of the tile's first output pixel
  const float* residual;
  const float* scale;  // of channel 0; null: absent
  const float* bias;
  float* sum;          // of channel 0: receives the sum over the tile's pixels as stored, row by row; or null
  int32_t rows, cols;  // of the tile that lie inside the output
};

// A^T m A of each tile, then activation(scale * y + bias + residual), for one block of at most 32 output channels; with
// `pool`, 2x2 max-pooling after that.
struct WinogradOutputArgs {
  const float* m;  // [point][tile][32]
  int64_t point_step;
  const WinogradTile* tiles;
  int64_t tile_count;
  int64_t channel0;  // added to every channel-0 address of the tiles
  int32_t live;      // channels to store, 1…32
  int64_t out_row_step, out_col_step, residual_row_step, residual_col_step;
  bool relu;
  bool pool;    // `out` receives the maxima of 2 x 2 outputs; rows and cols are even, no residual
  bool stream;  // store past the caches; whole vectors and aligned cache lines only (kernels whose `streams` says so)
};

// Weights of one input channel (of what is summed over) and `lanes` output channels, a multiple of 8, to U[point].
struct WinogradFilterArgs {
  static constexpr int kMaxTaps = 4, kLanes = 32;
  const double* g;                                     // [point of an axis][kMaxTaps]
  alignas(64) double tap[kMaxTaps][kMaxTaps][kLanes];  // [row][column]; 0 where a channel or a tap is missing
  int64_t lanes;
  float* to;
  int64_t point_step;
};

struct WinogradKernels {  // index 0: F(2x2, 3x3), 1: F(4x4, 3x3), 2: F(4x4, 4x4)
  void (*input[3])(const WinogradInputArgs&);
  void (*output[3])(const WinogradOutputArgs&);
  void (*filter[3])(const WinogradFilterArgs&);
};

}  // namespace rnp::cpu
