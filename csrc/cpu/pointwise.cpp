#include "cpu/pointwise.h"

#include <algorithm>

#include "core/processor.h"
#include "cpu/prefetch.h"
#include "cpu/weights_ahead.h"

namespace rnp::cpu {
namespace {

// Lines to fetch ahead of a tile: enough for the latency of memory, few enough for L2, of which a narrow prefix of a
// wide tensor uses a part of the sets.
constexpr int64_t kLinesAhead = 48;

// Passes of a tile that share the fetching and copying for later tiles: all of it in the first leaves memory idle while
// the others run (128 -> 32 channels: half of the time). Where there are more passes, products take longer than memory.
constexpr int64_t kMostSharers = 4;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

const float* first_pixel(const Call& call, const WorkItem& item) {
  const PrefixConv2dParams& p = call.p;
  const Strides4 st = p.input_at(item.n);
  return static_cast<const float*>(p.input) + item.n * st.n + item.g * call.layout.icg * st.c +
         item.row0 * p.shape.stride_h * st.h;
}

// The pixels of an item where they lie in the input tensor, in the order of the output's.
class PixelWalk {
 public:
  PixelWalk(const Call& call, const WorkItem& item)
      : cols_(call.p.shape.out_w),
        left_((item.row1 - item.row0) * cols_),
        step_(call.p.shape.stride_w * call.p.input_at(item.n).w),
        row_extra_(call.p.shape.stride_h * call.p.input_at(item.n).h - cols_ * step_),
        pixel_(first_pixel(call, item)) {}

  int64_t left() const { return left_; }
  const float* pixel() const { return pixel_; }
  void skip(int64_t count) {
    left_ -= count;
    pixel_ += count * step_;
    for (col_ += count; col_ >= cols_; col_ -= cols_) pixel_ += row_extra_;
  }
  // The next `count` pixels; the last one is repeated up to kMaxCols.
  void take(int64_t count, const float** to) {
    for (int64_t i = 0; i < count; ++i, skip(1)) to[i] = pixel_;
    std::fill(to + count, to + kMaxCols, to[count - 1]);
  }

 private:
  int64_t cols_, left_, step_, row_extra_, col_ = 0;
  const float* pixel_;
};

}  // namespace

Pointwise::Pointwise(const Call& call, const WorkItem& item, const WorkItem* following, float* scratch)
    : call_(call),
      item_(item),
      following_(following && following->block0 < following->block1 ? following : nullptr),
      scratch_(scratch),
      in_live_(live_in_group(call.p.in_live(item.n), item.g, call.layout.icg)),
      out_live_(live_in_group(call.p.out_live(item.n), item.g, call.layout.ocg)),
      rows_(1),
      row_pixels_((item.row1 - item.row0) * call.p.shape.out_w),
      x_row_extra_(0),
      panels_(call.uses_panels(item)),
      wide_(call.wide_from(item, item.block0)) {
  const PrefixConv2dParams& p = call.p;
  if (call.direct_input && !panels_ && !call.contiguous_pixels()) {
    rows_ = item.row1 - item.row0;
    row_pixels_ = p.shape.out_w;
    const Strides4 st = p.input_at(item.n);
    x_row_extra_ = p.shape.stride_h * st.h - row_pixels_ * p.shape.stride_w * st.w;
  }
  row_tiles_ = ceil_div(row_pixels_, wide_ ? call.kernels.wide_cols : call.kernels.max_cols);
  list_passes(scratch + call.band_floats(item));
}

void Pointwise::list_passes(float* sums) {
  const PrefixConv2dParams& p = call_.p;
  const PackedLayout& l = call_.layout;
  const int64_t first = item_.block0 * PackedLayout::kLanes;
  const int64_t end = std::min(out_live_, item_.block1 * PackedLayout::kLanes);
  const bool weights_stay = call_.weights_stay(item_);
  const int64_t ic_blocks = l.live_ic_blocks(in_live_);
  const int64_t line = p.row ? p.row[item_.n] : 0, group0 = item_.g * l.ocg;
  const bool partial = (end - first) % call_.kernels.width[0].lanes != 0;
  if (partial) tables_.resize(2 * PackedLayout::kLanes);
  const auto table = [&](const void* data, int64_t row_stride, int64_t channel, int64_t live, int64_t lanes,
                         float* to) -> const float* {
    if (!data) return nullptr;
    const float* from = static_cast<const float*>(data) + line * row_stride + group0 + channel;
    if (live == lanes) return from;
    std::copy_n(from, live, to);
    return to;
  };
  passes_.reserve(static_cast<size_t>(ceil_div(end - first, call_.kernels.width[0].lanes) * ic_blocks));
  PointwiseArgs args = {};
  TileArgs& a = args.tile;
  a.partial_col_step = PackedLayout::kLanes;
  a.partial_block_step = call_.block_floats(item_);
  const Strides4 in = p.input_at(item_.n), out = p.output_at(item_.n), residual = p.residual_at(item_.n);
  a.out_col_step = out.w;
  a.residual_col_step = residual.w;
  a.relu = p.activation == Activation::kRelu;
  const int64_t pixel0 = item_.n * out.n + item_.row0 * out.h + group0;
  const int64_t residual0 = item_.n * residual.n + item_.row0 * residual.h + group0;
  for (int64_t channel = first; channel < end;) {
    const int64_t block = channel / PackedLayout::kLanes, sub = channel % PackedLayout::kLanes;
    const int64_t left = std::min(end, (block + 1) * PackedLayout::kLanes) - channel;
    // Weights that come from afar are read once, in whole.
    const TileWidth& width = wide_          ? *wide_
                             : weights_stay ? call_.kernels.pointwise_width_for(left, processor().paired_multiply_adds)
                                            : call_.kernels.width_for(left);
    const int64_t live = std::min<int64_t>(width.lanes, end - channel);
    a.live = static_cast<int32_t>(live);
    a.w_step = l.lanes(block);
    a.w_block_step = l.panel_at(item_.g, block + 1, 0) - l.panel_at(item_.g, block, 0);
    a.scale = table(p.scale, p.scale_row_stride, channel, live, width.lanes, tables_.data());
    a.bias = table(p.bias, p.bias_row_stride, channel, live, width.lanes, tables_.data() + PackedLayout::kLanes);
    a.out = static_cast<float*>(p.output) + pixel0 + channel;
    a.residual = p.residual ? static_cast<const float*>(p.residual) + residual0 + channel : nullptr;
    a.partial = sums + sub;
    a.stream = call_.streams(live);
    for (int64_t ib = 0; ib < ic_blocks; ++ib) {
      const int64_t ic = ib * l.ic_block;
      args.count = std::clamp<int64_t>(in_live_ - ic, 0, l.ic_block);
      if (call_.direct_input) {
        a.x = first_pixel(call_, item_) + ic;
        a.x_col_step = p.shape.stride_w * in.w;
      } else {  // copy_band's
        a.x = scratch_ + ic * row_pixels_;
        a.x_col_step = args.count;
      }
      a.w = p.packed + l.panel_at(item_.g, block, ib) + sub;
      a.first = ib == 0;
      a.last = ib == ic_blocks - 1;
      passes_.push_back({args, &width, ic, 0});
    }
    channel += live;
  }
  share_out(static_cast<int64_t>(passes_.size()) / ic_blocks, ic_blocks);
}

// The passes that read the same input channels each fetch, or copy, a part of them.
void Pointwise::share_out(int64_t passes, int64_t ic_blocks) {
  const int64_t sharers = std::min(passes, kMostSharers);
  for (size_t i = 0; i < passes_.size(); ++i) {
    Pass& pass = passes_[i];
    const int64_t chunks = ceil_div(pass.args.count, kPanelChunk), part = static_cast<int64_t>(i) / ic_blocks;
    const auto bound = [&](int64_t k) { return chunks * std::min(k, sharers) / sharers * kPanelChunk; };
    pass.args.offset = pass.ic + bound(part);
    pass.share = std::min(bound(part + 1), pass.args.count) - std::min(bound(part), pass.args.count);
  }
}

void Pointwise::run() {
  if (panels_) {
    run_panels();
  } else if (call_.direct_input && call_.weights_stay(item_)) {
    run_in_place();
  } else {
    run_streaming();
  }
}

// Computes a tile of `cols` pixels; then the pass points behind it.
void Pointwise::run_tile(Pass& pass, int64_t cols, int64_t row_extra) {
  pass.width->pointwise[cols - 1](pass.args);
  TileArgs& a = pass.args.tile;
  a.x += cols * a.x_col_step + row_extra;
  a.partial += cols * a.partial_col_step;
  a.out += cols * a.out_col_step;
  if (a.residual) a.residual += cols * a.residual_col_step;
}

// A tile's pixels stay in L1 while all their output channels are computed.
void Pointwise::run_in_place() {
  // The first tiles were fetched by the item before, or come too soon.
  PixelWalk ahead(call_, item_);
  const int64_t lines = std::max<int64_t>(1, cols_of(0) * ceil_div(in_live_, kPanelChunk));
  ahead.skip(std::min(ahead.left(), cols_of(0) * (1 + kLinesAhead / lines)));
  for (int64_t row = 0; row < rows_; ++row) {
    for (int64_t t = 0; t < row_tiles_; ++t) {
      const int64_t cols = cols_of(t), row_extra = t + 1 < row_tiles_ ? 0 : x_row_extra_;
      if (ahead.left() <= 0 && following_) {
        ahead = PixelWalk(call_, *following_);
        following_ = nullptr;
      }
      const float* pixel = ahead.left() > 0 ? ahead.pixel() : nullptr;
      ahead.skip(cols);
      for (Pass& pass : passes_) {
        pass.args.ahead_count = pixel ? pass.share : 0;
        pass.args.ahead = pixel ? pixel + pass.args.offset : nullptr;
        run_tile(pass, cols, row_extra);
      }
    }
  }
}

// The weights of a pass stay in L1 or L2 while all pixels are computed.
void Pointwise::run_streaming() {
  Prefetcher prefetcher;
  if (following_)
    prefetcher = Prefetcher(call_.p, *following_, following_->g * call_.layout.icg,
                            live_in_group(call_.p.in_live(following_->n), following_->g, call_.layout.icg),
                            call_.element, rows_ * row_tiles_ * static_cast<int64_t>(passes_.size()));
  const auto run_pass_tile = [&](Pass& pass, int64_t t) {
    prefetcher.step();
    run_tile(pass, cols_of(t), t + 1 < row_tiles_ ? 0 : x_row_extra_);
  };
  if (call_.weights_stay(item_)) {
    for (int64_t row = 0; row < rows_; ++row)
      for (int64_t t = 0; t < row_tiles_; ++t)
        for (Pass& pass : passes_) run_pass_tile(pass, t);
  } else {
    for (size_t i = 0; i < passes_.size(); ++i) {
      Pass& pass = passes_[i];
      const PointwiseArgs* next = wide_ && i + 1 < passes_.size() ? &passes_[i + 1].args : nullptr;
      WeightsAhead ahead(next ? next->tile.w : nullptr, pass.args.tile.w_block_step,
                         next ? next->count * PackedLayout::kLanes : 0);
      for (int64_t row = 0; row < rows_; ++row) {
        for (int64_t t = 0; t < row_tiles_; ++t) {
          ahead.give(pass.args.tile, rows_ * row_tiles_);
          run_pass_tile(pass, t);
        }
      }
    }
  }
}

void Pointwise::run_panels() {
  const float *next[kMaxCols], *later[kMaxCols];
  PixelWalk walk(call_, item_), ahead(call_, item_);
  const int64_t floats = std::max<int64_t>(1, call_.panel_floats(in_live_));
  float *current = scratch_, *other = scratch_ + floats;
  walk.take(cols_of(0), next);
  call_.kernels.copy_panel(next, in_live_, current);
  ahead.skip(std::min(ahead.left(), cols_of(0) * (2 + kLinesAhead * kPanelChunk / floats)));
  for (int64_t t = 0; t < row_tiles_; ++t, std::swap(current, other)) {
    const int64_t cols = cols_of(t);
    const bool more = t + 1 < row_tiles_;
    if (more) walk.take(cols_of(t + 1), next);
    if (ahead.left() <= 0 && following_) {
      ahead = PixelWalk(call_, *following_);
      following_ = nullptr;
    }
    const bool fetch = ahead.left() > 0 && !processor().follows_rows;
    if (fetch) ahead.take(std::min(ahead.left(), cols), later);
    for (Pass& pass : passes_) {
      PointwiseArgs& a = pass.args;
      a.tile.x = current + pass.ic * kMaxCols;
      a.copy_count = more ? pass.share : 0;
      a.to = other + a.offset * kMaxCols;
      a.from = next;
      a.ahead_count = fetch ? pass.share : 0;
      a.ahead_pixels = later;
      pass.width->panel[cols - 1](a);
      a.tile.partial += cols * a.tile.partial_col_step;
      a.tile.out += cols * a.tile.out_col_step;
      if (a.tile.residual) a.tile.residual += cols * a.tile.residual_col_step;
    }
  }
}

void pointwise_item(const Call& call, const WorkItem& item, const WorkItem* following, float* scratch) {
  int64_t cut = item.block0;
  while (call.wide_from(item, cut)) cut += 2;
  WorkItem wide = item, rest = item;
  wide.block1 = rest.block0 = cut;
  if (rest.block0 < rest.block1) {
    if (item.block0 < cut) Pointwise(call, wide, nullptr, scratch).run();
    Pointwise(call, rest, following, scratch).run();
  } else {
    Pointwise(call, wide, following, scratch).run();
  }
}

}  // namespace rnp::cpu
