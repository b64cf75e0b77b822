// Fetching the next work item's input into L2 a few lines at a time, while the tiles of the current item compute.
#pragma once

#include <algorithm>

#include "core/processor.h"
#include "cpu/band.h"

namespace rnp::cpu {

class Prefetcher {
 public:
  Prefetcher() = default;

  // Walks `rows` rows of `cols` pixels of `pixel_bytes`, spread over `calls` calls of step().
  Prefetcher(const char* from, int64_t rows, int64_t row_bytes, int64_t cols, int64_t col_bytes, int64_t pixel_bytes,
             int64_t calls)
      : row_(from), rows_(rows), cols_(cols), row_bytes_(row_bytes), col_bytes_(col_bytes), pixel_bytes_(pixel_bytes) {
    if (rows <= 0 || cols <= 0 || pixel_bytes <= 0 || calls <= 0) return;
    if (pixel_bytes_ == col_bytes_) {  // pixels touch: one run per row
      pixel_bytes_ *= cols_;
      cols_ = 1;
    }
    per_call_ = (rows_ * cols_ * ((pixel_bytes_ + kLine - 1) / kLine) + calls - 1) / calls;
  }

  // Walks the live channels of the pixels of `item`'s band, spread over `calls` calls of step(). Where the processor
  // does so by itself (core/processor.h), nothing.
  Prefetcher(const PrefixConv2dParams& p, const WorkItem& item, int64_t first_channel, int64_t in_live, int64_t element,
             int64_t calls) {
    const ConvShape& s = p.shape;
    const BandGeometry g(s, item.row0, item.row1);
    const int64_t y0 = std::max<int64_t>(0, g.y0), y1 = std::min(s.h, g.y0 + (g.rows_in - 1) * g.y_step + 1);
    const Strides4 st = p.input_at(item.n);
    if (st.c != 1 || y1 <= y0 || processor().follows_rows) return;
    const char* from = static_cast<const char*>(p.input) + (item.n * st.n + first_channel + y0 * st.h) * element;
    *this = Prefetcher(from, (y1 - y0 + g.y_step - 1) / g.y_step, g.y_step * st.h * element,
                       (s.w + g.x_step - 1) / g.x_step, g.x_step * st.w * element, in_live * element, calls);
  }

  void step() {
    for (int64_t i = 0; i < per_call_; ++i) {
      __builtin_prefetch(row_ + col_ * col_bytes_ + byte_, 0, 2);
      byte_ += kLine;
      if (byte_ < pixel_bytes_) continue;
      byte_ = 0;
      if (++col_ < cols_) continue;
      col_ = 0;
      row_ += row_bytes_;
      if (--rows_ == 0) per_call_ = 0;
    }
  }

 private:
  static constexpr int64_t kLine = 64;
  const char* row_ = nullptr;
  int64_t rows_ = 0, cols_ = 0, row_bytes_ = 0, col_bytes_ = 0, pixel_bytes_ = 0;
  int64_t col_ = 0, byte_ = 0, per_call_ = 0;
};

}  // namespace rnp::cpu
