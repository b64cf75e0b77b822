#include "cpu/weight_grad_plan.h"

#include <algorithm>
#include <numeric>

namespace rnp::cpu {
namespace {

constexpr int64_t kItemFloats = 128 * 1024;   // sums of an item: half of a 1 MB L2
constexpr int64_t kPackedFloats = 48 * 1024;  // of the input, and of grad_output, in one unit
constexpr int64_t kChunk = 64;  // positions of one chain of additions: few enough for the accuracy of torch's sums
constexpr int64_t kItems = 16;  // items to aim at before the reduction is split
// Positions of a slot at least, or clearing and adding its sums would cost too much.
constexpr int64_t kSlotPositions = 1024, kPairSlotPositions = 4096;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t round_up(int64_t v, int64_t to) { return ceil_div(v, to) * to; }

// Halves the longer side of a rectangle of the weight; false where it is the least already.
bool halve(int64_t& out, int64_t& in) {
  if (out <= kGradLanes && in <= kGradPanel) return false;
  if (in <= kGradPanel || (out > in && out > kGradLanes)) {
    out = round_up(out / 2, kGradLanes);
  } else {
    in = round_up(in / 2, kGradPanel);
  }
  return true;
}

// Rows of the output and, where that is all rows, images: as many as fit.
struct UnitSize {
  int64_t rows, images;
};

UnitSize float_unit(const ConvShape& s, int64_t in, int64_t out) {
  const int64_t row_in = s.w * in, row_out = s.out_w * out;
  const int64_t span = (s.kh - 1) * s.dilation_h + 1, step = s.kh == 1 ? 1 : s.stride_h;
  const int64_t rows = std::min({(kPackedFloats / row_in - span) / step + 1, kPackedFloats / row_out, s.out_h});
  return {std::max<int64_t>(1, rows), std::min({kPackedFloats / (row_in * s.h), kPackedFloats / (row_out * s.out_h),
                                                8 * kChunk / (s.out_h * s.out_w)})};
}

UnitSize pair_unit(const ConvShape& s, int64_t in, int64_t out) {
  constexpr int64_t kPackedValues = 128 * 1024;
  const PairGeometry whole(s, 1, s.out_h);
  const int64_t widest = std::max(in * whole.phases() * whole.copies, out);
  const int64_t rows = std::min(kPackedValues / (whole.pitch() * widest) - whole.rows.max_shift, s.out_h);
  return {std::max<int64_t>(1, rows), kPackedValues / (whole.image * widest)};
}

}  // namespace

PackedAxis::PackedAxis(int64_t size, int64_t out, int64_t kernel, int64_t stride, int64_t pad, int64_t dilation)
    : step(kernel == 1 ? stride : 1), out_step(kernel == 1 ? 1 : stride) {
  for (int64_t k = 0; k < kernel; ++k) {
    const int64_t offset = k * dilation - pad;  // of the input position from stride * output position
    const int64_t first = offset >= 0 ? 0 : ceil_div(-offset, stride);
    const int64_t end = size - offset <= 0 ? 0 : std::min(out, ceil_div(size - offset, stride));
    taps.push_back({std::min(first, out), std::max(end, std::min(first, out))});
  }
}

WeightGradPlan::WeightGradPlan(const PrefixConv2dGradParams& p, int threads, bool in_pairs)
    : rows(p.shape.h, p.shape.out_h, p.shape.kh, p.shape.stride_h, p.shape.pad_top, p.shape.dilation_h),
      cols(p.shape.w, p.shape.out_w, p.shape.kw, p.shape.stride_w, p.shape.pad_left, p.shape.dilation_w) {
  const ConvShape& s = p.shape;
  const int64_t area = s.kh * s.kw;
  int64_t out = round_up(s.group_out(), kGradLanes), in = round_up(s.group_in(), kGradPanel);
  while ((out > 256 || in > 256 || out * in * area > kItemFloats) && halve(out, in)) {
  }

  order.resize(static_cast<size_t>(s.n));
  std::iota(order.begin(), order.end(), int64_t{0});
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) {
    return p.out_live(a) != p.out_live(b) ? p.out_live(a) > p.out_live(b) : p.in_live(a) > p.in_live(b);
  });

  // Bands of rows, or several small images, that fit into L2 packed.
  const int64_t positions = s.out_h * s.out_w;
  const UnitSize largest = in_pairs ? pair_unit(s, in, out) : float_unit(s, in, out);
  const int64_t bands = ceil_div(s.out_h, largest.rows), band = ceil_div(s.out_h, bands);
  const int64_t images = bands > 1 ? 1 : std::clamp<int64_t>(largest.images, 1, std::max<int64_t>(1, s.n));
  for (int64_t n = 0; n < s.n; n += images)
    for (int64_t b = 0; b < bands; ++b)
      units.push_back({n, std::min(images, s.n - n), b * band, std::min(s.out_h, (b + 1) * band)});
  chunk_images = std::max<int64_t>(1, kChunk / positions);
  chunk_rows = ceil_div(band, ceil_div(band, std::max<int64_t>(1, kChunk / s.out_w)));

  const auto rectangles = [&] { return s.groups * ceil_div(s.group_out(), out) * ceil_div(s.group_in(), in); };
  const int64_t unit_count = static_cast<int64_t>(units.size());
  const int64_t slot_total =
      std::clamp<int64_t>(std::min({ceil_div(kItems, rectangles()),
                                    s.n * positions / (in_pairs ? kPairSlotPositions : kSlotPositions), unit_count}),
                          1, kItems);
  for (int64_t i = 0; i <= slot_total; ++i) slots.push_back(unit_count * i / slot_total);
  // From here on nothing changes a bit: smaller items only share the work out.
  while (rectangles() * slot_total < 2 * threads && threads > 1 && halve(out, in)) {
  }

  const double cycle = in_pairs ? 8 : 1;  // products in place of one vector's
  item_floats = slot_floats = 0;
  for (int64_t g = 0; g < s.groups; ++g) {
    for (int64_t o = 0; o < s.group_out(); o += out) {
      for (int64_t i = 0; i < s.group_in(); i += in) {
        GradItem item{g, o, std::min(out, s.group_out() - o), i, std::min(in, s.group_in() - i), 0, slot_floats, 0};
        const int64_t floats = in_pairs ? pair_blocks(item) * pair_block_floats(item, area)
                                        : grad_blocks(item) * grad_block_floats(item, area);
        slot_floats += floats;
        item_floats = std::max(item_floats, floats);
        for (item.slot = 0; item.slot < slot_total; ++item.slot) {
          item.cost = static_cast<double>(floats) / 8;
          for (int64_t u = slots[item.slot]; u < slots[item.slot + 1]; ++u) {
            const GradUnit& unit = units[u];
            for (int64_t k = unit.image0; k < unit.image0 + unit.images; ++k) {
              const int64_t live_out = live_in_group(p.out_live(order[k]), g, s.group_out()) - o;
              const int64_t live_in = live_in_group(p.in_live(order[k]), g, s.group_in()) - i;
              if (live_out <= 0 || live_in <= 0) continue;
              const double lanes = static_cast<double>(round_up(std::min(live_out, item.out_count), 16)) / 16;
              item.cost += static_cast<double>((unit.row1 - unit.row0) * s.out_w) * lanes *
                           static_cast<double>(std::min(live_in, item.in_count) * area) / cycle;
            }
          }
          items.push_back(item);
        }
      }
    }
  }
  std::stable_sort(items.begin(), items.end(), [](const GradItem& a, const GradItem& b) { return a.cost > b.cost; });

  if (in_pairs) {
    pairs.emplace(s, images, band);
    input_floats = round_up(in, kPairLanes) * pairs->copies * pairs->all_phases / 2;
    grad_floats = round_up(out, kPairPanel) * pairs->plane / 2;
    staged_floats = p.input_stride.c == 1 ? 0 : kPairLanes * (pairs->phase + kPairChunk) / 2;
  } else {
    const int64_t span = (s.kh - 1) * s.dilation_h + 1;
    const int64_t rows_in = std::min(s.h, s.kh == 1 ? band : (band - 1) * s.stride_h + span);
    input_floats = images * rows_in * s.w * round_up(in, kGradPanel);
    grad_floats = images * band * s.out_w * round_up(out, kGradLanes);
  }
}

}  // namespace rnp::cpu
