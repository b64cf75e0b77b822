// 1x1 kernels: a matrix product of a band's pixels with the weights, its tiles ordered for the caches.
#pragma once

#include <vector>

#include "cpu/call.h"

namespace rnp::cpu {

// Computes one work item of a call whose tiles store their results. `scratch` is the item's (Call::band_floats, and
// behind them Call::sum_floats); where the call copies its pixels, they lie there. `following` is the thread's next
// item, or null: its pixels are fetched meanwhile.
void pointwise_item(const Call& call, const WorkItem& item, const WorkItem* following, float* scratch);

// An item, or part of one, whose tiles are all wide or all not.
class Pointwise {
 public:
  Pointwise(const Call& call, const WorkItem& item, const WorkItem* following, float* scratch);
  void run();

 private:
  // One pass of a tile: a block of input channels into up to `lanes` output channels. Its pointers move along with the
  // pixels.
  struct Pass {
    PointwiseArgs args;
    const TileWidth* width;
    int64_t ic;     // its first input channel
    int64_t share;  // input channels of tiles to come that it fetches, from args.offset
  };

  void list_passes(float* sums);
  void share_out(int64_t passes, int64_t ic_blocks);
  void run_tile(Pass& pass, int64_t cols, int64_t row_extra);
  void run_in_place();
  void run_streaming();
  void run_panels();
  // The tiles of a row differ by at most one pixel: the first of them have one more.
  int64_t cols_of(int64_t tile) const { return row_pixels_ / row_tiles_ + (tile < row_pixels_ % row_tiles_); }

  const Call& call_;
  const WorkItem& item_;
  const WorkItem* following_;
  float* scratch_;
  int64_t in_live_, out_live_;
  int64_t rows_, row_pixels_, row_tiles_;  // of one pixel step: all pixels, or those of a row of the image
  int64_t x_row_extra_;                    // floats from the end of a row to the next
  bool panels_;
  const TileWidth* wide_;  // null: narrower ones
  std::vector<Pass> passes_;
  std::vector<float> tables_;  // scale and bias of a last block with fewer channels than lanes
};

}  // namespace rnp::cpu
