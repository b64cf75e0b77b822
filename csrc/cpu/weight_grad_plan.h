// Cutting the weight's gradient: which positions are summed together, and which part of the weight an item computes.
//
// Only what decides the order of additions (units, chunks, slots) counts for the bits of the result. It follows from
// the shapes and the prefixes; `threads` changes nothing but the size of the items.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "cpu/pair_grad_geometry.h"
#include "cpu/pair_grad_kernel.h"
#include "cpu/prefix_conv2d_grad.h"
#include "cpu/weight_grad_kernel.h"

namespace rnp::cpu {

// Output positions [first, end) along one axis for which a tap lies inside the input.
struct TapRange {
  int64_t first, end;
};

// One axis of the input as it is packed: of a kernel of length 1 only the positions that the stride hits.
struct PackedAxis {
  int64_t step;                // input positions between packed neighbours
  int64_t out_step;            // packed positions between neighbours of the output
  std::vector<TapRange> taps;  // of each tap

  PackedAxis(int64_t size, int64_t out, int64_t kernel, int64_t stride, int64_t pad, int64_t dilation);
};

// The rows [row0, row1) of the output of `images` samples, from `image0` on in the plan's order: packed together.
struct GradUnit {
  int64_t image0, images, row0, row1;
};

// A rectangle of one group's weight, summed over the units of one slot.
struct GradItem {
  int64_t group, out0, out_count, in0, in_count, slot;
  int64_t sums_at;  // first float of its sums among those of its slot
  double cost;      // about cycles; decides only the order
};

// Sums of an item: [block of kGradLanes outputs][panel of kGradPanel inputs][tap][kGradPanel][kGradLanes].
inline int64_t grad_blocks(const GradItem& item) { return (item.out_count + kGradLanes - 1) / kGradLanes; }
inline int64_t grad_panels(const GradItem& item) { return (item.in_count + kGradPanel - 1) / kGradPanel; }
inline int64_t grad_block_floats(const GradItem& item, int64_t area) {
  return grad_panels(item) * area * kGradPanel * kGradLanes;
}

// In bfloat16 both change places: [block of kPairLanes inputs][panel of kPairPanel
// outputs][tap][kPairPanel][kPairLanes].
inline int64_t pair_blocks(const GradItem& item) { return (item.in_count + kPairLanes - 1) / kPairLanes; }
inline int64_t pair_panels(const GradItem& item) { return (item.out_count + kPairPanel - 1) / kPairPanel; }
inline int64_t pair_block_floats(const GradItem& item, int64_t area) {
  return pair_panels(item) * area * kPairPanel * kPairLanes;
}

struct WeightGradPlan {
  PackedAxis rows, cols;
  std::vector<int64_t> order;  // samples of like prefixes side by side
  std::vector<GradUnit> units;
  std::vector<int64_t> slots;        // slot i sums units slots[i] … slots[i + 1] - 1; the slots are then added in order
  std::vector<GradItem> items;       // longest first
  int64_t chunk_images, chunk_rows;  // positions that one chain of additions runs over
  int64_t input_floats, grad_floats;  // the largest packed unit of an item
  std::optional<PairGeometry> pairs;  // bfloat16, two positions at once
  int64_t staged_floats = 0;          // beside the packed unit, for those
  int64_t item_floats, slot_floats;   // sums of the largest item; of all items of a slot

  WeightGradPlan(const PrefixConv2dGradParams& params, int threads, bool in_pairs);

  int64_t packed_floats() const { return (input_floats + grad_floats + staged_floats + 15) / 16 * 16; }
  // What sums are stored and added in.
  int64_t blocks(const GradItem& item) const { return pairs ? pair_blocks(item) : grad_blocks(item); }
  int64_t block_floats(const GradItem& item, int64_t area) const {
    return pairs ? pair_block_floats(item, area) : grad_block_floats(item, area);
  }
  int64_t slot_count() const { return static_cast<int64_t>(slots.size()) - 1; }
};

}  // namespace rnp::cpu
