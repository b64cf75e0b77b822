#include "cpu/tiles.h"

#include <algorithm>

namespace rnp::cpu {
namespace {

// Below this many channels a tap is shorter than the work of starting it: whole kernel rows, padding included, are one
// run.
constexpr int64_t kMergeBelow = 16;

// Flags of one axis for a tile of `count` outputs starting at output position `first`.
std::vector<int32_t> skips(int64_t first, int64_t count, int64_t kernel, int64_t stride, int64_t pad, int64_t dilation,
                           int64_t size, int32_t first_flag, int32_t last_flag) {
  std::vector<int32_t> out(static_cast<size_t>(kernel), kSkipNone);
  for (int64_t k = 0; k < kernel; ++k) {
    int64_t lo = 0, hi = count;
    while (lo < count && (first + lo) * stride - pad + k * dilation < 0) ++lo;
    while (hi > lo && (first + hi - 1) * stride - pad + k * dilation >= size) --hi;
    int32_t& flag = out[static_cast<size_t>(k)];
    if (lo >= hi) {
      flag = AxisTile::kSkipAll;
    } else if (lo == 1 && hi == count) {
      flag = first_flag;
    } else if (lo == 0 && hi == count - 1) {
      flag = last_flag;
    }
  }
  return out;
}

// Numbers the kinds of an axis; returns how many there are.
int64_t number_kinds(std::vector<AxisTile>& tiles) {
  int64_t kinds = 0;
  for (size_t i = 0; i < tiles.size(); ++i) {
    tiles[i].kind = -1;
    for (size_t j = 0; j < i && tiles[i].kind < 0; ++j)
      if (tiles[j].skip == tiles[i].skip) tiles[i].kind = tiles[j].kind;
    if (tiles[i].kind < 0) tiles[i].kind = kinds++;
  }
  return kinds;
}

// The tallest tile that is instantiated for this width, at most `rows` high.
int64_t tile_rows(const Kernels& kernels, int64_t cols, int64_t rows) {
  int64_t best = 1;
  for (int64_t r = 2; r <= std::min<int64_t>(rows, kMaxRows); ++r)
    if (cols <= kMaxCols && kernels.widest().tile[r - 1][cols - 1]) best = r;
  return best;
}

}  // namespace

TilePlan::TilePlan(const ConvShape& s, const BandGeometry& geometry, const Kernels& kernels, int64_t row0, int64_t row1,
                   bool flat)
    : kh(s.kh), kw(s.kw), dilation_h(s.dilation_h), dilation_w(s.dilation_w), cols(s.out_w), cols_in(geometry.cols_in) {
  if (flat) {
    cols = cols_in = (row1 - row0) * s.out_w;
    row_tiles.push_back({0, 1, 0, {kSkipNone}});
  }
  const int64_t pieces = (cols + kernels.max_cols - 1) / kernels.max_cols;
  for (int64_t i = 0; i < pieces; ++i) {
    const int64_t first = cols * i / pieces, count = cols * (i + 1) / pieces - first;
    std::vector<int32_t> skip =
        flat ? std::vector<int32_t>{kSkipNone}
             : skips(first, count, kw, s.stride_w, s.pad_left, s.dilation_w, s.w, kSkipFirstCol, kSkipLastCol);
    col_tiles.push_back({first, count, 0, std::move(skip)});
  }
  for (int64_t r = 0; !flat && r < row1 - row0;) {
    const int64_t count = pieces == 1 ? tile_rows(kernels, cols, row1 - row0 - r) : 1;
    row_tiles.push_back(
        {r, count, 0,
         skips(row0 + r, count, kh, s.stride_h, s.pad_top, s.dilation_h, s.h, kSkipFirstRow, kSkipLastRow)});
    r += count;
  }
  row_kinds_ = number_kinds(row_tiles);
  col_kinds_ = number_kinds(col_tiles);
  lists_.resize(static_cast<size_t>(row_kinds_ * col_kinds_));
}

void TilePlan::list_runs(int64_t pixel, int64_t count, int64_t packed, int64_t w_step) {
  const int64_t wanted[4] = {pixel, count, packed, w_step};
  if (std::equal(wanted, wanted + 4, listed_)) return;
  std::copy(wanted, wanted + 4, listed_);
  int64_t row_kind = 0;  // kinds are numbered in the order of their first tiles
  for (const RowTile& row : row_tiles) {
    if (row.kind != row_kind) continue;
    ++row_kind;
    int64_t col_kind = 0;
    for (const ColTile& col : col_tiles) {
      if (col.kind != col_kind) continue;
      ++col_kind;
      list_tile(row, col, pixel, count, packed, w_step, lists_[static_cast<size_t>(row.kind * col_kinds_ + col.kind)]);
    }
  }
}

void TilePlan::list_tile(const RowTile& row, const ColTile& col, int64_t pixel, int64_t count, int64_t packed,
                         int64_t w_step, std::vector<Run>& runs) const {
  runs.clear();
  if (count == 0) return;
  for (int64_t i = 0; i < kh; ++i) {
    const int32_t row_skip = row.skip[static_cast<size_t>(i)];
    if (row_skip == AxisTile::kSkipAll) continue;
    for (int64_t j = 0; j < kw; ++j) {
      int32_t col_skip = col.skip[static_cast<size_t>(j)];
      if (col_skip == AxisTile::kSkipAll && count >= kMergeBelow) continue;
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
