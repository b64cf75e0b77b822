// Every instruction set's kernels against a double-precision reference, with NaN beyond every prefix; bitwise
// invariance.
#include <algorithm>
#include <cstring>
#include <string>

#include "core/processor.h"
#include "cpu/isa.h"
#include "cpu/scratch.h"
#include "tests/check.h"
#include "tests/conv_case.h"

namespace rnp::tests {
namespace {

enum Mode { kFull, kMixed, kTables, kResidual, kSkip, kModes };
const char* const kModeNames[] = {"full", "mixed prefixes", "tables, relu, pooled", "residual, relu, pooled",
                                  "skip, pooled"};

// One call with its own memory. T is the storage type of input, weight, residual and output.
template <typename T>
struct Problem {
  ConvShape s;
  Mode mode;
  double unit;  // the storage type's rounding error of one store, relative
  std::vector<T> input, weight, residual, output;
  std::vector<float> packed, scale, bias, pooled;
  std::vector<double> reference, tolerance;  // (n, c, h, w); NaN where the output is undefined
  std::vector<int32_t> in_prefix, out_prefix, row;
  PrefixConv2dParams p;

  Problem(const ConvCase& c, Mode m, DType dtype, bool channels_last, double u) : s(c.shape()), mode(m), unit(u) {
    Random random(static_cast<uint64_t>(s.c_in * 100 + s.c_out + m));
    fill(weight, s.c_out * s.group_in() * s.kh * s.kw, random);
    fill(input, s.n * s.c_in * s.h * s.w, random);
    fill(residual, s.n * s.c_out * s.out_h * s.out_w, random);
    for (int i = 0; i < 3 * s.c_out; ++i) scale.push_back(static_cast<float>(random.next()));
    for (int i = 0; i < 3 * s.c_out; ++i) bias.push_back(static_cast<float>(random.next()));
    for (int64_t n = 0; n < s.n; ++n) {
      in_prefix.push_back(random.below(s.c_in + 1));
      out_prefix.push_back(n == 1 ? 0 : 1 + random.below(s.c_out));
      row.push_back(random.below(3));
    }
    p.dtype = dtype;
    p.input_stride = strides_of(s.c_in, s.h, s.w, channels_last);
    p.weight_stride = strides_of(s.group_in(), s.kh, s.kw, false);
    p.output_stride = p.residual_stride = strides_of(s.c_out, s.out_h, s.out_w, channels_last);
    if (mode == kTables) p.scale_row_stride = p.bias_row_stride = s.c_out;
    if (mode == kTables || mode == kResidual) p.activation = Activation::kRelu;
    if (mode == kSkip) p.tail = Tail::kSkip;
    prepare();
    poison();
  }

  // The whole batch again, in this object's memory: weights packed for the instruction set in use, outputs of which
  // nothing is written yet.
  void prepare() {
    const PackedLayout l = cpu::layout_in_use(s, p.dtype);
    packed.assign(static_cast<size_t>(l.total_floats()), 0);
    cpu::pack_weight({weight.data(), p.dtype, p.weight_stride}, l, packed.data(), {});
    output.assign(residual.size(), from_float<T, float>(kNaN));
    pooled.assign(static_cast<size_t>(s.n * s.c_out), kNaN);
    p.shape = s;
    p.pairs = l.pairs;
    p.input = input.data(), p.weight = weight.data(), p.packed = packed.data(), p.output = output.data();
    if (mode != kFull) p.in_prefix = in_prefix.data(), p.out_prefix = out_prefix.data();
    if (mode == kTables) p.scale = scale.data(), p.row = row.data();
    if (mode == kTables || mode == kFull) p.bias = bias.data();
    if (mode == kResidual) p.residual = residual.data();
    if (mode >= kTables) p.pooled = pooled.data();
  }

  static void fill(std::vector<T>& to, int64_t count, Random& random) {
    for (int64_t i = 0; i < count; ++i) to.push_back(from_float<T, float>(static_cast<float>(random.next())));
  }

  void poison() {
    for (int64_t n = 0; n < s.n && p.in_prefix; ++n)
      for (int64_t c = in_prefix[n]; c < s.c_in; ++c)
        for (int64_t y = 0; y < s.h; ++y)
          for (int64_t x = 0; x < s.w; ++x) input[at(p.input_stride, n, c, y, x)] = from_float<T, float>(kNaN);
  }

  static size_t at(const Strides4& st, int64_t n, int64_t c, int64_t y, int64_t x) {
    return static_cast<size_t>(n * st.n + c * st.c + y * st.h + x * st.w);
  }

  void compute_reference() {
    const int64_t icg = s.group_in(), ocg = s.group_out();
    for (int64_t n = 0; n < s.n; ++n)
      for (int64_t c = 0; c < s.c_out; ++c)
        for (int64_t oy = 0; oy < s.out_h; ++oy)
          for (int64_t ox = 0; ox < s.out_w; ++ox) {
            double sum = 0, magnitude = 0, terms = 1;
            for (int64_t i = 0; i < icg * s.kh * s.kw; ++i) {
              const int64_t ic = i / (s.kh * s.kw), ky = i / s.kw % s.kh, kx = i % s.kw, channel = c / ocg * icg + ic;
              const int64_t y = oy * s.stride_h - s.pad_top + ky * s.dilation_h;
              const int64_t x = ox * s.stride_w - s.pad_left + kx * s.dilation_w;
              if (y < 0 || y >= s.h || x < 0 || x >= s.w || channel >= p.in_live(n)) continue;
              const double v = static_cast<double>(to_float(input[at(p.input_stride, n, channel, y, x)])) *
                               static_cast<double>(to_float(weight[at(p.weight_stride, c, ic, ky, kx)]));
              sum += v, magnitude += std::abs(v), terms += 1;
            }
            const int64_t line = p.row ? row[n] : 0;
            const double a = p.scale ? scale[line * s.c_out + c] : 1, b = p.bias ? bias[line * s.c_out + c] : 0;
            const bool live = c < p.out_live(n);
            double v = live ? sum * a + b : 0;
            if (p.residual) v += to_float(residual[at(p.residual_stride, n, c, oy, ox)]);
            if (p.activation == Activation::kRelu) v = std::max(v, 0.0);
            reference.push_back(!live && p.tail == Tail::kSkip ? kNaN : v);
            tolerance.push_back(8 * 0x1p-24 * (std::sqrt(terms) * magnitude * std::abs(a) + std::abs(b) + std::abs(v)) +
                                unit * std::abs(v));
          }
  }

  void check(const std::string& where) {
    if (reference.empty()) compute_reference();  // once for all instruction sets
    size_t i = 0;
    for (int64_t n = 0; n < s.n; ++n)
      for (int64_t c = 0; c < s.c_out; ++c) {
        double mean = 0, slack = 0;
        for (int64_t y = 0; y < s.out_h; ++y)
          for (int64_t x = 0; x < s.out_w; ++x, ++i) {
            const double got = to_float(output[at(p.output_stride, n, c, y, x)]);
            if (std::isnan(reference[i])) continue;  // skipped tail: counts as 0 in the mean
            mean += reference[i], slack += tolerance[i] + 1e-6 * std::abs(reference[i]);
            CHECK(std::abs(got - reference[i]) <= tolerance[i])
                << where << " at (" << n << ", " << c << ", " << y << ", " << x << "): " << got << " instead of "
                << reference[i];
          }
        if (!p.pooled) continue;
        const double positions = static_cast<double>(s.out_h * s.out_w),
                     got = pooled[static_cast<size_t>(n * s.c_out + c)];
        CHECK(std::abs(got - mean / positions) <= slack / positions)
            << where << " mean of (" << n << ", " << c << "): " << got << " instead of " << mean / positions;
      }
  }
};

template <typename T>
void check_dtype(DType dtype, double unit, const char* name) {
  const cpu::Isa before = cpu::current_isa();
  for (const ConvCase& c : conv_cases())
    for (int mode = 0; mode < kModes; ++mode)
      for (bool channels_last : {true, false}) {
        Problem<T> problem(c, static_cast<Mode>(mode), dtype, channels_last, unit);
        for (cpu::Isa isa : isas_of(dtype)) {
          cpu::set_isa(cpu::isa_name(isa));
          problem.prepare();
          cpu::prefix_conv2d(problem.p, {});
          problem.check(std::string(name) + ", " + cpu::isa_name(isa) + ", " + c.name + ", " + kModeNames[mode] +
                        (channels_last ? ", channels_last" : ", contiguous"));
        }
      }
  cpu::set_isa(cpu::isa_name(before));
}

}  // namespace

TEST(float32_equals_the_reference_on_every_isa) { check_dtype<float>(DType::kFloat32, 0, "float32"); }
TEST(bfloat16_equals_the_reference_on_every_isa) { check_dtype<BFloat16>(DType::kBFloat16, 0x1p-8, "bfloat16"); }
TEST(float16_equals_the_reference_on_every_isa) { check_dtype<Float16>(DType::kFloat16, 0x1p-11 * 1.01, "float16"); }

TEST(the_plain_kernel_equals_the_reference) {
  for (const ConvCase& c : conv_cases())
    for (int mode = 0; mode < kModes; ++mode) {
      Problem<float> problem(c, static_cast<Mode>(mode), DType::kFloat32, true, 0);
      cpu::prefix_conv2d_plain(problem.p, std_threads(2));
      problem.check(std::string("plain, ") + c.name + ", " + kModeNames[mode]);
    }
}

template <typename T>
void check_invariance(DType dtype) {
  const cpu::Isa before = cpu::current_isa();
  for (cpu::Isa isa : isas_of(dtype)) {
    cpu::set_isa(cpu::isa_name(isa));
    for (const ConvCase& c : conv_cases())
      for (Mode mode : {kTables, kResidual}) {
        const std::string where = std::string(cpu::isa_name(isa)) + ", " + c.name + ", " + kModeNames[mode];
        Problem<T> batch(c, mode, dtype, true, 0), other = batch;
        cpu::prefix_conv2d(batch.p, {});
        for (int threads : {2, 5}) {
          other.prepare();
          cpu::prefix_conv2d(other.p, std_threads(threads));
          CHECK(std::memcmp(other.output.data(), batch.output.data(), sizeof(T) * batch.output.size()) == 0)
              << where << ", threads";
          CHECK(std::memcmp(other.pooled.data(), batch.pooled.data(), 4 * batch.pooled.size()) == 0)
              << where << ", threads";
        }
        for (int64_t n = 0; n < c.n; ++n) {
          other.prepare();
          PrefixConv2dParams& p = other.p;
          p.shape.n = 1;
          p.input = other.input.data() + n * p.input_stride.n;
          if (p.residual) p.residual = other.residual.data() + n * p.residual_stride.n;
          p.in_prefix += n, p.out_prefix += n;
          if (p.row) p.row += n;
          cpu::prefix_conv2d(p, std_threads(2));
          const size_t size = other.output.size() / static_cast<size_t>(c.n), means = static_cast<size_t>(c.c_out);
          CHECK(std::memcmp(other.output.data(), batch.output.data() + n * size, sizeof(T) * size) == 0)
              << where << ", sample " << n;
          CHECK(std::memcmp(other.pooled.data(), batch.pooled.data() + n * means, 4 * means) == 0)
              << where << ", sample " << n;
        }
      }
  }
  cpu::set_isa(cpu::isa_name(before));
}

TEST(a_sample_has_the_same_bits_alone_in_a_batch_and_with_any_threads) {
  check_invariance<float>(DType::kFloat32);
  check_invariance<BFloat16>(DType::kBFloat16);
}

// Tiles of other widths, and lines that are asked for or not: the machine at hand has one of these, CI another.
TEST(no_bit_depends_on_the_processor) {
  const Processor before = processor();
  for (const ConvCase& c : conv_cases())
    for (Mode mode : {kFull, kTables, kResidual})
      for (bool channels_last : {true, false}) {
        Problem<float> problem(c, mode, DType::kFloat32, channels_last, 0);
        const auto run = [&](Processor one_of_them) {
          set_processor(one_of_them);
          problem.prepare();
          cpu::prefix_conv2d(problem.p, {});
          problem.check(std::string(c.name) + ", " + kModeNames[mode]);
          return problem.output;
        };
        const std::vector<float> one = run({});
        for (Processor other :
             {Processor{.paired_multiply_adds = true}, Processor{.paired_multiply_adds = true, .follows_rows = true}})
          CHECK(std::memcmp(run(other).data(), one.data(), sizeof(float) * one.size()) == 0)
              << c.name << ", " << kModeNames[mode] << ", pairs " << other.paired_multiply_adds << ", follows "
              << other.follows_rows;
      }
  set_processor(before);
}

// Two blocks of output channels at once, as some processors want them, on whatever machine this runs.
TEST(wide_tiles_equal_the_reference_and_change_no_bit) {
  ConvCase groups = padded_case("two groups", 3, 22, 3, 19, 140, 3);
  groups.groups = 2;
  const ConvCase cases[] = {
      padded_case("rows of three tiles, two input blocks", 3, 70, 5, 16, 150, 3),
      padded_case("uneven rows", 3, 13, 4, 31, 100, 3),
      padded_case("steps of two", 3, 9, 7, 37, 96, 3, 2),
      padded_case("one row", 3, 40, 1, 15, 130, 3),
      groups,
      padded_case("1x1, two input blocks", 3, 300, 5, 9, 144, 1),
      padded_case("1x1, copied", 3, 1024, 3, 7, 80, 1),
      padded_case("1x1, weights past L2", 3, 520, 4, 5, 260, 1),
      padded_case("1x1, weights past L2, one tile", 3, 520, 1, 2, 260, 1),
      padded_case("1x1 in steps of two", 3, 21, 5, 33, 100, 1, 2),
  };
  const Processor before = processor();
  for (const ConvCase& c : cases)
    for (int mode = 0; mode < kModes; ++mode) {
      Problem<float> problem(c, static_cast<Mode>(mode), DType::kFloat32, true, 0);
      const std::string where = std::string(c.name) + ", " + kModeNames[mode];
      const auto run = [&](bool wide, const Threads& threads) {
        set_processor({.paired_multiply_adds = wide});
        problem.prepare();
        cpu::prefix_conv2d(problem.p, threads);
        problem.check(where + (wide ? ", wide" : ""));
        return problem.output;
      };
      const std::vector<float> narrow = run(false, {});
      for (int threads : {1, 3})
        CHECK(std::memcmp(run(true, std_threads(threads)).data(), narrow.data(), sizeof(float) * narrow.size()) == 0)
            << where << ", " << threads << " threads";
    }
  set_processor(before);
}

// The batch spans enough for its output to be stored past the caches, a sample alone does not.
TEST(stores_past_the_caches_change_no_bit) {
  const ConvShape shape =
      ConvCase{.name = "", .n = 8, .c_in = 64, .h = 56, .w = 56, .c_out = 64, .kh = 1, .kw = 1}.shape();
  const std::vector<int32_t> in = {64, 17, 48, 0, 33, 64, 16, 5}, out = {64, 48, 16, 64, 20, 33, 64, 7};
  const size_t sample = 64 * 56 * 56, all = 8 * sample;
  cpu::ScratchMemory memory;  // whole cache lines, as streaming needs them
  float *x = memory.get(3 * all), *batch = x + all, *alone = batch + all;
  Random random(5);
  for (size_t i = 0; i < all; ++i) x[i] = static_cast<float>(random.next());
  std::fill(batch, batch + 2 * all, kNaN);
  std::vector<float> weight, packed(static_cast<size_t>(PackedLayout(shape).total_floats()));
  for (int i = 0; i < 64 * 64; ++i) weight.push_back(static_cast<float>(random.next()));
  PrefixConv2dParams p;
  p.shape = shape;
  p.input_stride = p.output_stride = strides_of(64, 56, 56, true);
  p.weight_stride = strides_of(64, 1, 1, false);
  cpu::pack_weight({weight.data(), p.dtype, p.weight_stride}, PackedLayout(shape), packed.data(), {});
  p.packed = packed.data();
  p.input = x, p.output = batch, p.in_prefix = in.data(), p.out_prefix = out.data();
  cpu::prefix_conv2d(p, std_threads(2));
  p.shape.n = 1;
  for (size_t n = 0; n < in.size(); ++n) {
    p.input = x + n * sample, p.output = alone + n * sample, p.in_prefix = &in[n], p.out_prefix = &out[n];
    cpu::prefix_conv2d(p, {});
  }
  CHECK(std::memcmp(batch, alone, all * sizeof(float)) == 0);
}

TEST(nan_and_infinity_of_live_channels_pass_through) {
  const cpu::Isa before = cpu::current_isa();
  for (cpu::Isa isa : isas_of(DType::kFloat32)) {
    cpu::set_isa(cpu::isa_name(isa));
    for (float value : {kNaN, std::numeric_limits<float>::infinity()}) {
      Problem<float> problem(conv_cases()[0], kFull, DType::kFloat32, true, 0);
      problem.p.activation = Activation::kRelu;
      problem.input[problem.at(problem.p.input_stride, 1, 2, 5, 3)] = value;
      cpu::prefix_conv2d(problem.p, {});
      for (int64_t c = 0; c < problem.s.c_out; ++c) {
        const float centre = problem.output[problem.at(problem.p.output_stride, 1, c, 5, 3)];
        const float weight = problem.weight[problem.at(problem.p.weight_stride, c, 2, 1, 1)];
        const float far = problem.output[problem.at(problem.p.output_stride, 1, c, 8, 3)];
        CHECK(std::isnan(value) ? std::isnan(centre) : centre == (weight > 0 ? value : 0.0f)) << cpu::isa_name(isa);
        CHECK(std::isfinite(far)) << cpu::isa_name(isa) << ": it spread to a pixel that does not see it";
      }
    }
  }
  cpu::set_isa(cpu::isa_name(before));
}

}  // namespace rnp::tests
