// Which algorithm computes a sample: direct convolution, or Winograd's with tiles of 2x2 or 4x4 outputs.
#pragma once

#include <string>

#include "core/prefix_conv2d.h"

namespace rnp {

enum class Algorithm : int32_t { kDirect = 0, kWinograd2 = 2, kWinograd4 = 4 };  // the value is the tile's edge

// Winograd needs float32, no groups, and a 3x3 kernel with stride 1 (dilated or not) or, with tiles of 4x4, a 7x7
// kernel with stride 2 over at most 4 channels (winograd.h), of which a sample needs all.
bool winograd_can(const ConvShape& shape, DType dtype);

// The one place of the rule; bench/winograd.py measures it. It looks at the layer and at the sample's own prefixes,
// never at the batch, the threads or the instruction set. The tile is one and the same for all prefixes of a layer.
Algorithm choose_algorithm(const ConvShape& shape, DType dtype, int64_t in_live, int64_t out_live);

// Edge of the tile for which this layer wants its weights transformed; 0 if no prefix of it uses Winograd.
int64_t winograd_tile(const ConvShape& shape, DType dtype);

// Whether weights for which nobody keeps a transform are worth transforming in the call: in training, where they change
// with every step, forward and for the input's gradient. False where winograd_tile is 0.
bool transforms_in_call(const ConvShape& shape, DType dtype);

// "auto" (the rule), "direct", or, to measure and test, "winograd2" or "winograd4": that tile wherever it can be used.
// Throws std::invalid_argument for another name.
void set_algorithm(const std::string& name);
const char* get_algorithm();

}  // namespace rnp
