// From the consumers' registers to the output of the sm_90a kernel.
#pragma once

#include "cuda/hopper_block.h"

namespace rnp::cuda {

// A warp holds 16 rows in the layout of wgmma's accumulator: lane l rows l / 4 and + 8, channels 8 j + 2 (l % 4) and
// + 1. It finishes and narrows 128 bytes of channels at a time, turns them in shared memory (pieces of 16 bytes,
// swizzled) and stores whole lines. Every address is found before the loops: with the general form of `finish` for each
// element this took 40,000 cycles a tile on an H200, longer than the products of 256 channels and nine taps.
template <typename Tile>
struct HopperEpilogue : HopperBlock<Tile> {
  using Base = HopperBlock<Tile>;
  using Base::kProducers, Base::p, Base::staging;
  using typename Base::T;
  using Narrow = decltype(narrow_two(T{}, 0.0f, 0.0f));  // two elements
  using Sums64 = float[Tile::BN / 2];                    // of a thread, for 64 rows
  // A staged row is as many blocks of eight channels, one or two pieces each, which change places from row to row: no
  // two of the rows that one access writes meet in a bank.
  static constexpr int kBlocks = Tile::kSlab / 8, kBlockBytes = 8 * Tile::kElement;

  RNP_DEVICE static int staged_at(int row, int piece) {
    return row * kPackBytes + ((piece ^ (row & (kBlocks - 1)) * (8 / kBlocks)) << 4);
  }

  RNP_DEVICE static int consumer() { return thread_index() - kProducers; }
  RNP_DEVICE static int consumer_group() { return consumer() / 128; }

  RNP_DEVICE int32_t first_channel_of(const TileState& s) const { return s.group * p.cut.group_out + s.first_channel; }

  // A row of the tile, as far as storing needs it. Offsets are to channel 0 of the tensor.
  struct Place {
    int32_t out_live;  // 0 in a dead row
    int32_t line;
    int64_t output, residual;
  };

  RNP_DEVICE Place place_of(const TileState& s, const Run* runs, int row) const {
    Place out = {};
    if (row >= s.rows) return out;
    const uint32_t pixels = s.pixel + static_cast<uint32_t>(row), positions = static_cast<uint32_t>(p.cut.positions);
    const uint32_t i = pixels < positions ? 0 : pixels / positions;
    const Run& run = runs[i];
    const int64_t n = run.sample;
    const int32_t pixel = static_cast<int32_t>(pixels - i * positions);
    out.out_live = run.out_live;
    out.line = run.line;
    if (p.partial) {
      out.output = (n * p.cut.positions + pixel) * p.c_out;
    } else if (p.dense) {
      out.output = n * p.output_stride.n + pixel * p.output_stride.w;
      if (p.residual) out.residual = n * p.residual_stride.n + pixel * p.residual_stride.w;
    } else {
      const int32_t oy = pixel / p.out_w, ox = pixel - oy * p.out_w;
      out.output = n * p.output_stride.n + oy * p.output_stride.h + ox * p.output_stride.w;
      if (p.residual) out.residual = n * p.residual_stride.n + oy * p.residual_stride.h + ox * p.residual_stride.w;
    }
    return out;
  }

  // Of one of a lane's two rows, from its first channel of the tile on.
  struct Part {
    int32_t live;  // channels
    Finish<T> with;
  };

  RNP_DEVICE Part part_of(const Place& row, int32_t channel, int pair) const {
    return {row.out_live - pair, Finish<T>(p, row.line, row.residual, channel)};
  }

  // Channels `at` and at + 1 of the row, finished as `finish` does.
  template <bool kTables, bool kResidual>
  RNP_DEVICE Narrow finish_pair(const Part& part, int at, const float* v) const {
    float out[2] = {v[0], v[1]};
    if constexpr (kTables) {
      // Of two channels the tables have both where they have one: ConvArgs::pairs.
      const bool scaled = part.live > at && p.scale, biased = part.live > at && p.bias;
      RNP_UNROLL
      for (int e = 0; e < 2; ++e)
        out[e] = multiply_add(out[e], load_if(scaled, part.with.scale, at + e, 1.0f),
                              load_if(biased, part.with.bias, at + e, 0.0f));
    } else {
      RNP_UNROLL
      for (int e = 0; e < 2; ++e) out[e] = multiply_add(out[e], 1.0f, 0.0f);  // as `finish`: no -0
    }
    if constexpr (kResidual) {
      const Pair two = load_two_if(part.live > at, part.with.residual, at);
      out[0] += two.low;
      out[1] += two.high;
    }
    if (p.relu) out[0] = relu(out[0]), out[1] = relu(out[1]);
    return narrow_two(T{}, out[0], out[1]);
  }

  // Channels slab … slab + kSlab - 1 of both rows, to shared memory.
  template <bool kTables, bool kResidual>
  RNP_DEVICE void stage(const Part (&part)[2], int slab, const Sums64& sums, char* to, int turn) const {
    RNP_UNROLL
    for (int j = 0; j < kBlocks; ++j) {
      RNP_UNROLL
      for (int high = 0; high < 2; ++high)
        *reinterpret_cast<Narrow*>(to + high * 8 * kPackBytes + (j ^ turn) * kBlockBytes) =
            finish_pair<kTables, kResidual>(part[high], slab + j * 8, &sums[(slab / 8 + j) * 4 + high * 2]);
    }
  }

  // Rows first_row … + 63 of the tile.
  RNP_DEVICE void store(const TileState& s, const Run* runs, int first_row, const Sums64& sums) const {
    const int lane = thread_index() & 31, warp = consumer() / 32, pair = (lane & 3) * 2, line = lane >> 2;
    const int turn = line & (kBlocks - 1);
    first_row += (warp & 3) * 16;
    if (!p.pairs) return store_singly(s, runs, first_row, sums);
    const int32_t channel = first_channel_of(s) + pair;
    if (p.partial) return store_partial(s, runs, first_row, channel, sums);
    const Part part[2] = {part_of(place_of(s, runs, first_row + line), channel, pair),
                          part_of(place_of(s, runs, first_row + line + 8), channel, pair)};
    char* staged = staging + warp * Tile::kStagedBytes;
    char* to = staged + line * kPackBytes + pair * Tile::kElement;
    // Four times four rows, eight lanes each.
    const int piece = lane & 7, first = lane >> 3;
    T* out[4];
    int32_t live[4];
    RNP_UNROLL
    for (int i = 0; i < 4; ++i) {
      const Place row = place_of(s, runs, first_row + i * 4 + first);
      out[i] = static_cast<T*>(p.output) + row.output + first_channel_of(s) + piece * Tile::kPiece;
      live[i] = row.out_live - piece * Tile::kPiece;
    }
    RNP_UNROLL
    for (int slab = 0; slab < Tile::BN; slab += Tile::kSlab) {
      if (slab < s.width) {
        if (!p.scale && !p.bias) {
          if (p.residual)
            stage<false, true>(part, slab, sums, to, turn);
          else
            stage<false, false>(part, slab, sums, to, turn);
        } else {
          if (p.residual)
            stage<true, true>(part, slab, sums, to, turn);
          else
            stage<true, false>(part, slab, sums, to, turn);
        }
        sync_warp();
        RNP_UNROLL
        for (int i = 0; i < 4; ++i) {
          const char* from = staged + staged_at(i * 4 + first, piece);
          if (live[i] >= slab + Tile::kPiece && (reinterpret_cast<uintptr_t>(out[i]) & 15) == 0) {
            *reinterpret_cast<Vec16*>(out[i] + slab) = *reinterpret_cast<const Vec16*>(from);
          } else {
            RNP_ROLL
            for (int e = 0; e < Tile::kPiece && slab + e < live[i]; ++e)
              out[i][slab + e] = reinterpret_cast<const T*>(from)[e];
          }
        }
        sync_warp();
      }
    }
  }

  // The unfinished sums of a segment.
  RNP_DEVICE void store_partial(const TileState& s, const Run* runs, int first_row, int32_t channel,
                                const Sums64& sums) const {
    const int lane = thread_index() & 31, pair = (lane & 3) * 2;
    RNP_UNROLL
    for (int high = 0; high < 2; ++high) {
      const Place row = place_of(s, runs, first_row + (lane >> 2) + high * 8);
      const int32_t live = row.out_live - pair;
      float* to = p.partial + int64_t{s.segment} * p.cut.n * p.cut.positions * p.c_out + row.output + channel;
      RNP_UNROLL
      for (int j = 0; j < Tile::BN / 8; ++j) {
        const float* v = &sums[j * 4 + high * 2];
        if (live > j * 8) store_two_floats(to + j * 8, v[0], v[1]);  // one too many at most: beyond what is read
      }
    }
  }

  // Anything, element by element: outputs whose channels are not neighbours, odd strides. 32 channels at a time go
  // through shared memory, so that one loop serves all of them.
  RNP_DEVICE void store_singly(const TileState& s, const Run* runs, int first_row, const Sums64& sums) const {
    const int lane = thread_index() & 31, warp = consumer() / 32;
    float* staged = reinterpret_cast<float*>(staging + warp * Tile::kStagedBytes);
    float* partial = p.partial ? p.partial + int64_t{s.segment} * p.cut.n * p.cut.positions * p.c_out : nullptr;
    RNP_UNROLL
    for (int slab = 0; slab < Tile::BN; slab += 32) {
      if (slab < s.width) {
        RNP_UNROLL
        for (int i = 0; i < 16; ++i)
          staged[((lane >> 2) + (i >> 1 & 1) * 8) * 32 + (i >> 2) * 8 + (lane & 3) * 2 + (i & 1)] = sums[slab / 2 + i];
        sync_warp();
        RNP_ROLL
        for (int r = 0; r < 16; ++r) {
          const Place row = place_of(s, runs, first_row + r);
          if (slab + lane < row.out_live) {
            const int32_t c = first_channel_of(s) + slab + lane;
            if (p.partial)
              partial[row.output + c] = staged[r * 32 + lane];
            else
              static_cast<T*>(p.output)[row.output + c * p.output_stride.c] =
                  narrow<T>(finish<T>(p, row.line, row.residual, c, staged[r * 32 + lane]));
          }
        }
        sync_warp();
      }
    }
  }
};

}  // namespace rnp::cuda
