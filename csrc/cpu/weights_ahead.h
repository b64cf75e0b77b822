// Weights of the next pass, fetched while wide tiles run.
#pragma once

#include "core/packing.h"
#include "cpu/microkernel.h"

namespace rnp::cpu {

// What the wide tiles of a pass ask for: `floats` of each of two blocks from `next` on, the weights of the next pass.
// The first four tiles ask for a quarter each, or, where there are fewer (layers of few pixels, whose weights come from
// afar), two for a half or one for all.
class WeightsAhead {
 public:
  WeightsAhead() = default;
  WeightsAhead(const float* next, int64_t floats) : next_(next), floats_(floats) {}

  // Before each of the pass's `tiles` tiles.
  void give(TileArgs& args, int64_t tiles) {
    const int64_t share = tiles < 2 ? 4 : tiles < 4 ? 2 : 1, from = tile_ * share;  // in quarters
    const bool some = next_ && from < 4;
    args.ahead = some ? next_ + floats_ * from / 4 / PackedLayout::kLanes * PackedLayout::kLanes : nullptr;
    args.ahead_rows = some ? static_cast<int32_t>(share) : 0;
    ++tile_;
  }

 private:
  const float* next_ = nullptr;
  int64_t floats_ = 0, tile_ = 0;
};

}  // namespace rnp::cpu
