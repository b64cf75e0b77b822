// What a call of a segment must satisfy, checked before anything is computed.
#pragma once

#include "cpu/segment.h"

namespace rnp::cpu {

// The convolution of a step whose input map has this shape; `n` is left to the caller.
ConvShape step_shape(const SegmentStep& step, const MapShape& in);

// Throws std::invalid_argument where constants or the values of index inputs do not fit.
void check_segment(const SegmentProgram& program, const std::vector<MapShape>& shapes, const SegmentCall& call);

}  // namespace rnp::cpu
