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

#include "cuda/hopper_consumer.h"
#include "cuda/hopper_producer.h"

namespace rnp::cuda {

template <typename Tile>
RNP_DEVICE void hopper_block(const ConvArgs& p, const TensorMap* map, char* shared) {
  const HopperBlock<Tile> block(p, map, shared);
  block.make_barriers();
  if (thread_index() < HopperBlock<Tile>::kProducers) {
    give_registers<kProducerRegisters>();
    HopperProducer<Tile>{block}.produce();
  } else {
    take_registers<kConsumerRegisters>();
    HopperConsumer<Tile>{block}.consume();
  }
}

}  // namespace rnp::cuda
