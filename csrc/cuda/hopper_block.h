// What the two kinds of warpgroups of the sm_90a kernel share: shared memory, its barriers, the states of its tiles.
#pragma once

#include "cuda/conv_epilogue.h"
#include "cuda/hopper.h"

namespace rnp::cuda {

// What loaders and consumers must know of a tile. width 0: there is no further tile.
struct TileState {
  int32_t k_live;                  // K in channels, at least the longest row's, a multiple of the step
  int32_t width;                   // live output channels of the widest row
  int32_t group, first_channel;    // in the group
  int32_t first_chunk, end_chunk;  // of K
  int32_t segment;
  int32_t stage;     // where its stages begin in the ring
  uint32_t parity;   // of the ring there
  int32_t boxes;     // im2col copies that bring a stage's rows; 0: cp.async does
  int32_t box_rows;  // that they bring, some twice
  int32_t rows;      // that are live: the first ones
  uint32_t pixel;    // of the first row
  int32_t window;    // where its windows begin in their ring
  uint32_t window_parity;
  bool scrub;  // some row's live channels end within a chunk: what came behind them is not zero
};

// The rows of a tile that are pixels of one sample; those of run i begin at row i · positions - TileState::pixel.
struct Run {
  int32_t sample;
  int32_t row;       // the first
  uint32_t pixel;    // of that row
  int32_t in_live;   // live input channels of the group
  int32_t out_live;  // live output channels of the tile
  int32_t line;      // of the scale and bias tables
};
static_assert(sizeof(Run) == 24);

// Rows that one im2col copy brings: pixels that follow each other in one sample, or on into the next one.
struct Box {
  uint16_t row;       // where it begins
  uint8_t run, size;  // the run where it begins, and the logarithm of the number of rows
};

// A row as cp.async fetches it.
struct alignas(16) CopiedRow {
  int64_t input;    // of the pixel under tap delta 0, channel 0 of the group (may lie outside the map)
  uint32_t taps;    // valid taps: low half along y, high half along x
  int32_t in_live;  // 0 in a dead row
};

// A place in a ring of `size` stages, and the parity of its barriers' phase.
struct Ring {
  int32_t size;
  int32_t at = 0;
  uint32_t parity = 0;
  RNP_DEVICE void next() {
    if (++at == size) at = 0, parity ^= 1;
  }
  RNP_DEVICE void skip(int32_t stages) {
    const int32_t to = at + stages, rounds = to / size;
    at = to - rounds * size;
    parity ^= static_cast<uint32_t>(rounds) & 1;
  }
};

template <typename Tile>
struct HopperBlock {
  using T = typename Tile::T;
  static constexpr int kProducers = 128, kWarps = kHopperConsumers / 32;

  const ConvArgs& p;
  const TensorMap* maps;  // kBoxSizes
  char* stages;
  char* staging;
  Run* runs_of_both;
  CopiedRow* copied_rows;
  TileState* states;
  uint64_t *full, *empty, *rows_full, *rows_empty, *turn, *window_full, *window_empty, *window_landed;
  Box* boxes_of_both;
  int32_t* box_count;  // and their rows

  RNP_DEVICE HopperBlock(const ConvArgs& args, const TensorMap* tensor_maps, char* shared)
      : p(args), maps(tensor_maps) {
    const uint32_t skip = (1024 - (shared_address(shared) & 1023)) & 1023;
    stages = shared + skip;
    staging = stages + Tile::kStages * Tile::kStageBytes;
    copied_rows = reinterpret_cast<CopiedRow*>(staging + Tile::kStagingBytes);
    runs_of_both = reinterpret_cast<Run*>(copied_rows + Tile::kMostRows);
    full = reinterpret_cast<uint64_t*>(runs_of_both + 2 * (Tile::kMostRows + 1));
    empty = full + Tile::kStages;
    rows_full = empty + Tile::kStages;
    rows_empty = rows_full + 2;
    turn = rows_empty + 2;
    window_full = turn + 2;
    window_empty = window_full + 2;
    window_landed = window_empty + 2;
    states = reinterpret_cast<TileState*>(window_landed + 2);
    box_count = reinterpret_cast<int32_t*>(states + 2);
    boxes_of_both = reinterpret_cast<Box*>(box_count + 2);
    static_assert((2 * Tile::kStages + 12) * 8 + 2 * sizeof(TileState) + 8 + 2 * kMostBoxes * sizeof(Box) <=
                  Tile::kStateBytes);
    static_assert(sizeof(CopiedRow) * Tile::kMostRows == Tile::kRowBytes &&
                  sizeof(Run) * 2 * (Tile::kMostRows + 1) == Tile::kRunBytes);
  }

  // Properties of the launch: whether tiles are tall, and whether each belongs to one warpgroup of consumers.
  RNP_DEVICE bool tall() const { return Tile::kTurns && p.cut.bm == kTallRows; }
  RNP_DEVICE bool turns() const { return Tile::kTurns && !tall() && p.segment_chunks >= p.chunks; }

  // Whether a warp asks for the residual's lines while the tile is multiplied, and whether it has anything to do.
  RNP_DEVICE bool prefetches() const { return p.residual && p.vectors && !p.partial; }
  RNP_DEVICE bool helps() const { return prefetches() || windows(); }

  RNP_DEVICE int rows() const { return Tile::kTurns ? p.cut.bm : Tile::BM; }
  RNP_DEVICE bool windows() const { return p.window_rows > 0; }
  RNP_DEVICE Ring ring() const {
    if (windows()) return {p.window_stages};
    return {tall() ? Tile::kTallStages : Tile::kStages};
  }
  RNP_DEVICE Ring ring_of(const TileState& s) const { return {ring().size, s.stage, s.parity}; }

  RNP_DEVICE char* input_of(int stage) const { return stages + stage * (rows() + Tile::BN) * kPackBytes; }
  RNP_DEVICE char* window_of(int window) const { return stages + window * p.window_rows * kPackBytes; }
  RNP_DEVICE char* weights_of(int stage) const {
    return windows() ? window_of(2) + stage * p.cut.bn * kPackBytes : input_of(stage) + rows() * kPackBytes;
  }
  RNP_DEVICE Run* runs_of(int buffer) const { return runs_of_both + buffer * (Tile::kMostRows + 1); }

  RNP_DEVICE static bool first_lane() { return (thread_index() & 31) == 0; }

  RNP_DEVICE Box* boxes_of(int buffer) const { return boxes_of_both + buffer * kMostBoxes; }

  // A window is full when the lanes of the warp that brings it have arrived, one for all, or each after it has replaced
  // by zeros what must be. A stage is full when every loader has arrived: each when its copies have landed, or one for
  // all, and the bytes that were announced have come. One arrival of each warp that empties a stage, gives rows back or
  // passes the turn; one for a tile's description.
  RNP_DEVICE void make_barriers() const {
    if (p.use_tma && thread_index() < kBoxSizes) prefetch_map(maps + thread_index());
    if (thread_index() == 0) {
      const int warps = turns() ? kWarps / 2 : kWarps;
      for (int i = 0; i < Tile::kStages; ++i) init_barrier(full + i, kHopperLoaders), init_barrier(empty + i, warps);
      for (int i = 0; i < 2; ++i) {
        init_barrier(rows_full + i, 1);
        init_barrier(rows_empty + i, warps + kHopperLoaders / 32 + (helps() ? 1 : 0));
        init_barrier(turn + i, kWarps / 2);
        init_barrier(window_full + i, 32), init_barrier(window_empty + i, warps), init_barrier(window_landed + i, 1);
      }
      publish_barriers();
    }
    sync_block();
  }
};

}  // namespace rnp::cuda
