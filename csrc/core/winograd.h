// Winograd's minimal filtering F(m x m, 3x3), m = 2 or 4: its numbers, and the transformed weights.
//
//   Y = A^T [ (G g G^T) . (B^T d B) ] A     d: (m + 2)^2 inputs, g: 3x3 weights, Y: m^2 outputs
//
// summed over input channels inside the brackets: (m + 2)^2 products instead of 9 m^2. F(2x2) uses the points 0, 1, -1,
// infinity; F(4x4) uses 0, +-2/3, +-3/2, infinity instead of the usual 0, +-1, +-2: the same number of operations, and
// half the error (relative L2, 256 channels, normal data: 1.4e-6 against 3.0e-6). The polynomials behind the matrices
// are x (x^2 - p) (x^2 - q), p = 4/9, q = 9/4, p q = 1.
#pragma once

#include <cstdint>

#include "core/packing.h"

namespace rnp {

struct WinogradPoints {
  static constexpr double a = 2.0 / 3, b = 3.0 / 2, p = a * a, q = b * b;
};

// Transformed weights: header (kHeaderWords int32) | fingerprint (c_out floats), both as in packing.h | padding | data:
//   [oc block of 32][point][c_in][lanes]
// so that the weights of one block of output channels are read from front to back, and an input prefix is a contiguous
// run at every point. F(4x4) takes 4 times the memory of the weights, F(2x2) 16/9 of it.
struct WinogradLayout {
  static constexpr int32_t kMagic = 0x524e5757, kVersion = 1;

  int64_t tile, c_in, c_out;

  int64_t edge() const { return tile + 2; }
  int64_t points() const { return edge() * edge(); }
  int64_t oc_blocks() const { return (c_out + PackedLayout::kLanes - 1) / PackedLayout::kLanes; }
  int64_t lanes(int64_t block) const {
    return c_out - block * PackedLayout::kLanes <= PackedLayout::kHalfLanes ? PackedLayout::kHalfLanes
                                                                            : PackedLayout::kLanes;
  }
  int64_t data_at() const { return (PackedLayout::kHeaderWords + c_out + 15) / 16 * 16; }
  // First float of [c_in][lanes] of one block and point.
  int64_t panel_at(int64_t block, int64_t point) const {
    return data_at() + (block * PackedLayout::kLanes * points() + point * lanes(block)) * c_in;
  }
  int64_t total_floats() const { return panel_at(oc_blocks() - 1, points()); }

  bool operator==(const WinogradLayout&) const = default;
};

}  // namespace rnp
