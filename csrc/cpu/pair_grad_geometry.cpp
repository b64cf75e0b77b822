#include "cpu/pair_grad_geometry.h"

#include <algorithm>

#include "cpu/pair_grad_kernel.h"

namespace rnp::cpu {
namespace {

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

int64_t whole_chunks(int64_t positions) { return ceil_div(positions, kPairChunk) * kPairChunk; }

}  // namespace

PairAxis::PairAxis(int64_t size, int64_t out, int64_t kernel, int64_t stride, int64_t pad, int64_t dilation)
    : max_shift(0), pitch(out) {
  for (int64_t k = 0; k < kernel; ++k) {
    const int64_t offset = k * dilation, first = offset % stride - pad, shift = offset / stride;
    size_t at = 0;
    while (at < phases.size() && phases[at].first != first) ++at;
    if (at == phases.size()) phases.push_back({first, 0});
    phases[at].shift = std::max(phases[at].shift, shift);
    taps.push_back({static_cast<int64_t>(at), shift});
    max_shift = std::max(max_shift, shift);
  }
  for (const Phase& p : phases) {
    const int64_t read = out + p.shift;  // positions of a row
    const int64_t zeros = p.first >= 0 ? 0 : ceil_div(-p.first, stride);
    const int64_t inside = size - p.first <= 0 ? 0 : ceil_div(size - p.first, stride);  // of them, or in front
    pitch = std::max({pitch, std::min(inside, read), read - zeros});
  }
}

PairGeometry::PairGeometry(const ConvShape& s, int64_t images, int64_t unit_rows)
    : rows(s.h, s.out_h, s.kh, s.stride_h, s.pad_top, s.dilation_h),
      cols(s.w, s.out_w, s.kw, s.stride_w, s.pad_left, s.dilation_w) {
  const int64_t held = unit_rows < s.out_h ? unit_rows + rows.max_shift : rows.pitch;
  image = (held * pitch() + 1) / 2 * 2;
  const int64_t positions = whole_chunks(extent(images, unit_rows, s.out_w));
  chunks = positions / kPairChunk;
  phase = whole_chunks(positions + rows.max_shift * pitch() + cols.max_shift);
  all_phases = phases() * phase;
  plane = positions;
  if (plane / kPairChunk % 2 == 0) plane += kPairChunk;
  copies = 1;
  for (const PairAxis::Tap& row : rows.taps)
    for (const PairAxis::Tap& col : cols.taps)
      if (begin(row, col) % 2 != 0) copies = 2;
}

}  // namespace rnp::cpu
