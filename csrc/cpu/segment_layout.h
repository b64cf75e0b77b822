// Which maps of a segment keep only their samples' live channels, side by side.
//
// In a tensor laid out for full width the live channels of a pruned sample are islands: reading 64 of 256 channels
// takes a quarter of the lines, but each from another page of the prefetchers' view, and pixels 4 KB apart share one
// set of L1. A map that never leaves the segment can do without the water: each of its samples has a distance of its
// own between pixels, the live channels rounded up to whole cache lines. Nobody reads more, so no bit changes.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/segment_memory.h"

namespace rnp::cpu {

// Map slot → whether it can be kept so. It can where it lives in the segment's memory, every reader is a convolution
// without groups or a pooling that reads it by the very prefix that it was written with. A sum is computed over its
// residual then, widened or copied to where it belongs, of which the channels beyond the prefix stay as they are.
std::vector<bool> compact_maps(const SegmentProgram& program, const SegmentMemory& memory);

// Whether the activation of a sum leaves its residual as it is: there is none, or a ReLU has made that.
bool residual_stays(const SegmentProgram& program, const SegmentStep& sum);

// Moves `live` channels of each pixel of a sample; channels [live, end) become 0. `from` and `to` may be one place
// where the pixels do not move closer together.
void widen_pixels(const float* from, int64_t from_pixel, float* to, int64_t to_pixel, int64_t pixels, int64_t live,
                  int64_t end);

}  // namespace rnp::cpu
