// What the two kinds of warpgroups of the sm_90a kernel share: shared memory, its barriers, the states of its tiles.
#pragma once

#include "cuda/conv_epilogue.h"
#include "cuda/hopper.h"

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

  RNP_DEVICE static bool first_lane() { return (thread_index() & 31) == 0; }

  // One arrival for each warp that fills or empties a stage, or gives rows back; one for a tile's description.
  RNP_DEVICE void make_barriers() const {
    if (thread_index() == 0) {
      for (int i = 0; i < Tile::kStages; ++i) init_barrier(full + i, kProducers / 32), init_barrier(empty + i, kWarps);
      for (int i = 0; i < 2; ++i) init_barrier(rows_full + i, 1), init_barrier(rows_empty + i, kWarps);
      publish_barriers();
    }
    sync_block();
  }
};

}  // namespace rnp::cuda
