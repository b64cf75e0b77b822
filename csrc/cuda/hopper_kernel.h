// The tile kernel of sm_90a, one thread block's view: a warpgroup of producers fetches, two of consumers multiply.
//
// Producers describe a tile's rows and bring its stages: the weights by one bulk copy each; the input by one im2col
// copy where the tile's rows follow each other in memory (one sample, or neighbours with the same prefix) and its K is
// whole steps, else by cp.async, row by row, zeros where a row has no live channel. They run up to a tile ahead.
// Consumers hold 64 rows by the tile's live width in registers and feed wgmma from shared memory. Barriers: full and
// empty for each stage, and for each of the two descriptions of a tile.
//
// Compiled for the GPU in hopper_tiles.cu and for the CPU in the tests, which run it on the emulator. It has never run
// on a device.
#pragma once

#include "cuda/conv_epilogue.h"
#include "cuda/hopper_wgmma.h"

namespace rnp::cuda {

// What consumers must know of a tile beside its rows. width 0: there is no further tile.
struct TileState {
  int32_t k_live;                  // K in channels, at least the longest row's, a multiple of 16
  int32_t width;                   // live output channels of the widest row
  int32_t first_channel;           // of the tensor
  int32_t first_chunk, end_chunk;  // of K
  int32_t segment;
};

// A place in a ring of `kSize` stages, and the parity of its barriers' phase.
template <int kSize>
struct Ring {
  int32_t at = 0;
  uint32_t parity = 0;
  RNP_DEVICE void next() {
    if (++at == kSize) at = 0, parity ^= 1;
  }
};

template <typename Tile>
struct HopperBlock {
  using T = typename Tile::T;
  static constexpr int kProducers = 128, kWarps = kHopperConsumers / 32;
  // Stages of cp.async under way before the oldest is handed over. The stage whose place is needed next must have been,
  // and the one after it too: consumers give a stage back when they have begun the next.
  static constexpr int kAhead = Tile::kStages - 2;

  const ConvArgs& p;
  const TensorMap* map;
  char* stages;
  float* staging;
  Row* rows_of_both;
  TileState* states;
  uint64_t *full, *empty, *rows_full, *rows_empty;
  int32_t* longest;  // [0]: K in channels, [1]: width, [2]: rows that one im2col copy cannot bring, [3]: the next tile

  RNP_DEVICE HopperBlock(const ConvArgs& args, const TensorMap* tensor_map, char* shared) : p(args), map(tensor_map) {
    const uint32_t skip = (1024 - (shared_address(shared) & 1023)) & 1023;
    stages = shared + skip;
    staging = reinterpret_cast<float*>(stages + Tile::kStages * Tile::kStageBytes);
    rows_of_both = reinterpret_cast<Row*>(reinterpret_cast<char*>(staging) + Tile::kStagingBytes);
    full = reinterpret_cast<uint64_t*>(rows_of_both + 2 * Tile::BM);
    empty = full + Tile::kStages;
    rows_full = empty + Tile::kStages;
    rows_empty = rows_full + 2;
    longest = reinterpret_cast<int32_t*>(rows_empty + 2);
    states = reinterpret_cast<TileState*>(longest + 4);
    static_assert((2 * Tile::kStages + 4) * 8 + 16 + 2 * sizeof(TileState) <= Tile::kStateBytes);
  }

  RNP_DEVICE char* input_of(int stage) const { return stages + stage * Tile::kStageBytes; }
  RNP_DEVICE char* weights_of(int stage) const { return input_of(stage) + Tile::BM * kPackBytes; }
  RNP_DEVICE Row* rows_of(int buffer) const { return rows_of_both + buffer * Tile::BM; }

  RNP_DEVICE void make_barriers() {
    if (thread_index() == 0) {
      for (int i = 0; i < Tile::kStages; ++i) init_barrier(full + i, kProducers), init_barrier(empty + i, kWarps);
      for (int i = 0; i < 2; ++i) init_barrier(rows_full + i, kProducers), init_barrier(rows_empty + i, kWarps);
      publish_barriers();
    }
    sync_block();
  }

  // ---- producers: threads 0 … 127 ----

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
    arrive(full + oldest.at);
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
        arrive(full + ring.at);
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
        if (thread == 0) states[buffer.at] = s;
        arrive(rows_full + buffer.at);
        fetch_tile(s, rows, at, place, straight, ring);
        buffer.next();
      }
      sync_threads(1, kProducers);  // `longest` has been read
    }
    wait_barrier(rows_empty + buffer.at, buffer.parity ^ 1);
    if (thread == 0) states[buffer.at].width = 0;
    arrive(rows_full + buffer.at);
  }

  // ---- consumers: threads 128 … 383, warpgroups 0 and 1 of them ----

  RNP_DEVICE static int consumer() { return thread_index() - kProducers; }
  RNP_DEVICE static int consumer_group() { return consumer() / 128; }
  RNP_DEVICE static bool first_lane() { return (thread_index() & 31) == 0; }

  // Adds chunks first … end - 1 of K to the sums: all their taps. One stage's products are under way while the next
  // stage is waited for.
  template <int N>
  RNP_DEVICE void multiply_chunks(const TileState& s, int32_t first, int32_t end, float (&sums)[N / 2],
                                  Ring<Tile::kStages>& ring) {
    const int32_t taps = p.y.count * p.x.count;
    constexpr int32_t kSteps = Tile::BK / Tile::kStep;
    int32_t used = -1;
    pin(sums);
    for (int32_t chunk = first; chunk < end; ++chunk) {
      const int32_t steps = (s.k_live - chunk * Tile::BK) / Tile::kStep;
      for (int32_t tap = 0; tap < taps; ++tap) {
        wait_barrier(full + ring.at, ring.parity);
        const uint64_t a = operand_descriptor(shared_address(input_of(ring.at) + consumer_group() * 64 * kPackBytes));
        const uint64_t b = operand_descriptor(shared_address(weights_of(ring.at)));
        if (steps >= kSteps) {  // nothing between the products, or the compiler fences each
          begin_products();
          RNP_UNROLL
          for (int step = 0; step < kSteps; ++step)
            multiply_warpgroup(T{}, Width<N>{}, sums, a + step * kDescriptorStep, b + step * kDescriptorStep);
          commit_products();
        } else {
          RNP_ROLL
          for (int step = 0; step < steps; ++step) {
            begin_products();
            multiply_warpgroup(T{}, Width<N>{}, sums, a + step * kDescriptorStep, b + step * kDescriptorStep);
            commit_products();  // a group each: the wait below covers one stage more closely than it must
          }
        }
        wait_products<1>();
        if (used >= 0 && first_lane()) arrive(empty + used);
        used = ring.at;
        ring.next();
      }
    }
    wait_products<0>();
    pin(sums);
    if (used >= 0 && first_lane()) arrive(empty + used);
  }

  // The sums of one warpgroup: staged 32 channels at a time, stored from there.
  template <int N>
  RNP_DEVICE void store(const TileState& s, const Row* rows, const float (&sums)[N / 2]) {
    const int group = consumer_group(), thread = consumer() & 127, lane = thread & 31;
    float* staged = staging + group * 64 * Tile::kSlabStride;
    float* own = staged + (thread / 32 * 16 + lane / 4) * Tile::kSlabStride + (lane & 3) * 2;
    const int32_t width = s.width < N ? s.width : N;
    RNP_ROLL
    for (int32_t slab = 0; slab < width; slab += Tile::kSlab) {
      RNP_UNROLL
      for (int j = 0; j < N / 8; ++j) {
        const int32_t column = j * 8 - slab;
        if (column >= 0 && column < Tile::kSlab) {
          RNP_UNROLL
          for (int i = 0; i < 4; ++i) own[(i >> 1) * 8 * Tile::kSlabStride + column + (i & 1)] = sums[j * 4 + i];
        }
      }
      sync_threads(2 + group, 128);
      const Slab what{staged, slab, s.first_channel + slab};
      if (p.partial)
        store_partial<64, Tile::kSlab, Tile::kSlabStride>(
            p.partial + int64_t{s.segment} * p.cut.n * p.cut.positions * p.c_out, rows, what, thread, 128);
      else
        store_slab<T, 64, Tile::kSlab, Tile::kSlabStride>(p, rows, what, thread, 128);
      sync_threads(2 + group, 128);
    }
  }

  // A tile of at most N live channels: its segments of K one after the other, each from zero, then added. A tile has
  // one where the layer has one, or where the launch splits K.
  template <int N>
  RNP_DEVICE void compute(const TileState& s, const Row* rows, Ring<Tile::kStages>& ring) {
    float sums[N / 2];
    RNP_UNROLL
    for (int i = 0; i < N / 2; ++i) sums[i] = 0;
    if constexpr (Tile::kSegments) {
      float total[N / 2];
      RNP_UNROLL
      for (int i = 0; i < N / 2; ++i) total[i] = 0;
      for (int32_t chunk = s.first_chunk; chunk < s.end_chunk; chunk += p.segment_chunks) {
        const int32_t end = chunk + p.segment_chunks < s.end_chunk ? chunk + p.segment_chunks : s.end_chunk;
        multiply_chunks<N>(s, chunk, end, sums, ring);
        RNP_UNROLL
        for (int i = 0; i < N / 2; ++i) {
          total[i] = chunk == s.first_chunk ? sums[i] : total[i] + sums[i];
          sums[i] = 0;
        }
      }
      store<N>(s, rows, total);
    } else {
      multiply_chunks<N>(s, s.first_chunk, s.end_chunk, sums, ring);
      store<N>(s, rows, sums);
    }
  }

  RNP_DEVICE void consume() {
    Ring<Tile::kStages> ring;
    Ring<2> buffer;
    for (;; buffer.next()) {
      wait_barrier(rows_full + buffer.at, buffer.parity);
      const TileState s = states[buffer.at];
      if (s.width == 0) break;
      const Row* rows = rows_of(buffer.at) + consumer_group() * 64;
      switch ((s.width + Tile::kGrain - 1) / Tile::kGrain) {  // the widths of wgmma: 1 … 8 grains
#define RNP_CASE(grains)                           \
  case grains:                                     \
    compute<grains * Tile::kGrain>(s, rows, ring); \
    break;
        RNP_CASE(1)
        RNP_CASE(2)
        RNP_CASE(3)
        RNP_CASE(4)
        RNP_CASE(5)
        RNP_CASE(6)
        RNP_CASE(7)
        default:
          RNP_CASE(8)
#undef RNP_CASE
      }
      if (first_lane()) arrive(rows_empty + buffer.at);
    }
    if (p.zero_tail && p.out_prefix && !p.partial) write_tails<T>(p, consumer(), kHopperConsumers);
  }
};

template <typename Tile>
RNP_DEVICE void hopper_block(const ConvArgs& p, const TensorMap* map, char* shared) {
  HopperBlock<Tile> block(p, map, shared);
  block.make_barriers();
  if (thread_index() < HopperBlock<Tile>::kProducers) {
    give_registers<kProducerRegisters>();
    block.produce();
  } else {
    take_registers<kConsumerRegisters>();
    block.consume();
  }
}

}  // namespace rnp::cuda
