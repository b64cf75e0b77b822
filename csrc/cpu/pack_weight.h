// Writing and checking packed weights (core/packing.h).
#pragma once

#include "core/packing.h"
#include "core/parallel.h"
#include "core/stock.h"

namespace rnp::cpu {

struct WeightView {  // (c_out, c_in / groups, kh, kw)
  const void* data;
  DType dtype;
  Strides4 stride;
};

// The layout that the kernels in use want of a weight of this shape and dtype: pairs of bfloat16 channels where the
// processor multiplies those, except where a pair would join two groups, and depthwise.
PackedLayout layout_in_use(const ConvShape& shape, DType dtype);

// How those kernels multiply bfloat16.
StockBFloat16 bfloat16_in_use(const ConvShape& shape, DType dtype);

// No more than the first `in_live` input and `out_live` output channels are needed; what stands beyond is undefined.
void pack_weight(const WeightView& weight, const PackedLayout& layout, float* packed, const Threads& threads,
                 int64_t in_live = INT64_MAX, int64_t out_live = INT64_MAX);

// Writes what packed_is_fresh compares: the part of a pack behind its header.
void write_fingerprint(const WeightView& weight, const PackedLayout& layout, float* packed);

// Null if `packed` (of `floats` floats) was written for this layout; otherwise what differs.
const char* packed_mismatch(const float* packed, int64_t floats, const PackedLayout& layout);

// False if the weights were edited after packing. One element of every filter is compared bit by bit, at a position
// that varies from filter to filter: an optimizer step, `.data` edits of whole filters and loaded checkpoints are seen;
// an edit that spares every sampled element (one single weight, say) is not.
bool packed_is_fresh(const WeightView& weight, const PackedLayout& layout, const float* packed);

// Leaves a mark in the header of a pack found stale, for its owner to see and pack again. It changes no result.
void mark_stale(const float* packed);

}  // namespace rnp::cpu
