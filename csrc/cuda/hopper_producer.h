// The producers of the sm_90a kernel: the warpgroup that describes tiles and fetches their stages.
#pragma once

#include "cuda/hopper_block.h"

namespace rnp::cuda {

// Threads 0 … 127.
template <typename Tile>
struct HopperProducer : HopperBlock<Tile> {
  using Base = HopperBlock<Tile>;
  using Base::empty, Base::first_lane, Base::full, Base::input_of, Base::kAhead, Base::kProducers, Base::longest,
      Base::map, Base::p;
  using Base::rows_empty, Base::rows_full, Base::rows_of, Base::states, Base::weights_of;
  using typename Base::T;

  // Announced and fetched by one thread; exactly the live rows of the weights.
  RNP_DEVICE void fetch_weights(const TileState& s, int32_t group, const StageCursor& at, int stage, uint32_t others) {
    const int32_t tap = p.y.tap[at.iy] * p.kernel_w + p.x.tap[at.ix];
    const int64_t line = ((int64_t{group} * p.chunks + at.chunk) * p.taps + tap) * p.cut.group_out;
    const int32_t in_group = s.first_channel - group * p.cut.group_out;
    const uint32_t bytes = static_cast<uint32_t>(s.width) * kPackBytes;
    expect_bytes(full + stage, bytes + others);
    copy_bulk(weights_of(stage), static_cast<const char*>(p.packed) + (line + in_group) * kPackBytes, bytes,
              full + stage);
  }

  // Eight neighbouring threads fetch one row's 128 bytes. Pieces behind the last live step are never multiplied.
  RNP_DEVICE void fetch_rows(const TileState& s, const Row* rows, const StageCursor& at, int stage) {
    const int piece = thread_index() & 7, first = thread_index() >> 3;
    const int32_t channel = at.chunk * Tile::BK + piece * 8;
    if (channel >= s.k_live) return;
    const int64_t offset =
        p.y.delta[at.iy] * p.input_stride.h + p.x.delta[at.ix] * p.input_stride.w + channel * p.input_stride.c;
    char* to = input_of(stage) + swizzled(first, piece);  // rows 16 apart: the same place of a later row
    RNP_UNROLL
    for (int i = 0; i < Tile::BM / 16; ++i) {
      const Row& row = rows[first + i * 16];
      const int32_t left = row.in_live - channel;
      const bool valid = (row.taps >> at.iy & row.taps >> (16 + at.ix) & 1u) != 0 && left > 0;
      const T* from = static_cast<const T*>(p.input) + (valid ? row.input + offset : 0);
      copy_async(to + i * 16 * kPackBytes, from, valid ? (left < 8 ? left * 2 : 16) : 0);
    }
  }

  // Hands over the oldest stage of cp.async: its bytes have landed, and wgmma shall see them.
  template <int kLeft>
  RNP_DEVICE void hand_over(Ring<Tile::kStages>& oldest) {
    wait_copies<kLeft>();
    publish_writes();
    sync_warp();
    if (first_lane()) arrive(full + oldest.at);
    oldest.next();
  }

  RNP_DEVICE void fetch_tile(const TileState& s, const Row* rows, const gpu::Cursor& cursor, const gpu::RowPlace& first,
                             bool straight, Ring<Tile::kStages>& ring) {
    const int32_t total = (s.end_chunk - s.first_chunk) * p.y.count * p.x.count;
    StageCursor at;
    at.chunk = s.first_chunk;
    // Of thread 0: where the im2col copies begin.
    const int32_t oy = static_cast<int32_t>(first.pixel / static_cast<uint32_t>(p.out_w));
    const int32_t ox = static_cast<int32_t>(first.pixel - static_cast<uint32_t>(oy) * static_cast<uint32_t>(p.out_w));
    const int32_t h = oy * p.y.step + p.box_lower_h, w = ox * p.x.step + p.box_lower_w;
    Ring<Tile::kStages> oldest = ring;
    for (int32_t it = 0; it < total; ++it, at.next(p), ring.next()) {
      wait_barrier(empty + ring.at, ring.parity ^ 1);
      if (straight) {
        if (thread_index() == 0) {
          fetch_weights(s, cursor.group, at, ring.at, Tile::BM * kPackBytes);
          copy_im2col(input_of(ring.at), map, full + ring.at, cursor.group * p.cut.group_in + at.chunk * Tile::BK, w, h,
                      order_of(p).sample_at(first.place), static_cast<uint16_t>(p.x.delta[at.ix] - p.box_lower_w),
                      static_cast<uint16_t>(p.y.delta[at.iy] - p.box_lower_h));
        }
        sync_warp();  // no lane may still wait for a phase that is over when the stage comes round again
        if (first_lane()) arrive(full + ring.at);
      } else {
        if (thread_index() == 0) fetch_weights(s, cursor.group, at, ring.at, 0);
        fetch_rows(s, rows, at, ring.at);
        commit_copies();
        if (it >= kAhead) hand_over<kAhead>(oldest);
      }
    }
    if (!straight) {
      wait_copies<0>();
      for (int32_t left = total < kAhead ? total : kAhead; left > 0; --left) hand_over<0>(oldest);
    }
  }

  RNP_DEVICE void produce() {
    const int thread = thread_index();
    const gpu::Order order = order_of(p);
    gpu::Cursor at;
    Ring<Tile::kStages> ring;
    Ring<2> buffer;
    int64_t number = block_index();
    while (at.seek(p.cut, order, number / p.splits)) {
      wait_barrier(rows_empty + buffer.at, buffer.parity ^ 1);
      if (thread == 0 && p.ticket) longest[3] = take_ticket(p.ticket);
      if (thread < 3) longest[thread] = 0;
      sync_threads(1, kProducers);
      Row* rows = rows_of(buffer.at);
      const int64_t first_row = at.first_row(p.cut, number / p.splits);
      const gpu::RowPlace place = describe_row(p, at, first_row, thread, rows, longest);
      const int64_t first_place = first_row / p.cut.positions;
      if (place.live && (order.in_at(place.place) != order.in_at(first_place) ||
                         order.sample_at(place.place) - order.sample_at(first_place) != place.place - first_place))
        max_in_block(longest + 2, 1);
      sync_threads(1, kProducers);
      TileState s;
      s.k_live = (longest[0] + Tile::kStep - 1) / Tile::kStep * Tile::kStep;
      s.width = longest[1];
      s.first_channel = at.group * p.cut.group_out + at.block * p.cut.bn;
      s.segment = static_cast<int32_t>(number % p.splits);
      const gpu::ChunkRange chunks =
          gpu::chunks_of((s.k_live + Tile::BK - 1) / Tile::BK, p.segment_chunks, s.segment, p.splits);
      s.first_chunk = chunks.first, s.end_chunk = chunks.end;
      // K ends with whole steps, or where the tensor ends and the copy engine brings zeros.
      const bool whole = longest[0] % Tile::kStep == 0 || longest[0] == p.c_in;
      const bool straight = p.use_tma && longest[2] == 0 && whole;
      number = p.ticket ? block_count() + longest[3] : number + block_count();
      if (p.splits == 1 || s.first_chunk < s.end_chunk) {  // a split tile whose rows end before the segment has no work
        if (thread == 0) states[buffer.at] = s, arrive(rows_full + buffer.at);
        fetch_tile(s, rows, at, place, straight, ring);
        buffer.next();
      }
      sync_threads(1, kProducers);  // `longest` has been read
    }
    wait_barrier(rows_empty + buffer.at, buffer.parity ^ 1);
    if (thread == 0) states[buffer.at].width = 0, arrive(rows_full + buffer.at);
  }
};

}  // namespace rnp::cuda
