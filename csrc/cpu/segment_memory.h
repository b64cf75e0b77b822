// Where a segment's maps live, and how many samples pass through which steps together.
#pragma once

#include <vector>

#include "cpu/segment.h"

namespace rnp::cpu {

// Elements from one pixel to the next of a sample that keeps `live` channels only: whole cache lines, and never a
// multiple of 2 KB, so that neighbours at stride 1 or 2 do not share one set of L1.
inline int64_t compact_pixel(int64_t live) {
  const int64_t whole = live < 16 ? 16 : (live + 15) / 16 * 16;
  return whole % 512 == 0 ? whole + 16 : whole;
}

// Floats of a sample's place in a map, however its channels lie.
inline int64_t sample_room(const MapShape& shape) { return shape.h * shape.w * compact_pixel(shape.c); }

// Steps first … end − 1, run for `samples` samples at a time, by `places` threads at once that each have a group of
// their own; by all threads together where that is 1.
struct SegmentPhase {
  size_t first, end;
  int64_t samples;
  int64_t places;
  int64_t group_floats;  // from one place to the next, of maps that hold a group
};

// Whether step i is a 3x3 convolution whose one reader is 2x2 max-pooling in the next step: Winograd's tiles can do
// that themselves, and the larger map is neither written nor read.
bool pooling_follows(const SegmentProgram& program, const std::vector<MapShape>& shapes, size_t i);

struct SegmentMemory {
  std::vector<SegmentPhase> phases;
  std::vector<int64_t> offset;  // map slot → first float in the buffer (of the first place), −1 for inputs and outputs
  std::vector<bool> whole_batch;  // map slot → holds all samples; otherwise only those of its phase's groups under way
  int64_t floats = 0;

  SegmentMemory(const SegmentProgram& program, const std::vector<MapShape>& shapes, int64_t n, int64_t group_bytes,
                int threads = 1);

 private:
  void cut(const SegmentProgram& program, const std::vector<MapShape>& shapes, int64_t n, int64_t group_bytes,
           int threads);
  void place(const SegmentProgram& program, const std::vector<MapShape>& shapes, int64_t n);
};

}  // namespace rnp::cpu
