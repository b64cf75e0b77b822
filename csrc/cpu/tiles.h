// Covering a band's output pixels with register tiles, and listing the taps that each tile really needs.
#pragma once

#include <vector>

#include "cpu/band.h"
#include "cpu/microkernel.h"

namespace rnp::cpu {

// `count` output rows (or columns) from `first`, counted within the band. Tiles of one kind lack the same taps.
struct AxisTile {
  int64_t first, count, kind;
};
using RowTile = AxisTile;
using ColTile = AxisTile;

// By tap: kSkipNone, the flag of the first or last row (or column) of a tile if only that one finds the tap in the
// padding, or kSkipAll if all do.
using TapSkips = std::vector<int32_t>;
constexpr int32_t kSkipAll = -1;

struct TilePlan {
  int64_t kh, kw, dilation_h, dilation_w;
  int64_t cols;     // output columns of a row; flat: all pixels of the band
  int64_t cols_in;  // band pixels of a row
  std::vector<RowTile> row_tiles;
  std::vector<ColTile> col_tiles;

  // `wide`: of the kernels' wide tiles.
  TilePlan(const ConvShape& shape, const BandGeometry& geometry, const Kernels& kernels, bool wide, int64_t row0,
           int64_t row1, bool flat);
  int64_t tiles() const { return static_cast<int64_t>(row_tiles.size() * col_tiles.size()); }

  // Lists the taps of every kind of tile, for a block of input channels. Taps whose input lies in the padding for the
  // whole tile are left out; those for which one edge row or column does are marked; others read the band's zeros.
  // Neighbouring runs that continue each other merge. `pixel`: floats between band pixels; `count`: live channels of
  // the block, `packed`: channels it has in the packed weights.
  void list_runs(int64_t pixel, int64_t count, int64_t packed, int64_t w_step);
  const std::vector<Run>& runs(const RowTile& row, const ColTile& col) const {
    return lists_[static_cast<size_t>(row.kind) * col_kinds_.size() + static_cast<size_t>(col.kind)];
  }

 private:
  void list_tile(const TapSkips& row, const TapSkips& col, int64_t pixel, int64_t count, int64_t packed, int64_t w_step,
                 std::vector<Run>& runs) const;

  std::vector<TapSkips> row_kinds_, col_kinds_;
  int64_t listed_[4] = {-1, -1, -1, -1};  // arguments of the last list_runs
  std::vector<std::vector<Run>> lists_;   // [row kind][column kind]
};

}  // namespace rnp::cpu
