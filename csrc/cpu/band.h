// The live input channels of a band of rows, compacted, converted to float32 and padded with zeros.
#pragma once

#include "core/packing.h"
#include "core/schedule.h"
#include "cpu/microkernel.h"

namespace rnp::cpu {

// How a band's pixels lie, and where the taps of an output pixel are. Along an axis where the kernel has length 1 only
// the pixels that the stride hits are kept, so that its step becomes 1.
struct BandGeometry {
  int64_t rows_in, cols_in;    // input pixels of the band, padding included
  int64_t y0, x0;              // input position of the first of them (may be negative)
  int64_t y_step, x_step;      // input pixels between neighbours of the band
  int64_t row_step, col_step;  // band pixels between neighbouring output pixels

  BandGeometry(const ConvShape& s, int64_t row0, int64_t row1);
  int64_t pixels() const { return rows_in * cols_in; }
};

// Writes [part][rows_in][cols_in][channels of the part], where part i holds the live channels of input block i
// (`ic_block` channels each). `channels` may exceed `live`: the rest is 0.
void copy_band(const PrefixConv2dParams& p, const BandGeometry& geometry, int64_t n, int64_t first_channel,
               int64_t live, int64_t channels, int64_t ic_block, const Kernels& kernels, float* to);

// The same of a bfloat16 input for kernels that multiply pairs: [part][rows_in][cols_in][words of the part], where part
// i holds the words of the live channels of input block i (`ic_block` words each). The second half of an odd last
// channel's word is 0.
void copy_band_pairs(const PrefixConv2dParams& p, const BandGeometry& geometry, int64_t n, int64_t first_channel,
                     int64_t live, int64_t ic_block, CopyPixels copy_pixels, float* to);

// For kernels that multiply chunks of 16 words, each chunk by itself: [chunk][rows_in][cols][16], `cols` records of a
// row. A record is a band pixel, or (`taps` > 1, where one chunk holds all live words of a pixel) that pixel and its
// right neighbours, `taps` in all, every col_step-th of them. The words beyond a record's last are 0. `row`: memory for
// one row of the band's words.
struct ChunkedBand {
  int64_t taps, cols;
  int64_t words;  // of a record that are not padding
  int64_t chunk;  // floats between chunks

  int64_t chunks() const { return (words + 15) / 16; }
};
void copy_band_chunks(const PrefixConv2dParams& p, const BandGeometry& geometry, int64_t n, int64_t first_channel,
                      int64_t live, const ChunkedBand& band, CopyPixels copy_pixels, float* row, float* to);

// Folds a band of `channels` (at most 4) a pixel, as copy_band writes it: [rows][cols][kFoldedPixel], where each pixel
// holds 2x2 of the band's (core/winograd.h), 0 where the band ends between them. What is left of a pixel is not
// defined. Up to kFoldedPixel floats behind the band may be read.
void fold_band(const float* band, const BandGeometry& geometry, int64_t channels, int64_t rows, int64_t cols,
               float* to);

}  // namespace rnp::cpu
