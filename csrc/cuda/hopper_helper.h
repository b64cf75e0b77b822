// The warp of the sm_90a kernel that helps the others: it asks for what the epilogue will read, and cleans windows.
#pragma once

#include "cuda/hopper_epilogue.h"

namespace rnp::cuda {

// Threads 96 … 127, where HopperBlock::helps.
template <typename Tile>
struct HopperHelper : HopperEpilogue<Tile> {
  using Base = HopperEpilogue<Tile>;
  using Base::first_channel_of, Base::first_lane, Base::p, Base::place_of, Base::prefetches, Base::rows,
      Base::rows_empty, Base::rows_full, Base::runs_of, Base::states, Base::window_full, Base::window_landed,
      Base::window_of;
  using typename Base::T;
  static constexpr int kLine = 128 / Tile::kElement;

  // A warp of consumers has registers for one slab of the residual on its way, which is little for memory a thousand
  // cycles off; from L2 it comes in a quarter of them.
  RNP_DEVICE void prefetch_residual(const TileState& s, const Run* runs) const {
    RNP_ROLL
    for (int row = thread_index() & 31; row < s.rows; row += 32) {
      const auto place = place_of(s, runs, row);
      const T* const from = static_cast<const T*>(p.residual) + place.residual + first_channel_of(s);
      RNP_ROLL
      for (int32_t c = 0; c < place.out_live; c += kLine) prefetch(from + c);
    }
  }

  // Zeros for the channels of a window's rows that are not live. `chunk`: what the window holds.
  RNP_DEVICE void scrub(const TileState& s, const Run* runs, int32_t chunk, char* window) const {
    const int lane = thread_index() & 31;
    const int32_t positions = static_cast<int32_t>(p.cut.positions);
    int32_t begin = 0;
    RNP_ROLL
    for (int i = 0; begin < rows(); ++i) {
      const int32_t next = (i + 1) * positions - static_cast<int32_t>(s.pixel),
                    live = runs[i].in_live - chunk * Tile::BK;
      const int32_t end = next < rows() ? next : p.window_rows;
      if (live > 0 && live < Tile::BK) {
        RNP_ROLL
        for (int32_t row = begin + lane; row < end; row += 32) {
          RNP_ROLL
          for (int32_t c = live; c < Tile::BK;) {
            char* const to = window + swizzled(row, c / Tile::kPiece);
            wrote(to);
            if (c % Tile::kPiece == 0) {
              *reinterpret_cast<Vec16*>(to) = Vec16{};
              c += Tile::kPiece;
            } else {
              reinterpret_cast<T*>(to)[c % Tile::kPiece] = T{};
              ++c;
            }
          }
        }
      }
      begin = next;
    }
  }

  // The windows of a tile in which the copy engine brought dead channels, one after the other.
  RNP_DEVICE void scrub_windows(const TileState& s, const Run* runs, uint32_t& landed) const {
    Ring ring{2, s.window, s.window_parity};
    for (int32_t chunk = s.first_chunk; chunk < s.end_chunk; ++chunk, ring.next()) {
      wait_barrier(window_landed + ring.at, landed >> ring.at & 1);
      landed ^= 1u << ring.at;
      scrub(s, runs, chunk, window_of(ring.at));
      publish_writes();
      arrive(window_full + ring.at);
    }
  }

  RNP_DEVICE void help() const {
    uint32_t landed = 0;  // the parities of window_landed, a bit for each
    for (Ring buffer{2};; buffer.next()) {
      wait_barrier(rows_full + buffer.at, buffer.parity);
      const TileState& s = states[buffer.at];
      if (s.width == 0) break;
      const Run* runs = runs_of(buffer.at);
      if (this->windows() && s.scrub) scrub_windows(s, runs, landed);
      if (prefetches()) prefetch_residual(s, runs);
      sync_warp();
      if (first_lane()) arrive(rows_empty + buffer.at);
    }
  }
};

}  // namespace rnp::cuda
