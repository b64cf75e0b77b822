// Kernels that multiply bfloat16 in pairs of channels: where the pairs lie, and every prefix, odd ones included.
#include <cstring>
#include <string>

#include "cpu/isa.h"
#include "tests/check.h"
#include "tests/conv_case.h"

namespace rnp::tests {
namespace {

const BFloat16 kNaN16 = from_float<BFloat16, float>(kNaN);

ConvCase square(int64_t c_in, int64_t side, int64_t c_out, int64_t kernel, int64_t groups = 1) {
  ConvCase c = {.name = "", .n = 1, .c_in = c_in, .h = side, .w = side, .c_out = c_out, .kh = kernel, .kw = kernel};
  c.top = c.bottom = c.left = c.right = kernel / 2;
  c.groups = groups;
  return c;
}

std::vector<BFloat16> values(int64_t count, uint64_t seed) {
  Random random(seed);
  std::vector<BFloat16> out;
  for (int64_t i = 0; i < count; ++i) out.push_back(from_float<BFloat16, float>(static_cast<float>(random.next())));
  return out;
}

// One sample: pixels `pitch` apart, of which the first `in_live` channels are live and all others NaN.
std::vector<BFloat16> convolve(const ConvShape& s, int64_t pitch, int32_t in_live, int32_t out_live, bool plain,
                               int64_t packed_live = INT64_MAX) {
  const PackedLayout l = cpu::layout_in_use(s, DType::kBFloat16);
  const auto from = values(s.c_in * s.h * s.w, 1), weight = values(s.c_out * l.icg * s.kh * s.kw, 2);
  std::vector<BFloat16> input(static_cast<size_t>(pitch * s.h * s.w), kNaN16);
  for (int64_t i = 0; i < s.h * s.w; ++i)
    for (int64_t c = 0; c < in_live; ++c)
      input[static_cast<size_t>(i * pitch + c)] = from[static_cast<size_t>(i * s.c_in + c)];
  std::vector<BFloat16> output(static_cast<size_t>(s.c_out * s.out_h * s.out_w), kNaN16);
  std::vector<float> packed(static_cast<size_t>(l.total_floats()), kNaN);
  PrefixConv2dParams p;
  p.shape = s;
  p.dtype = DType::kBFloat16;
  p.pairs = l.pairs;
  p.input_stride = {pitch * s.h * s.w, 1, s.w * pitch, pitch};
  p.weight_stride = strides_of(l.icg, s.kh, s.kw, false);
  p.output_stride = strides_of(s.c_out, s.out_h, s.out_w, true);
  cpu::pack_weight({weight.data(), p.dtype, p.weight_stride}, l, packed.data(), {}, packed_live);
  p.input = input.data(), p.weight = weight.data(), p.packed = packed.data(), p.output = output.data();
  p.in_prefix = &in_live, p.out_prefix = &out_live;
  plain ? cpu::prefix_conv2d_plain(p, {}) : cpu::prefix_conv2d(p, {});
  return output;
}

bool same(const std::vector<BFloat16>& a, const std::vector<BFloat16>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(BFloat16)) == 0;
}

// Runs `body` with each instruction set that multiplies pairs and that this machine has.
template <typename F>
void on_pairs(F&& body) {
  const cpu::Isa before = cpu::current_isa();
  for (cpu::Isa isa : cpu::available_isas()) {
    if (isa < cpu::Isa::kAvx512Bf16) continue;
    cpu::set_isa(cpu::isa_name(isa));
    body();
  }
  cpu::set_isa(cpu::isa_name(before));
}

}  // namespace

TEST(pairs_are_what_the_instruction_set_and_the_layer_allow) {
  const ConvShape dense = square(9, 4, 5, 3).shape(), even = square(8, 4, 4, 3, 2).shape(),
                  odd = square(6, 4, 4, 3, 2).shape(), depthwise = square(4, 4, 4, 3, 4).shape();
  const cpu::Isa before = cpu::current_isa();
  for (cpu::Isa isa : cpu::available_isas()) {
    cpu::set_isa(cpu::isa_name(isa));
    const bool has = isa >= cpu::Isa::kAvx512Bf16;
    CHECK_EQUAL(cpu::layout_in_use(dense, DType::kBFloat16).pairs, has);
    CHECK_EQUAL(cpu::layout_in_use(even, DType::kBFloat16).pairs, has);
    CHECK(!cpu::layout_in_use(odd, DType::kBFloat16).pairs) << "a pair would join two groups";
    CHECK(!cpu::layout_in_use(depthwise, DType::kBFloat16).pairs);
    CHECK(!cpu::layout_in_use(dense, DType::kFloat16).pairs && !cpu::layout_in_use(dense, DType::kFloat32).pairs);
  }
  cpu::set_isa(cpu::isa_name(before));
}

// The documented layout: [oc block][ic block][kh][kw][word][lanes], channels 2i and 2i + 1 in the halves of word i.
TEST(packed_pairs_hold_every_weight_at_its_place_and_zeros_elsewhere) {
  for (const ConvCase& c :
       {square(9, 4, 5, 3), square(150, 3, 40, 3), square(700, 2, 33, 1), square(12, 3, 20, 3, 2)}) {
    const ConvShape s = c.shape();
    const PackedLayout l(s, true);
    const auto weight = values(s.c_out * l.icg * s.kh * s.kw, 3);
    std::vector<float> packed(static_cast<size_t>(l.total_floats()), kNaN);
    cpu::pack_weight({weight.data(), DType::kBFloat16, strides_of(l.icg, s.kh, s.kw, false)}, l, packed.data(),
                     std_threads(2));
    std::vector<uint16_t> halves(2 * packed.size());
    std::memcpy(halves.data(), packed.data(), 4 * packed.size());
    for (int64_t oc = 0; oc < s.c_out; ++oc)
      for (int64_t k = 0; k < l.icg * l.area(); ++k) {
        const int64_t ic = k / l.area(), tap = k % l.area(), g = oc / l.ocg, o = oc % l.ocg;
        const int64_t ib = ic / 2 / l.ic_block, word = ic / 2 % l.ic_block;
        const int64_t at = l.panel_at(g, o / 32, ib) + (tap * l.ic_count(ib) + word) * l.lanes(o / 32) + o % 32;
        uint16_t& half = halves[static_cast<size_t>(2 * at + ic % 2)];
        CHECK_EQUAL(half, weight[static_cast<size_t>(oc * l.icg * l.area() + k)].bits)
            << s.c_in << " channels, oc " << oc << " k " << k;
        half = 0;
      }
    for (size_t i = static_cast<size_t>(2 * l.data_at()); i < halves.size(); ++i) CHECK_EQUAL(halves[i], 0);
  }
}

TEST(every_prefix_of_pairs_is_right_and_reads_nothing_beyond) {
  on_pairs([] {
    for (const ConvCase& c : {square(11, 5, 37, 3), square(10, 4, 9, 1), square(12, 5, 12, 3, 2)}) {
      const ConvShape s = c.shape();
      for (int32_t in = 0; in <= s.c_in; ++in)
        for (const int32_t out : {int32_t{1}, static_cast<int32_t>(s.c_out - 1), static_cast<int32_t>(s.c_out)}) {
          const auto got = convolve(s, s.c_in, in, out, false), expected = convolve(s, s.c_in, in, out, true);
          for (size_t i = 0; i < got.size(); ++i) {
            const float a = to_float(got[i]), b = to_float(expected[i]);
            CHECK(std::abs(a - b) <= 0x1p-7f * std::abs(b) + 1e-5f)
                << s.c_in << " channels, prefixes " << in << " and " << out << ": " << a << " instead of " << b;
          }
        }
    }
  });
}

// Matrices of 16 pixels x 16 words: rows that are not whole, records of a pixel and of a kernel row, strides and
// dilations, words of two blocks, lanes of half a block, a tail that is computed by itself.
TEST(every_cut_into_matrices_gives_the_same_sums) {
  on_pairs([] {
    std::vector<ConvCase> cases = {square(64, 14, 40, 3), square(40, 7, 16, 3),  square(16, 19, 33, 3),
                                   square(3, 21, 20, 7),  square(150, 5, 24, 3), square(64, 5, 48, 1),
                                   square(640, 7, 40, 1), square(33, 9, 64, 5)};
    for (const auto& [stride, dilation] : {std::pair{2, 1}, std::pair{1, 2}, std::pair{3, 2}})
      for (const int64_t channels : {12, 32, 72}) {
        ConvCase c = square(channels, 18, 24, 3);
        c.stride_h = c.stride_w = stride;
        c.dilation_h = c.dilation_w = c.top = c.bottom = c.left = c.right = dilation;
        cases.push_back(c);
      }
    ConvCase wide = square(32, 3, 32, 3);
    wide.w = 50, wide.stride_h = 2, wide.top = 3, wide.bottom = 0;  // rows of which no tap meets the input
    cases.push_back(wide);
    for (const ConvCase& c : cases) {
      const ConvShape s = c.shape();
      for (const int64_t in : {s.c_in, s.c_in - s.c_in / 3, s.c_in / 2, int64_t{1}}) {
        const int32_t live = static_cast<int32_t>(in), out = static_cast<int32_t>(s.c_out - 1);
        const auto got = convolve(s, s.c_in, live, out, false), expected = convolve(s, s.c_in, live, out, true);
        for (size_t i = 0; i < got.size(); ++i) {
          const float a = to_float(got[i]), b = to_float(expected[i]);
          CHECK(std::abs(a - b) <= 0x1p-7f * std::abs(b) + 1e-4f * std::sqrt(static_cast<float>(in)))
              << s.c_in << " channels, kernel " << s.kh << ", " << in << " live: " << a << " instead of " << b;
        }
      }
    }
  });
}

// In place, copied word by word, copied half by half: which of them depends on strides and on company.
TEST(pairs_have_the_same_bits_whatever_way_they_are_read) {
  on_pairs([] {
    for (const ConvCase& c :
         {square(10, 6, 24, 1), square(11, 6, 24, 3), square(64, 9, 24, 1), square(300, 5, 24, 1)}) {
      const ConvShape s = c.shape();
      for (int32_t in = 0; in <= s.c_in; in += 1 + in / 16) {
        const auto expected = convolve(s, s.c_in, in, 24, false);
        for (const int64_t pitch : {s.c_in + 1, s.c_in + 2})
          CHECK(same(convolve(s, pitch, in, 24, false), expected))
              << s.c_in << " channels, " << in << " live, pixels " << pitch << " apart";
        CHECK(same(convolve(s, s.c_in, in, 24, false, in), expected)) << "weights packed for " << in << " channels";
      }
    }
  });
}

TEST(infinity_and_nan_pass_through_pairs) {
  on_pairs([] {
    const ConvShape s = square(4, 3, 2, 1).shape();
    for (const float value : {kNaN, std::numeric_limits<float>::infinity()}) {
      std::vector<BFloat16> input(36, from_float<BFloat16, float>(1.0f)), output(18, kNaN16);
      std::vector<BFloat16> weight(8, from_float<BFloat16, float>(2.0f));
      const PackedLayout l = cpu::layout_in_use(s, DType::kBFloat16);
      std::vector<float> packed(static_cast<size_t>(l.total_floats()));
      input[4 * 4 + 3] = from_float<BFloat16, float>(value);
      PrefixConv2dParams p;
      p.shape = s;
      p.dtype = DType::kBFloat16;
      p.pairs = l.pairs;
      p.input_stride = strides_of(4, 3, 3, true), p.output_stride = strides_of(2, 3, 3, true);
      p.weight_stride = strides_of(4, 1, 1, false);
      p.activation = Activation::kRelu;
      cpu::pack_weight({weight.data(), p.dtype, p.weight_stride}, l, packed.data(), {});
      p.input = input.data(), p.weight = weight.data(), p.packed = packed.data(), p.output = output.data();
      cpu::prefix_conv2d(p, {});
      for (size_t i = 0; i < 18; ++i) {
        const float got = to_float(output[i]);
        CHECK(i / 2 != 4 ? got == 8.0f : std::isnan(value) ? std::isnan(got) : got == value) << i << ": " << got;
      }
    }
  });
}

}  // namespace rnp::tests
