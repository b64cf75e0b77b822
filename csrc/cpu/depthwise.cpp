#include "cpu/depthwise.h"

#include <algorithm>
#include <atomic>
#include <vector>

#include "cpu/band.h"
#include "cpu/epilogue.h"

namespace rnp::cpu {
namespace {

constexpr int64_t kBandBytes = 128 * 1024;

int64_t rows_of_band(const ConvShape& s) {
  const int64_t row_bytes = s.w * s.c_in * static_cast<int64_t>(sizeof(float));
  const int64_t rows = (kBandBytes / std::max<int64_t>(1, row_bytes) - (s.kh - 1) * s.dilation_h) / s.stride_h;
  return std::clamp<int64_t>(rows, std::min<int64_t>(4, s.out_h), s.out_h);
}

int64_t padded(int64_t channels) { return (channels + kDepthwisePanel - 1) / kDepthwisePanel * kDepthwisePanel; }

}  // namespace

void depthwise(const PrefixConv2dParams& p, const Kernels& kernels, const Threads& threads,
               const std::function<float*(size_t)>& scratch, float* row_sums) {
  const ConvShape& s = p.shape;
  const PackedLayout layout(s);
  const int64_t rows = rows_of_band(s), bands = (s.out_h + rows - 1) / rows, items = s.n * bands;
  const bool direct = p.dtype == DType::kFloat32 && p.output_stride.c == 1 && (!p.residual || p.residual_stride.c == 1);
  const int64_t band_floats = BandGeometry(s, 0, rows).pixels() * padded(s.c_in), line_floats = s.out_w * s.c_out;
  const int64_t need = (band_floats + line_floats + 15) / 16 * 16;
  const int workers = static_cast<int>(std::min<int64_t>(threads.count, items));
  float* memory = scratch(static_cast<size_t>(need * workers));
  const size_t taps = static_cast<size_t>(s.kh * s.kw);
  std::vector<int64_t> offsets(taps * static_cast<size_t>(workers));
  std::atomic<int64_t> next{0};
  threads(workers, [&](int worker) {
    float* band = memory + worker * need;
    float* sums = band + band_floats;
    int64_t* offset = offsets.data() + taps * static_cast<size_t>(worker);
    for (int64_t i = next++; i < items; i = next++) {
      const int64_t n = i / bands, row0 = i % bands * rows, row1 = std::min(s.out_h, row0 + rows);
      // A channel whose input is pruned but whose output is not is a sum over nothing: its band is 0.
      const int64_t live = p.out_live(n), in_live = std::min(live, p.in_live(n));
      const BandGeometry g(s, row0, row1);
      if (live > 0) copy_band(p, g, n, 0, in_live, padded(live), kDepthwisePanel, kernels.copy_pixels, band);
      for (int64_t k = 0; k < s.kh; ++k)
        for (int64_t j = 0; j < s.kw; ++j)
          offset[k * s.kw + j] = (k * s.dilation_h * g.cols_in + j * s.dilation_w) * kDepthwisePanel;
      const int64_t line = p.row ? p.row[n] : 0;
      DepthwiseArgs a = {};
      a.w = p.packed + layout.data_at();
      a.taps = s.kh * s.kw;
      a.w_step = s.c_out;
      a.tap_offset = offset;
      a.cols = s.out_w;
      a.channels = live;
      a.x_col_step = g.col_step * kDepthwisePanel;
      a.x_panel_step = g.pixels() * kDepthwisePanel;
      a.out_col_step = direct ? p.output_stride.w : live;
      if (direct) {
        a.scale = p.scale ? static_cast<const float*>(p.scale) + line * p.scale_row_stride : nullptr;
        a.bias = p.bias ? static_cast<const float*>(p.bias) + line * p.bias_row_stride : nullptr;
        a.residual_col_step = p.residual_stride.w;
        a.relu = p.activation == Activation::kRelu;
      }
      for (int64_t r = row0; r < row1 && live > 0; ++r) {
        a.x = band + (r - row0) * g.row_step * g.cols_in * kDepthwisePanel;
        a.out = direct ? static_cast<float*>(p.output) + n * p.output_stride.n + r * p.output_stride.h : sums;
        if (direct && p.residual)
          a.residual = static_cast<const float*>(p.residual) + n * p.residual_stride.n + r * p.residual_stride.h;
        kernels.depthwise_row(a);
        if (!direct) finish_block(p, n, r, r + 1, 0, live, {sums, 0, live});
      }
      fill_tail(p, n, row0, row1, live, s.c_out);
      if (row_sums) sum_rows(p, n, row0, row1, 0, p.tail == Tail::kSkip ? live : s.c_out, row_sums);
    }
  });
}

}  // namespace rnp::cpu
