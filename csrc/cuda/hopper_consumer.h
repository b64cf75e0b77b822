// The consumers of the sm_90a kernel: two warpgroups that multiply and store.
#pragma once

#include "cuda/hopper_epilogue.h"
#include "cuda/hopper_wgmma.h"

namespace rnp::cuda {

// Threads 128 … 383. A warpgroup computes 64 rows of each tile, or 128: of a tall one, or (turns) of every second one.
template <typename Tile>
struct HopperConsumer : HopperEpilogue<Tile> {
  using Base = HopperEpilogue<Tile>;
  using Base::consumer, Base::consumer_group, Base::store;
  using Base::empty, Base::first_lane, Base::full, Base::input_of, Base::kProducers, Base::p, Base::rows_empty,
      Base::rows_full;
  using Base::ring_of, Base::runs_of, Base::staging, Base::states, Base::tall, Base::turn, Base::turns,
      Base::weights_of;
  using typename Base::T;

  // Of a thread, for 64 rows or twice 64, whatever the width: one epilogue serves all main loops.
  template <int kHalves>
  using Sums = float[kHalves][Tile::BN / 2];

  // The first of a warpgroup's rows in its tile.
  template <int kHalves>
  RNP_DEVICE int own_row() const {
    return kHalves == 2 && turns() ? 0 : consumer_group() * (kHalves * 64);
  }

  // One step of K for kHalves times 64 rows.
  template <int N, int kHalves>
  RNP_DEVICE static void multiply_step(Sums<kHalves>& sums, uint64_t a, uint64_t b) {
    RNP_UNROLL
    for (int h = 0; h < kHalves; ++h) multiply_warpgroup(T{}, Width<N>{}, sums[h], a + h * (64 * kPackBytes >> 4), b);
  }

  // Adds chunks first … end - 1 of K to the sums: all their taps. One stage's products are under way while the next
  // stage is waited for. `parity`: of the tile's description, which changes from turn to turn.
  template <int N, int kHalves>
  RNP_DEVICE void multiply_chunks(const TileState& s, int32_t first, int32_t end, Sums<kHalves>& sums, Ring& ring,
                                  uint32_t parity) {
    const int32_t taps = p.y.count * p.x.count;
    constexpr int32_t kSteps = Tile::BK / Tile::kStep;
    const int32_t first_row = own_row<kHalves>(), k_live = s.k_live;
    const bool copied = s.boxes == 0;
    int32_t used = -1;
    // In turn, and not before the other group has seen its last stage full: until then a stage of the other's tile that
    // is still on its way looks, by its parity, like this one's.
    if (kHalves == 2 && turns()) {
      wait_barrier(turn + consumer_group(), consumer_group() == 0 ? parity ^ 1 : parity);  // its first turn is free
    }
    RNP_UNROLL
    for (int h = 0; h < kHalves; ++h) pin(sums[h]);
    for (int32_t chunk = first; chunk < end; ++chunk) {
      const int32_t steps = (k_live - chunk * Tile::BK) / Tile::kStep;
      for (int32_t tap = 0; tap < taps; ++tap) {
        wait_barrier(full + ring.at, ring.parity);
        if (copied) publish_writes();
        const uint64_t a = operand_descriptor(shared_address(input_of(ring.at) + first_row * kPackBytes));
        const uint64_t b = operand_descriptor(shared_address(weights_of(ring.at)));
        if (steps >= kSteps) {  // nothing between the products, or the compiler fences each
          begin_products();
          RNP_UNROLL
          for (int step = 0; step < kSteps; ++step)
            multiply_step<N, kHalves>(sums, a + step * kDescriptorStep, b + step * kDescriptorStep);
          commit_products();
        } else {
          RNP_ROLL
          for (int step = 0; step < steps; ++step) {
            begin_products();
            multiply_step<N, kHalves>(sums, a + step * kDescriptorStep, b + step * kDescriptorStep);
            commit_products();  // a group each: the wait below covers one stage more closely than it must
          }
        }
        wait_products<1>();
        if (used >= 0 && first_lane()) arrive(empty + used);
        used = ring.at;
        ring.next();
      }
    }
    if (kHalves == 2 && turns()) {
      sync_warp();  // the turn is passed when every lane has seen the last stage
      if (first_lane()) arrive(turn + 1 - consumer_group());
    }
    wait_products<0>();
    RNP_UNROLL
    for (int h = 0; h < kHalves; ++h) pin(sums[h]);
    if (used >= 0 && first_lane()) arrive(empty + used);
  }

  // The main loop of the tile's width.
  template <int kHalves>
  RNP_DEVICE void multiply(const TileState& s, int32_t first, int32_t end, Sums<kHalves>& sums, Ring& ring,
                           uint32_t parity) {
    RNP_UNROLL
    for (int h = 0; h < kHalves; ++h) {
      RNP_UNROLL
      for (int i = 0; i < Tile::BN / 2; ++i) sums[h][i] = 0;
    }
    switch ((s.width + Tile::kGrain - 1) / Tile::kGrain) {  // the widths of wgmma: 1 … 8 grains
#define RNP_CASE(grains)                                                                \
  case grains:                                                                          \
    multiply_chunks<grains * Tile::kGrain, kHalves>(s, first, end, sums, ring, parity); \
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
  }

  // A tile whose K is one segment.
  template <int kHalves>
  RNP_DEVICE void compute(const TileState& s, const Run* runs, Ring& ring, uint32_t parity) {
    Sums<kHalves> sums;
    multiply<kHalves>(s, s.first_chunk, s.end_chunk, sums, ring, parity);
    // One copy of the epilogue's code for both halves: moving the sums costs less than fetching it twice.
    RNP_ROLL
    for (int h = 0; h < kHalves; ++h) {
      if (kHalves == 2 && h == 1) {
        RNP_UNROLL
        for (int i = 0; i < Tile::BN / 2; ++i) sums[0][i] = sums[kHalves - 1][i];
      }
      store(s, runs, own_row<kHalves>() + h * 64, sums[0]);
    }
  }

  // The segments of K one after the other, each from zero, then added; one of them where the launch splits K.
  RNP_DEVICE void compute_segments(const TileState& s, const Run* runs, Ring& ring) {
    Sums<1> sums;
    float total[Tile::BN / 2];
    RNP_UNROLL
    for (int i = 0; i < Tile::BN / 2; ++i) total[i] = 0;
    for (int32_t chunk = s.first_chunk; chunk < s.end_chunk; chunk += p.segment_chunks) {
      const int32_t end = chunk + p.segment_chunks < s.end_chunk ? chunk + p.segment_chunks : s.end_chunk;
      multiply<1>(s, chunk, end, sums, ring, 0);
      RNP_UNROLL
      for (int i = 0; i < Tile::BN / 2; ++i) total[i] = chunk == s.first_chunk ? sums[0][i] : total[i] + sums[0][i];
    }
    store(s, runs, consumer_group() * 64, total);
  }

  RNP_DEVICE void consume() {
    Ring buffer{2};
    if (turns()) buffer.skip(consumer_group());
    for (;; buffer.skip(turns() ? 2 : 1)) {
      wait_barrier(rows_full + buffer.at, buffer.parity);
      const TileState& s = states[buffer.at];  // read where it is needed: registers are for sums
      if (s.width == 0) break;
      const Run* runs = runs_of(buffer.at);
      Ring ring = ring_of(s);
      if constexpr (Tile::kTurns) {
        if (turns() || tall())
          compute<2>(s, runs, ring, buffer.parity);
        else
          compute_segments(s, runs, ring);
      } else {
        compute<1>(s, runs, ring, 0);
      }
      sync_warp();  // every lane has read its rows
      if (first_lane()) arrive(rows_empty + buffer.at);
    }
    if (p.zero_tail && p.out_prefix && !p.partial) write_tails<T>(p, consumer(), kHopperConsumers);
  }
};

}  // namespace rnp::cuda
