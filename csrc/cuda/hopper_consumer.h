// The consumers of the sm_90a kernel: two warpgroups that multiply and store, 64 rows of each tile.
#pragma once

#include "cuda/hopper_block.h"
#include "cuda/hopper_wgmma.h"

namespace rnp::cuda {

// Threads 128 … 383.
template <typename Tile>
struct HopperConsumer : HopperBlock<Tile> {
  using Base = HopperBlock<Tile>;
  using Base::empty, Base::first_lane, Base::full, Base::input_of, Base::kProducers, Base::p, Base::rows_empty,
      Base::rows_full;
  using Base::rows_of, Base::staging, Base::states, Base::weights_of;
  using typename Base::T;

  RNP_DEVICE static int consumer() { return thread_index() - kProducers; }
  RNP_DEVICE static int consumer_group() { return consumer() / 128; }

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

}  // namespace rnp::cuda
