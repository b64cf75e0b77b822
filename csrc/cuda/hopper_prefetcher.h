// The warp of the sm_90a kernel that asks for what the epilogue will read.
#pragma once

#include "cuda/hopper_epilogue.h"

namespace rnp::cuda {

// Threads 96 … 127, where HopperBlock::prefetches. A warp of consumers has registers for one slab of the residual on
// its way, which is little for memory a thousand cycles off; from L2 it comes in a quarter of them.
template <typename Tile>
struct HopperPrefetcher : HopperEpilogue<Tile> {
  using Base = HopperEpilogue<Tile>;
  using Base::first_channel_of, Base::first_lane, Base::p, Base::place_of, Base::rows_empty, Base::rows_full,
      Base::runs_of, Base::states;
  using typename Base::T;
  static constexpr int kLine = 128 / Tile::kElement;

  RNP_DEVICE void prefetch_residual() const {
    for (Ring buffer{2};; buffer.next()) {
      wait_barrier(rows_full + buffer.at, buffer.parity);
      const TileState& s = states[buffer.at];
      if (s.width == 0) break;
      RNP_ROLL
      for (int row = thread_index() & 31; row < s.rows; row += 32) {
        const auto place = place_of(s, runs_of(buffer.at), row);
        const T* const from = static_cast<const T*>(p.residual) + place.residual + first_channel_of(s);
        RNP_ROLL
        for (int32_t c = 0; c < place.out_live; c += kLine) prefetch(from + c);
      }
      sync_warp();
      if (first_lane()) arrive(rows_empty + buffer.at);
    }
  }
};

}  // namespace rnp::cuda
