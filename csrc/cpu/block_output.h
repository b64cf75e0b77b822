// Where a block of output channels of an item, or two of them, go, and what follows their sums.
#pragma once

#include <algorithm>

#include "cpu/call.h"

namespace rnp::cpu {

struct BlockOutput {
  int64_t channel0, live;  // first of the output channels; how many are live
  alignas(64) float scale[2 * PackedLayout::kLanes] = {}, bias[2 * PackedLayout::kLanes] = {};
  // Where tiles store their results: of the first pixel and channel, with the steps. Otherwise all is null.
  TileArgs args = {};

  BlockOutput(const Call& call, const WorkItem& item, int64_t block, int64_t out_live,
              int64_t lanes = PackedLayout::kLanes)
      : channel0(item.g * call.layout.ocg + block * PackedLayout::kLanes),
        live(std::min(lanes, out_live - block * PackedLayout::kLanes)) {
    const PrefixConv2dParams& p = call.p;
    const Strides4 out_step = p.output_at(item.n), residual_step = p.residual_at(item.n);
    args.live = static_cast<int32_t>(live);
    args.out_row_step = out_step.h;
    args.out_col_step = out_step.w;
    args.residual_row_step = residual_step.h;
    args.residual_col_step = residual_step.w;
    args.relu = p.activation == Activation::kRelu;
    if (!call.direct_output) return;
    const int64_t line = p.row ? p.row[item.n] : 0;
    const auto lanes_of = [&](const void* table, int64_t row_stride, float* to) -> const float* {
      if (!table) return nullptr;
      return std::copy_n(static_cast<const float*>(table) + line * row_stride + channel0, live, to) - live;
    };
    args.scale = lanes_of(p.scale, p.scale_row_stride, scale);
    args.bias = lanes_of(p.bias, p.bias_row_stride, bias);
    args.out = call.advance(static_cast<float*>(p.output), item.n * out_step.n + item.row0 * out_step.h + channel0);
    if (p.residual)
      args.residual = call.advance(static_cast<const float*>(p.residual),
                                   item.n * residual_step.n + item.row0 * residual_step.h + channel0);
  }
  BlockOutput(const BlockOutput&) = delete;
  BlockOutput& operator=(const BlockOutput&) = delete;
};

}  // namespace rnp::cpu
