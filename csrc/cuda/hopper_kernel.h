// The tile kernel of sm_90a, one thread block's view: two warps load, one describes, one helps,
// two warpgroups multiply.
//
// The describer finds a tile's samples and the boxes of rows that follow each other in memory. Loaders bring its
// stages: the weights by one bulk copy each; the input by an im2col copy for each box where all channels of a row's
// chunk live or none, else by cp.async, row by row, zeros where a row has no live channel. Consumers hold the sums of a
// tile's live width in registers and feed wgmma from shared memory; HopperTile says how they share the tiles. Barriers:
// full and empty for each stage, and for each of the two descriptions of a tile.
//
// Compiled for the GPU in hopper_tiles.cu and for the CPU in the tests, which run it on the emulator.
#pragma once

#include "cuda/hopper_consumer.h"
#include "cuda/hopper_describer.h"
#include "cuda/hopper_helper.h"
#include "cuda/hopper_loader.h"

namespace rnp::cuda {

// `maps`: of boxes of 1, 2, 4 … 128 rows.
template <typename Tile>
RNP_DEVICE void hopper_block(const ConvArgs& p, const TensorMap* maps, char* shared) {
  const HopperBlock<Tile> block(p, maps, shared);
  block.make_barriers();
  if (thread_index() < HopperBlock<Tile>::kProducers) {
    give_registers<kProducerRegisters>();
    if (thread_index() < kHopperLoaders)
      HopperLoader<Tile>{block}.load();
    else if (thread_index() < kHopperLoaders + 32)
      HopperDescriber<Tile>{block}.describe();
    else if (block.helps())
      HopperHelper<Tile>{block}.help();
  } else {
    take_registers<kConsumerRegisters>();
    HopperConsumer<Tile>{block}.consume();
  }
}

}  // namespace rnp::cuda
