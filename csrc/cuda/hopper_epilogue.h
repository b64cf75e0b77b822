// From the consumers' registers to the output of the sm_90a kernel.
#pragma once

#include "cuda/hopper_block.h"

namespace rnp::cuda {

// A warp holds 16 rows in the layout of wgmma's accumulator: lane l rows l / 4 and + 8, channels 8 j + 2 (l % 4) and
// + 1. It finishes and narrows 128 bytes of channels at a time, turns them in shared memory (pieces of 16 bytes,
// swizzled) and stores whole lines; the residual comes the other way, whole lines first.
//
// What limits this code is its own length. Every tile runs through all of it once, so nothing is in the caches of
// instructions when it is needed: on an H200 half of the consumers' time in layers of 64 and 128 channels was waiting
// for instructions of an epilogue of 1,300. Hence no bounds in the loops beyond one a vector, places found by one lane
// a row, and one copy of the code for both halves of a warpgroup's rows.
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

  RNP_DEVICE static int64_t offset_from_lane(int64_t v, int lane) {
    const uint32_t low = static_cast<uint32_t>(from_lane(static_cast<int32_t>(v), lane));
    return int64_t{from_lane(static_cast<int32_t>(v >> 32), lane)} << 32 | low;
  }

  // Where the lane finds its part of blocks j and j + 1 of a warp's staged rows: of 2 bytes the row of one of four
  // matrices of eight rows by 16 bytes, else its elements of block j.
  RNP_DEVICE static char* blocks_at(char* staged, int j) {
    const int lane = opaque(thread_index() & 31);
    if constexpr (Tile::kElement == 2) return staged + (staged_at(lane & 15, lane >> 4) ^ (j << 4));
    const int line = lane >> 2;
    return staged + line * kPackBytes + (j ^ (line & (kBlocks - 1))) * kBlockBytes + (lane & 3) * 2 * Tile::kElement;
  }
  RNP_DEVICE static void load_blocks(char* staged, int j, Narrow (&two)[2][2]) {
    if constexpr (Tile::kElement == 2) {
      uint32_t four[4];
      load_matrices(four, blocks_at(staged, j));
      two[0][0] = four[0], two[0][1] = four[1], two[1][0] = four[2], two[1][1] = four[3];
    } else {
      RNP_UNROLL
      for (int i = 0; i < 4; ++i)
        two[i / 2][i % 2] = *reinterpret_cast<const Narrow*>(blocks_at(staged, j + i / 2) + i % 2 * 8 * kPackBytes);
    }
  }
  RNP_DEVICE static void store_blocks(char* staged, int j, const Narrow (&two)[2][2]) {
    if constexpr (Tile::kElement == 2) {
      const uint32_t four[4] = {two[0][0], two[0][1], two[1][0], two[1][1]};
      store_matrices(blocks_at(staged, j), four);
    } else {
      RNP_UNROLL
      for (int i = 0; i < 4; ++i)
        *reinterpret_cast<Narrow*>(blocks_at(staged, j + i / 2) + i % 2 * 8 * kPackBytes) = two[i / 2][i % 2];
    }
  }

  // A warp's 16 rows by whole lines, where `by_lines` says so. kTables: 0 none, 1 bias, 2 scale and bias.
  template <int kTables, bool kResidual>
  RNP_DEVICE void store_lines(const TileState& s, const Place& own, const Sums64& sums) const {
    const int lane = opaque(thread_index() & 31), pair = (lane & 3) * 2;
    const int32_t channel = opaque(first_channel_of(s));
    char* const staged = staging + consumer() / 32 * Tile::kStagedBytes;
    // Lines go out, and the residual's come in, four times four rows, eight lanes each.
    const int piece = lane & 7, first = lane >> 3;
    T* out[4];
    int32_t live[4];  // channels from this lane's piece of the first slab on
    RNP_UNROLL
    for (int i = 0; i < 4; ++i) {
      const int at = i * 4 + first;
      out[i] = static_cast<T*>(p.output) + offset_from_lane(own.output, at) + channel + piece * Tile::kPiece;
      live[i] = from_lane(own.out_live, at) - piece * Tile::kPiece;
    }
    const float *scale = nullptr, *bias = nullptr;
    if constexpr (kTables > 0) {
      const int32_t line = from_lane(own.line, 0);
      if constexpr (kTables == 2) scale = p.scale + line * p.scale_row_stride + channel + pair;
      bias = p.bias + line * p.bias_row_stride + channel + pair;
    }
    const int64_t away = static_cast<const char*>(p.residual) - static_cast<const char*>(p.output);
    const auto floor = floor_of(T{}, p.relu ? 0.0f : -kInfinity);
    Vec16 coming[4];
    if constexpr (kResidual) {
      RNP_UNROLL
      for (int i = 0; i < 4; ++i) coming[i] = load_vector(live[i] > 0, out[i], away);
    }
    RNP_UNROLL
    for (int slab = 0; slab < Tile::BN; slab += Tile::kSlab) {
      if (slab < s.width) {
        if constexpr (kResidual) {
          RNP_UNROLL
          for (int i = 0; i < 4; ++i) {
            *reinterpret_cast<Vec16*>(staged + staged_at(i * 4 + first, piece)) = coming[i];
            if (slab + Tile::kSlab < Tile::BN)  // on its way while this slab is finished
              coming[i] =
                  load_vector(live[i] > slab + Tile::kSlab, out[i], away + (slab + Tile::kSlab) * Tile::kElement);
          }
          sync_warp();
        }
        RNP_UNROLL
        for (int j = 0; j < kBlocks; j += 2) {
          keep_order();  // two blocks at a time: there are no registers for more
          Narrow two[2][2];
          if constexpr (kResidual) load_blocks(staged, j, two);
          RNP_UNROLL
          for (int b = 0; b < 2; ++b) {
            const int at = slab + (j + b) * 8;
            Pair factor = {1, 1}, summand = {0, 0};
            if constexpr (kTables == 2) factor = load_pair(scale + at);
            if constexpr (kTables > 0) summand = load_pair(bias + at);
            RNP_UNROLL
            for (int high = 0; high < 2; ++high) {
              Pair v = {sums[at / 2 + high * 2], sums[at / 2 + high * 2 + 1]};
              // The operations of `finish`. Without tables none is left: a sum that began with 0 is never -0.
              if constexpr (kTables > 0) {
                v.low = multiply_add(v.low, factor.low, summand.low);
                v.high = multiply_add(v.high, factor.high, summand.high);
              }
              if constexpr (kResidual) {
                const Pair more = widen_two(T{}, two[b][high]);
                v.low += more.low, v.high += more.high;
              }
              two[b][high] = no_less(T{}, narrow_two(T{}, v.low, v.high), floor);
            }
          }
          store_blocks(staged, j, two);  // each lane where it read
        }
        sync_warp();
        RNP_UNROLL
        for (int i = 0; i < 4; ++i)
          if (live[i] > slab)
            *reinterpret_cast<Vec16*>(out[i] + slab) =
                *reinterpret_cast<const Vec16*>(staged + staged_at(i * 4 + first, piece));
        sync_warp();
      }
    }
  }

  // Whether a warp's rows can go by whole lines: 16 bytes at a time, no row ends within a piece, one line of the tables
  // for all, which are read by whole slabs.
  RNP_DEVICE bool by_lines(const TileState& s, const Place& own) const {
    if (!p.vectors || (p.scale && !p.bias)) return false;
    bool fits = own.out_live % Tile::kPiece == 0;
    if (p.bias) {
      const int32_t end = first_channel_of(s) + (s.width + Tile::kSlab - 1) / Tile::kSlab * Tile::kSlab;
      const bool alike = own.line == from_lane(own.line, 0);  // by all lanes
      fits = fits && end <= p.c_out && (alike || own.out_live == 0);
    }
    return ballot(fits) == 0xffffffffu;
  }

  // Rows first_row … + 63 of the tile.
  RNP_DEVICE void store(const TileState& s, const Run* runs, int first_row, const Sums64& sums) const {
    first_row += (consumer() / 32 & 3) * 16;
    if (p.partial && p.c_out % 2 == 0) return store_partial(s, runs, first_row, sums);
    const Place own = place_of(s, runs, first_row + (thread_index() & 15));  // of a row in two lanes
    if (p.partial || !by_lines(s, own)) return store_singly(s, runs, first_row, sums);
    if (p.residual) {
      if (p.scale) return store_lines<2, true>(s, own, sums);
      return p.bias ? store_lines<1, true>(s, own, sums) : store_lines<0, true>(s, own, sums);
    }
    if (p.scale) return store_lines<2, false>(s, own, sums);
    return p.bias ? store_lines<1, false>(s, own, sums) : store_lines<0, false>(s, own, sums);
  }

  // The unfinished sums of a segment, of a warp's 16 rows.
  RNP_DEVICE void store_partial(const TileState& s, const Run* runs, int first_row, const Sums64& sums) const {
    const int lane = thread_index() & 31, pair = (lane & 3) * 2;
    RNP_UNROLL
    for (int high = 0; high < 2; ++high) {
      const Place row = place_of(s, runs, first_row + (lane >> 2) + high * 8);
      const int32_t live = row.out_live - pair;
      float* to = p.partial + int64_t{s.segment} * p.cut.n * p.cut.positions * p.c_out + row.output +
                  first_channel_of(s) + pair;
      RNP_UNROLL
      for (int j = 0; j < Tile::BN / 8; ++j) {
        const float* v = &sums[j * 4 + high * 2];
        if (live > j * 8) store_two_floats(to + j * 8, v[0], v[1]);  // one too many at most: beyond what is read
      }
    }
  }

  // A warp's 16 rows, whatever they are, element by element. 32 channels at a time go through shared memory, so that
  // one loop serves all of them.
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
