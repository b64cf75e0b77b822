#include "cpu/pointwise.h"

#include <algorithm>

namespace rnp::cpu {
namespace {

constexpr int64_t kWeightBytes = 512 * 1024;  // of a 1 MB L2

}  // namespace

Pointwise::Pointwise(const Call& call, const WorkItem& item, int64_t in_live, int64_t out_live, const float* band,
                     float* sums)
    : pixels_((item.row1 - item.row0) * call.p.shape.out_w),
      tiles_((pixels_ + call.kernels.max_cols - 1) / call.kernels.max_cols) {
  const PrefixConv2dParams& p = call.p;
  const PackedLayout& l = call.layout;
  const int64_t first = item.block0 * PackedLayout::kLanes;
  const int64_t end = std::min(out_live, item.block1 * PackedLayout::kLanes);
  weights_stay_ = (end - first) * in_live * static_cast<int64_t>(sizeof(float)) <= kWeightBytes;
  const int64_t ic_blocks = std::max<int64_t>(1, (in_live + l.ic_block - 1) / l.ic_block);
  const int64_t line = p.row ? p.row[item.n] : 0, group0 = item.g * l.ocg;
  const bool partial = (end - first) % call.kernels.width[0].lanes != 0;
  if (partial) tables_.resize(2 * PackedLayout::kLanes);
  const auto table = [&](const void* data, int64_t row_stride, int64_t channel, int64_t live, int64_t lanes,
                         float* to) -> const float* {
    if (!data) return nullptr;
    const float* from = static_cast<const float*>(data) + line * row_stride + group0 + channel;
    if (live == lanes) return from;
    std::copy_n(from, live, to);
    return to;
  };
  TileArgs a = {};
  a.partial_col_step = PackedLayout::kLanes;
  a.out_col_step = p.output_stride.w;
  a.residual_col_step = p.residual_stride.w;
  a.relu = p.activation == Activation::kRelu;
  const int64_t pixel0 = item.n * p.output_stride.n + item.row0 * p.output_stride.h + group0;
  const int64_t residual0 = item.n * p.residual_stride.n + item.row0 * p.residual_stride.h + group0;
  for (int64_t channel = first; channel < end;) {
    const int64_t block = channel / PackedLayout::kLanes, sub = channel % PackedLayout::kLanes;
    const int64_t left = std::min(end, (block + 1) * PackedLayout::kLanes) - channel;
    // Weights that come from afar are read once, in whole.
    const TileWidth& width = weights_stay_ ? call.kernels.pointwise_width_for(left) : call.kernels.width_for(left);
    const int64_t live = std::min<int64_t>(width.lanes, end - channel);
    a.live = static_cast<int32_t>(live);
    a.w_step = l.lanes(block);
    a.scale = table(p.scale, p.scale_row_stride, channel, live, width.lanes, tables_.data());
    a.bias = table(p.bias, p.bias_row_stride, channel, live, width.lanes, tables_.data() + PackedLayout::kLanes);
    a.out = static_cast<float*>(p.output) + pixel0 + channel;
    a.residual = p.residual ? static_cast<const float*>(p.residual) + residual0 + channel : nullptr;
    a.partial = sums + sub;
    a.stream = call.streams(live);
    for (int64_t ib = 0; ib < ic_blocks; ++ib) {
      const int64_t count = std::clamp<int64_t>(in_live - ib * l.ic_block, 0, l.ic_block);
      a.x_col_step = call.direct_input ? p.input_stride.w : count;
      a.x = band + ib * l.ic_block * (call.direct_input ? 1 : pixels_);
      a.w = p.packed + l.panel_at(item.g, block, ib) + sub;
      a.first = ib == 0;
      a.last = ib == ic_blocks - 1;
      a.run_count = count > 0 ? 1 : 0;
      passes_.push_back({{0, 0, count, 0, kSkipNone}, a, &width});
    }
    channel += live;
  }
}

// `cols` neighbouring pixels; then the pass points behind them.
void Pointwise::run_tile(Pass& pass, int64_t cols) {
  TileArgs& a = pass.args;
  a.runs = &pass.run;
  pass.width->tile[0][cols - 1](a);
  a.x += cols * a.x_col_step;
  a.partial += cols * a.partial_col_step;
  a.out += cols * a.out_col_step;
  if (a.residual) a.residual += cols * a.residual_col_step;
}

void Pointwise::run(Prefetcher prefetcher) {
  // Tiles differ by at most one pixel: the first `longer` of them have one more.
  const int64_t cols = pixels_ / tiles_, longer = pixels_ % tiles_;
  if (weights_stay_) {  // a tile's pixels stay in L1 while all their output channels are computed
    for (int64_t t = 0; t < tiles_; ++t) {
      for (Pass& pass : passes_) {
        prefetcher.step();
        run_tile(pass, t < longer ? cols + 1 : cols);
      }
    }
  } else {  // the weights of a pass stay in L1 or L2 while all pixels are computed
    for (Pass& pass : passes_) {
      for (int64_t t = 0; t < tiles_; ++t) {
        prefetcher.step();
        run_tile(pass, t < longer ? cols + 1 : cols);
      }
    }
  }
}

}  // namespace rnp::cpu
