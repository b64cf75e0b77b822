// 1x1 kernels: a matrix product of a band's pixels with the weights, its tiles ordered for the caches.
#pragma once

#include <vector>

#include "cpu/call.h"
#include "cpu/prefetch.h"

namespace rnp::cpu {

// One work item of a call whose tiles store their results. `band` holds the item's pixels: the input tensor from the
// item's first pixel on, or copy_band's result; `sums` is scratch (Call::sum_floats).
class Pointwise {
 public:
  Pointwise(const Call& call, const WorkItem& item, int64_t in_live, int64_t out_live, const float* band, float* sums);

  int64_t steps() const { return tiles_ * static_cast<int64_t>(passes_.size()); }  // of the prefetcher
  void run(Prefetcher prefetcher);

 private:
  // One pass of a tile: a block of input channels into up to `lanes` output channels. Its pointers move along with the
  // pixels.
  struct Pass {
    Run run;
    TileArgs args;
    const TileWidth* width;
  };

  static void run_tile(Pass& pass, int64_t cols);

  int64_t pixels_, tiles_;
  bool weights_stay_;  // in L2, whatever else passes
  std::vector<Pass> passes_;
  std::vector<float> tables_;  // scale and bias of a last block with fewer channels than lanes
};

}  // namespace rnp::cpu
