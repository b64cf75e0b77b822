#include "core/schedule.h"

#include <algorithm>
#include <cmath>

namespace rnp {
namespace {

constexpr int64_t kInputBytes = 384 * 1024;     // of a 1 MB L2: the rest is for a weight panel, sums and output
constexpr int64_t kPointwiseBytes = 64 * 1024;  // 1x1: the next item's input is fetched into L2 while one computes
constexpr int64_t kMaxPixels = 1024;            // sums of 32 channels: 128 KB
constexpr int kItemsPerThread = 4;              // enough for "longest first" to balance mixed prefixes
constexpr double kCostOfItem = 12500;           // an item has some hundred cycles of its own

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

double cost_of(const ConvShape& s, double pixels, int64_t in_live, int64_t out_live) {
  return pixels * static_cast<double>(s.kh * s.kw * in_live) * static_cast<double>(out_live) / 16 +
         pixels * static_cast<double>(in_live);
}

// Items to cut a call of this cost into: more would cost more than they balance.
double items_wanted(double cost, int threads) {
  if (threads <= 1) return 1;
  return std::clamp<double>(cost / kCostOfItem, threads, static_cast<double>(threads) * kItemsPerThread);
}

// Its share of the items that a part of the call of this cost should give. One a little above the average gives one.
int64_t items_of(double cost, double whole, double items) {
  return whole > 0 ? std::max<int64_t>(1, static_cast<int64_t>(std::ceil(items * cost / whole - 0.3))) : 1;
}

}  // namespace

int64_t band_rows(const ConvShape& s, int64_t in_live) {
  const int64_t cols = s.kw == 1 ? s.out_w : (s.out_w - 1) * s.stride_w + (s.kw - 1) * s.dilation_w + 1;
  const int64_t row_bytes = std::max<int64_t>(1, cols * in_live * static_cast<int64_t>(sizeof(float)));
  const int64_t step = s.kh == 1 ? 1 : s.stride_h;
  const int64_t span = (s.kh - 1) * s.dilation_h + 1;
  const int64_t bytes = s.kh * s.kw == 1 && in_live * s.group_out() <= 128 * 1024 ? kPointwiseBytes : kInputBytes;
  int64_t rows = std::max<int64_t>(1, (bytes / row_bytes - span) / step + 1);
  rows = std::min({rows, std::max<int64_t>(1, kMaxPixels / s.out_w), s.out_h});
  return ceil_div(s.out_h, ceil_div(s.out_h, rows));  // equal bands
}

std::vector<WorkItem> schedule(const PrefixConv2dParams& p, int threads) {
  const ConvShape& s = p.shape;
  std::vector<double> costs(static_cast<size_t>(s.n * s.groups), 0.0);
  double whole = 0;
  for (int64_t i = 0; i < s.n * s.groups; ++i) {
    const int64_t n = i / s.groups, g = i % s.groups;
    if (p.elsewhere && p.elsewhere[n]) continue;
    double& cost = costs[static_cast<size_t>(i)];
    cost = cost_of(s, static_cast<double>(s.out_h * s.out_w), live_in_group(p.in_live(n), g, s.group_in()),
                   live_in_group(p.out_live(n), g, s.group_out()));
    whole += cost;
  }
  const double wanted = items_wanted(whole, threads);
  std::vector<WorkItem> items;
  for (int64_t n = 0; n < s.n; ++n) {
    if (p.elsewhere && p.elsewhere[n]) continue;
    for (int64_t g = 0; g < s.groups; ++g) {
      const int64_t in_live = p.words(live_in_group(p.in_live(n), g, s.group_in()));
      const int64_t out_live = live_in_group(p.out_live(n), g, s.group_out());
      const int64_t blocks = ceil_div(out_live, PackedLayout::kLanes);
      int64_t rows = band_rows(s, in_live);
      int64_t bands = ceil_div(s.out_h, rows), ranges = 1;
      const double cost = costs[static_cast<size_t>(n * s.groups + g)];
      int64_t needed = items_of(cost, whole, wanted);
      // Every range of channels reads, and may copy, all pixels: few of them where that is most of what is moved.
      if (s.kh * s.kw == 1 && (!weights_stay(in_live, out_live) || pixels_share_a_set(p)))
        needed = std::min(needed, items_of(cost, whole, 2.0 * threads));
      if (bands < needed) ranges = std::clamp<int64_t>(ceil_div(needed, bands), 1, std::max<int64_t>(1, blocks));
      if (bands * ranges < needed) {
        rows = std::max<int64_t>(1, s.out_h / ceil_div(needed, ranges));
        bands = ceil_div(s.out_h, rows);
      }
      for (int64_t b = 0; b < bands; ++b) {
        for (int64_t r = 0; r < ranges; ++r) {
          WorkItem item{n,
                        g,
                        b * rows,
                        std::min(s.out_h, (b + 1) * rows),
                        blocks * r / ranges,
                        blocks * (r + 1) / ranges,
                        r == ranges - 1,
                        0};
          const double pixels = static_cast<double>((item.row1 - item.row0) * s.out_w);
          const int64_t lanes =
              std::min(out_live, item.block1 * PackedLayout::kLanes) - item.block0 * PackedLayout::kLanes;
          item.cost = cost_of(s, pixels, in_live, lanes) +
                      (item.tail ? pixels * static_cast<double>(s.group_out() - out_live) / 8 : 0);
          items.push_back(item);
        }
      }
    }
  }
  std::stable_sort(items.begin(), items.end(), [](const WorkItem& a, const WorkItem& b) { return a.cost > b.cost; });
  return items;
}

}  // namespace rnp
