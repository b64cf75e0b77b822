// Covering a band's output pixels with matrices of 16 pixels (matrix_kernels.h).
#pragma once

#include <vector>

#include "cpu/band.h"
#include "cpu/matrix_kernels.h"

namespace rnp::cpu {

// How the words that the products read lie: records of one size, and where the records of an output pixel are.
struct MatrixGrid {
  int64_t rows, cols;          // output pixels
  int64_t cols_in;             // records of a row
  int64_t row_step, col_step;  // records between neighbouring output pixels

  bool operator==(const MatrixGrid&) const = default;
};

struct MatrixPlan {
  MatrixGrid grid;
  bool tail_apart;
  std::vector<MatrixTile> tiles;
  std::vector<MatrixPixels> pixels;
  int64_t row_sums;  // floats between the sums of rows, where [tile][pixel][32] holds them
  int64_t paired;    // tiles before the one that is computed by itself

  // `tail_apart`: the last tile, where it is not whole, is computed by itself.
  MatrixPlan(const MatrixGrid& grid, bool tail_apart);
  bool same(const MatrixGrid& g, bool apart) const { return grid == g && tail_apart == apart; }

 private:
  void add_tile(int64_t record, int64_t row, int64_t col, int64_t count, int64_t cols);
};

}  // namespace rnp::cpu
