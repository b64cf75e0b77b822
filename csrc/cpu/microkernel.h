// The interface between the driver (prefix_conv2d.cpp) and the per-ISA kernels. Plain structs only: translation units
// compiled for a wide ISA must not instantiate anything that other units share, or the linker may keep the wide copy
// for all.
#pragma once

#include <cstdint>

#include "cpu/matrix_kernels.h"
#include "cpu/winograd_kernels.h"

namespace rnp::cpu {

// One run of input values that are contiguous for each pixel: for i < count: acc[pixel][lane] += x[pixel][i] *
// w[i][lane]. A run is (part of) one kernel tap. `skip` names the pixels of the tile for which the tap lies in the
// padding.
struct Run {
  int64_t x;  // floats from the tile's first pixel
  int64_t w;  // floats from the tile's weights
  int64_t count;
  int32_t kernel_row;
  int32_t skip;  // a sum of Skip flags: at most one of the columns' and one of the rows'
};
enum Skip : int32_t { kSkipNone = 0, kSkipFirstCol = 1, kSkipLastCol = 2, kSkipFirstRow = 3, kSkipLastRow = 6 };

// A register tile: R rows x C columns of output pixels, up to `lanes` output channels.
struct TileArgs {
  const float* x;
  const float* w;
  const Run* runs;
  int64_t run_count;
  int64_t x_row_step, x_col_step;  // floats between neighbouring pixels of the tile
  int64_t w_step;                  // floats between consecutive input channels of the packed weights
  int32_t live;                    // output channels to store, 1…lanes; of a wide tile all

  // Wide tiles, of two blocks of 32 output channels: floats from a block's weights and sums to the next block's. And
  // weights to come: `ahead_lines` cache lines of them are fetched into L2 from `ahead` on, `ahead_burst` before any
  // four input channels.
  int64_t w_block_step, partial_block_step;
  const float* ahead;
  int32_t ahead_lines, ahead_burst;

  // Sums of earlier input-channel blocks: read unless `first`, written unless `last`.
  bool first, last;
  float* partial;
  int64_t partial_row_step, partial_col_step;

  // Used when `last`: out = activation(scale * sum + bias + residual). Scale and bias hold `lanes` floats or are null.
  // Output and residual are of the type that the kernel stores (bfloat16 in those that multiply pairs); so are steps.
  float* out;
  int64_t out_row_step, out_col_step;
  const float* scale;
  const float* bias;
  const float* residual;
  int64_t residual_row_step, residual_col_step;
  bool relu;
  bool stream;  // store past the caches; only whole, aligned cache lines (kernels whose `streams` says so)
};

using TileKernel = void (*)(const TileArgs&);

// A tile of a 1x1 kernel (pointwise_tile.h): `count` input channels of each pixel, `tile.runs` is not used.
constexpr int64_t kPanelChunk = 16;
struct PointwiseArgs {
  TileArgs tile;
  int64_t count;

  // Meanwhile `ahead_count` input channels (whole chunks) of a tile to come are fetched into L2. In place: from
  // `ahead`, the first of them in that tile's first pixel.
  int64_t ahead_count;
  const float* ahead;

  // From a panel: `tile.x` is its chunk of the first of these channels, and `tile.x_col_step` is not used. Channels are
  // counted from `offset` in each pixel: those of the pixels `ahead_pixels` are fetched, and `copy_count` of the pixels
  // `from` are copied `to` another panel. Both name as many pixels as the tile has.
  int64_t copy_count;
  int64_t offset;
  float* to;
  const float* const* from;
  const float* const* ahead_pixels;
};
using PointwiseKernel = void (*)(const PointwiseArgs&);

// A tile of a 1x1 kernel on contiguous NCHW (plane_pointwise_tile.h): output channels x one or two vectors of pixels.
struct PlaneTileArgs {
  const float* w;  // of the tile's first output channel, input channels side by side
  int64_t w_step;  // floats between output channels
  const float* x;  // panel: [input channel][the tile's lanes]
  int64_t count;   // input channels

  // Sums of earlier input-channel blocks, [output channel][lanes]: read unless `first`, written unless `last`.
  bool first, last;
  float* partial;

  // Used when `last`: out = activation(scale * sum + bias + residual). Scale and bias hold a value for each output
  // channel, or are null.
  int pixels;  // to be stored
  float* out;
  int64_t out_step;  // between output channels
  const float* scale;
  const float* bias;
  const float* residual;
  int64_t residual_step;
  bool relu;
  bool stream;  // store past the caches: whole, aligned cache lines
};
using PlaneTileKernel = void (*)(const PlaneTileArgs&);

// Copies `count` channels of each of `cols` pixels, from `pixel_stride` apart to `channels` apart.
using CopyPixels = void (*)(const float* from, int64_t pixel_stride, int64_t cols, int64_t count, int64_t channels,
                            float* to);

// to[c * to_step + r] = from[r * from_step + c] for r < rows and c < cols.
using Transpose = void (*)(const float* from, int64_t from_step, int64_t rows, int64_t cols, float* to,
                           int64_t to_step);

constexpr int kMaxRows = 4, kMaxCols = 14;

// Tiles of one number of output channels.
struct TileWidth {
  int lanes;
  // tile[rows - 1][cols - 1]; null where the shape is not instantiated. One-row tiles of 1…max_cols always are.
  TileKernel tile[kMaxRows][kMaxCols];
  PointwiseKernel pointwise[kMaxCols], panel[kMaxCols];  // [cols - 1]; panel: where there is a copy_panel
};

struct Kernels {
  int widths;          // 1…3, narrowest first
  TileWidth width[3];  // each a multiple of the first
  int max_cols;        // of a one-row tile
  // Tiles of two blocks of output channels and fewer pixels: fewer reads for each multiply-add, more of them weights.
  // `lanes` is 0 where there are none. For whole blocks, where multiply-adds start in pairs (wide_for).
  TileWidth wide;
  int wide_cols;
  // Which of them is the widest to use where a tile ends after one tap: in general, and where multiply-adds start in
  // pairs (core/processor.h).
  int pointwise, paired_pointwise;
  // Without fused multiply-add every product rounds too: each kernel row is then summed by itself, for shorter chains.
  bool sum_kernel_rows;
  bool streams;  // knows TileArgs::stream, for tiles of 16 channels or more
  CopyPixels copy_pixels;
  Transpose transpose;  // null: element by element
  // Fills a panel with `count` channels of kMaxCols pixels. Null: no panels, and `pointwise` alone.
  void (*copy_panel)(const float* const* from, int64_t count, float* to);
  WinogradKernels winograd;
  const MatrixKernels* matrix;  // not null: these multiply the pairs of every layer (cpu/matrix_item.h)
  // 1x1 on contiguous NCHW: [vectors - 1][output channels - 1], up to max_cols of them; null in kernels of pairs.
  int plane_lanes;  // of a vector
  PlaneTileKernel plane[2][kMaxCols];
  void (*copy_planes)(const float* from, int64_t plane_step, int64_t channels, int64_t pixels, float* to);
  void (*copy_every_second)(const float* from, int64_t count, float* to);

  // The wide tiles, if they are to be used where `left` output channels are left from the beginning of a block on.
  const TileWidth* wide_for(int64_t left, bool paired) const {
    return paired && wide.lanes && left >= wide.lanes ? &wide : nullptr;
  }
  const TileWidth& widest() const { return width[widths - 1]; }
  // The width to take next where `left` output channels are left: the one that covers them, or the largest below it
  // where narrower ones together leave fewer lanes empty (20 channels: 16 and then 8, not 32).
  const TileWidth& width_for(int64_t left) const { return width_for(left, widths - 1); }
  const TileWidth& pointwise_width_for(int64_t left, bool paired) const {
    return width_for(left, paired ? paired_pointwise : pointwise);
  }
  const TileWidth& width_for(int64_t left, int i) const {
    const int64_t needed = (left + width[0].lanes - 1) / width[0].lanes * width[0].lanes;
    while (i > 0 && width[i].lanes > needed) --i;
    return width[i];
  }
};

const Kernels& portable_kernels();
#if defined(__x86_64__)
const Kernels& avx2_kernels();
const Kernels& avx512_kernels();
// Tiles that multiply bfloat16: their "floats" of x and w are words of two channels, and they store bfloat16.
const Kernels& avx512bf16_kernels();
// The same with matrices; only where CMake found an assembler that knows them (RNP_AMX).
const Kernels& amx_kernels();
#endif

}  // namespace rnp::cpu
