// The driver: cuts a call into work items, prepares each item's input, and walks it with the register tiles of the ISA
// in use.
#include "cpu/prefix_conv2d.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <new>
#include <optional>
#include <vector>

#include "cpu/band.h"
#include "cpu/block_output.h"
#include "cpu/call.h"
#include "cpu/epilogue.h"
#include "cpu/grouped.h"
#include "cpu/isa.h"
#include "cpu/kernels.h"
#include "cpu/matrix_item.h"
#include "cpu/microkernel.h"
#include "cpu/pack_weight.h"
#include "cpu/plane_pointwise.h"
#include "cpu/pointwise.h"
#include "cpu/prefetch.h"
#include "cpu/scratch.h"
#include "cpu/tiles.h"
#include "cpu/weights_ahead.h"
#include "cpu/winograd.h"
#include "cpu/work_queue.h"

namespace rnp::cpu {
namespace {

// Sums the runs of a tile, in one chain or in one per kernel row. The cut must not depend on the tile, hence not on the
// band.
void run_tile(bool sum_kernel_rows, TileKernel tile, const std::vector<Run>& runs, bool first, bool last,
              TileArgs& args) {
  size_t begin = 0;
  do {
    size_t end = sum_kernel_rows ? begin : runs.size();
    while (end < runs.size() && runs[end].kernel_row == runs[begin].kernel_row) ++end;
    args.runs = runs.data() + begin;
    args.run_count = static_cast<int64_t>(end - begin);
    args.first = first && begin == 0;
    args.last = last && end == runs.size();
    tile(args);
    begin = end;
  } while (begin < runs.size());
}

// What an item's blocks of output channels have in common.
struct Convolution {
  const Call& call;
  const WorkItem& item;
  int64_t in_live, out_live;
  const BandGeometry& geometry;
  const float* band;
  float* sums;
  Prefetcher& prefetcher;
};

// Adds up one width of tiles over all pixels of a band: of `output`'s channels, those from `sub` on.
void convolve(const Convolution& c, const TileWidth& width, const BlockOutput& output, int64_t block, int64_t sub,
              int64_t live, TilePlan& plan) {
  const Call& call = c.call;
  const PackedLayout& l = call.layout;
  const int64_t w_step = l.lanes(block), ic_blocks = l.live_ic_blocks(c.in_live);
  float* out = output.args.out;
  const float* residual = output.args.residual;
  for (int64_t ib = 0; ib < ic_blocks; ++ib) {
    const int64_t count = std::clamp<int64_t>(c.in_live - ib * l.ic_block, 0, l.ic_block);
    const int64_t pixel = call.direct_input ? call.input_step(call.p.input_at(c.item.n).w) : count;
    const float* x = c.band + ib * l.ic_block * (call.direct_input ? 1 : c.geometry.pixels());
    TileArgs args = output.args;
    args.w = call.p.packed + l.panel_at(c.item.g, block, ib) + sub;
    args.w_step = w_step;
    args.w_block_step = l.panel_at(c.item.g, block + 1, ib) - l.panel_at(c.item.g, block, ib);
    args.live = static_cast<int32_t>(live);
    args.partial_col_step = PackedLayout::kLanes;
    args.partial_row_step = plan.cols * PackedLayout::kLanes;
    args.partial_block_step = call.block_floats(c.item);
    if (args.scale) args.scale += sub;
    if (args.bias) args.bias += sub;
    args.x_row_step = c.geometry.row_step * plan.cols_in * pixel;
    args.x_col_step = c.geometry.col_step * pixel;
    plan.list_runs(pixel, count, l.ic_count(ib), w_step);
    const bool more = ib + 1 < ic_blocks;
    const int64_t next_block = more ? block : block + width.lanes / PackedLayout::kLanes, next_ib = more ? ib + 1 : 0;
    const bool known = width.lanes == call.kernels.wide.lanes && next_block < c.item.block1;
    WeightsAhead ahead(known ? call.p.packed + l.panel_at(c.item.g, next_block, next_ib) : nullptr, args.w_block_step,
                       l.area() * l.ic_count(next_ib) * PackedLayout::kLanes);
    for (const RowTile& row : plan.row_tiles) {
      for (const ColTile& col : plan.col_tiles) {
        args.x = x + (row.first * c.geometry.row_step * plan.cols_in + col.first * c.geometry.col_step) * pixel;
        args.partial = c.sums + (row.first * plan.cols + col.first) * PackedLayout::kLanes + sub;
        if (out) {
          args.out = call.advance(out, row.first * args.out_row_step + col.first * args.out_col_step + sub);
          args.residual = residual ? call.advance(residual, row.first * args.residual_row_step +
                                                                col.first * args.residual_col_step + sub)
                                   : nullptr;
        }
        ahead.give(args, plan.tiles());
        c.prefetcher.step();
        run_tile(call.kernels.sum_kernel_rows || call.p.sum_kernel_rows, width.tile[row.count - 1][col.count - 1],
                 plan.runs(row, col), ib == 0, ib == ic_blocks - 1 && call.direct_output, args);
      }
    }
  }
}

void convolve_block(const Convolution& c, int64_t block, TilePlan& plan) {
  const Call& call = c.call;
  const BlockOutput output(call, c.item, block, c.out_live);
  for (int64_t sub = 0, live = 0; sub < output.live; sub += live) {
    const TileWidth& width = call.kernels.width_for(output.live - sub);
    live = std::min<int64_t>(width.lanes, output.live - sub);
    convolve(c, width, output, block, sub, live, plan);
  }
  if (!call.direct_output)
    finish_patch(call.p, {c.item.n, c.item.row0, c.item.row1 - c.item.row0, 0, call.p.shape.out_w}, output.channel0,
                 output.live, {c.sums, call.p.shape.out_w * PackedLayout::kLanes, PackedLayout::kLanes},
                 call.kernels.transpose);
}

// A worker's plan of the band it computed last. Groups and samples have their bands in common, and where groups are
// small a plan costs a tenth of an item.
class LastPlan {
 public:
  MatrixWorker matrices;

  TilePlan& of(const Call& call, const BandGeometry& geometry, bool wide, int64_t row0, int64_t row1) {
    if (row0 != row0_ || row1 != row1_) plan_[0].reset(), plan_[1].reset();
    row0_ = row0, row1_ = row1;
    std::optional<TilePlan>& plan = plan_[wide];
    if (!plan) plan.emplace(call.p.shape, geometry, call.kernels, wide, row0, row1, call.flat);
    return *plan;
  }

 private:
  std::optional<TilePlan> plan_[2];  // of wide tiles: the second
  int64_t row0_ = 0, row1_ = 0;
};

void run_item(const Call& call, const WorkItem& item, const WorkItem* following, float* scratch, LastPlan& last,
              float* row_sums) {
  const PrefixConv2dParams& p = call.p;
  const PackedLayout& l = call.layout;
  const int64_t in_live = call.in_words(item);
  const int64_t out_live = live_in_group(p.out_live(item.n), item.g, l.ocg);
  const int64_t group0 = item.g * l.ocg;
  if (item.block0 < item.block1 && call.kernels.matrix) {
    last.matrices.run(call, item, following, scratch);
  } else if (item.block0 < item.block1) {
    const BandGeometry geometry(p.shape, item.row0, item.row1);
    const float* band = scratch;
    if (call.direct_input) {
      const Strides4 st = p.input_at(item.n);
      band = call.advance(static_cast<const float*>(p.input), item.n * st.n + item.g * l.icg + item.row0 * st.h);
    } else if (p.pairs) {
      copy_band_pairs(p, geometry, item.n, item.g * l.icg, live_in_group(p.in_live(item.n), item.g, l.icg), l.ic_block,
                      call.kernels.copy_pixels, scratch);
    } else if (!call.uses_panels(item)) {
      copy_band(p, geometry, item.n, item.g * l.icg, in_live, in_live, l.ic_block, call.kernels, scratch);
    }
    if (call.flat && call.direct_output && !p.pairs) {
      pointwise_item(call, item, following, scratch);
    } else {
      const bool wide = call.wide_from(item, item.block0);
      Prefetcher next;
      if (following && following->block0 < following->block1)
        next = Prefetcher(p, *following, following->g * l.icg,
                          live_in_group(p.in_live(following->n), following->g, l.icg), call.element,
                          last.of(call, geometry, wide, item.row0, item.row1).tiles() * (item.block1 - item.block0) /
                              (wide ? 2 : 1) * l.live_ic_blocks(in_live));
      const Convolution c{call, item, in_live, out_live, geometry, band, scratch + call.band_floats(item), next};
      int64_t block = item.block0;
      for (; const TileWidth* width = call.wide_from(item, block); block += 2)
        convolve(c, *width, BlockOutput(call, item, block, out_live, width->lanes), block, 0, width->lanes,
                 last.of(call, geometry, true, item.row0, item.row1));
      for (; block < item.block1; ++block)
        convolve_block(c, block, last.of(call, geometry, false, item.row0, item.row1));
    }
  }
  if (item.tail) fill_tail(p, item.n, item.row0, item.row1, group0 + out_live, group0 + l.ocg);
  if (row_sums) {
    const int64_t first = group0 + item.block0 * PackedLayout::kLanes;
    const int64_t end = group0 + std::min(out_live, item.block1 * PackedLayout::kLanes);
    const int64_t written =
        item.tail && p.tail != Tail::kSkip ? std::max(end, std::min(group0 + l.ocg, p.tail_end(item.n))) : end;
    if (first < written) sum_rows(p, item.n, item.row0, item.row1, first, written, row_sums);
  }
}

// Samples of one pixel each, all alike, are the pixels of one sample: its tiles share what they read of the weights.
std::optional<PrefixConv2dParams> pixels_for_samples(const PrefixConv2dParams& p) {
  const ConvShape& s = p.shape;
  const bool alike = s.groups == 1 && !p.in_prefix && !p.out_prefix && !p.row && !p.pooled && !p.elsewhere &&
                     !p.input_pixel && !p.residual_pixel && !p.output_pixel && !p.ring;
  if (!alike || s.n < 2 || s.h * s.w * s.kh * s.kw * s.out_h * s.out_w != 1 || s.pad_top != 0 || s.pad_left != 0)
    return std::nullopt;
  PrefixConv2dParams q = p;
  q.shape.n = 1;
  q.shape.h = q.shape.out_h = s.n;
  q.shape.stride_h = q.shape.stride_w = 1;
  const auto turn = [](Strides4& st) { st.h = st.w = st.n; };
  turn(q.input_stride), turn(q.residual_stride), turn(q.output_stride);
  return q;
}

}  // namespace

const Kernels& kernels_of(Isa isa, bool pairs) {
#if defined(__x86_64__)
#if defined(RNP_AMX)
  if (pairs && isa == Isa::kAvx512Amx) return amx_kernels();
#endif
  if (pairs) return avx512bf16_kernels();
  if (isa >= Isa::kAvx512) return avx512_kernels();
  if (isa == Isa::kAvx2) return avx2_kernels();
#endif
  return portable_kernels();
}

void prefix_conv2d(const PrefixConv2dParams& p, const Threads& threads) {
  if (const auto pixels = pixels_for_samples(p)) return prefix_conv2d(*pixels, threads);
  const ConvShape& s = p.shape;
  if (s.n == 0 || s.c_out == 0 || s.out_h == 0 || s.out_w == 0) return;
  if (p.dtype == DType::kFloat64) return prefix_conv2d_plain(p, threads);
  const Kernels& kernels = kernels_of(current_isa(), p.pairs);
  static thread_local ScratchMemory scratch;
  const auto memory_of = [](size_t floats) { return scratch.get(floats); };
  if (const WinogradSamples split(p); !split.samples.empty()) {
    winograd_conv2d(p, split.samples, kernels, threads, memory_of);
    PrefixConv2dParams rest = p;
    rest.winograd = nullptr;
    rest.elsewhere = split.chosen.data();
    return split.all() ? void() : prefix_conv2d(rest, threads);
  }
  // Row sums of the pooled means start at 0: a skipped tail is never summed.
  std::vector<float> row_sums(p.pooled ? static_cast<size_t>(s.n * s.out_h * s.c_out) : 0);
  float* sums = p.pooled ? row_sums.data() : nullptr;
  const Call call(p, kernels);
  if (call.layout.small_groups() || runs_in_planes(p)) {
    grouped_conv2d(p, threads, memory_of, sums);
  } else if (multiplies_planes(p)) {
    plane_pointwise(p, kernels, threads, memory_of, sums);
  } else {
    const std::vector<WorkItem> items = schedule(p, threads.count);
    int64_t need = 0;
    double cost = 0;
    for (const WorkItem& item : items) {
      need = std::max(need, call.kernels.matrix ? MatrixWorker::floats(call, item)
                                                : call.band_floats(item) + call.sum_floats(item));
      cost += item.cost;
    }
    const int workers = useful_workers(cost, items.size(), threads);
    float* memory = scratch.get(static_cast<size_t>(need * workers));
    hand_out(items.size(), workers, threads, [&](int worker) {
      return [&, own = memory + worker * need, last = LastPlan()](size_t i, size_t following) mutable {
        run_item(call, items[i], following < items.size() ? &items[following] : nullptr, own, last, sums);
      };
    });
  }
  if (p.pooled)
    for (int64_t n = 0; n < s.n; ++n)
      if (!p.elsewhere || !p.elsewhere[n]) finish_pooled(p, sums, n);
}

std::string describe_kernel(const ConvShape& s, DType dtype) {
  if (dtype == DType::kFloat64) return "plain float64 kernel";
  if (far_apart(s)) return "plain kernel, for taps far apart";
  const bool converted = dtype != DType::kFloat32 && !layout_in_use(s, dtype).pairs;
  const std::string name =
      std::string(isa_name(current_isa())) + " kernels, " + (converted ? "converted to float32, " : "");
  if (PackedLayout(s).small_groups()) return name + (s.group_in() * s.group_out() == 1 ? "depthwise" : "small groups");
  const bool pairs = layout_in_use(s, dtype).pairs;
  const Kernels& kernels = kernels_of(current_isa(), pairs);
  if (kernels.matrix) return name + "matrices of 32 pixels x 32 channels";
  const int64_t rows = std::min(s.out_h, band_rows(s, pairs ? (s.group_in() + 1) / 2 : s.group_in()));
  const TileWidth* wide = wide_tiles(kernels, s, s.group_out());
  const TilePlan plan(s, BandGeometry(s, 0, rows), kernels, wide, 0, rows, s.kh == 1 && s.kw == 1);
  const int64_t lanes = wide ? wide->lanes : kernels.width_for(s.group_out()).lanes;
  return name + "tile " + std::to_string(plan.row_tiles[0].count) + "x" + std::to_string(plan.col_tiles[0].count) +
         " pixels x " + std::to_string(lanes) + " channels" +
         (dtype == DType::kFloat32 && (few_channels(s) || plane_products(s)) ? "; contiguous: planes" : "");
}

}  // namespace rnp::cpu
