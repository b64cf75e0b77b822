// Winograd's minimal filtering F(m x m, r x r): its numbers, and the transformed weights.
//
//   Y = A^T [ (G g G^T) . (B^T d B) ] A     d: (m + r - 1)^2 inputs, g: r x r weights, Y: m^2 outputs
//
// summed over input channels inside the brackets: (m + r - 1)^2 products instead of r^2 m^2.
//
// r = 3, m = 2 or 4: 3x3 kernels. F(2x2) uses the points 0, 1, -1, infinity; F(4x4) uses 0, +-2/3, +-3/2, infinity
// instead of the usual 0, +-1, +-2: the same number of operations, and half the error (relative L2, 256 channels,
// normal data: 1.4e-6 against 3.0e-6). The polynomials behind the matrices are x (x^2 - p) (x^2 - q), p = 4/9, q = 9/4,
// p q = 1.
//
// Dilation d: outputs d apart read inputs d apart, so d x d interleaved maps are convolved with dilation 1 each.
//
// r = 4, m = 4: the stem of a ResNet, a 7x7 kernel in steps of two over up to 4 channels. *Folded*: each 2x2 pixels of
// the input are the channels [row][column][channel] of one pixel of half the resolution, and of the kernel's 8x8 taps,
// the eighth of each axis 0, as many are left: a 4x4 kernel in steps of one. 49 products a folded channel and tile
// instead of 196 for each channel of the image. Points 0, +-1/2, +-2, 1, infinity: x (x^2 - p) (x^2 - q) (x - 1), again
// p q = 1 (relative L2, 12 folded channels, normal data: 1.7e-6; with +-2/3, +-3/2, 1 3.9e-6).
#pragma once

#include <cstdint>

#include "core/packing.h"

namespace rnp {

template <int kTaps>  // r
struct WinogradPoints {
  static constexpr double a = kTaps == 4 ? 0.5 : 2.0 / 3, b = 1 / a, p = a * a, q = b * b;
};

// Tiles along an axis of `outputs`: with a dilation, of so many interleaved maps, all as long as the longest.
inline int64_t winograd_tiles(int64_t outputs, int64_t tile, int64_t dilation) {
  return (outputs + tile * dilation - 1) / (tile * dilation) * dilation;
}

// Floats of a folded pixel in memory: [row][column][channel], and what is left.
constexpr int64_t kFoldedPixel = 16;

// Transformed weights: header (kHeaderWords int32) | fingerprint (c_out floats), both as in packing.h | padding | data:
//   [oc block of 32][point][c_in][lanes]
// so that the weights of one block of output channels are read from front to back, and an input prefix is a contiguous
// run at every point; of a folded kernel, c_in are the folded channels. F(4x4) takes 4 times the memory of the weights,
// F(2x2) 16/9 of it.
struct WinogradLayout {
  static constexpr int32_t kMagic = 0x524e5757, kVersion = 2;

  int64_t tile, c_in, c_out;
  int64_t kernel = 3;  // of the weights: 3x3, or 7x7 to be folded

  bool folded() const { return kernel == 7; }
  int64_t taps() const { return folded() ? 4 : 3; }
  int64_t channels() const { return folded() ? 4 * c_in : c_in; }  // that are summed over
  int64_t edge() const { return tile + taps() - 1; }
  int64_t points() const { return edge() * edge(); }
  int64_t oc_blocks() const { return (c_out + PackedLayout::kLanes - 1) / PackedLayout::kLanes; }
  int64_t lanes(int64_t block) const {
    return c_out - block * PackedLayout::kLanes <= PackedLayout::kHalfLanes ? PackedLayout::kHalfLanes
                                                                            : PackedLayout::kLanes;
  }
  int64_t data_at() const { return (PackedLayout::kHeaderWords + c_out + 15) / 16 * 16; }
  // First float of [c_in][lanes] of one block and point.
  int64_t panel_at(int64_t block, int64_t point) const {
    return data_at() + (block * PackedLayout::kLanes * points() + point * lanes(block)) * channels();
  }
  int64_t total_floats() const { return panel_at(oc_blocks() - 1, points()); }

  bool operator==(const WinogradLayout&) const = default;
};

}  // namespace rnp
