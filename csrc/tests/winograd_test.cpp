// Winograd convolution on every instruction set against the plain kernel in float64, with NaN beyond every prefix and
// in every fresh output; bitwise invariance; the transformed weights.
#include "core/winograd.h"

#include <cstring>
#include <string>

#include "core/algorithm.h"
#include "core/processor.h"
#include "cpu/isa.h"
#include "cpu/winograd.h"
#include "tests/check.h"
#include "tests/conv_case.h"

namespace rnp::tests {
namespace {

struct WinogradCase {
  const char* name;
  int64_t n, c_in, h, w, c_out;
  int64_t top = 1, bottom = 1, left = 1, right = 1;
  int64_t kernel = 3;
  int64_t dilation_h = 1, dilation_w = 1;

  bool has(int64_t tile) const { return kernel == 3 || tile == 4; }
};

const WinogradCase kCases[] = {
    {"whole tiles", 2, 32, 8, 12, 64},
    {"odd sizes", 4, 37, 13, 7, 45},
    {"many blocks", 3, 20, 26, 31, 70},
    {"two pairs of blocks and a half", 3, 21, 9, 13, 150},
    {"without padding", 3, 17, 9, 10, 33, 0, 0, 0, 0},
    {"padding 2", 2, 5, 5, 6, 16, 2, 2, 2, 2},
    {"uneven padding", 3, 12, 6, 11, 20, 0, 2, 3, 1},
    {"one output pixel", 3, 9, 3, 3, 17, 0, 0, 0, 0},
    {"one pixel", 2, 3, 1, 1, 1},
    {"many input channels", 2, 300, 6, 6, 31},
    {"dilation 2", 2, 32, 16, 12, 40, 2, 2, 2, 2, 3, 2, 2},
    {"dilations 3 and 2, uneven padding", 3, 19, 17, 14, 33, 0, 4, 3, 1, 3, 3, 2},
    {"dilation in one axis", 3, 20, 9, 21, 17, 1, 1, 5, 5, 3, 1, 5},
    {"dilation beyond half of the map", 2, 9, 11, 10, 20, 7, 7, 6, 6, 3, 7, 6},
    {"folded", 2, 3, 32, 24, 64, 3, 3, 3, 3, 7},
    {"folded, odd sizes", 4, 3, 29, 38, 45, 3, 3, 3, 3, 7},
    {"folded, one channel", 3, 1, 23, 18, 20, 3, 3, 3, 3, 7},
    {"folded, four channels, uneven padding", 3, 4, 26, 21, 33, 0, 2, 3, 1, 7},
    {"folded, two channels without padding", 3, 2, 27, 25, 17, 0, 0, 0, 0, 7},
    {"folded, one output pixel", 2, 3, 7, 7, 40, 0, 0, 0, 0, 7},
};

enum Mode { kFull, kMixed, kTables, kResidual, kSkip, kModes };
const char* const kModeNames[] = {"full", "mixed prefixes", "tables, relu, pooled", "residual, relu, pooled",
                                  "skip, pooled"};

// One call with its own memory, in float32 and, for the truth, in float64.
struct Problem {
  ConvShape s;
  Mode mode;
  std::vector<float> input, weight, residual, output, transformed, packed, scale, bias, pooled;
  std::vector<double> truth;
  std::vector<int32_t> in_prefix, out_prefix, row;
  PrefixConv2dParams p;

  Problem(const WinogradCase& c, Mode m, bool channels_last) : mode(m) {
    const ConvCase shape{.name = c.name,
                         .n = c.n,
                         .c_in = c.c_in,
                         .h = c.h,
                         .w = c.w,
                         .c_out = c.c_out,
                         .kh = c.kernel,
                         .kw = c.kernel,
                         .stride_h = c.kernel == 7 ? 2 : 1,
                         .stride_w = c.kernel == 7 ? 2 : 1,
                         .top = c.top,
                         .bottom = c.bottom,
                         .left = c.left,
                         .right = c.right,
                         .dilation_h = c.dilation_h,
                         .dilation_w = c.dilation_w};
    s = shape.shape();
    Random random(static_cast<uint64_t>(s.c_in * 1000 + s.c_out * 10 + m));
    fill(input, s.n * s.c_in * s.h * s.w, random);
    fill(weight, s.c_out * s.c_in * c.kernel * c.kernel, random);
    fill(residual, s.n * s.c_out * s.out_h * s.out_w, random);
    fill(scale, 3 * s.c_out, random);
    fill(bias, 3 * s.c_out, random);
    const int64_t in[] = {s.c_in, 1, (s.c_in + 1) / 2, 0}, out[] = {(s.c_out + 1) / 2, s.c_out, 1, s.c_out};
    for (int64_t n = 0; n < s.n; ++n) {
      in_prefix.push_back(static_cast<int32_t>(in[n % 4]));
      out_prefix.push_back(static_cast<int32_t>(out[n % 4]));
      row.push_back(random.below(3));
    }
    p.input_stride = strides_of(s.c_in, s.h, s.w, channels_last);
    p.weight_stride = strides_of(s.c_in, c.kernel, c.kernel, false);
    p.output_stride = p.residual_stride = strides_of(s.c_out, s.out_h, s.out_w, channels_last);
    if (m != kFull)
      for (int64_t n = 0; n < s.n; ++n)
        for (int64_t i = 0; i < s.h * s.w * (s.c_in - in_prefix[n]); ++i) {
          const int64_t channel = in_prefix[n] + i / (s.h * s.w), y = i / s.w % s.h, x = i % s.w;
          const Strides4& st = p.input_stride;
          input[static_cast<size_t>(n * st.n + channel * st.c + y * st.h + x * st.w)] = kNaN;
        }
    if (m == kTables) p.scale_row_stride = p.bias_row_stride = s.c_out;
    if (m == kTables || m == kResidual) p.activation = Activation::kRelu;
    if (m == kSkip) p.tail = Tail::kSkip;
    packed.resize(static_cast<size_t>(PackedLayout(s).total_floats()));
    cpu::pack_weight({weight.data(), DType::kFloat32, p.weight_stride}, PackedLayout(s), packed.data(), {});
  }

  // The whole batch, with weights transformed for this tile by the instruction set in use, and outputs of which nothing
  // is written yet.
  void prepare(int64_t tile) {
    const WinogradLayout layout{tile, s.c_in, s.c_out, s.kh};
    transformed.assign(static_cast<size_t>(layout.total_floats()), kNaN);
    cpu::pack_winograd({weight.data(), DType::kFloat32, p.weight_stride}, layout, transformed.data(), std_threads(2));
    output.assign(residual.size(), kNaN);
    pooled.assign(static_cast<size_t>(s.n * s.c_out), kNaN);
    p.shape = s;
    p.winograd = transformed.data();
    p.winograd_tile = tile;
    p.packed = packed.data();
    if (mode != kFull) p.in_prefix = in_prefix.data(), p.out_prefix = out_prefix.data();
    if (mode == kTables) p.row = row.data();
    if (mode >= kTables) p.pooled = pooled.data();
    bind(p, input, weight, residual, scale, bias, output);
  }

  static void fill(std::vector<float>& to, int64_t count, Random& random) {
    for (int64_t i = 0; i < count; ++i) to.push_back(static_cast<float>(random.next()));
  }

  template <typename T>
  void bind(PrefixConv2dParams& to, const std::vector<T>& x, const std::vector<T>& w, const std::vector<T>& r,
            const std::vector<T>& a, const std::vector<T>& b, std::vector<T>& y) const {
    to.input = x.data(), to.weight = w.data(), to.output = y.data();
    to.residual = mode == kResidual ? r.data() : nullptr;
    to.scale = mode == kTables ? a.data() : nullptr;
    to.bias = mode == kTables || mode == kFull ? b.data() : nullptr;
  }

  // What the plain kernel computes in float64; 0 in a skipped tail, which is not compared and counts so in the mean.
  void compute_truth() {
    const auto widen = [](const std::vector<float>& from) { return std::vector<double>(from.begin(), from.end()); };
    truth.assign(output.size(), 0.0);
    PrefixConv2dParams wide = p;
    const std::vector<double> x = widen(input), w = widen(weight), r = widen(residual), a = widen(scale),
                              b = widen(bias);
    bind(wide, x, w, r, a, b, truth);
    wide.dtype = DType::kFloat64;
    wide.pooled = nullptr;
    cpu::prefix_conv2d_plain(wide, {});
  }

  // Checks the output that a call wrote, and its means, against the plain kernel in float64.
  void check(const std::string& where) {
    if (truth.empty()) compute_truth();  // once for all instruction sets and tiles
    double error = 0, size = 0, mean_error = 0, mean_size = 0, largest = 0;
    const Strides4& st = p.output_stride;
    for (int64_t n = 0; n < s.n; ++n)
      for (int64_t c = 0; c < s.c_out; ++c) {
        const bool defined = p.tail == Tail::kZero || c < p.out_live(n);
        double mean = 0;
        for (int64_t y = 0; y < s.out_h; ++y)
          for (int64_t x = 0; x < s.out_w; ++x) {
            const auto at = static_cast<size_t>(n * st.n + c * st.c + y * st.h + x * st.w);
            if (!defined) continue;
            const double difference = output[at] - truth[at];
            error += difference * difference, size += truth[at] * truth[at], mean += truth[at];
            largest = std::isnan(difference) ? difference : std::max(largest, std::abs(difference));
            CHECK(c < p.out_live(n) || difference == 0) << where << ": tail of sample " << n << ", channel " << c;
          }
        const double difference = mode >= kTables ? pooled[static_cast<size_t>(n * s.c_out + c)] -
                                                        mean / static_cast<double>(s.out_h * s.out_w)
                                                  : 0;
        mean_error += difference * difference, mean_size += std::pow(mean / static_cast<double>(s.out_h * s.out_w), 2);
      }
    CHECK(std::sqrt(error) <= 1e-5 * std::sqrt(size)) << where << ": relative error " << std::sqrt(error / size);
    // No single element stands out: 8 times what an even spread of that bound would give.
    CHECK(largest <= 8e-5 * std::sqrt(size / static_cast<double>(output.size()))) << where << ": error " << largest;
    CHECK(std::sqrt(mean_error) <=
          1e-5 * std::sqrt(size / static_cast<double>(output.size()) * static_cast<double>(pooled.size())))
        << where << ": error of the means " << std::sqrt(mean_error);
  }
};

// f(tile, name) with each instruction set and each tile that the case has.
template <typename F>
void on_every_isa_and_tile(const WinogradCase& c, F&& f) {
  const cpu::Isa before = cpu::current_isa();
  for (cpu::Isa isa : isas_of(DType::kFloat32))
    for (int64_t tile : {2, 4}) {
      if (!c.has(tile)) continue;
      cpu::set_isa(cpu::isa_name(isa));
      set_algorithm(tile == 2 ? "winograd2" : "winograd4");
      f(tile, std::string(cpu::isa_name(isa)) + ", tile " + std::to_string(tile) + ", ");
    }
  set_algorithm("auto");
  cpu::set_isa(cpu::isa_name(before));
}

}  // namespace

TEST(winograd_equals_the_plain_kernel_on_every_isa) {
  for (const WinogradCase& c : kCases)
    for (int mode = 0; mode < kModes; ++mode)
      for (bool channels_last : {true, false}) {
        Problem problem(c, static_cast<Mode>(mode), channels_last);
        on_every_isa_and_tile(c, [&](int64_t tile, const std::string& where) {
          problem.prepare(tile);
          cpu::prefix_conv2d(problem.p, {});
          problem.check(where + c.name + ", " + kModeNames[mode] + (channels_last ? "" : ", contiguous"));
        });
      }
}

TEST(winograd_gives_a_sample_the_same_bits_alone_in_a_batch_and_with_any_threads) {
  for (const WinogradCase& c : kCases)
    for (Mode mode : {kFull, kTables, kResidual}) {
      Problem batch(c, mode, true), other = batch;
      on_every_isa_and_tile(c, [&](int64_t tile, const std::string& where) {
        batch.prepare(tile);
        cpu::prefix_conv2d(batch.p, {});
        for (int threads : {2, 5}) {
          other.prepare(tile);
          cpu::prefix_conv2d(other.p, std_threads(threads));
          CHECK(std::memcmp(other.output.data(), batch.output.data(), 4 * batch.output.size()) == 0)
              << where << c.name << ", " << threads << " threads";
          CHECK(mode == kFull || std::memcmp(other.pooled.data(), batch.pooled.data(), 4 * batch.pooled.size()) == 0)
              << where << c.name << ", means, " << threads << " threads";
        }
        for (int64_t n = 0; n < c.n; ++n) {
          other.prepare(tile);
          PrefixConv2dParams& p = other.p;
          p.shape.n = 1;
          p.input = other.input.data() + n * p.input_stride.n;
          if (p.residual) p.residual = other.residual.data() + n * p.residual_stride.n;
          if (p.in_prefix) p.in_prefix += n, p.out_prefix += n;
          if (p.row) p.row += n;
          cpu::prefix_conv2d(p, std_threads(2));
          const size_t size = batch.output.size() / static_cast<size_t>(c.n), means = static_cast<size_t>(c.c_out);
          const auto at = static_cast<size_t>(n);
          CHECK(std::memcmp(other.output.data(), batch.output.data() + at * size, 4 * size) == 0)
              << where << c.name << ", sample " << n;
          CHECK(mode == kFull || std::memcmp(other.pooled.data(), batch.pooled.data() + at * means, 4 * means) == 0)
              << where << c.name << ", means of sample " << n;
        }
      });
    }
}

// Wide tiles, of two blocks of output channels, and narrow ones; of a batch whose samples reach other blocks.
TEST(no_bit_of_winograd_depends_on_the_processor) {
  const Processor before = processor();
  for (const WinogradCase& c : kCases)
    for (Mode mode : {kFull, kMixed, kResidual}) {
      if (c.c_out < 64) continue;
      Problem problem(c, mode, true);
      on_every_isa_and_tile(c, [&](int64_t tile, const std::string& where) {
        const auto run = [&](bool wide) {
          set_processor({.paired_multiply_adds = wide});
          problem.prepare(tile);
          cpu::prefix_conv2d(problem.p, {});
          problem.check(where + c.name + ", " + kModeNames[mode]);
          return problem.output;
        };
        const std::vector<float> narrow = run(false);
        CHECK(std::memcmp(run(true).data(), narrow.data(), 4 * narrow.size()) == 0)
            << where << c.name << ", " << kModeNames[mode];
      });
    }
  set_processor(before);
}

TEST(winograd_and_direct_samples_share_a_batch) {
  set_algorithm("auto");
  const WinogradCase c{"mixed algorithms", 4, 64, 16, 16, 64};
  Problem problem(c, kResidual, true);
  problem.in_prefix = {64, 1, 64, 48}, problem.out_prefix = {64, 64, 1, 48};
  problem.prepare(4);
  for (float& v : problem.input) v = std::isnan(v) ? 0.5f : v;
  CHECK_EQUAL(winograd_tile(problem.s, DType::kFloat32), 4);
  const cpu::WinogradSamples split(problem.p);
  CHECK_EQUAL(split.samples.size(), 2u) << "the narrow ones are computed directly";
  cpu::prefix_conv2d(problem.p, std_threads(2));
  problem.check("mixed algorithms");
}

TEST(winograd_is_chosen_by_the_layer_and_the_prefixes) {
  set_algorithm("auto");
  ConvShape s = ConvCase{.name = "",
                         .n = 1,
                         .c_in = 64,
                         .h = 28,
                         .w = 28,
                         .c_out = 64,
                         .kh = 3,
                         .kw = 3,
                         .top = 1,
                         .bottom = 1,
                         .left = 1,
                         .right = 1}
                    .shape();
  CHECK(choose_algorithm(s, DType::kFloat32, 64, 64) == Algorithm::kWinograd4);
  for (const auto& [dilation, chosen] : {std::pair{int64_t{2}, Algorithm::kWinograd4},
                                         {int64_t{6}, Algorithm::kDirect},
                                         {int64_t{14}, Algorithm::kWinograd2},
                                         {int64_t{20}, Algorithm::kDirect}}) {
    ConvShape other = s;
    other.dilation_h = other.dilation_w = dilation;
    CHECK_EQUAL(static_cast<int>(choose_algorithm(other, DType::kFloat32, 64, 64)), static_cast<int>(chosen));
  }
  CHECK(choose_algorithm(s, DType::kFloat32, 0, 64) == Algorithm::kDirect);
  CHECK(choose_algorithm(s, DType::kFloat32, 64, 0) == Algorithm::kDirect);
  CHECK(choose_algorithm(s, DType::kBFloat16, 64, 64) == Algorithm::kDirect);
  set_algorithm("direct");
  CHECK(choose_algorithm(s, DType::kFloat32, 64, 64) == Algorithm::kDirect);
  set_algorithm("winograd2");
  CHECK(choose_algorithm(s, DType::kFloat32, 1, 1) == Algorithm::kWinograd2);
  for (int64_t ConvShape::* field : {&ConvShape::stride_h, &ConvShape::groups, &ConvShape::kh}) {
    ConvShape other = s;
    other.*field = 2;
    CHECK(choose_algorithm(other, DType::kFloat32, 64, 64) == Algorithm::kDirect);
  }
  ConvShape dilated = s;
  dilated.dilation_h = dilated.dilation_w = 28;
  CHECK(choose_algorithm(dilated, DType::kFloat32, 64, 64) == Algorithm::kWinograd2);
  dilated.dilation_w = 29;
  CHECK(choose_algorithm(dilated, DType::kFloat32, 64, 64) == Algorithm::kDirect) << "each output is a map";
  CHECK(test::message_of([] { set_algorithm("fast"); }).find("got 'fast'") != std::string::npos);
  CHECK_EQUAL(std::string(get_algorithm()), "winograd2");
  set_algorithm("auto");
}

TEST(transformed_weights_know_what_they_were_made_from) {
  Problem problem(kCases[1], kFull, true);
  problem.prepare(4);
  std::vector<float>& packed = problem.transformed;
  const auto floats = static_cast<int64_t>(packed.size());
  const cpu::WeightView view{problem.weight.data(), DType::kFloat32, problem.p.weight_stride};
  int64_t tile = 0;
  CHECK(cpu::winograd_mismatch(packed.data(), floats, 45, 37, 3, &tile) == nullptr);
  CHECK_EQUAL(tile, 4);
  CHECK(cpu::winograd_mismatch(packed.data(), 3, 45, 37, 3, &tile) != nullptr);
  CHECK(cpu::winograd_mismatch(packed.data(), floats - 1, 45, 37, 3, &tile) != nullptr);
  CHECK(cpu::winograd_mismatch(packed.data(), floats, 37, 45, 3, &tile) != nullptr);
  CHECK(cpu::winograd_mismatch(problem.packed.data(), static_cast<int64_t>(problem.packed.size()), 45, 37, 3, &tile) !=
        nullptr);
  CHECK(cpu::packed_is_fresh(view, PackedLayout(problem.s), packed.data()));
  for (float& w : problem.weight) w += 1;
  CHECK(!cpu::packed_is_fresh(view, PackedLayout(problem.s), packed.data()));
  for (float v : packed) CHECK(!std::isnan(v)) << "a word was left unwritten";
}

}  // namespace rnp::tests
