// Copies of live channels, written once over a vector type V of microkernel_tile.h's kind. Included by one translation
// unit per ISA, inside its flags; everything here has internal linkage.
#pragma once

#include <cstdint>

#include "cpu/inlining.h"

namespace rnp::cpu {
namespace {

// Up to kVectors vectors of each pixel. Live channels lie in pieces, `pixel_stride` apart, which no hardware prefetcher
// follows well: the lines of a pixel about 32 lines ahead are asked for.
template <class V, int kVectors>
RNP_INLINE void copy_vectors(const float* from, int64_t pixel_stride, int64_t cols, int64_t count, int64_t channels,
                             float* to) {
  constexpr int kAhead = 32 * 16 / (kVectors * V::kWidth) > 0 ? 32 * 16 / (kVectors * V::kWidth) : 1;
  const auto mask = V::mask(static_cast<int>(count - (kVectors - 1) * V::kWidth));
  const bool full = count == kVectors * V::kWidth;
  for (int64_t x = 0; x < cols; ++x, from += pixel_stride, to += channels) {
    if (x + kAhead < cols) {
      RNP_UNROLL
      for (int v = 0; v < kVectors; v += 16 / V::kWidth)
        __builtin_prefetch(from + kAhead * pixel_stride + v * V::kWidth);
    }
    RNP_UNROLL
    for (int v = 0; v + 1 < kVectors; ++v) V::store(to + v * V::kWidth, V::load(from + v * V::kWidth));
    constexpr int kLast = (kVectors - 1) * V::kWidth;
    if (full) {
      V::store(to + kLast, V::load(from + kLast));
    } else {
      V::masked_store(to + kLast, mask, V::masked_load(from + kLast, mask));
    }
  }
}

template <class V>
void copy_pixels(const float* from, int64_t pixel_stride, int64_t cols, int64_t count, int64_t channels, float* to) {
  constexpr int64_t kMost = 4 * V::kWidth;
  for (; count > kMost; count -= kMost, from += kMost, to += kMost)
    copy_vectors<V, 4>(from, pixel_stride, cols, kMost, channels, to);
  const int64_t vectors = (count + V::kWidth - 1) / V::kWidth;
  if (vectors == 4) copy_vectors<V, 4>(from, pixel_stride, cols, count, channels, to);
  if (vectors == 3) copy_vectors<V, 3>(from, pixel_stride, cols, count, channels, to);
  if (vectors == 2) copy_vectors<V, 2>(from, pixel_stride, cols, count, channels, to);
  if (vectors == 1) copy_vectors<V, 1>(from, pixel_stride, cols, count, channels, to);
}

}  // namespace
}  // namespace rnp::cpu
