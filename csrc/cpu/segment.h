// Runs a segment's program (segment_program.h) on a batch: one call from Python for a whole run of layers.
//
// Maps that do not leave the segment live in one buffer that is kept from call to call; a map takes the place of one
// that is no longer read, a sum the place of its residual. The samples of large maps pass through several layers in
// groups small enough for the caches. Neither changes a bit: a sample's result depends on the sample alone.
#pragma once

#include <vector>

#include "core/parallel.h"
#include "core/prefix_conv2d.h"
#include "cpu/segment_program.h"

namespace rnp::cpu {

struct MapShape {
  int64_t c = 0, h = 0, w = 0;
  int64_t floats() const { return c * h * w; }
};

struct Constant {
  const float* data = nullptr;
  int64_t floats = 0;
};

// A batch and what goes with it. Pointers stand in the order of the program's inputs and outputs; outputs are dense
// (maps channels_last).
struct SegmentCall {
  int64_t n = 0;
  std::vector<const float*> map_in;
  std::vector<Strides4> map_in_stride;
  std::vector<MapShape> map_in_shape;
  std::vector<const int32_t*> index_in;
  std::vector<const float*> vector_in;
  std::vector<Constant> constants;
  float shift = 0;
  std::vector<float*> map_out;
  std::vector<int32_t*> index_out;
  std::vector<float*> vector_out;
};

// The shape of every map slot. Throws std::invalid_argument where the inputs do not fit the program.
std::vector<MapShape> segment_shapes(const SegmentProgram& program, const std::vector<MapShape>& map_in);

// Bytes of maps that a group of samples should touch in a step, where the whole batch touches more than four times
// that: what one core's caches hold, since the sums of a mixed batch wait for memory and not for multiply-adds
// (bench/NOTES.md).
constexpr int64_t kGroupBytes = int64_t{4} << 20;

// Checks constants and the values of index inputs (std::invalid_argument), then computes the outputs.
void run_segment(const SegmentProgram& program, const std::vector<MapShape>& shapes, const SegmentCall& call,
                 const Threads& threads, int64_t group_bytes = kGroupBytes);

// Gives back the memory that calls have left for the next ones.
void release_segment_memory();

}  // namespace rnp::cpu
