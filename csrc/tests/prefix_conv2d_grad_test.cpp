// Both gradients on every instruction set against a double-precision reference, with NaN beyond every prefix; the same
// bits on any number of threads and, for the input, in any batch.
#include "cpu/prefix_conv2d_grad.h"

#include <cstring>
#include <string>
#include <type_traits>

#include "core/algorithm.h"
#include "cpu/isa.h"
#include "tests/check.h"
#include "tests/conv_case.h"

namespace rnp::tests {
namespace {

enum Mode { kFull, kMixed, kZero, kModes };
const char* const kModeNames[] = {"full", "mixed prefixes", "prefixes of zero"};

// T is the storage type of all tensors. Reference sums and their magnitudes are taken over the storage type's values.
template <typename T>
struct GradProblem {
  ConvShape s;
  std::vector<T> input, weight, grad, grad_input, grad_weight;
  std::vector<int32_t> in_prefix, out_prefix;
  std::vector<double> input_sum, input_size, weight_sum, weight_size;  // (n, c, h, w) and (oc, ic, kh, kw)
  cpu::PrefixConv2dGradParams p;

  GradProblem(const ConvCase& c, Mode mode, DType dtype, bool channels_last, int64_t copies = 1) : s(c.shape()) {
    s.n *= copies;
    Random random(static_cast<uint64_t>(s.c_in * 100 + s.c_out + mode));
    fill(input, s.n * s.c_in * s.h * s.w, random);
    fill(weight, s.c_out * s.group_in() * s.kh * s.kw, random);
    fill(grad, s.n * s.c_out * s.out_h * s.out_w, random);
    for (int64_t n = 0; n < s.n; ++n) {
      in_prefix.push_back(mode == kZero ? 0 : random.below(s.c_in + 1));
      out_prefix.push_back(n == 1 || mode == kZero ? 0 : 1 + random.below(s.c_out));
    }
    p.dtype = dtype;
    p.input_stride = p.grad_input_stride = strides_of(s.c_in, s.h, s.w, channels_last);
    p.grad_output_stride = strides_of(s.c_out, s.out_h, s.out_w, channels_last);
    p.weight_stride = strides_of(s.group_in(), s.kh, s.kw, channels_last);
    p.grad_weight_dtype = dtype, p.grad_weight_stride = strides_of(s.group_in(), s.kh, s.kw, false);
    if (mode != kFull) p.in_prefix = in_prefix.data(), p.out_prefix = out_prefix.data();
    poison(input, p.input_stride, s.c_in, s.h, s.w, p.in_prefix);
    poison(grad, p.grad_output_stride, s.c_out, s.out_h, s.out_w, p.out_prefix);
    prepare();
  }

  // The whole batch again, in this object's memory, with gradients of which nothing is written yet.
  void prepare() {
    grad_input.assign(input.size(), from_float<T, float>(kNaN));
    grad_weight.assign(weight.size(), from_float<T, float>(kNaN));
    p.shape = s;
    p.input = input.data(), p.weight = weight.data(), p.grad_output = grad.data();
    p.grad_input = grad_input.data(), p.grad_weight = grad_weight.data();
    if (p.in_prefix) p.in_prefix = in_prefix.data(), p.out_prefix = out_prefix.data();
  }

  static void fill(std::vector<T>& to, int64_t count, Random& random) {
    for (int64_t i = 0; i < count; ++i) to.push_back(from_float<T, float>(static_cast<float>(random.next())));
  }

  void poison(std::vector<T>& to, const Strides4& st, int64_t channels, int64_t h, int64_t w, const int32_t* prefix) {
    for (int64_t n = 0; n < s.n && prefix; ++n)
      for (int64_t c = prefix[n]; c < channels; ++c)
        for (int64_t y = 0; y < h; ++y)
          for (int64_t x = 0; x < w; ++x) to[at(st, n, c, y, x)] = from_float<T, float>(kNaN);
  }

  static size_t at(const Strides4& st, int64_t n, int64_t c, int64_t y, int64_t x) {
    return static_cast<size_t>(n * st.n + c * st.c + y * st.h + x * st.w);
  }

  // The forward's loop, each product given back to both of its factors.
  void reference() {
    input_sum.assign(input.size(), 0), input_size.assign(input.size(), 0);
    weight_sum.assign(weight.size(), 0), weight_size.assign(weight.size(), 0);
    const Strides4 in = strides_of(s.c_in, s.h, s.w, false), of = strides_of(s.group_in(), s.kh, s.kw, false);
    for (int64_t n = 0; n < s.n; ++n)
      for (int64_t c = 0; c < p.out_live(n); ++c)
        for (int64_t i = 0; i < s.group_in() * s.kh * s.kw * s.out_h * s.out_w; ++i) {
          const int64_t ox = i % s.out_w, oy = i / s.out_w % s.out_h, tap = i / (s.out_h * s.out_w);
          const int64_t kx = tap % s.kw, ky = tap / s.kw % s.kh, ic = tap / (s.kh * s.kw);
          const int64_t channel = c / s.group_out() * s.group_in() + ic;
          const int64_t y = oy * s.stride_h - s.pad_top + ky * s.dilation_h;
          const int64_t x = ox * s.stride_w - s.pad_left + kx * s.dilation_w;
          if (y < 0 || y >= s.h || x < 0 || x >= s.w || channel >= p.in_live(n)) continue;
          const double g = to_float(grad[at(p.grad_output_stride, n, c, oy, ox)]);
          const double to_input = g * to_float(weight[at(p.weight_stride, c, ic, ky, kx)]);
          const double to_weight = g * to_float(input[at(p.input_stride, n, channel, y, x)]);
          input_sum[at(in, n, channel, y, x)] += to_input, input_size[at(in, n, channel, y, x)] += std::abs(to_input);
          weight_sum[at(of, c, ic, ky, kx)] += to_weight, weight_size[at(of, c, ic, ky, kx)] += std::abs(to_weight);
        }
  }

  // `unit`: the storage type's rounding error of one store, relative to normal numbers; below the smallest it stays.
  void check(const std::string& where, double unit) {
    if (input_sum.empty()) reference();  // once for all instruction sets
    const Strides4 in = strides_of(s.c_in, s.h, s.w, false);
    const double normal = std::is_same_v<T, Float16> ? 0x1p-14 : 0x1p-126;
    const auto close = [&](double got, double sum, double size) {
      return std::abs(got - sum) <= 32 * 0x1p-24 * size + unit * std::max(std::abs(sum), normal);
    };
    for (int64_t n = 0; n < s.n; ++n)
      for (int64_t c = 0; c < s.c_in; ++c)
        for (int64_t y = 0; y < s.h; ++y)
          for (int64_t x = 0; x < s.w; ++x) {
            const double got = to_float(grad_input[at(p.grad_input_stride, n, c, y, x)]);
            const size_t i = at(in, n, c, y, x);
            CHECK(close(got, input_sum[i], input_size[i])) << where << " input (" << n << ", " << c << ", " << y << ", "
                                                           << x << "): " << got << " instead of " << input_sum[i];
          }
    for (size_t i = 0; i < weight.size(); ++i)
      CHECK(close(to_float(grad_weight[i]), weight_sum[i], weight_size[i]))
          << where << " weight " << i << ": " << to_float(grad_weight[i]) << " instead of " << weight_sum[i];
  }
};

// f(name) with each instruction set that may differ for this type.
template <typename F>
void on_every_isa(DType dtype, F&& f) {
  const cpu::Isa before = cpu::current_isa();
  for (cpu::Isa isa : isas_of(dtype)) {
    cpu::set_isa(cpu::isa_name(isa));
    f(std::string(cpu::isa_name(isa)));
  }
  cpu::set_isa(cpu::isa_name(before));
}

template <typename T>
void check_dtype(DType dtype, double unit, const char* name) {
  for (const ConvCase& c : conv_cases())
    for (int mode = 0; mode < kModes; ++mode)
      for (bool channels_last : {true, false}) {
        GradProblem<T> problem(c, static_cast<Mode>(mode), dtype, channels_last);
        on_every_isa(dtype, [&](const std::string& isa) {
          problem.prepare();
          cpu::prefix_conv2d_input_grad(problem.p, {});
          cpu::prefix_conv2d_weight_grad(problem.p, {});
          problem.check(std::string(name) + ", " + isa + ", " + c.name + ", " + kModeNames[mode] +
                            (channels_last ? ", channels_last" : ", contiguous"),
                        unit);
        });
      }
}

const ConvCase kSmallMaps = padded_case("3x3 on 5x5, many samples", 1, 40, 5, 5, 48, 3);
// Samples that are summed together differ in which panels of 32 output channels are live.
const ConvCase kManyOutputs = padded_case("3x3 on 4x4, four panels", 1, 37, 4, 4, 120, 3);
// Many images share a chunk of positions, some of them without a part of it that is live.
const ConvCase kTinyMaps = padded_case("3x3 on 2x2, many samples", 1, 40, 2, 2, 48, 3);
// Samples so large that the input's gradient takes them one by one, each thread its own; 1x1: most pixels get nothing.
const ConvCase kStridedMap = padded_case("3x3 on 37x31 in steps of two", 1, 94, 37, 31, 9, 3, 2);
const ConvCase kStridedPoints = padded_case("1x1 on 45x47 in steps of two", 1, 61, 45, 47, 9, 1, 2);
const ConvCase kLargeMap = padded_case("3x3 on 90x90", 1, 12, 90, 90, 40, 3);

// Maps of so many positions that the input's gradient goes through Winograd.
const std::vector<ConvCase> kWinogradMaps = [] {
  ConvCase uneven = padded_case("3x3 on 22x25, uneven padding", 3, 67, 22, 25, 17, 3);
  uneven.top = 0, uneven.bottom = 2, uneven.left = 3;
  return std::vector<ConvCase>{padded_case("3x3 on 20x21", 3, 40, 20, 21, 70, 3), uneven};
}();

}  // namespace

TEST(float32_gradients_equal_the_reference_on_every_isa) { check_dtype<float>(DType::kFloat32, 0, "float32"); }
TEST(bfloat16_gradients_equal_the_reference_on_every_isa) { check_dtype<BFloat16>(DType::kBFloat16, 0x1p-8, "bf16"); }
TEST(float16_gradients_equal_the_reference_on_every_isa) {
  check_dtype<Float16>(DType::kFloat16, 0x1p-11 * 1.01, "float16");
}

template <typename T>
void check_units_and_slots(DType dtype, double unit) {
  for (Mode mode : {kFull, kMixed})
    for (const auto& [shape, copies] :
         {std::pair(kSmallMaps, 23), std::pair(kManyOutputs, 19), std::pair(kLargeMap, 3), std::pair(kTinyMaps, 150),
          std::pair(kStridedMap, 4), std::pair(kStridedPoints, 4)}) {
      GradProblem<T> problem(shape, mode, dtype, true, copies);
      on_every_isa(dtype, [&, name = shape.name](const std::string& isa) {
        problem.prepare();
        cpu::prefix_conv2d_input_grad(problem.p, std_threads(2));
        cpu::prefix_conv2d_weight_grad(problem.p, std_threads(2));
        problem.check(isa + ", " + name + ", " + kModeNames[mode], unit);
      });
    }
}

TEST(gradients_of_batches_that_are_cut_into_units_and_slots) { check_units_and_slots<float>(DType::kFloat32, 0); }
TEST(bfloat16_gradients_of_such_batches) { check_units_and_slots<BFloat16>(DType::kBFloat16, 0x1p-8); }

// The weight's gradient before it is rounded to bfloat16, which would hide most differences of a bit.
template <typename T>
std::vector<float> unrounded(const GradProblem<T>& problem, int threads) {
  std::vector<float> sums(problem.weight.size(), kNaN);
  cpu::PrefixConv2dGradParams p = problem.p;
  p.grad_weight = sums.data(), p.grad_weight_dtype = DType::kFloat32;
  cpu::prefix_conv2d_weight_grad(p, threads == 1 ? Threads{} : std_threads(threads));
  return sums;
}

template <typename T>
void check_threads(DType dtype, const std::vector<ConvCase>& more) {
  std::vector<std::pair<ConvCase, int64_t>> all = {{kSmallMaps, 23}, {kManyOutputs, 19}, {kLargeMap, 3},
                                                   {kTinyMaps, 150}, {kStridedMap, 5},   {kStridedPoints, 5}};
  for (const ConvCase& c : conv_cases()) all.emplace_back(c, 1);
  for (const ConvCase& c : more) all.emplace_back(c, 1);
  on_every_isa(dtype, [&](const std::string& isa) {
    for (const auto& [shape, copies] : all) {
      GradProblem<T> first(shape, kMixed, dtype, true, copies), other = first;
      cpu::prefix_conv2d_input_grad(first.p, {});
      for (int threads : {1, 2, 5, 32}) {
        other.prepare();
        cpu::prefix_conv2d_input_grad(other.p, std_threads(threads));
        CHECK(std::memcmp(first.grad_input.data(), other.grad_input.data(), sizeof(T) * first.grad_input.size()) == 0)
            << isa << ", " << shape.name << ", input, " << threads << " threads";
        const std::vector<float> sums = unrounded(first, 1), others = unrounded(other, threads);
        CHECK(std::memcmp(sums.data(), others.data(), sizeof(float) * sums.size()) == 0)
            << isa << ", " << shape.name << ", weight, " << threads << " threads";
      }
    }
  });
}

TEST(gradients_have_the_same_bits_on_any_threads) { check_threads<float>(DType::kFloat32, kWinogradMaps); }
TEST(bfloat16_gradients_have_the_same_bits_on_any_threads) { check_threads<BFloat16>(DType::kBFloat16, {}); }

// In float32 and as channels_last, whatever the other tensors are: what was summed, rounded less or not at all.
TEST(weight_gradients_in_the_dtype_and_layout_of_the_weight) {
  for (const ConvCase& c : conv_cases()) {
    GradProblem<BFloat16> problem(c, kMixed, DType::kBFloat16, true);
    const ConvShape& s = problem.s;
    const Strides4 contiguous = strides_of(s.group_in(), s.kh, s.kw, false),
                   last = strides_of(s.group_in(), s.kh, s.kw, true);
    on_every_isa(DType::kBFloat16, [&](const std::string& isa) {
      problem.prepare();
      cpu::prefix_conv2d_weight_grad(problem.p, {});
      std::vector<float> floats(problem.weight.size(), kNaN);
      std::vector<BFloat16> halves(problem.weight.size(), from_float<BFloat16, float>(kNaN));
      for (void* to : {static_cast<void*>(floats.data()), static_cast<void*>(halves.data())}) {
        cpu::PrefixConv2dGradParams p = problem.p;
        p.grad_weight = to, p.grad_weight_stride = last;
        p.grad_weight_dtype = to == floats.data() ? DType::kFloat32 : DType::kBFloat16;
        cpu::prefix_conv2d_weight_grad(p, {});
      }
      for (int64_t i = 0; i < static_cast<int64_t>(floats.size()); ++i) {
        const int64_t x = i % s.kw, y = i / s.kw % s.kh, ic = i / (s.kw * s.kh) % s.group_in(),
                      oc = i / (s.kw * s.kh * s.group_in());
        const float got = to_float(problem.grad_weight[problem.at(contiguous, oc, ic, y, x)]);
        const float sum = floats[problem.at(last, oc, ic, y, x)];
        CHECK_EQUAL(to_float(halves[problem.at(last, oc, ic, y, x)]), got) << isa << ", " << c.name << ", " << i;
        CHECK(std::abs(got - sum) <= 0x1p-8 * std::max(std::abs(sum), 0x1p-126f))
            << isa << ", " << c.name << ", " << i << ": " << sum << " rounded to " << got;
      }
    });
  }
}

TEST(input_gradients_through_winograd) {
  for (const ConvCase& c : kWinogradMaps)
    for (int mode = 0; mode < kModes; ++mode)
      for (bool channels_last : {true, false}) {
        GradProblem<float> problem(c, static_cast<Mode>(mode), DType::kFloat32, channels_last);
        on_every_isa(DType::kFloat32, [&](const std::string& isa) {
          const std::string where = isa + ", " + c.name + ", " + kModeNames[mode];
          problem.prepare();
          cpu::prefix_conv2d_input_grad(problem.p, std_threads(2));
          cpu::prefix_conv2d_weight_grad(problem.p, {});
          problem.check(where, 0);
          const std::vector<float> found = problem.grad_input;
          double error = 0, size = 0;
          for (int64_t n = 0; n < c.n; ++n)
            for (int64_t i = 0; i < c.c_in; ++i)
              for (int64_t y = 0; y < c.h; ++y)
                for (int64_t x = 0; x < c.w; ++x) {
                  const double sum = problem.input_sum[problem.at(strides_of(c.c_in, c.h, c.w, false), n, i, y, x)];
                  error += std::pow(found[problem.at(problem.p.grad_input_stride, n, i, y, x)] - sum, 2);
                  size += sum * sum;
                }
          CHECK(error <= 1e-10 * size) << where << ": relative L2 error " << std::sqrt(error / size);
          set_algorithm("direct");
          problem.prepare();
          cpu::prefix_conv2d_input_grad(problem.p, {});
          set_algorithm("auto");
          const bool same = std::memcmp(found.data(), problem.grad_input.data(), 4 * found.size()) == 0;
          CHECK_EQUAL(same, mode == kZero) << where << ": Winograd has other bits than direct convolution";
        });
      }
}

TEST(the_gradient_of_a_sample_has_the_same_bits_alone) {
  std::vector<ConvCase> all = conv_cases();
  all.insert(all.end(), kWinogradMaps.begin(), kWinogradMaps.end());
  for (ConvCase c : {kStridedMap, kStridedPoints}) {
    c.n = 3;
    all.push_back(c);
  }
  on_every_isa(DType::kFloat32, [&](const std::string& isa) {
    for (const ConvCase& c : all) {
      GradProblem<float> batch(c, kMixed, DType::kFloat32, true), alone = batch;
      cpu::prefix_conv2d_input_grad(batch.p, {});
      for (int64_t n = 0; n < c.n; ++n) {
        alone.prepare();
        alone.p.shape.n = 1;
        alone.p.grad_output = alone.grad.data() + n * alone.p.grad_output_stride.n;
        alone.p.in_prefix += n, alone.p.out_prefix += n;
        cpu::prefix_conv2d_input_grad(alone.p, std_threads(2));
        const size_t size = alone.grad_input.size() / static_cast<size_t>(c.n);
        CHECK(std::memcmp(alone.grad_input.data(), batch.grad_input.data() + n * size, 4 * size) == 0)
            << isa << ", " << c.name << ", sample " << n;
      }
    }
  });
}

}  // namespace rnp::tests
