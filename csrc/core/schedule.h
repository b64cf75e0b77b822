// Cutting one call into work items for threads: (sample, group, band of output rows, range of output-channel blocks).
//
// No choice made here can change a result's bits: every output element is one chain of additions in the order (ic
// block, kh, kw, ic), whatever the band or range it is computed in, so the cut may follow caches and the number of
// threads.
#pragma once

#include <cstdint>
#include <vector>

#include "core/packing.h"

namespace rnp {

struct WorkItem {
  int64_t n, g;
  int64_t row0, row1;      // output rows
  int64_t block0, block1;  // blocks of 32 live output channels of the group
  bool tail;               // also writes the group's channels beyond the prefix, in these rows
  double cost;             // about cycles of a vector unit; decides only the order
};

// Whether a sample's live weights of a 1x1 kernel stay in L2 (of 1 MB), whatever else passes. Otherwise they are read
// past a band's pixels once.
inline bool weights_stay(int64_t in_live, int64_t out_live) {
  return in_live * out_live * static_cast<int64_t>(sizeof(float)) <= 512 * 1024;
}

// 1x1: whether neighbouring output pixels read 4 KB apart, hence from one set of L1. Their live channels are then
// copied side by side first.
inline bool pixels_share_a_set(const PrefixConv2dParams& p) {
  return !p.input_pixel && p.shape.stride_w * p.input_stride.w % 1024 == 0;
}

// How many output rows a band may have so that its input (live channels only, with halo) and its sums stay in L2.
// `in_live`: channels of float32, or words of two bfloat16.
int64_t band_rows(const ConvShape& shape, int64_t in_live);

// Items cover every (sample, group, row, live block) once, and every (sample, group, row) once with `tail`. Longest
// first.
std::vector<WorkItem> schedule(const PrefixConv2dParams& params, int threads);

}  // namespace rnp
