// Where a segment's maps live, and how many samples pass through which steps together.
#pragma once

#include <vector>

#include "cpu/segment.h"

namespace rnp::cpu {

// Steps first … end − 1, run for `samples` samples at a time.
struct SegmentPhase {
  size_t first, end;
  int64_t samples;
};

struct SegmentMemory {
  std::vector<SegmentPhase> phases;
  std::vector<int64_t> offset;    // map slot → first float in the buffer, −1 for inputs and outputs
  std::vector<bool> whole_batch;  // map slot → holds all samples; otherwise only those of its phase's group
  int64_t floats = 0;

  SegmentMemory(const SegmentProgram& program, const std::vector<MapShape>& shapes, int64_t n, int64_t group_bytes);

 private:
  void cut(const SegmentProgram& program, const std::vector<MapShape>& shapes, int64_t n, int64_t group_bytes);
  void place(const SegmentProgram& program, const std::vector<MapShape>& shapes, int64_t n);
};

}  // namespace rnp::cpu
