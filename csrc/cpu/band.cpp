#include "cpu/band.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "core/half.h"
#include "core/winograd.h"

namespace rnp::cpu {

BandGeometry::BandGeometry(const ConvShape& s, int64_t row0, int64_t row1)
    : rows_in(s.kh == 1 ? row1 - row0 : (row1 - row0 - 1) * s.stride_h + (s.kh - 1) * s.dilation_h + 1),
      cols_in(s.kw == 1 ? s.out_w : (s.out_w - 1) * s.stride_w + (s.kw - 1) * s.dilation_w + 1),
      y0(row0 * s.stride_h - s.pad_top),
      x0(-s.pad_left),
      y_step(s.kh == 1 ? s.stride_h : 1),
      x_step(s.kw == 1 ? s.stride_w : 1),
      row_step(s.kh == 1 ? 1 : s.stride_h),
      col_step(s.kw == 1 ? 1 : s.stride_w) {}

namespace {

// One row: `cols` pixels, `count` channels each, written `channels` apart (the rest of each pixel is left alone).
template <typename T>
void copy_row(const T* from, int64_t pixel_stride, int64_t channel_stride, int64_t cols, int64_t count,
              int64_t channels, [[maybe_unused]] const Kernels& kernels, float* to) {
  if constexpr (sizeof(T) == sizeof(float)) {
    if (channel_stride == 1) {
      if (pixel_stride == count && channels == count) {
        std::memcpy(to, from, sizeof(float) * static_cast<size_t>(cols * count));
      } else {
        kernels.copy_pixels(from, pixel_stride, cols, count, channels, to);
      }
      return;
    }
    if (pixel_stride == 1 && kernels.transpose)
      return kernels.transpose(from, channel_stride, count, cols, to, channels);
  }
  if (channel_stride == 1) {
    for (int64_t x = 0; x < cols; ++x)
      for (int64_t c = 0; c < count; ++c) to[x * channels + c] = to_float(from[x * pixel_stride + c]);
    return;
  }
  // Blocks of 16 channels: a cache line of the target is filled before it leaves.
  for (int64_t c0 = 0; c0 < count; c0 += 16) {
    const int64_t c1 = std::min(count, c0 + 16);
    for (int64_t x = 0; x < cols; ++x)
      for (int64_t c = c0; c < c1; ++c) to[x * channels + c] = to_float(from[x * pixel_stride + c * channel_stride]);
  }
}

// Band columns [left, right) that lie inside the image.
std::pair<int64_t, int64_t> inside(const ConvShape& s, const BandGeometry& g) {
  const int64_t left = std::clamp<int64_t>(g.x0 >= 0 ? 0 : (-g.x0 + g.x_step - 1) / g.x_step, 0, g.cols_in);
  return {left, std::clamp<int64_t>((s.w - g.x0 + g.x_step - 1) / g.x_step, left, g.cols_in)};
}

// One row of bfloat16: `cols` pixels, `count` channels each, as words that touch. `all`: channels that may be read.
void copy_row_pairs(const uint16_t* from, int64_t pixel_stride, int64_t channel_stride, int64_t cols, int64_t count,
                    int64_t all, CopyPixels copy_pixels, float* to) {
  const int64_t words = (count + 1) / 2;
  const bool odd = count % 2 != 0;
  uint16_t* halves = reinterpret_cast<uint16_t*>(to);
  if (channel_stride == 1 && pixel_stride % 2 == 0 && (!odd || count < all)) {  // whole words can be read
    const float* whole = reinterpret_cast<const float*>(from);
    if (pixel_stride == 2 * words) {
      std::memcpy(to, from, sizeof(float) * static_cast<size_t>(cols * words));
    } else {
      copy_pixels(whole, pixel_stride / 2, cols, words, words, to);
    }
    for (int64_t x = 0; odd && x < cols; ++x) halves[2 * words * (x + 1) - 1] = 0;
    return;
  }
  // As in copy_row: a cache line of the target is filled before it leaves.
  for (int64_t c0 = 0; c0 < count; c0 += 32) {
    const int64_t c1 = std::min(count, c0 + 32);
    for (int64_t x = 0; x < cols; ++x) {
      for (int64_t c = c0; c < c1; ++c) halves[x * 2 * words + c] = from[x * pixel_stride + c * channel_stride];
      if (odd) halves[2 * words * (x + 1) - 1] = 0;
    }
  }
}

template <typename T>
void copy_typed(const PrefixConv2dParams& p, const BandGeometry& g, int64_t n, int64_t first_channel, int64_t live,
                int64_t channels, int64_t ic_block, const Kernels& kernels, float* to) {
  const ConvShape& s = p.shape;
  const Strides4 st = p.input_at(n);
  const T* input = static_cast<const T*>(p.input) + n * st.n + first_channel * st.c;
  const auto [left, right] = inside(s, g);
  for (int64_t c0 = 0; c0 < channels; c0 += ic_block) {
    const int64_t width = std::min(ic_block, channels - c0);
    const int64_t count = std::clamp<int64_t>(live - c0, 0, width);
    for (int64_t r = 0; r < g.rows_in; ++r, to += g.cols_in * width) {
      const int64_t y = g.y0 + r * g.y_step;
      if (y < 0 || y >= s.h || count < width) {
        std::memset(to, 0, sizeof(float) * static_cast<size_t>(g.cols_in * width));
        if (y < 0 || y >= s.h || count == 0) continue;
      } else {
        std::memset(to, 0, sizeof(float) * static_cast<size_t>(left * width));
        std::memset(to + right * width, 0, sizeof(float) * static_cast<size_t>((g.cols_in - right) * width));
      }
      const T* from = input + c0 * st.c + y * st.h + (g.x0 + left * g.x_step) * st.w;
      copy_row(from, g.x_step * st.w, st.c, right - left, count, width, kernels, to + left * width);
    }
  }
}

}  // namespace

void copy_band_pairs(const PrefixConv2dParams& p, const BandGeometry& g, int64_t n, int64_t first_channel, int64_t live,
                     int64_t ic_block, CopyPixels copy_pixels, float* to) {
  const ConvShape& s = p.shape;
  const Strides4 st = p.input_at(n);
  const uint16_t* input = static_cast<const uint16_t*>(p.input) + n * st.n + first_channel * st.c;
  const int64_t all = s.c_in - first_channel;
  const auto [left, right] = inside(s, g);
  for (int64_t c0 = 0; c0 < live; c0 += 2 * ic_block) {
    const int64_t count = std::min(2 * ic_block, live - c0), words = (count + 1) / 2;
    const auto clear = [&](int64_t first, int64_t end) {
      std::memset(to + first * words, 0, sizeof(float) * static_cast<size_t>((end - first) * words));
    };
    for (int64_t r = 0; r < g.rows_in; ++r, to += g.cols_in * words) {
      const int64_t y = g.y0 + r * g.y_step;
      if (y < 0 || y >= s.h) {
        clear(0, g.cols_in);
        continue;
      }
      clear(0, left);
      clear(right, g.cols_in);
      const uint16_t* from = input + c0 * st.c + y * st.h + (g.x0 + left * g.x_step) * st.w;
      copy_row_pairs(from, g.x_step * st.w, st.c, right - left, count, all - c0, copy_pixels, to + left * words);
    }
  }
}

void copy_band_chunks(const PrefixConv2dParams& p, const BandGeometry& g, int64_t n, int64_t first_channel,
                      int64_t live, const ChunkedBand& band, CopyPixels copy_pixels, float* row, float* to) {
  constexpr int64_t kChunk = 16;
  const ConvShape& s = p.shape;
  const Strides4 st = p.input_at(n);
  const uint16_t* input = static_cast<const uint16_t*>(p.input) + n * st.n + first_channel * st.c;
  const int64_t words = (live + 1) / 2;
  const auto [left, right] = inside(s, g);
  const auto clear = [](float* first, int64_t pixels, int64_t size) {
    std::memset(first, 0, sizeof(float) * static_cast<size_t>(std::max<int64_t>(0, pixels) * size));
  };
  // Whole words of a pixel go straight to their chunks; else a row is made of words first.
  const bool straight = band.taps == 1 && st.c == 1 && g.x_step * st.w % 2 == 0 && live % 2 == 0;
  for (int64_t r = 0; r < g.rows_in; ++r, to += band.cols * kChunk) {
    const int64_t y = g.y0 + r * g.y_step;
    const bool outside = y < 0 || y >= s.h;
    const uint16_t* from = input + y * st.h + (g.x0 + left * g.x_step) * st.w;
    if (!straight && !outside) {
      clear(row, left, words);
      clear(row + right * words, g.cols_in - right, words);
      copy_row_pairs(from, g.x_step * st.w, st.c, right - left, live, s.c_in - first_channel, copy_pixels,
                     row + left * words);
    }
    for (int64_t c = 0; c < band.chunks(); ++c) {
      float* target = to + c * band.chunk;
      const int64_t count = std::min(kChunk, band.words - c * kChunk);
      if (outside || count < kChunk) clear(target, band.cols, kChunk);
      if (outside) continue;
      if (straight) {
        clear(target, left, kChunk);
        clear(target + right * kChunk, band.cols - right, kChunk);
        copy_pixels(reinterpret_cast<const float*>(from) + c * kChunk, g.x_step * st.w / 2, right - left, count, kChunk,
                    target + left * kChunk);
      } else {
        const int64_t step = band.taps > 1 ? g.col_step : 1;
        copy_pixels(row + c * kChunk, step * words, band.cols, count, kChunk, target);
      }
    }
  }
}

void fold_band(const float* band, const BandGeometry& g, int64_t channels, int64_t rows, int64_t cols, float* to) {
  constexpr int64_t kHalf = kFoldedPixel / 2;
  static_assert(kHalf >= 2 * 4);
  const int64_t row = g.cols_in * channels, whole = std::min(cols, g.cols_in / 2);
  // Two neighbours of one row are one run: always copied as kHalf floats, of which the next run overwrites the rest.
  const auto copy = [](const float* from, float* target) { std::memcpy(target, from, sizeof(float) * kHalf); };
  for (int64_t y = 0; y < rows; ++y, band += 2 * row) {
    const bool both = 2 * y + 1 < g.rows_in;
    for (int64_t x = 0; x < whole; ++x, to += kFoldedPixel) {
      copy(band + x * 2 * channels, to);
      if (both) {
        copy(band + row + x * 2 * channels, to + 2 * channels);
      } else {
        std::memset(to + 2 * channels, 0, sizeof(float) * kHalf);
      }
    }
    for (int64_t x = whole; x < cols; ++x, to += kFoldedPixel) {  // one column of the band is left
      std::memset(to, 0, sizeof(float) * kFoldedPixel);
      for (int64_t c = 0; c < channels; ++c) {
        to[c] = band[x * 2 * channels + c];
        if (both) to[2 * channels + c] = band[row + x * 2 * channels + c];
      }
    }
  }
}

void copy_band(const PrefixConv2dParams& p, const BandGeometry& geometry, int64_t n, int64_t first_channel,
               int64_t live, int64_t channels, int64_t ic_block, const Kernels& kernels, float* to) {
  switch (p.dtype) {
    case DType::kBFloat16:
      return copy_typed<BFloat16>(p, geometry, n, first_channel, live, channels, ic_block, kernels, to);
    case DType::kFloat16:
      return copy_typed<Float16>(p, geometry, n, first_channel, live, channels, ic_block, kernels, to);
    case DType::kFloat32:
    case DType::kFloat64:  // has its own kernel
      return copy_typed<float>(p, geometry, n, first_channel, live, channels, ic_block, kernels, to);
  }
}

}  // namespace rnp::cpu
