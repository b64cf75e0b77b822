#include "cpu/tiles.h"

#include <algorithm>

namespace rnp::cpu {
namespace {

// Below this many channels a tap is shorter than the work of starting it: whole kernel rows, padding included, are one
// run.
constexpr int64_t kMergeBelow = 16;

// Flags of one axis for a tile of `count` outputs starting at output position `first`, written to `out`.
void find_skips(int64_t first, int64_t count, int64_t stride, int64_t pad, int64_t dilation, int64_t size,
                int32_t first_flag, int32_t last_flag, TapSkips& out) {
  for (size_t k = 0; k < out.size(); ++k) {
    const int64_t tap = static_cast<int64_t>(k) * dilation - pad;
    int64_t lo = 0, hi = count;
    while (lo < count && (first + lo) * stride + tap < 0) ++lo;
    while (hi > lo && (first + hi - 1) * stride + tap >= size) --hi;
    out[k] = kSkipNone;
    if (lo >= hi) {
      out[k] = kSkipAll;
    } else if (lo == 1 && hi == count) {
      out[k] = first_flag;
    } else if (lo == 0 && hi == count - 1) {
      out[k] = last_flag;
    }
  }
}

// The number of these flags' kind; a new one is added. There are few kinds and many tiles.
int64_t kind_of(const TapSkips& skips, std::vector<TapSkips>& kinds) {
  const auto found = std::find(kinds.begin(), kinds.end(), skips);
  const int64_t kind = found - kinds.begin();
  if (found == kinds.end()) kinds.push_back(skips);
  return kind;
}

// The tallest tile that is instantiated for this width, at most `rows` high.
int64_t tile_rows(const TileWidth& width, int64_t cols, int64_t rows) {
  int64_t best = 1;
  for (int64_t r = 2; r <= std::min<int64_t>(rows, kMaxRows); ++r)
    if (cols <= kMaxCols && width.tile[r - 1][cols - 1]) best = r;
  return best;
}

}  // namespace

TilePlan::TilePlan(const ConvShape& s, const BandGeometry& geometry, const Kernels& kernels, bool wide, int64_t row0,
                   int64_t row1, bool flat)
    : kh(s.kh), kw(s.kw), dilation_h(s.dilation_h), dilation_w(s.dilation_w), cols(s.out_w), cols_in(geometry.cols_in) {
  TapSkips skips(static_cast<size_t>(flat ? 1 : kw), kSkipNone);
  if (flat) {
    cols = cols_in = (row1 - row0) * s.out_w;
    row_tiles.push_back({0, 1, kind_of(skips, row_kinds_)});
  }
  const int64_t most = wide ? kernels.wide_cols : kernels.max_cols, pieces = (cols + most - 1) / most;
  col_tiles.reserve(static_cast<size_t>(pieces));
  for (int64_t i = 0; i < pieces; ++i) {
    const int64_t first = cols * i / pieces, count = cols * (i + 1) / pieces - first;
    if (!flat) find_skips(first, count, s.stride_w, s.pad_left, s.dilation_w, s.w, kSkipFirstCol, kSkipLastCol, skips);
    col_tiles.push_back({first, count, kind_of(skips, col_kinds_)});
  }
  skips.assign(static_cast<size_t>(kh), kSkipNone);
  for (int64_t r = 0; !flat && r < row1 - row0;) {
    const int64_t count = pieces == 1 && !wide ? tile_rows(kernels.widest(), cols, row1 - row0 - r) : 1;
    find_skips(row0 + r, count, s.stride_h, s.pad_top, s.dilation_h, s.h, kSkipFirstRow, kSkipLastRow, skips);
    row_tiles.push_back({r, count, kind_of(skips, row_kinds_)});
    r += count;
  }
  lists_.resize(row_kinds_.size() * col_kinds_.size());
}

void TilePlan::list_runs(int64_t pixel, int64_t count, int64_t packed, int64_t w_step) {
  const int64_t wanted[4] = {pixel, count, packed, w_step};
  if (std::equal(wanted, wanted + 4, listed_)) return;
  std::copy(wanted, wanted + 4, listed_);
  auto list = lists_.begin();
  for (const TapSkips& row : row_kinds_)
    for (const TapSkips& col : col_kinds_) list_tile(row, col, pixel, count, packed, w_step, *list++);
}

void TilePlan::list_tile(const TapSkips& row, const TapSkips& col, int64_t pixel, int64_t count, int64_t packed,
                         int64_t w_step, std::vector<Run>& runs) const {
  runs.clear();
  if (count == 0) return;
  for (int64_t i = 0; i < kh; ++i) {
    const int32_t row_skip = row[static_cast<size_t>(i)];
    if (row_skip == kSkipAll) continue;
    for (int64_t j = 0; j < kw; ++j) {
      int32_t col_skip = col[static_cast<size_t>(j)];
      if (col_skip == kSkipAll && count >= kMergeBelow) continue;
      if (count < kMergeBelow) col_skip = kSkipNone;
      const Run run{(i * dilation_h * cols_in + j * dilation_w) * pixel, (i * kw + j) * packed * w_step, count,
                    static_cast<int32_t>(i), row_skip + col_skip};
      if (!runs.empty()) {
        Run& last = runs.back();
        if (last.kernel_row == run.kernel_row && last.skip == run.skip && last.x + last.count == run.x &&
            last.w + last.count * w_step == run.w) {
          last.count += count;
          continue;
        }
      }
      runs.push_back(run);
    }
  }
}

}  // namespace rnp::cpu
