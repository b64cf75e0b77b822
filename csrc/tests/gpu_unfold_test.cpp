// The copy of an input of few channels that the CUDA tile kernels read: what it holds, element by element, for inputs
// of any strides; and what it is a property of. The convolutions that read it are among the cases of gpu_conv_test.cpp
// and gpu_hopper_test.cpp.
#include <algorithm>
#include <cstring>
#include <string>

#include "tests/check.h"
#include "tests/gpu_run.h"

namespace rnp::tests {
namespace {

constexpr cuda::Device kDevices[] = {{108, false}, {132, true}};

PrefixConv2dParams params_of(const ConvCase& c, DType dtype) {
  PrefixConv2dParams p;
  p.shape = c.shape(), p.dtype = dtype;
  p.input_stride = strides_of(c.c_in, c.h, c.w, true);
  p.output_stride = strides_of(c.c_out, p.shape.out_h, p.shape.out_w, true);
  return p;
}

// Each channel of each tap of each output, through the launch's own view of the copy; what lies beyond the prefix is
// NaN in the input and must be 0 there.
template <typename T>
void check_copy(const ConvCase& c, DType dtype, const Strides4& stride, int64_t first, int64_t elements) {
  PrefixConv2dParams p = params_of(c, dtype);
  const ConvShape& s = p.shape;
  const cuda::PackedTiles packed = cuda::pack_args(s, dtype, cuda::Role::kForward, nullptr, {}, nullptr).layout;
  if (!packed.unfolded()) return;
  std::vector<T> input(static_cast<size_t>(elements), from_float<T, float>(kNaN));
  std::vector<int32_t> prefix;
  const auto at = [&](int64_t n, int64_t k, int64_t y, int64_t x) -> T& {
    return input[static_cast<size_t>(first + n * stride.n + k * stride.c + y * stride.h + x * stride.w)];
  };
  float next = 0;
  for (int64_t n = 0; n < c.n; ++n) {
    prefix.push_back(n == 0 ? 0 : static_cast<int32_t>(n == 1 ? c.c_in + 3 : n % (c.c_in + 1)));  // 3 too many: clamped
    for (int64_t k = 0; k < std::min<int64_t>(prefix.back(), c.c_in); ++k)
      for (int64_t y = 0; y < c.h; ++y)
        for (int64_t x = 0; x < c.w; ++x) at(n, k, y, x) = from_float<T, float>(next = next >= 250 ? 1 : next + 1);
  }
  p.input = input.data() + first, p.input_stride = stride, p.in_prefix = prefix.data();
  for (const cuda::Device& device : kDevices) {
    cuda::TileLaunch launch = cuda::tile_launches(p, cuda::Role::kForward, 1, true, device).front();
    const std::vector<cuda::Vec16> memory = unfold<T>(launch);
    const cuda::ConvArgs& a = launch.args;
    const std::string where = std::string(c.name) + ", " + std::to_string(sizeof(T)) + " bytes";
    CHECK(!a.gather && !a.flat && a.in_prefix == nullptr && a.taps == s.kh) << where;
    CHECK(a.use_tma == (cuda::is_hopper(launch.tile) && c.stride_h <= 8)) << where;  // the copy engine's longest step
    CHECK(launch.box.base == memory.data()) << where;
    CHECK(a.input_stride.w * static_cast<int64_t>(sizeof(T)) % 16 == 0) << where << ": pixels are not aligned";
    CHECK(a.input_stride.h % a.input_stride.w == 0) << where << ": a row is no multiple of a pixel's distance";
    const T* const copy = static_cast<const T*>(a.input);
    const int64_t size = static_cast<int64_t>(memory.size() * sizeof(cuda::Vec16) / sizeof(T)), pixel = packed.pixel();
    int64_t wrong = 0;
    for (int64_t n = 0; n < c.n; ++n)
      for (int64_t oy = 0; oy < s.out_h; ++oy)
        for (int64_t ox = 0; ox < s.out_w; ++ox)
          for (int64_t ky = 0; ky < s.kh; ++ky)
            for (int64_t i = 0; i < a.c_in; ++i) {
              const int64_t row = oy * a.y.step + a.y.delta + ky * a.y.delta_step, kx = i / pixel, k = i % pixel;
              const int64_t offset = n * a.input_stride.n + row * a.input_stride.h + ox * a.input_stride.w + i;
              const int64_t y = oy * c.stride_h - c.top + ky * c.dilation_h;
              const int64_t x = ox * c.stride_w - c.left + kx * c.dilation_w;
              const bool live = k < std::min<int64_t>(prefix[static_cast<size_t>(n)], c.c_in) && y >= 0 && y < c.h &&
                                x >= 0 && x < c.w;
              const T expected = live ? at(n, k, y, x) : T{};
              wrong += row >= a.h || offset >= size || std::memcmp(copy + offset, &expected, sizeof(T)) != 0;
            }
    CHECK(wrong == 0) << where << ": " << wrong << " elements";
  }
}

template <typename T>
void check_copies(DType dtype) {
  std::vector<ConvCase> cases = few_channel_cases();
  for (int64_t channels : {3, 7, 12})  // a line of more than one run
    cases.push_back({.name = "long lines", .n = 3, .c_in = channels, .h = 3, .w = 290, .c_out = 64, .kh = 2, .kw = 3});
  for (const ConvCase& c : cases) {
    const int64_t map = c.h * c.w;
    check_copy<T>(c, dtype, strides_of(c.c_in, c.h, c.w, true), 0, c.n * c.c_in * map);
    check_copy<T>(c, dtype, strides_of(c.c_in, c.h, c.w, false), 0, c.n * c.c_in * map);
    // Every second column, and channels from the second on, of a larger contiguous tensor; then rows and columns
    // turned.
    check_copy<T>(c, dtype, {(c.c_in + 2) * 2 * map, 2 * map, 2 * c.w, 2}, 2 * map, c.n * (c.c_in + 2) * 2 * map);
    check_copy<T>(c, dtype, {c.c_in * map, map, 1, c.h}, 0, c.n * c.c_in * map);
  }
}

}  // namespace

TEST(gpu_unfold_copies_what_the_taps_read) {
  check_copies<BFloat16>(DType::kBFloat16);
  check_copies<Float16>(DType::kFloat16);
  check_copies<float>(DType::kFloat32);
}

// pack_weight knows the weight alone, so nothing else may decide what it writes.
TEST(gpu_unfolded_weights_depend_on_the_weight_alone) {
  int unfolded = 0;
  for (const ConvCase& c : few_channel_cases())
    for (DType dtype : {DType::kBFloat16, DType::kFloat16, DType::kFloat32}) {
      ConvShape s = c.shape(), bare;
      bare.c_in = s.c_in, bare.c_out = s.c_out, bare.kh = s.kh, bare.kw = s.kw;
      const auto layout = [&](const ConvShape& of) {
        return cuda::pack_args(of, dtype, cuda::Role::kForward, nullptr, {}, nullptr).layout;
      };
      CHECK(layout(s).run() == layout(bare).run() && layout(s).elements() == layout(bare).elements()) << c.name;
      unfolded += layout(s).unfolded();
      for (const cuda::Device& device : kDevices) {
        PrefixConv2dParams p = params_of(c, dtype);
        const cuda::TileLaunch launch = cuda::tile_launches(p, cuda::Role::kForward, 1, true, device).front();
        CHECK((launch.unfold.pieces() > 0) == layout(s).unfolded()) << c.name;
      }
    }
  CHECK(unfolded > 25) << unfolded << " layers";
}

// The same copy, so the same bits and the same kernel, whatever the input's layout.
TEST(gpu_unfolded_launches_do_not_depend_on_the_layout_of_the_input) {
  for (const ConvCase& c : few_channel_cases()) {
    PrefixConv2dParams p = params_of(c, DType::kBFloat16);
    const auto plan = [&] { return cuda::tile_launches(p, cuda::Role::kForward, 1, true, {132, true}).front(); };
    const cuda::TileLaunch last = plan();
    p.input_stride = strides_of(c.c_in, c.h, c.w, false);
    if (last.unfold.pieces() == 0) continue;
    CHECK(plan().tile == last.tile && plan().args.cut.bn == last.args.cut.bn) << c.name;
    CHECK(cuda::is_hopper(last.tile) == (c.c_out >= 64)) << c.name;
  }
}

// Windows where a stride passes over columns, and nothing twice where taps are neighbours anyway.
TEST(gpu_unfold_copies_no_column_that_nobody_reads) {
  for (const ConvCase& c : few_channel_cases()) {
    const PrefixConv2dParams p = params_of(c, DType::kBFloat16);
    const cuda::UnfoldArgs u = cuda::tile_launches(p, cuda::Role::kForward, 1, true, {132, true}).front().unfold;
    if (u.pieces() == 0) continue;
    const int64_t reached = (p.shape.out_w - 1) * c.stride_w + (c.kw - 1) * c.dilation_w + 1;
    const int64_t allowed = std::min(reached + c.stride_w - 1, p.shape.out_w * c.kw);
    CHECK(c.dilation_w > 1 || u.columns <= allowed) << c.name << ": " << u.columns << " columns";
    CHECK((u.window > 1) == (c.dilation_w > 1 || c.stride_w > c.kw)) << c.name;
  }
}

// A map of more than 2^31 elements, and windows of a row of 2^27 outputs.
TEST(gpu_unfold_counts_in_64_bits) {
  ConvCase c{.name = "large", .n = 4096, .c_in = 3, .h = 1024, .w = 1024, .c_out = 64, .kh = 3, .kw = 3};
  PrefixConv2dParams p = params_of(c, DType::kBFloat16);
  const auto pieces = [&] {
    return cuda::tile_launches(p, cuda::Role::kForward, 1, true, {132, true}).front().unfold.pieces();
  };
  CHECK(pieces() == int64_t{4096} * 1024 * 1024) << pieces();
  c.n = 1, c.h = 1, c.w = int64_t{1} << 28, c.kh = 1, c.kw = 16, c.stride_w = 1, c.dilation_w = 2;
  p = params_of(c, DType::kBFloat16);
  CHECK(pieces() == p.shape.out_w * 16) << pieces();
}

}  // namespace rnp::tests
