// The tile kernel of sm_80: an implicit GEMM over the live rows and channels only, one thread block's view. Compiled
// for the GPU in conv_tiles.cu and for the CPU in the tests, which run it on cuda/emulator.h.
#pragma once

#include "cuda/conv_epilogue.h"

namespace rnp::cuda {

// Where 16-byte piece `piece` of row `row` stands: pieces change places so that eight rows of one piece, and two whole
// rows, each fall into all 32 banks.
RNP_DEVICE int piece_at(int row, int piece) { return row * kChunkBytes + ((piece ^ (row >> 1 & 3)) << 4); }

template <typename Tile>
struct Block {
  using T = typename Tile::T;
  using Cursor = StageCursor<Tile::BK, 1>;  // two chunks make one of the packed weights
  static constexpr int kRowsOfThread = Tile::BM * 4 / kThreads, kWeightsOfThread = Tile::BN * 4 / kThreads;
  static constexpr bool kMatrix = Tile::kMath == Math::kMatrix;
  // Sums of one thread: [2 blocks of 16 rows][runs of 16 channels][two blocks of 8][4], or [8 rows][8 channels].
  static constexpr int kSums = kMatrix ? 2 * Tile::kRuns * 8 : 64;

  const ConvArgs& p;
  Row* rows;
  int32_t* longest;  // [0]: K in channels, [1]: width
  char* stages;
  int32_t k_live = 0;  // K of the tile: a multiple of the step, and at least the longest row's
  int32_t width = 0, group = 0, first_channel = 0;
  float sums[kSums];

  RNP_DEVICE Block(const ConvArgs& args, char* shared)
      : p(args),
        rows(reinterpret_cast<Row*>(shared)),
        longest(reinterpret_cast<int32_t*>(shared + Tile::kRowBytes)),
        stages(shared + Tile::kRowBytes + 16) {}

  RNP_DEVICE char* rows_of_stage(int stage) { return stages + stage * Tile::kStageBytes; }
  RNP_DEVICE char* weights_of_stage(int stage) { return rows_of_stage(stage) + Tile::BM * kChunkBytes; }

  // ---- fetching a stage ----

  // A chunk is half a packed row of 128 bytes, whose pieces stand where wgmma wants them (PackedTiles).
  RNP_DEVICE void fetch_weights(const Cursor& at, int stage) {
    const int piece = thread_index() & 3, first = thread_index() >> 2;
    const char* from = static_cast<const char*>(p.packed) + (at.line * p.cut.group_out + first_channel) * kPackBytes +
                       ((((at.chunk & 1) * 4 + piece) ^ (first & 7)) << 4);
    RNP_UNROLL
    for (int i = 0; i < kWeightsOfThread; ++i) {
      const int n = first + i * (kThreads / 4);  // a multiple of 8 apart: the same piece of each row
      if (n < width) copy_async(weights_of_stage(stage) + piece_at(n, piece), from + int64_t{n} * kPackBytes, 16);
    }
  }

  // cp.async: four neighbouring threads fetch one row's 64 bytes. Pieces behind the last live step are never
  // multiplied.
  RNP_DEVICE void fetch_rows(const Cursor& at, int stage) {
    const int piece = thread_index() & 3, first = thread_index() >> 2;
    const int32_t channel = at.chunk * Tile::BK + piece * Tile::kPiece;
    if (channel >= k_live) return;
    const int64_t offset = at.input + piece * Tile::kPiece;  // channels are neighbours here
    RNP_UNROLL
    for (int i = 0; i < kRowsOfThread; ++i) {
      const int r = first + i * (kThreads / 4);
      const int32_t left = rows[r].in_live - channel;
      const bool valid = (rows[r].taps >> at.iy & rows[r].taps >> (16 + at.ix) & 1u) != 0 && left > 0;
      const T* from = static_cast<const T*>(p.input) + (valid ? rows[r].input + offset : 0);
      const int bytes = valid ? (left < Tile::kPiece ? left * static_cast<int>(sizeof(T)) : 16) : 0;
      copy_async(rows_of_stage(stage) + piece_at(r, piece), from, bytes);
    }
  }

  RNP_DEVICE T gather(const Row& row, const Cursor& at, int32_t k) {
    int32_t channel = k, iy = at.iy, ix = at.ix;
    if (p.flat) {
      const int32_t tap = k / p.cut.group_in;
      channel = k - tap * p.cut.group_in;
      iy = tap / p.kernel_w;
      ix = tap - iy * p.kernel_w;
      if (iy >= p.y.count) return T{};
    }
    if ((row.taps >> iy & row.taps >> (16 + ix) & 1u) == 0 || channel >= row.in_live) return T{};
    return static_cast<const T*>(
        p.input)[row.input + (p.y.delta + iy * p.y.delta_step) * p.input_stride.h +
                 (p.x.delta + ix * p.x.delta_step) * p.input_stride.w + channel * p.input_stride.c];
  }

  // Element by element, each thread its own rows: neighbouring threads read neighbouring pixels, as NCHW wants it.
  RNP_DEVICE void gather_rows(const Cursor& at, int stage) {
    union {
      T element[Tile::kPiece];
      Vec16 all;
    } piece;
    for (int r = thread_index(); r < Tile::BM; r += kThreads) {
      for (int i = 0; i < 4; ++i) {
        const int32_t k = at.chunk * Tile::BK + i * Tile::kPiece;
        if (k >= k_live) break;
        RNP_UNROLL
        for (int e = 0; e < Tile::kPiece; ++e) piece.element[e] = gather(rows[r], at, k + e);
        *reinterpret_cast<Vec16*>(rows_of_stage(stage) + piece_at(r, i)) = piece.all;
      }
    }
  }

  RNP_DEVICE void fetch(const Cursor& at, int stage) {
    if (p.gather)
      gather_rows(at, stage);
    else
      fetch_rows(at, stage);
    fetch_weights(at, stage);
  }

  // ---- multiplying a stage ----

  RNP_DEVICE int warp_row() const { return thread_index() / 32 / Tile::WN * 32; }
  RNP_DEVICE int warp_run() const { return thread_index() / 32 % Tile::WN; }

  RNP_DEVICE void multiply(const char* a_stage, const char* b_stage, int steps) {
    if constexpr (kMatrix)
      multiply_fragments(a_stage, b_stage, steps);
    else
      multiply_scalars(a_stage, b_stage, steps);
  }

  RNP_DEVICE static void round_operands(uint32_t (&r)[4]) {
    if constexpr (sizeof(T) == 4) {
      RNP_UNROLL
      for (int i = 0; i < 4; ++i) r[i] = to_tf32(r[i]);
    }
  }

  RNP_DEVICE void multiply_fragments(const char* a_stage, const char* b_stage, int steps) {
    const int lane = thread_index() & 31, matrix = lane >> 3, line = lane & 7;
    for (int step = 0; step < steps; ++step) {
      uint32_t a[2][4];
      RNP_UNROLL
      for (int m = 0; m < 2; ++m) {
        const int r = warp_row() + m * 16 + (matrix & 1) * 8 + line;
        load_matrices(a[m], a_stage + piece_at(r, step * 2 + (matrix >> 1)));
        round_operands(a[m]);
      }
      RNP_UNROLL
      for (int run = 0; run < Tile::kRuns; ++run) {
        const int n = (run * Tile::WN + warp_run()) * 16;
        if (n < width) {
          uint32_t b[4];
          load_matrices(b, b_stage + piece_at(n + (matrix >> 1) * 8 + line, step * 2 + (matrix & 1)));
          round_operands(b);
          RNP_UNROLL
          for (int m = 0; m < 2; ++m) {
            RNP_UNROLL
            for (int half = 0; half < 2; ++half) {
              float(&d)[4] = *reinterpret_cast<float(*)[4]>(&sums[((m * Tile::kRuns + run) * 2 + half) * 4]);
              multiply_matrices(T{}, d, a[m], b[half * 2], b[half * 2 + 1]);
            }
          }
        }
      }
    }
  }

  // Thread (m, n) of 16 x 8 owns rows m + 16 i and channels n + 8 j.
  RNP_DEVICE void multiply_scalars(const char* a_stage, const char* b_stage, int steps) {
    const int m = thread_index() >> 3, n = thread_index() & 7;
    for (int piece = 0; piece < steps * 2; ++piece) {
      float a[8][4];
      RNP_UNROLL
      for (int i = 0; i < 8; ++i) {
        const float* from = reinterpret_cast<const float*>(a_stage + piece_at(m + 16 * i, piece));
        RNP_UNROLL
        for (int e = 0; e < 4; ++e) a[i][e] = from[e];
      }
      RNP_UNROLL
      for (int j = 0; j < 8; ++j) {
        if (j * 8 < width) {
          const float* b = reinterpret_cast<const float*>(b_stage + piece_at(n + 8 * j, piece));
          RNP_UNROLL
          for (int e = 0; e < 4; ++e) {
            RNP_UNROLL
            for (int i = 0; i < 8; ++i) sums[i * 8 + j] = multiply_add(a[i][e], b[e], sums[i * 8 + j]);
          }
        }
      }
    }
  }

  // ---- the main loop ----

  RNP_DEVICE void compute() {
    RNP_UNROLL
    for (int i = 0; i < kSums; ++i) sums[i] = 0;
    const int32_t chunks = (k_live + Tile::BK - 1) / Tile::BK;
    const int32_t total = p.flat ? chunks : chunks * p.y.count * p.x.count;
    Cursor fetched;
    fetched.begin(p, group, 0);
    const int32_t taps = p.flat ? 1 : p.y.count * p.x.count;
    int32_t chunk = 0, tap = 0;  // of the stage that is multiplied
    RNP_UNROLL
    for (int stage = 0; stage < Tile::kStages - 1; ++stage) {
      if (stage < total) fetch(fetched, stage), fetched.next(p, group);
      commit_copies();
    }
    int reading = 0, writing = Tile::kStages - 1;
    for (int32_t it = 0; it < total; ++it) {
      wait_copies<Tile::kStages - 2>();
      sync_block();  // the stage has landed for all, and the one before it is free
      if (it + Tile::kStages - 1 < total) fetch(fetched, writing), fetched.next(p, group);
      commit_copies();
      const int32_t left = k_live - chunk * Tile::BK;
      const int steps = left >= Tile::BK ? 2 : 1;
      multiply(rows_of_stage(reading), weights_of_stage(reading), steps);
      if (++tap == taps) tap = 0, ++chunk;
      reading = reading + 1 == Tile::kStages ? 0 : reading + 1;
      writing = writing + 1 == Tile::kStages ? 0 : writing + 1;
    }
    wait_copies<0>();
    sync_block();
  }

  // ---- the epilogue ----

  // Sums of channels slab … slab + 63 to shared memory, as (BM, kSlabStride) floats.
  RNP_DEVICE void stage_sums(float* to, int slab) {
    if constexpr (kMatrix) {
      const int lane = thread_index() & 31;
      RNP_UNROLL
      for (int run = 0; run < Tile::kRuns; ++run) {
        const int n = (run * Tile::WN + warp_run()) * 16 - slab;
        if (n >= 0 && n < kSlab && n + slab < width) {
          RNP_UNROLL
          for (int i = 0; i < 8; ++i) {  // i: (16 rows, half of the channels, 8 rows)
            const int m = i >> 2, half = i >> 1 & 1, high = i & 1;
            const float* d = &sums[((m * Tile::kRuns + run) * 2 + half) * 4 + high * 2];
            float* out =
                to + (warp_row() + m * 16 + high * 8 + (lane >> 2)) * Tile::kSlabStride + n + half * 8 + (lane & 3) * 2;
            out[0] = d[0];
            out[1] = d[1];
          }
        }
      }
    } else {
      const int m = thread_index() >> 3, n = thread_index() & 7;
      RNP_UNROLL
      for (int i = 0; i < 8; ++i) {
        RNP_UNROLL
        for (int j = 0; j < 8; ++j) to[(m + 16 * i) * Tile::kSlabStride + n + 8 * j] = sums[i * 8 + j];
      }
    }
  }

  RNP_DEVICE void store() {
    float* staged = reinterpret_cast<float*>(stages);
    const int32_t first = group * p.cut.group_out + first_channel;
    for (int slab = 0; slab < Tile::BN; slab += kSlab) {
      if (slab < width) {
        stage_sums(staged, slab);
        sync_block();
        store_slab<T, Tile::BM, kSlab, Tile::kSlabStride>(p, rows, {staged, slab, first + slab}, thread_index(),
                                                          kThreads);
        sync_block();
      }
    }
  }

  RNP_DEVICE void tile(const gpu::Cursor& at) {
    if (thread_index() < 2) longest[thread_index()] = 0;
    sync_block();
    for (int r = thread_index(); r < Tile::BM; r += kThreads) {  // whole warps
      const Row row = describe_row(p, at, gpu::place_row(p.cut, at, r));
      rows[r] = row;
      max_in_block(longest, row.in_live);
      max_in_block(longest + 1, row.out_live);
    }
    sync_block();
    const int32_t k = p.flat && longest[0] > 0 ? p.cut.group_in * p.y.count * p.x.count : longest[0];
    k_live = (k + Tile::kStep - 1) / Tile::kStep * Tile::kStep;
    width = longest[1];
    group = at.group;
    first_channel = at.block * p.cut.bn;
    compute();
    store();
  }
};

template <typename Tile>
RNP_DEVICE void conv_block(const ConvArgs& p, char* shared) {
  Block<Tile> block(p, shared);
  gpu::Cursor at;
  int32_t* next = block.longest + 2;
  int64_t number = block_index();
  // A block's first tile is its own number. With prefixes tiles differ in cost: whoever is free takes the next one.
  // That decides where a tile is computed, not what.
  while (at.seek(p.cut, order_of(p), number)) {
    if (p.ticket && thread_index() == 0) *next = take_ticket(p.ticket);
    block.tile(at);  // its barriers publish `next`, and end before the next round writes it
    number = p.ticket ? block_count() + *next : number + block_count();
    sync_block();
  }
  if (p.zero_tail && p.out_prefix) write_tails<typename Tile::T>(p, thread_index(), kThreads);
}

}  // namespace rnp::cuda
