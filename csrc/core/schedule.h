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

// How many output rows a band may have so that its input (live channels only, with halo) and its sums stay in L2.
// `in_live`: channels of float32, or words of two bfloat16.
int64_t band_rows(const ConvShape& shape, int64_t in_live);

// Items cover every (sample, group, row, live block) once, and every (sample, group, row) once with `tail`. Longest
// first.
std::vector<WorkItem> schedule(const PrefixConv2dParams& params, int threads);

}  // namespace rnp
