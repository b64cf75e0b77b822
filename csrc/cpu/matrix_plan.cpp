#include "cpu/matrix_plan.h"

#include <algorithm>

namespace rnp::cpu {

MatrixPlan::MatrixPlan(const MatrixGrid& g, bool apart) : grid(g), tail_apart(apart) {
  const int64_t pieces = (g.cols + kMatrix - 1) / kMatrix;
  // One step leads from record to record also across rows: the records between two rows are computed and dropped.
  const int64_t length = (g.rows - 1) * g.cols_in + g.cols, across = (length + kMatrix - 1) / kMatrix;
  if (g.row_step == 1 && g.col_step == 1 && across < g.rows * pieces) {
    row_sums = g.cols_in * 2 * kMatrix;
    for (int64_t q = 0; q < length; q += kMatrix)
      add_tile(q, q / g.cols_in, q % g.cols_in, std::min(kMatrix, length - q), g.cols_in);
  } else {
    row_sums = pieces * kMatrixSums;
    for (int64_t r = 0; r < g.rows; ++r)
      for (int64_t c = 0; c < g.cols; c += kMatrix)
        add_tile(r * g.row_step * g.cols_in + c * g.col_step, r, c, std::min(kMatrix, g.cols - c), g.cols);
  }
  paired = static_cast<int64_t>(tiles.size());
  if (apart && length % kMatrix != 0) --paired;
}

void MatrixPlan::add_tile(int64_t record, int64_t row, int64_t col, int64_t count, int64_t cols) {
  const int64_t i = static_cast<int64_t>(tiles.size());
  MatrixTile tile = {record, static_cast<int64_t>(pixels.size()), 0, row, row + 1, 0, 0};
  const bool second = i % 2 != 0 && !(tail_apart && count < kMatrix);  // of its pair
  for (int64_t p = 0; p < count;) {
    if (col == cols) {
      col = 0;
      ++row;
    }
    const int64_t left = std::min(count - p, (col < grid.cols ? grid.cols : cols) - col);
    if (col < grid.cols) {
      tile.row1 = row + 1;
      for (int64_t done = 0, size = 0; done < left; done += size) {
        size = left - done >= 4 ? 4 : left - done >= 2 ? 2 : 1;
        pixels.push_back({static_cast<int32_t>((second ? kMatrixSums : 0) + (p + done) * 2 * kMatrix),
                          static_cast<int32_t>(size), static_cast<int32_t>(row), static_cast<int32_t>(col + done)});
      }
    }
    p += left;
    col += left;
  }
  tile.end = static_cast<int64_t>(pixels.size());
  tiles.push_back(tile);
}

}  // namespace rnp::cpu
