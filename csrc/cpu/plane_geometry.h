// Contiguous NCHW: a band of a channel's rows as padded planes, in which every tap of a convolution is one offset.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "core/prefix_conv2d.h"

namespace rnp::cpu {

// Along one axis of stride s, tap k of output o reads input s o + k d - pad: position o + k d / s of phase k d mod s,
// where phase f holds the inputs f - pad, f - pad + s, f - pad + 2 s…
struct PlaneAxis {
  std::vector<int64_t> phases;       // those that a tap reads
  std::vector<int64_t> phase, step;  // of each tap: index into phases, positions from the output's own
  int64_t reach = 0;                 // the largest step

  PlaneAxis(int64_t kernel, int64_t stride, int64_t dilation) {
    for (int64_t k = 0; k < kernel; ++k) {
      const int64_t f = k * dilation % stride;
      const auto at = std::find(phases.begin(), phases.end(), f);
      phase.push_back(at - phases.begin());
      if (at == phases.end()) phases.push_back(f);
      step.push_back(k * dilation / stride);
      reach = std::max(reach, step.back());
    }
  }
};

// Planes of one input channel: [row phase][column phase][rows + reach][pitch]. Rows follow each other without a gap, so
// that a band's output is one run of positions, of which `pitch - out_w` in each row are of no use.
struct PlaneGeometry {
  PlaneAxis vertical, horizontal;
  int64_t rows, pitch;

  PlaneGeometry(const ConvShape& s, int64_t band_rows)
      : vertical(s.kh, s.stride_h, s.dilation_h),
        horizontal(s.kw, s.stride_w, s.dilation_w),
        rows(band_rows),
        pitch(s.out_w + horizontal.reach) {}

  int64_t plane_floats() const { return (rows + vertical.reach) * pitch; }
  int64_t channel_floats() const {
    return static_cast<int64_t>(vertical.phases.size() * horizontal.phases.size()) * plane_floats();
  }
  int64_t plane_at(int64_t v, int64_t h) const {
    return (v * static_cast<int64_t>(horizontal.phases.size()) + h) * plane_floats();
  }
  int64_t tap_offset(int64_t i, int64_t j) const {
    const size_t v = static_cast<size_t>(i), h = static_cast<size_t>(j);
    return plane_at(vertical.phase[v], horizontal.phase[h]) + vertical.step[v] * pitch + horizontal.step[h];
  }
  int64_t length(int64_t row_count, int64_t out_w) const { return (row_count - 1) * pitch + out_w; }
};

}  // namespace rnp::cpu
