#include "tests/gpu_case.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <type_traits>

namespace rnp::tests {
namespace {

template <typename T>
T value(double v) {
  if constexpr (sizeof(T) == 8)
    return v;
  else
    return from_float<T, float>(static_cast<float>(v));
}

template <typename T>
double number(T v) {
  return static_cast<double>(to_float(v));
}

}  // namespace

template <typename T>
GpuCase<T>::GpuCase(const ConvCase& c, GpuMode mode, cuda::Role r, DType dtype, bool channels_last)
    : s(c.shape()), role(r) {
  const bool forward = role == cuda::Role::kForward;
  from_c = forward ? s.c_in : s.c_out, from_h = forward ? s.h : s.out_h, from_w = forward ? s.w : s.out_w;
  to_c = forward ? s.c_out : s.c_in, to_h = forward ? s.out_h : s.h, to_w = forward ? s.out_w : s.w;
  Random random(static_cast<uint64_t>(s.c_in * 100 + s.c_out + static_cast<int>(mode)));
  const auto fill = [&](std::vector<T>& to, int64_t count) {
    for (int64_t i = 0; i < count; ++i) to.push_back(value<T>(random.next()));
  };
  fill(weight, s.c_out * s.group_in() * s.kh * s.kw);
  fill(input, s.n * from_c * from_h * from_w);
  fill(residual, s.n * to_c * to_h * to_w);
  for (int64_t i = 0; i < 3 * to_c; ++i) scale.push_back(static_cast<float>(random.next()));
  for (int64_t i = 0; i < 3 * to_c; ++i) bias.push_back(static_cast<float>(random.next()));
  for (int64_t n = 0; n < s.n; ++n) {
    if (mode == GpuMode::kGroups) {  // neighbours share their action
      in_prefix.push_back(static_cast<int32_t>((n + 3) / 2 % 4 * s.c_in / 4));
      out_prefix.push_back(static_cast<int32_t>((4 - n / 2 % 4) * s.c_out / 4));
      row.push_back(0);
      continue;
    }
    in_prefix.push_back(n == 2 ? s.c_in : random.below(s.c_in + 1));
    out_prefix.push_back(n == 1 ? 0 : (n == 2 ? s.c_out + 9 : 1 + random.below(s.c_out)));  // 9 too many: clamped
    row.push_back(random.below(3));
  }
  output.assign(residual.size(), value<T>(kNaN));
  means.assign(static_cast<size_t>(s.n * to_c), kNaN);
  p.shape = s, p.dtype = dtype;
  p.input_stride = strides_of(from_c, from_h, from_w, channels_last);
  p.weight_stride = strides_of(s.group_in(), s.kh, s.kw, false);
  p.output_stride = p.residual_stride = strides_of(to_c, to_h, to_w, channels_last);
  if (mode != GpuMode::kFull) p.in_prefix = in_prefix.data(), p.out_prefix = out_prefix.data();
  if (mode == GpuMode::kTables) {
    p.scale = scale.data(), p.bias = bias.data(), p.row = row.data();
    p.scale_row_stride = p.bias_row_stride = to_c;
  } else if (mode == GpuMode::kFull) {
    p.bias = bias.data();
  }
  if (dtype == DType::kFloat64) p.scale = p.bias = nullptr;  // its tables would be doubles
  if (mode == GpuMode::kResidual) p.residual = residual.data();
  if (mode == GpuMode::kTables || mode == GpuMode::kResidual) p.activation = Activation::kRelu;
  if (mode == GpuMode::kSkip) p.tail = Tail::kSkip;
  for (int64_t n = 0; n < s.n; ++n)
    for (int64_t k = std::min<int64_t>(from_live(n), from_c); k < from_c; ++k)
      for (int64_t y = 0; y < from_h; ++y)
        for (int64_t x = 0; x < from_w; ++x) input[at(p.input_stride, n, k, y, x)] = value<T>(kNaN);
  p.input = input.data(), p.weight = weight.data(), p.output = output.data();
}

// Sums of products and of their magnitudes, in (n, c, h, w). One pair of channels and one tap at a time, so that the
// inner loop has nothing to decide: most of these tests' time is spent here, and under sanitizers most of all.
template <typename T>
void GpuCase<T>::reference(std::vector<double>& sums, std::vector<double>& sizes) const {
  const int64_t icg = s.group_in(), ocg = s.group_out(), from_plane = from_h * from_w, to_plane = to_h * to_w;
  const bool forward = role == cuda::Role::kForward;
  const auto operand = [&](T v) {
    if constexpr (std::is_same_v<T, float>)
      if (cut) return number(std::bit_cast<float>(std::bit_cast<uint32_t>(v) & 0xffffe000u));
    return number(v);
  };
  sums.assign(output.size(), 0.0), sizes.assign(output.size(), 0.0);
  std::vector<double> image(static_cast<size_t>(from_c * from_plane));
  const auto add = [&](const double* from, double* sum, double* size, double w, int64_t ky, int64_t kx) {
    for (int64_t oy = 0; oy < s.out_h; ++oy) {
      const int64_t y = oy * s.stride_h - s.pad_top + ky * s.dilation_h;
      if (y < 0 || y >= s.h) continue;
      for (int64_t ox = 0; ox < s.out_w; ++ox) {
        const int64_t x = ox * s.stride_w - s.pad_left + kx * s.dilation_w;
        if (x < 0 || x >= s.w) continue;
        const int64_t in = y * s.w + x, out = oy * s.out_w + ox, i = forward ? out : in;
        const double v = from[forward ? in : out] * w;
        sum[i] += v, size[i] += std::abs(v);
      }
    }
  };
  for (int64_t n = 0; n < s.n; ++n) {
    const int64_t live = std::min<int64_t>(from_live(n), from_c);
    for (int64_t c = 0; c < live; ++c)
      for (int64_t i = 0; i < from_plane; ++i)
        image[static_cast<size_t>(c * from_plane + i)] =
            operand(input[at(p.input_stride, n, c, i / from_w, i % from_w)]);
    for (int64_t o = 0; o < s.c_out; ++o)
      for (int64_t c = 0; c < icg; ++c) {
        const int64_t channel = o / ocg * icg + c, from = forward ? channel : o, to = forward ? o : channel;
        if (from >= live) continue;
        const int64_t at_sum = (n * to_c + to) * to_plane;
        for (int64_t ky = 0; ky < s.kh; ++ky)
          for (int64_t kx = 0; kx < s.kw; ++kx)
            add(image.data() + from * from_plane, sums.data() + at_sum, sizes.data() + at_sum,
                operand(weight[at(p.weight_stride, o, c, ky, kx)]), ky, kx);
      }
  }
}

template <typename T>
void GpuCase<T>::check(const std::string& where, double unit, double store_unit) const {
  std::vector<double> sums, sizes;
  reference(sums, sizes);
  const Strides4 dense = strides_of(to_c, to_h, to_w, false);
  for (int64_t n = 0; n < s.n; ++n)
    for (int64_t c = 0; c < to_c; ++c)
      for (int64_t y = 0; y < to_h; ++y)
        for (int64_t x = 0; x < to_w; ++x) {
          const size_t i = at(p.output_stride, n, c, y, x), k = at(dense, n, c, y, x);
          const bool live = c < to_live(n);
          const int64_t line = p.row ? row[static_cast<size_t>(n)] : 0;
          const double a = p.scale ? scale[static_cast<size_t>(line * to_c + c)] : 1;
          const double b = p.bias ? bias[static_cast<size_t>(line * to_c + c)] : 0;
          double v = live ? sums[k] * a + b : 0;
          if (p.residual) v += number(residual[i]);
          if (p.activation == Activation::kRelu) v = std::max(v, 0.0);
          const double got = number(output[i]);
          if (!live && p.tail == Tail::kSkip) {
            CHECK(got != got) << where << ": a skipped tail was written at channel " << c;
            continue;
          }
          // Below 2^-14 halves are 2^-24 apart, whatever their size: a store is off by up to half of that.
          const double subnormal = std::is_same_v<T, Float16> ? 0x1p-25 : 0;
          const double allowed =
              unit * sizes[k] * std::abs(a) + store_unit * std::abs(v) + subnormal + 1e-6 * (std::abs(b) + 1e-3);
          CHECK(std::abs(got - v) <= allowed) << where << " at (" << n << ", " << c << ", " << y << ", " << x
                                              << "): " << got << " instead of " << v << ", allowed " << allowed;
        }
}

// Beside the cases of every backend: channels that cp.async can fetch, several blocks, runs and chunks.
std::vector<ConvCase> gpu_cases() {
  std::vector<ConvCase> all = conv_cases();
  const auto add = [&](const char* name, int64_t n, int64_t c_in, int64_t side, int64_t c_out, int64_t kernel,
                       int64_t stride, int64_t groups) {
    ConvCase c{
        .name = name, .n = n, .c_in = c_in, .h = side, .w = side + 1, .c_out = c_out, .kh = kernel, .kw = kernel};
    c.stride_h = c.stride_w = stride, c.groups = groups;
    c.top = c.bottom = c.left = c.right = kernel / 2;
    all.push_back(c);
  };
  add("aligned 3x3, two blocks of channels", 4, 72, 6, 152, 3, 1, 1);
  add("aligned 3x3, narrow", 5, 40, 7, 24, 3, 1, 1);
  add("aligned 3x3, stride 2", 4, 48, 9, 88, 3, 2, 1);
  add("aligned 1x1, small maps", 30, 136, 2, 72, 1, 1, 1);
  add("aligned 1x1, stride 2", 4, 32, 8, 200, 1, 2, 1);
  add("aligned groups", 4, 64, 7, 96, 3, 1, 2);
  add("aligned 5x5, stride 3", 3, 16, 11, 16, 5, 3, 1);
  all.push_back({.name = "aligned, dilated, padded unevenly",
                 .n = 3,
                 .c_in = 24,
                 .h = 9,
                 .w = 8,
                 .c_out = 40,
                 .kh = 3,
                 .kw = 2,
                 .stride_h = 1,
                 .stride_w = 2,
                 .top = 0,
                 .bottom = 4,
                 .left = 3,
                 .right = 1,
                 .dilation_h = 2,
                 .dilation_w = 3});
  for (const ConvCase& c : few_channel_cases()) all.push_back(c);
  return all;
}

std::vector<ConvCase> few_channel_cases() {
  std::vector<ConvCase> all;
  const auto add = [&](const char* name, int64_t n, int64_t c_in, int64_t side, int64_t c_out, int64_t kernel,
                       int64_t stride, int64_t padding) -> ConvCase& {
    ConvCase c{
        .name = name, .n = n, .c_in = c_in, .h = side, .w = side + 1, .c_out = c_out, .kh = kernel, .kw = kernel};
    c.stride_h = c.stride_w = stride;
    c.top = c.bottom = c.left = c.right = padding;
    all.push_back(c);
    return all.back();
  };
  add("3 channels, 3x3", 4, 3, 11, 64, 3, 1, 1);
  add("3 channels, 7x7, stride 2", 3, 3, 17, 72, 7, 2, 3);
  add("4 channels, dilated along x", 4, 4, 9, 64, 3, 1, 2).dilation_w = 2;
  add("1 channel, dilated along y", 4, 1, 9, 24, 5, 1, 2).dilation_h = 2;
  add("3 channels, patches of 4x4", 5, 3, 16, 136, 4, 4, 0);
  add("3 channels, patches of 16x16, K in segments", 3, 3, 32, 64, 16, 16, 0);
  add("2 channels, a stride longer than the kernel", 4, 2, 11, 64, 2, 3, 1);
  add("12 channels, 3x3", 4, 12, 9, 64, 3, 1, 1);
  add("8 channels, 3x3", 4, 8, 7, 64, 3, 1, 1);
  ConvCase& uneven = add("7 channels, padded unevenly", 4, 7, 8, 64, 3, 1, 0);
  uneven.kw = 4, uneven.stride_w = 3;
  uneven.bottom = 4, uneven.left = 5, uneven.right = 2;
  add("5 channels, one row of the kernel", 4, 5, 6, 40, 3, 2, 1).kh = 1;
  add("5 channels, one column of the kernel", 4, 5, 6, 40, 3, 1, 1).kw = 1;
  return all;
}

template struct GpuCase<float>;
template struct GpuCase<double>;
template struct GpuCase<BFloat16>;
template struct GpuCase<Float16>;

}  // namespace rnp::tests
