// How positions lie for the weight's gradient in bfloat16: in one row, so that a matrix of 32 of them may run on from
// one row of pixels, or from one image, into the next.
//
// Behind a stride the input is split by residues into phases, each of them as if the stride were 1. A tap then reads
// its phase from a position on that is `shift` behind the output's own. Zeros lie between rows and between images,
// shared by the right padding of one and the left padding of the next: pitches are as small as that allows.
#pragma once

#include <cstdint>
#include <vector>

#include "core/prefix_conv2d.h"

namespace rnp::cpu {

struct PairAxis {
  struct Phase {
    int64_t first;  // input coordinate of position 0; negative in the padding
    int64_t shift;  // largest of its taps
  };
  struct Tap {
    int64_t phase, shift;
  };
  std::vector<Phase> phases;
  std::vector<Tap> taps;
  int64_t max_shift;
  int64_t pitch;  // positions from one row to the next: everything beyond is zero for whoever reads on

  PairAxis(int64_t size, int64_t out, int64_t kernel, int64_t stride, int64_t pad, int64_t dilation);
};

// Of units of at most `images` images, or bands of one, with at most `rows` rows of the output.
struct PairGeometry {
  PairAxis rows, cols;
  int64_t image;       // positions from one image to the next, even
  int64_t chunks;      // that the positions of the largest unit's output take
  int64_t phase;       // positions of a phase, whole chunks: whatever a chunk of any tap reads
  int64_t all_phases;  // positions of the packed input
  int64_t plane;       // positions of packed grad_output, an odd number of cache lines
  // Packed, the input's positions 2i and 2i + 1 are a word; a second copy of 2i + 1 and 2i + 2 serves taps that begin
  // at an odd position.
  int64_t copies;

  PairGeometry(const ConvShape& shape, int64_t images, int64_t unit_rows);

  int64_t phases() const { return static_cast<int64_t>(rows.phases.size() * cols.phases.size()); }
  int64_t pitch() const { return cols.pitch; }
  // Where the tap's input begins.
  int64_t begin(const PairAxis::Tap& row, const PairAxis::Tap& col) const {
    return (row.phase * static_cast<int64_t>(cols.phases.size()) + col.phase) * phase + row.shift * pitch() + col.shift;
  }
  // Positions up to the last of the output.
  int64_t extent(int64_t unit_images, int64_t unit_rows, int64_t out_w) const {
    return (unit_images - 1) * image + (unit_rows - 1) * pitch() + out_w;
  }
};

}  // namespace rnp::cpu
