// The warp of the sm_90a kernel that describes tiles, up to one ahead of those that are loaded.
#pragma once

#include "cuda/hopper_block.h"

namespace rnp::cuda {

// Threads 64 … 95. A lane describes every 32nd run of the tile. (Every row described by a thread of its own took 4,000
// cycles a tile on an H200, as long as the products of 64 channels.)
template <typename Tile>
struct HopperDescriber : HopperBlock<Tile> {
  using Base = HopperBlock<Tile>;
  using Base::box_count, Base::boxes_of, Base::p, Base::rows, Base::rows_empty, Base::rows_full, Base::runs_of,
      Base::states, Base::turns;

  RNP_DEVICE static int lane() { return thread_index() & 31; }

  // Whether a copy that brings the sample before this one in the order cannot go on to it. Copies go from one sample on
  // to the next in memory.
  RNP_DEVICE static bool begins(const gpu::Order& order, int64_t place) {
    return order.sample &&
           (order.sample_at(place) != order.sample_at(place - 1) + 1 || order.in_at(place) != order.in_at(place - 1));
  }

  // The boxes of rows first … end - 1, which begin with run `run`: all of the largest size that fits, the last one
  // ending with the rows, so that it brings some a second time. Fewer copies matter more than fewer bytes: by 100 + 156
  // rows in seven boxes of seven sizes a stage took an H200 two and a half times as long as by two of 128.
  RNP_DEVICE void add_boxes(Box* boxes, int32_t run, int32_t first, int32_t end) const {
    const int highest = highest_bit(static_cast<uint32_t>(end - first));
    const int size = highest < kBoxSizes - 1 ? highest : kBoxSizes - 1;
    const int32_t rows = 1 << size, count = (end - first + rows - 1) >> size;
    int32_t at = add_in_block(box_count, count);
    add_in_block(box_count + 1, count << size);
    for (int32_t row = first; row < end; row += rows, ++at)
      if (at < kMostBoxes)
        boxes[at] = {static_cast<uint16_t>(row + rows < end ? row : end - rows), static_cast<uint8_t>(run),
                     static_cast<uint8_t>(size)};
  }

  RNP_DEVICE TileState describe_tile(const gpu::Cursor& at, int64_t number, Run* runs, Box* boxes) const {
    const gpu::Order order = order_of(p);
    const int64_t first_row = at.first_row(p.cut), first_place = gpu::quotient(first_row, p.cut.positions);
    const int32_t positions = static_cast<int32_t>(p.cut.positions), first_channel = at.block * p.cut.bn;
    TileState s = {};
    s.pixel = static_cast<uint32_t>(first_row - first_place * p.cut.positions);
    const int32_t spanned =
        static_cast<int32_t>((s.pixel + static_cast<uint32_t>(rows()) - 1) / static_cast<uint32_t>(positions)) + 1;
    if (lane() == 0) box_count[0] = box_count[1] = 0;
    sync_warp();
    int32_t longest = 0, widest = 0, uneven = -p.c_in - 1, live_rows = 0;
    bool within = true;  // every beginning of a copy is one of these lanes' first runs
    int32_t own_first = 0;
    bool own_begins = false;
    RNP_ROLL
    for (int32_t base = 0; base < spanned; base += 32) {
      const int32_t i = base + lane();
      const int64_t place = first_place + i;
      Run run = {0, 0, i == 0 ? s.pixel : 0, 0, 0, 0};
      if (i > 0 && i < spanned) run.row = i * positions - static_cast<int32_t>(s.pixel);
      bool starts = false;
      if (i < spanned && place < p.cut.n) {
        const int32_t width = gpu::live_of_group(order.out_at(place), at.group, p.cut.group_out) - first_channel;
        if (width > 0) {
          run.sample = order.sample_at(place);
          run.in_live = gpu::live_of_group(order.in_at(place), at.group, p.cut.group_in);
          run.out_live = width < p.cut.bn ? width : p.cut.bn;
          run.line = p.row ? gpu::clamp_prefix(p.row[run.sample], p.lines - 1) : 0;
          starts = i == 0 || begins(order, place);
          const int32_t end = (i + 1) * positions - static_cast<int32_t>(s.pixel);
          live_rows = end < rows() ? end : rows();
          if (run.in_live > longest) longest = run.in_live;
          if (run.out_live > widest) widest = run.out_live;
          if (run.in_live % Tile::BK != 0 && -run.in_live > uneven) uneven = -run.in_live;
        }
      }
      if (i < spanned) runs[i] = run;
      if (base == 0) {
        own_first = run.row, own_begins = starts;
      } else if (starts) {
        within = false;
      }
    }
    longest = max_in_warp(longest);
    s.width = max_in_warp(widest);
    uneven = max_in_warp(uneven);
    s.rows = max_in_warp(live_rows);
    s.k_live = (longest + Tile::kStep - 1) / Tile::kStep * Tile::kStep;
    s.group = at.group;
    s.first_channel = first_channel;
    s.segment = p.splits == 1 ? 0 : static_cast<int32_t>(number % p.splits);
    const gpu::ChunkRange chunks =
        gpu::chunks_of((s.k_live + Tile::BK - 1) / Tile::BK, p.segment_chunks, s.segment, p.splits);
    s.first_chunk = chunks.first, s.end_chunk = chunks.end;
    // The copy engine brings whole chunks: of each row all or nothing of one, but for the last of the longest. That
    // ends with a whole step, or where the tensor ends and zeros come.
    const bool whole = (longest % Tile::kStep == 0 || longest == p.c_in) && (-uneven > p.c_in || -uneven == longest);
    const uint32_t starts = ballot(own_begins), inside = ballot(within);
    // A window has no other way to come, and the plan sees to it that its boxes are few; it goes on behind the last
    // row.
    s.scrub = !whole;
    if (this->windows() || (p.use_tma && whole && inside == 0xffffffffu)) {
      const int32_t all = this->windows() ? p.window_rows : s.rows;
      const uint32_t later = lane() < 31 ? starts >> (lane() + 1) : 0;
      const int next = later ? lane() + 1 + lowest_bit(later) : 32;
      const int32_t end = next < 32 ? next * positions - static_cast<int32_t>(s.pixel) : all;
      if (own_begins) add_boxes(boxes, lane(), own_first, end < all ? end : all);
      sync_warp();
      s.boxes = *box_count <= kMostBoxes ? *box_count : 0;
      s.box_rows = box_count[1];
    }
    sync_warp();
    return s;
  }

  RNP_DEVICE void describe() const {
    const gpu::Order order = order_of(p);
    gpu::Cursor at;
    Ring ring = this->ring(), buffer{2}, windows{2};
    int64_t number = block_index();
    while (at.seek(p.cut, order, p.splits == 1 ? number : number / p.splits)) {
      wait_barrier(rows_empty + buffer.at, buffer.parity ^ 1);
      // Taken early and looked at late: the memory has a description's time to answer.
      const int32_t ticket = lane() == 0 && p.ticket ? take_ticket(p.ticket) : 0;
      TileState s = describe_tile(at, number, runs_of(buffer.at), boxes_of(buffer.at));
      s.stage = ring.at, s.parity = ring.parity;
      s.window = windows.at, s.window_parity = windows.parity;
      if (p.splits == 1 || s.first_chunk < s.end_chunk) {  // a split tile whose rows end before the segment has no work
        if (lane() == 0) states[buffer.at] = s, arrive(rows_full + buffer.at);
        ring.skip((s.end_chunk - s.first_chunk) * p.y.count * p.x.count);
        windows.skip(s.end_chunk - s.first_chunk);
        buffer.next();
      }
      number = p.ticket ? block_count() + max_in_warp(ticket) : number + block_count();
    }
    for (int ends = turns() ? 2 : 1; ends > 0; --ends, buffer.next()) {
      wait_barrier(rows_empty + buffer.at, buffer.parity ^ 1);
      if (lane() == 0) states[buffer.at].width = 0, arrive(rows_full + buffer.at);
    }
  }
};

}  // namespace rnp::cuda
