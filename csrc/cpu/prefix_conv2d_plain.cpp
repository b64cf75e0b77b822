// The plain kernel: one output row at a time, channels innermost, no packing kept between calls.
#include <algorithm>
#include <atomic>
#include <cstring>
#include <vector>

#include "core/half.h"
#include "cpu/prefix_conv2d.h"

namespace rnp::cpu {
namespace {

// Weights of one group as [kh][kw][ic][oc]: the inner loop runs over output channels.
template <typename T, typename Acc>
void transpose_weight(const PrefixConv2dParams& p, std::vector<Acc>& out) {
  const ConvShape& s = p.shape;
  const T* w = static_cast<const T*>(p.weight);
  const int64_t icg = s.group_in(), ocg = s.group_out();
  out.resize(static_cast<size_t>(s.c_out * icg * s.kh * s.kw));
  Acc* dst = out.data();
  for (int64_t g = 0; g < s.groups; ++g)
    for (int64_t i = 0; i < s.kh; ++i)
      for (int64_t j = 0; j < s.kw; ++j)
        for (int64_t ic = 0; ic < icg; ++ic)
          for (int64_t oc = 0; oc < ocg; ++oc)
            *dst++ = to_float(w[(g * ocg + oc) * p.weight_stride.n + ic * p.weight_stride.c + i * p.weight_stride.h +
                                j * p.weight_stride.w]);
}

// acc[ow][oc] of output row `oh`, group `g`.
template <typename T, typename Acc>
void accumulate_row(const PrefixConv2dParams& p, const Acc* weight, int64_t n, int64_t oh, int64_t g, int64_t in_live,
                    int64_t out_live, Acc* acc) {
  const ConvShape& s = p.shape;
  const int64_t icg = s.group_in(), ocg = s.group_out();
  const T* input = static_cast<const T*>(p.input) + n * p.input_stride.n + g * icg * p.input_stride.c;
  for (int64_t i = 0; i < s.kh; ++i) {
    const int64_t y = oh * s.stride_h - s.pad_top + i * s.dilation_h;
    if (y < 0 || y >= s.h) continue;
    for (int64_t j = 0; j < s.kw; ++j) {
      const Acc* tap = weight + ((g * s.kh + i) * s.kw + j) * icg * ocg;
      for (int64_t ow = 0; ow < s.out_w; ++ow) {
        const int64_t x = ow * s.stride_w - s.pad_left + j * s.dilation_w;
        if (x < 0 || x >= s.w) continue;
        const T* pixel = input + y * p.input_stride.h + x * p.input_stride.w;
        Acc* row = acc + ow * ocg;
        for (int64_t ic = 0; ic < in_live; ++ic) {
          const Acc value = to_float(pixel[ic * p.input_stride.c]);
          const Acc* line = tap + ic * ocg;
          for (int64_t oc = 0; oc < out_live; ++oc) row[oc] += value * line[oc];
        }
      }
    }
  }
}

template <typename T, typename Acc>
void finish_row(const PrefixConv2dParams& p, int64_t n, int64_t oh, int64_t g, int64_t out_live, const Acc* acc,
                Acc* row_sum) {
  const ConvShape& s = p.shape;
  const int64_t ocg = s.group_out(), first = g * ocg;
  const int64_t line = p.row ? p.row[n] : 0;
  const Acc* scale = p.scale ? static_cast<const Acc*>(p.scale) + line * p.scale_row_stride + first : nullptr;
  const Acc* bias = p.bias ? static_cast<const Acc*>(p.bias) + line * p.bias_row_stride + first : nullptr;
  const int64_t r_at = n * p.residual_stride.n + first * p.residual_stride.c + oh * p.residual_stride.h;
  const T* residual = p.residual ? static_cast<const T*>(p.residual) + r_at : nullptr;
  T* output = static_cast<T*>(p.output) + n * p.output_stride.n + first * p.output_stride.c + oh * p.output_stride.h;
  const int64_t written = p.tail == Tail::kSkip ? out_live : ocg;
  for (int64_t ow = 0; ow < s.out_w; ++ow) {
    for (int64_t oc = 0; oc < written; ++oc) {
      Acc v = 0;
      if (oc < out_live) {
        v = acc[ow * ocg + oc];
        if (scale) v *= scale[oc];
        if (bias) v += bias[oc];
      }
      if (residual) v += to_float(residual[ow * p.residual_stride.w + oc * p.residual_stride.c]);
      if (p.activation == Activation::kRelu && v < 0) v = 0;  // a NaN stays
      const T stored = from_float<T, Acc>(v);
      output[ow * p.output_stride.w + oc * p.output_stride.c] = stored;
      if (row_sum) row_sum[first + oc] += to_float(stored);
    }
  }
}

template <typename T, typename Acc>
void run(const PrefixConv2dParams& p, const Threads& threads) {
  const ConvShape& s = p.shape;
  const int64_t rows = s.n * s.out_h, ocg = s.group_out();
  if (rows == 0 || s.out_w == 0 || s.c_out == 0) return;
  std::vector<Acc> weight;
  transpose_weight<T, Acc>(p, weight);
  const int workers = static_cast<int>(std::min<int64_t>(threads.count, rows));
  std::vector<Acc> scratch(static_cast<size_t>(workers * s.out_w * ocg));
  // One line of sums per output row, added up in row order below: the same bits whoever computed the row.
  std::vector<Acc> row_sums(p.pooled ? static_cast<size_t>(rows * s.c_out) : 0);
  std::atomic<int64_t> next{0};
  threads(workers, [&](int worker) {
    Acc* acc = scratch.data() + worker * s.out_w * ocg;
    for (int64_t at = next++; at < rows; at = next++) {
      const int64_t n = at / s.out_h, oh = at % s.out_h;
      for (int64_t g = 0; g < s.groups; ++g) {
        const int64_t in_live = live_in_group(p.in_live(n), g, s.group_in());
        const int64_t out_live = live_in_group(p.out_live(n), g, ocg);
        std::fill(acc, acc + s.out_w * ocg, Acc(0));
        accumulate_row<T, Acc>(p, weight.data(), n, oh, g, in_live, out_live, acc);
        finish_row<T, Acc>(p, n, oh, g, out_live, acc, p.pooled ? row_sums.data() + at * s.c_out : nullptr);
      }
    }
  });
  if (!p.pooled) return;
  const Acc count = static_cast<Acc>(s.out_h * s.out_w);
  for (int64_t n = 0; n < s.n; ++n) {
    for (int64_t c = 0; c < s.c_out; ++c) {
      Acc sum = 0;
      for (int64_t oh = 0; oh < s.out_h; ++oh) sum += row_sums[static_cast<size_t>((n * s.out_h + oh) * s.c_out + c)];
      p.pooled[n * s.c_out + c] = static_cast<float>(sum / count);
    }
  }
}

}  // namespace

void prefix_conv2d_plain(const PrefixConv2dParams& p, const Threads& threads) {
  switch (p.dtype) {
    case DType::kFloat32:
      return run<float, float>(p, threads);
    case DType::kFloat64:
      return run<double, double>(p, threads);
    case DType::kBFloat16:
      return run<BFloat16, float>(p, threads);
    case DType::kFloat16:
      return run<Float16, float>(p, threads);
  }
}

}  // namespace rnp::cpu
