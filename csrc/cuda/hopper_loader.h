// The warps of the sm_90a kernel that fetch the stages of the tiles.
#pragma once

#include "cuda/hopper_block.h"

namespace rnp::cuda {

// Threads 0 … 63.
template <typename Tile>
struct HopperLoader : HopperBlock<Tile> {
  using Base = HopperBlock<Tile>;
  using Base::boxes_of, Base::copied_rows, Base::empty, Base::first_lane, Base::full, Base::input_of, Base::maps,
      Base::p, Base::ring_of, Base::rows, Base::rows_empty, Base::rows_full, Base::runs_of, Base::states,
      Base::weights_of, Base::window_empty, Base::window_full, Base::window_landed, Base::window_of, Base::windows;
  using typename Base::T;
  using Cursor = StageCursor<Tile::BK, 0>;

  // Announced, with `others` more, and fetched by one thread; exactly the live rows of the weights.
  RNP_DEVICE void fetch_weights(const TileState& s, const Cursor& at, int stage, uint32_t others) const {
    const uint32_t bytes = static_cast<uint32_t>(s.width) * kPackBytes;
    expect_bytes(full + stage, bytes + others);
    copy_bulk(weights_of(stage),
              static_cast<const char*>(p.packed) + (at.line * p.cut.group_out + s.first_channel) * kPackBytes, bytes,
              full + stage);
  }

  // By the copy engine: one warp asks for the weights of every stage, in the other each lane for one box of rows.
  RNP_DEVICE void fetch_stages(const TileState& s, int32_t stages, Ring ring) const {
    Cursor at;
    at.begin(p, s.group, s.first_chunk);
    for (int32_t it = 0; it < stages; ++it, at.next(p, s.group), ring.next()) {
      wait_barrier(empty + ring.at, ring.parity ^ 1);
      fetch_weights(s, at, ring.at, windows() ? 0 : static_cast<uint32_t>(s.box_rows) * kPackBytes);
      arrive_for(full + ring.at, kHopperLoaders);
    }
  }

  // Where the copy engine begins with a box.
  struct Pixel {
    int32_t n, h, w;
  };
  RNP_DEVICE Pixel pixel_of(const Run& run, const Box& box, int32_t pitch) const {
    const uint32_t pixel = run.pixel + static_cast<uint32_t>(box.row - run.row);
    // A box may begin some samples behind its run, where copies go on from sample to sample.
    const uint32_t positions = static_cast<uint32_t>(p.cut.positions), samples = pixel / positions;
    const uint32_t inside = pixel - samples * positions, y = inside / static_cast<uint32_t>(pitch);
    const uint32_t x = inside - y * static_cast<uint32_t>(pitch);
    return {run.sample + static_cast<int32_t>(samples), static_cast<int32_t>(y) * p.y.step + p.box_lower_h,
            static_cast<int32_t>(x) * p.x.step + p.box_lower_w};
  }

  RNP_DEVICE void fetch_box(const TileState& s, const Run* runs, const Box& box, int32_t stages, Ring ring) const {
    const Run& run = runs[box.run];
    const Pixel at = pixel_of(run, box, p.out_w);
    // Behind its own last channel a shorter row than the longest gets what lies beyond the tensor: zeros.
    const int32_t end = run.in_live % Tile::BK == 0 ? run.in_live / Tile::BK : s.end_chunk;
    const int32_t group = s.group * p.cut.group_in, taps_x = p.x.count, taps_y = p.y.count;
    const int32_t base_x = p.x.delta - p.box_lower_w, base_y = p.y.delta - p.box_lower_h;
    int32_t chunk = s.first_chunk, ix = 0, iy = 0;
    for (int32_t it = 0; it < stages; ++it, ring.next()) {
      wait_barrier(empty + ring.at, ring.parity ^ 1);
      copy_im2col(input_of(ring.at) + box.row * kPackBytes, maps + box.size, full + ring.at,
                  chunk < end ? group + chunk * Tile::BK : p.c_in, at.w, at.h, at.n,
                  static_cast<uint16_t>(base_x + ix * p.x.delta_step),
                  static_cast<uint16_t>(base_y + iy * p.y.delta_step));
      if (++ix == taps_x) {
        ix = 0;
        if (++iy == taps_y) iy = 0, ++chunk;
      }
    }
  }

  // A tile's windows, by the first warp: each lane asks for one box of rows of every chunk. Full when they have come,
  // or, where dead channels have come too, when HopperHelper says so.
  RNP_DEVICE void fetch_windows(const TileState& s, const Run* runs, const Box* boxes) const {
    const int lane = thread_index(), own = lane < s.boxes ? lane : 0;
    const Box box = boxes[own];
    const Run& run = runs[box.run];
    const Pixel at = pixel_of(run, box, p.pitch);
    const int32_t end = (run.in_live + Tile::BK - 1) / Tile::BK, group = s.group * p.cut.group_in;
    Ring ring{2, s.window, s.window_parity};
    for (int32_t chunk = s.first_chunk; chunk < s.end_chunk; ++chunk, ring.next()) {
      wait_barrier(window_empty + ring.at, ring.parity ^ 1);
      uint64_t* const barrier = (s.scrub ? window_landed : window_full) + ring.at;
      char* const window = window_of(ring.at);
      if (lane == 0) expect_bytes(barrier, static_cast<uint32_t>(s.box_rows) * kPackBytes);
      if (lane < s.boxes)
        copy_im2col(window + box.row * kPackBytes, maps + box.size, barrier,
                    chunk < end ? group + chunk * Tile::BK : p.c_in, at.w, at.h, at.n, 0, 0);
      if (lane == 0) arrive_for(barrier, s.scrub ? 1 : 32);
    }
  }

  // What cp.async must know of every row, by all loaders.
  RNP_DEVICE void describe_rows(const TileState& s, const Run* runs) const {
    RNP_ROLL
    for (int r = thread_index(); r < rows(); r += kHopperLoaders) {
      CopiedRow row = {0, 0, 0};
      if (r < s.rows) {
        const uint32_t pixels = s.pixel + static_cast<uint32_t>(r), positions = static_cast<uint32_t>(p.cut.positions);
        const uint32_t i = pixels / positions, pixel = pixels - i * positions;
        const int32_t oy = static_cast<int32_t>(pixel / static_cast<uint32_t>(p.out_w));
        const int32_t ox = static_cast<int32_t>(pixel - static_cast<uint32_t>(oy) * static_cast<uint32_t>(p.out_w));
        const int32_t y = oy * p.y.step, x = ox * p.x.step;
        row.input = runs[i].sample * p.input_stride.n + y * p.input_stride.h + x * p.input_stride.w +
                    int64_t{s.group} * p.cut.group_in * p.input_stride.c;
        row.taps = valid_taps(p.y, y, p.h) | valid_taps(p.x, x, p.w) << 16;
        row.in_live = runs[i].in_live;
      }
      copied_rows[r] = row;
    }
  }

  // By cp.async: eight neighbouring threads fetch one row's 128 bytes, each thread every eighth row. Pieces behind the
  // last live step are never multiplied.
  RNP_DEVICE void fetch_copied(const TileState& s, int32_t stages, Ring ring) const {
    const int piece = thread_index() & 7, first = thread_index() >> 3;
    const T* const input = static_cast<const T*>(p.input);
    Cursor at;
    at.begin(p, s.group, s.first_chunk);
    for (int32_t it = 0; it < stages; ++it, at.next(p, s.group), ring.next()) {
      wait_barrier(empty + ring.at, ring.parity ^ 1);
      if (thread_index() == 0) fetch_weights(s, at, ring.at, 0);
      const int32_t channel = at.chunk * Tile::BK + piece * Tile::kPiece;
      if (channel < s.k_live) {
        const uint32_t tap = 1u << at.iy | 0x10000u << at.ix;
        const T* const from = input + at.input + piece * Tile::kPiece;
        RNP_ROLL
        for (int half = 0; half < rows(); half += Tile::BM) {
          // Rows 8 apart: the same place of a later row.
          char* to = input_of(ring.at) + half * kPackBytes + swizzled(first, piece);
          RNP_UNROLL
          for (int i = 0; i < Tile::BM / 8; ++i) {
            const CopiedRow row = copied_rows[half + first + i * 8];
            const int32_t left = row.in_live - channel;
            const bool valid = (row.taps & tap) == tap && left > 0;
            copy_async(to + i * 8 * kPackBytes, valid ? from + row.input : input,
                       valid ? (left < Tile::kPiece ? left * Tile::kElement : 16) : 0);
          }
        }
      }
      arrive_after_copies(full + ring.at);
    }
  }

  RNP_DEVICE void load() const {
    for (Ring buffer{2};; buffer.next()) {
      wait_barrier(rows_full + buffer.at, buffer.parity);
      const TileState s = states[buffer.at];
      if (s.width == 0) break;
      const Ring ring = ring_of(s);
      const int32_t stages = (s.end_chunk - s.first_chunk) * p.y.count * p.x.count;
      const Run* runs = runs_of(buffer.at);
      if (windows()) {
        if (thread_index() < 32)
          fetch_windows(s, runs, boxes_of(buffer.at));
        else if (thread_index() == 32)
          fetch_stages(s, stages, ring);
      } else if (s.boxes == 0) {
        describe_rows(s, runs);
        sync_threads(2, kHopperLoaders);
        fetch_copied(s, stages, ring);
      } else if (thread_index() == 32) {
        fetch_stages(s, stages, ring);
      } else if (thread_index() < s.boxes) {
        fetch_box(s, runs, boxes_of(buffer.at)[thread_index()], stages, ring);
      }
      sync_warp();
      // Together: a warp that had nothing to do would look for the next tile's stages rounds too early.
      sync_threads(2, kHopperLoaders);
      if (first_lane()) arrive(rows_empty + buffer.at);
    }
  }
};

}  // namespace rnp::cuda
