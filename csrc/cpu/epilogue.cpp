#include "cpu/epilogue.h"

#include <algorithm>
#include <cstring>
#include <type_traits>
#include <utility>
#if defined(__x86_64__)
#include <emmintrin.h>
#endif

#include "cpu/call.h"
#include "cpu/sum_pixels.h"
#include "cpu/with_type.h"

namespace rnp::cpu {
namespace {

template <typename T>
const T* residual_at(const PrefixConv2dParams& p, int64_t n, int64_t row, int64_t channel) {
  const Strides4 st = p.residual_at(n);
  return p.residual ? static_cast<const T*>(p.residual) + n * st.n + channel * st.c + row * st.h : nullptr;
}

template <typename T>
T* output_at(const PrefixConv2dParams& p, int64_t n, int64_t row, int64_t channel) {
  const Strides4 st = p.output_at(n);
  return static_cast<T*>(p.output) + n * st.n + channel * st.c + row * st.h;
}

// Calls f(std::bool_constant...) for run-time flags, so that inner loops carry no branches.
template <typename F>
void with_flag(bool flag, F&& f) {
  flag ? f(std::true_type{}) : f(std::false_type{});
}

// One row of a patch: where it lies, and the distances between its pixels.
template <typename T>
struct Row {
  int64_t cols;
  T* out;
  int64_t out_step, out_channel;
  const T* residual;  // null: none
  int64_t residual_step, residual_channel;
};

template <bool kRelu>
float finished(float v) {
  return kRelu && v < 0 ? 0.0f : v;  // a NaN stays
}

template <typename T>
void finish_row(const Row<T>& row, const float* scale, const float* bias, bool activated, const float* sums,
                int64_t col_step, int64_t count) {
  const int64_t oc = row.out_channel, ow = row.out_step, rc = row.residual_channel, rw = row.residual_step;
  const T* const residual = row.residual;
  T* const out = row.out;
  with_flag(activated, [&](auto relu) {
    with_flag(residual != nullptr, [&](auto has_residual) {
      const auto one = [&](int64_t x, int64_t c, float factor, float offset) {
        float v = sums[x * col_step + c] * factor + offset;
        if constexpr (has_residual.value) v += to_float(residual[x * rw + c * rc]);
        out[x * ow + c * oc] = from_float<T, float>(finished<relu.value>(v));
      };
      if (oc != 1) {
        for (int64_t c = 0; c < count; ++c) {
          const float factor = scale ? scale[c] : 1.0f, offset = bias ? bias[c] : 0.0f;
          for (int64_t x = 0; x < row.cols; ++x) one(x, c, factor, offset);
        }
        return;
      }
      with_flag(scale != nullptr, [&](auto has_scale) {
        with_flag(bias != nullptr, [&](auto has_bias) {
          for (int64_t x = 0; x < row.cols; ++x)
            for (int64_t c = 0; c < count; ++c)
              one(x, c, has_scale.value ? scale[c] : 1.0f, has_bias.value ? bias[c] : 0.0f);
        });
      });
    });
  });
}

// The same into planes: sums are transposed to where the outputs belong, and are finished there, in place: finish_row's
// loop, which may not assume that it reads what it writes, would not be vectorized.
void finish_planes(const Row<float>& row, const float* scale, const float* bias, bool activated, const float* sums,
                   int64_t col_step, int64_t count, Transpose transpose) {
  transpose(sums, col_step, row.cols, count, row.out, row.out_channel);
  if (!scale && !bias && !row.residual && !activated) return;
  with_flag(activated, [&](auto relu) {
    with_flag(row.residual != nullptr, [&](auto has_residual) {
      for (int64_t c = 0; c < count; ++c) {
        const float factor = scale ? scale[c] : 1.0f, offset = bias ? bias[c] : 0.0f;
        float* out = row.out + c * row.out_channel;
        for (int64_t x = 0; x < row.cols; ++x) {
          const float sum = out[x] * factor + offset;
          out[x] = finished<relu.value>(
              has_residual.value ? sum + row.residual[c * row.residual_channel + x * row.residual_step] : sum);
        }
      }
    });
  });
}

// `pixels` runs of `count` zeros, `step` apart. Of a large output past the caches, in whole lines: 2 to 2.5 times the
// speed of memset, which reads every line before it writes it. fill_tail fences.
template <typename T>
void clear_pixels(T* out, int64_t pixels, int64_t step, int64_t count, [[maybe_unused]] bool stream) {
  const int64_t bytes = count * static_cast<int64_t>(sizeof(T)), step_bytes = step * static_cast<int64_t>(sizeof(T));
#if defined(__x86_64__)
  if (stream && (reinterpret_cast<uintptr_t>(out) | static_cast<uintptr_t>(bytes | step_bytes)) % 64 == 0) {
    for (int64_t x = 0; x < pixels; ++x) {
      auto* to = reinterpret_cast<__m128i*>(out + x * step);
      for (int64_t i = 0; i < bytes / 16; ++i) _mm_stream_si128(to + i, _mm_setzero_si128());
    }
    return;
  }
#endif
  if (step_bytes == bytes) {
    std::memset(out, 0, static_cast<size_t>(pixels * bytes));
  } else {
    for (int64_t x = 0; x < pixels; ++x) std::memset(out + x * step, 0, static_cast<size_t>(bytes));
  }
}

template <typename T>
void fill_row(const PrefixConv2dParams& p, int64_t n, const T* residual, int64_t count, T* out) {
  const Strides4 to = p.output_at(n), from = p.residual_at(n);
  const int64_t oc = to.c, ow = to.w, rc = from.c, rw = from.w;
  const int64_t cols = p.shape.out_w;
  const bool relu = p.activation == Activation::kRelu;
  if (!residual) {
    if (oc == 1) {
      clear_pixels(out, cols, ow, count, streams_past_caches(p));
    } else {
      for (int64_t c = 0; c < count; ++c)
        for (int64_t x = 0; x < cols; ++x) out[x * ow + c * oc] = T{};
    }
    return;
  }
  const auto one = [&](int64_t x, int64_t c) {
    const T v = residual[x * rw + c * rc];
    out[x * ow + c * oc] = relu && to_float(v) < 0 ? T{} : v;
  };
  if (oc == 1) {
    for (int64_t x = 0; x < cols; ++x)
      for (int64_t c = 0; c < count; ++c) one(x, c);
  } else {
    for (int64_t c = 0; c < count; ++c)
      for (int64_t x = 0; x < cols; ++x) one(x, c);
  }
}

template <typename T>
void sum_row(const PrefixConv2dParams& p, int64_t n, const T* out, int64_t count, float* sums) {
  const Strides4 st = p.output_at(n);
  const int64_t oc = st.c, ow = st.w, cols = p.shape.out_w;
  if constexpr (std::is_same_v<T, float>) {
    if (oc == 1) return sum_pixels(out, ow, cols, count, sums);
  }
  if (oc == 1) {
    for (int64_t x = 0; x < cols; ++x)
      for (int64_t c = 0; c < count; ++c) sums[c] += to_float(out[x * ow + c]);
  } else {
    for (int64_t c = 0; c < count; ++c)
      for (int64_t x = 0; x < cols; ++x) sums[c] += to_float(out[x * ow + c * oc]);
  }
}

}  // namespace

void finish_patch(const PrefixConv2dParams& p, const Patch& patch, int64_t channel0, int64_t count,
                  const SumsView& view, Transpose transpose) {
  const int64_t line = p.row ? p.row[patch.n] : 0;
  const auto table = [&](const void* data, int64_t row_stride) {
    return data ? static_cast<const float*>(data) + line * row_stride + channel0 : nullptr;
  };
  const float* scale = table(p.scale, p.scale_row_stride);
  const float* bias = table(p.bias, p.bias_row_stride);
  const Strides4 to = p.output_at(patch.n), from = p.residual_at(patch.n);
  const bool relu = p.activation == Activation::kRelu;
  with_type(p.dtype, [&](auto tag) {
    using T = decltype(tag);
    Row<T> row{patch.cols, nullptr, to.w * patch.col_step, to.c, nullptr, from.w * patch.col_step, from.c};
    const bool planes = std::is_same_v<T, float> && transpose && count > 1 && to.c != 1 && row.out_step == 1;
    // Rows that follow each other, here and there, are one.
    const auto follow = [&](const Strides4& st) { return st.h * patch.row_step == st.w * patch.col_step * patch.cols; };
    int64_t rows = patch.rows;
    if (planes && view.row_step == view.col_step * patch.cols && follow(to) && (!p.residual || follow(from)))
      row.cols *= std::exchange(rows, 1);
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t y = patch.row0 + r * patch.row_step;
      row.out = output_at<T>(p, patch.n, y, channel0) + patch.col0 * to.w;
      row.residual = residual_at<T>(p, patch.n, y, channel0);
      if (row.residual) row.residual += patch.col0 * from.w;
      const float* sums = view.sums + r * view.row_step;
      if constexpr (std::is_same_v<T, float>)
        if (planes) {
          finish_planes(row, scale, bias, relu, sums, view.col_step, count, transpose);
          continue;
        }
      finish_row(row, scale, bias, relu, sums, view.col_step, count);
    }
  });
}

void fill_tail(const PrefixConv2dParams& p, int64_t n, int64_t row0, int64_t row1, int64_t channel0, int64_t channel1) {
  if (p.tail != Tail::kZero || channel0 >= channel1) return;
  with_type(p.dtype, [&](auto tag) {
    using T = decltype(tag);
    for (int64_t r = row0; r < row1; ++r)
      fill_row<T>(p, n, residual_at<T>(p, n, r, channel0), channel1 - channel0, output_at<T>(p, n, r, channel0));
  });
#if defined(__x86_64__)
  if (streams_past_caches(p)) _mm_sfence();  // streamed stores are not ordered with the one that ends the work item
#endif
}

void sum_rows(const PrefixConv2dParams& p, int64_t n, int64_t row0, int64_t row1, int64_t channel0, int64_t channel1,
              float* row_sums) {
  with_type(p.dtype, [&](auto tag) {
    using T = decltype(tag);
    for (int64_t r = row0; r < row1; ++r) {
      float* sums = row_sums + (n * p.shape.out_h + r) * p.shape.c_out + channel0;
      std::fill(sums, sums + (channel1 - channel0), 0.0f);
      sum_row<T>(p, n, output_at<T>(p, n, r, channel0), channel1 - channel0, sums);
    }
  });
}

void finish_pooled(const PrefixConv2dParams& p, const float* row_sums, int64_t n) {
  const ConvShape& s = p.shape;
  float* out = p.pooled + n * s.c_out;
  std::fill(out, out + s.c_out, 0.0f);
  for (int64_t r = 0; r < s.out_h; ++r) {
    const float* sums = row_sums + (n * s.out_h + r) * s.c_out;
    for (int64_t c = 0; c < s.c_out; ++c) out[c] += sums[c];
  }
  const float positions = static_cast<float>(s.out_h * s.out_w);
  for (int64_t c = 0; c < s.c_out; ++c) out[c] /= positions;
}

}  // namespace rnp::cpu
