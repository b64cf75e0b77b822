// Weights of the next pass, fetched while wide tiles run.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/microkernel.h"

namespace rnp::cpu {

// What the wide tiles of a pass ask for: `floats` of each of two blocks, `block_step` apart, from `next` on. Every tile
// asks for an equal part, spread over its multiply-adds, so that weights from past L2 leave miss buffers to the tile's
// own loads. (A quarter in each of the first four tiles was level: 512 channels at 7x7 1.38 and 1.07 of oneDNN's speed,
// batch 1 and 8, and 1.33 and 1.07 with equal parts.)
class WeightsAhead {
 public:
  WeightsAhead() = default;
  WeightsAhead(const float* next, int64_t block_step, int64_t floats)
      : next_(next), block_step_(block_step), lines_(floats / kLine) {}

  // Before each of the pass's `tiles` tiles.
  void give(TileArgs& args, int64_t tiles) {
    args.ahead_lines = 0;
    if (!next_) return;
    const int64_t all = 2 * lines_, first = all * tile_ / tiles, end = all * (tile_ + 1) / tiles;
    ++tile_;
    args.ahead = next_ + (first < lines_ ? first * kLine : block_step_ + (first - lines_) * kLine);
    args.ahead_lines = static_cast<int32_t>(end - first);
    // A pass multiplies about as many weights as it asks for: 16 lines for any four input channels.
    args.ahead_burst = static_cast<int32_t>(std::max<int64_t>(1, (16 + tiles - 1) / tiles));
  }

 private:
  static constexpr int64_t kLine = 16;  // floats
  const float* next_ = nullptr;
  int64_t block_step_ = 0, lines_ = 0, tile_ = 0;
};

}  // namespace rnp::cpu
