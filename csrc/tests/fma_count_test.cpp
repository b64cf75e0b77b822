// The work is counted: kernels execute the multiply-adds of the prefixes and of nothing else, up to this rounding.
//
//   output channels   up to a narrow tile: the multiples of 8 (AVX-512, AVX2) or 4 (portable) are exact, and no width
//                     costs more than the next of them; small groups: whole vectors of channels (channels_last) or
//                     of positions of a band with its row ends padded (contiguous); contiguous 1x1: whole vectors
//                     of positions
//   Winograd          (m + 2)^2 products for each tile of m x m outputs, instead of 9 m^2, of a folded stem 49 for each
//                     folded channel; the last tile of a row or column is computed whole
//   input channels    bfloat16 multiplied in pairs: up to an even number
//   padding           taps in the padding are left out; in blocks of fewer than 16 live input channels only whole
//                     kernel rows are; contiguous small groups: none
//
// The counts come from the instrumented build (RNP_COUNT_FMAS), the expectation from the definition alone.
#include <algorithm>
#include <string>

#include "core/algorithm.h"
#include "core/count.h"
#include "core/macs.h"
#include "core/winograd.h"
#include "cpu/isa.h"
#include "cpu/winograd.h"
#include "tests/check.h"
#include "tests/conv_case.h"

namespace rnp::tests {
namespace {

int64_t narrow_lanes() { return std::string(cpu::isa_name(cpu::current_isa())) == "portable" ? 4 : 8; }

// A vector of the depthwise kernel, which has no narrower one.
int64_t vector_lanes() {
  const std::string name = cpu::isa_name(cpu::current_isa());
  return name.starts_with("avx512") ? 16 : name == "avx2" ? 8 : 4;
}

// Multiply-adds of one call with these prefixes. `winograd`: 0, or the tile to compute with.
int64_t counted(const ConvShape& s, const std::vector<int32_t>& in_prefix, const std::vector<int32_t>& out_prefix,
                int threads = 1, int64_t winograd = 0, DType dtype = DType::kFloat32, bool channels_last = true) {
  const PackedLayout l = cpu::layout_in_use(s, dtype);
  std::vector<float> input(static_cast<size_t>(s.n * s.c_in * s.h * s.w), 0.5f);
  std::vector<float> weight(static_cast<size_t>(s.c_out * l.icg * s.kh * s.kw), 0.25f);
  std::vector<float> output(static_cast<size_t>(s.n * s.c_out * s.out_h * s.out_w));
  std::vector<float> packed(static_cast<size_t>(l.total_floats()));
  PrefixConv2dParams p;
  p.shape = s;
  p.dtype = dtype;  // a bfloat16 needs half of the memory, and every bit pattern here is a number
  p.pairs = l.pairs;
  p.weight_stride = strides_of(l.icg, s.kh, s.kw, false);
  p.input_stride = strides_of(s.c_in, s.h, s.w, channels_last);
  p.output_stride = strides_of(s.c_out, s.out_h, s.out_w, channels_last);
  cpu::pack_weight({weight.data(), p.dtype, p.weight_stride}, l, packed.data(), {});
  p.input = input.data(), p.weight = weight.data(), p.packed = packed.data(), p.output = output.data();
  p.in_prefix = in_prefix.data(), p.out_prefix = out_prefix.data();
  std::vector<float> transformed;
  if (winograd) {
    const WinogradLayout layout{winograd, s.c_in, s.c_out, s.kh};
    transformed.resize(static_cast<size_t>(layout.total_floats()));
    cpu::pack_winograd({weight.data(), p.dtype, p.weight_stride}, layout, transformed.data(), {});
    p.winograd = transformed.data(), p.winograd_tile = winograd;
    set_algorithm(winograd == 4 ? "winograd4" : "winograd2");
  }
  take_fma_count();
  cpu::prefix_conv2d(p, threads == 1 ? Threads{} : std_threads(threads));
  set_algorithm("auto");
  return take_fma_count();
}

// Lanes in which `live` of `channels` output channels are computed: one pixel, one input channel, no padding.
int64_t lanes(int64_t channels, int64_t live) {
  ConvCase c = {.name = "probe", .n = 1, .c_in = 1, .h = 1, .w = 1, .c_out = channels, .kh = 1, .kw = 1};
  return counted(c.shape(), {1}, {static_cast<int32_t>(live)});
}

// Kernel taps of an axis, summed over its output positions, that meet the input.
int64_t valid_taps(int64_t out, int64_t in, int64_t kernel, int64_t stride, int64_t pad, int64_t dilation) {
  int64_t count = 0;
  for (int64_t o = 0; o < out; ++o)
    for (int64_t k = 0; k < kernel; ++k) {
      const int64_t at = o * stride - pad + k * dilation;
      count += at >= 0 && at < in;
    }
  return count;
}

// By the rules above.
int64_t expected(const ConvShape& s, const std::vector<int32_t>& in_prefix, const std::vector<int32_t>& out_prefix) {
  const PackedLayout l(s);
  const int64_t rows = valid_taps(s.out_h, s.h, s.kh, s.stride_h, s.pad_top, s.dilation_h);
  const int64_t cols = valid_taps(s.out_w, s.w, s.kw, s.stride_w, s.pad_left, s.dilation_w), all = s.out_w * s.kw;
  int64_t sum = 0;
  for (size_t n = 0; n < in_prefix.size(); ++n)
    for (int64_t g = 0; g < s.groups; ++g) {
      const int64_t live_in = live_in_group(in_prefix[n], g, s.group_in());
      const int64_t live_out = live_in_group(out_prefix[n], g, s.group_out());
      if (live_out == 0) continue;
      for (int64_t first = 0; first < live_in; first += l.ic_block) {
        const int64_t count = std::min(l.ic_block, live_in - first);
        sum += lanes(s.group_out(), live_out) * count * rows * (count < 16 ? all : cols);
      }
    }
  return sum;
}

template <typename F>
void on_every_isa(F&& body) {
  for (cpu::Isa isa : cpu::available_isas()) {
    cpu::set_isa(cpu::isa_name(isa));
    body(std::string(cpu::isa_name(isa)));
  }
  cpu::set_isa("auto");
}

ConvCase square(const char* name, int64_t c_in, int64_t side, int64_t c_out, int64_t kernel, int64_t stride = 1,
                int64_t groups = 1) {
  ConvCase c = {.name = name, .n = 4, .c_in = c_in, .h = side, .w = side, .c_out = c_out, .kh = kernel, .kw = kernel};
  c.stride_h = c.stride_w = stride;
  c.groups = groups;
  c.top = c.bottom = c.left = c.right = kernel / 2;
  return c;
}

TEST(output_channels_are_rounded_up_to_a_narrow_tile_at_most) {
  on_every_isa([](const std::string& isa) {
    const int64_t narrow = narrow_lanes();
    for (const int64_t channels : {4, 16, 33, 64, 70})
      for (int64_t live = 0; live <= channels; ++live) {
        const int64_t found = lanes(channels, live);
        CHECK(found >= live && found <= (live + narrow - 1) / narrow * narrow)
            << isa << ", " << live << " of " << channels << " channels: " << found << " lanes";
      }
  });
}

TEST(every_multiply_add_is_one_of_the_prefixes) {
  const std::vector<ConvCase> cases = {
      square("3x3", 160, 9, 96, 3),
      square("3x3, wide map", 32, 30, 32, 3),
      square("3x3 on 7x7", 64, 7, 64, 3),
      square("3x3 on 4x4", 64, 4, 40, 3),
      square("3x3 on 2x2", 32, 2, 32, 3),
      square("3x3 on 1x1", 32, 1, 32, 3),
      square("3x3 stride 2", 64, 14, 128, 3, 2),
      square("1x1", 300, 6, 96, 1),
      square("1x1 of 512 channels", 512, 5, 64, 1),
      square("1x1 stride 2", 64, 9, 64, 1, 2),
      square("7x7 stem", 3, 46, 64, 7, 2),
      square("grouped", 128, 8, 128, 3, 1, 4),
      square("groups of 6 and 10", 24, 8, 40, 3, 1, 4),
  };
  on_every_isa([&](const std::string& isa) {
    for (const ConvCase& c : cases) {
      const ConvShape s = c.shape();
      const auto in = [&](int64_t a) { return static_cast<int32_t>((a * s.c_in + 3) / 4); };
      const auto out = [&](int64_t a) { return static_cast<int32_t>((a * s.c_out + 3) / 4); };
      const int32_t cut_in = static_cast<int32_t>(s.c_in - s.c_in / 3), cut_out = static_cast<int32_t>(s.c_out / 3 + 1);
      const std::vector<std::pair<std::vector<int32_t>, std::vector<int32_t>>> batches = {
          {{in(4), in(4), in(4), in(4)}, {out(4), out(4), out(4), out(4)}},
          {{in(1), in(2), in(3), in(4)}, {out(4), out(1), out(2), out(3)}},
          {{0, in(4), 1, cut_in}, {out(4), 0, 1, cut_out}},
      };
      for (const auto& [in_prefix, out_prefix] : batches) {
        const int64_t found = counted(s, in_prefix, out_prefix), wanted = expected(s, in_prefix, out_prefix);
        CHECK(found == wanted) << isa << ", " << c.name << ": " << found << " multiply-adds, " << wanted << " needed";
        CHECK_EQUAL(counted(s, in_prefix, out_prefix, 3), found) << " with 3 threads: " << c.name;
      }
    }
  });
}

// Without padding, at widths that are whole tiles, it is the count of DESIGN.md itself.
TEST(whole_tiles_without_padding_cost_the_macs_exactly) {
  ConvCase c = square("valid 3x3", 64, 9, 64, 3);
  c.top = c.bottom = c.left = c.right = 0;
  const ConvShape s = c.shape();
  const std::vector<int32_t> in_prefix = {64, 48, 33, 16}, out_prefix = {16, 64, 48, 32};
  int64_t macs = 0;
  for (size_t n = 0; n < 4; ++n) macs += conv_macs(s, in_prefix[n], out_prefix[n]);
  on_every_isa([&](const std::string& isa) { CHECK_EQUAL(counted(s, in_prefix, out_prefix), macs) << isa; });
}

TEST(pairs_of_bfloat16_round_input_channels_up_to_an_even_number) {
  ConvCase c = square("valid 3x3", 161, 9, 64, 3);
  c.top = c.bottom = c.left = c.right = 0;
  const ConvShape s = c.shape();
  const std::vector<int32_t> in_prefix = {161, 96, 33, 0}, out_prefix = {16, 64, 48, 32};
  int64_t converted = 0, pairs = 0;
  for (size_t n = 0; n < 4; ++n) {
    converted += conv_macs(s, in_prefix[n], out_prefix[n]);
    pairs += conv_macs(s, in_prefix[n], out_prefix[n]) / std::max(1, in_prefix[n]) * ((in_prefix[n] + 1) / 2 * 2);
  }
  on_every_isa([&](const std::string& isa) {
    if (isa == "avx512amx") return;  // whole matrices: what hangs over is computed too
    const int64_t wanted = isa == "avx512bf16" ? pairs : converted;
    CHECK_EQUAL(counted(s, in_prefix, out_prefix, 1, 0, DType::kBFloat16), wanted) << isa;
    CHECK_EQUAL(counted(s, in_prefix, out_prefix, 3, 0, DType::kBFloat16), wanted) << isa << ", 3 threads";
  });
}

TEST(winograd_executes_the_products_of_a_folded_stem) {
  ConvCase c = {.name = "7x7", .n = 4, .c_in = 3, .h = 37, .w = 32, .c_out = 40, .kh = 7, .kw = 7};
  c.stride_h = c.stride_w = 2, c.top = c.bottom = c.left = c.right = 3;
  const ConvShape s = c.shape();
  const std::vector<int32_t> in_prefix = {3, 3, 3, 3}, out_prefix = {40, 40, 17, 0};
  on_every_isa([&](const std::string& isa) {
    int64_t wanted = 0;
    for (int32_t live : out_prefix) wanted += live ? 49 * 5 * 4 * 12 * lanes(s.c_out, live) : 0;
    for (int threads : {1, 3})
      CHECK_EQUAL(counted(s, in_prefix, out_prefix, threads, 4), wanted) << isa << ", " << threads << " threads";
  });
}

TEST(winograd_executes_the_products_of_its_tiles) {
  const ConvShape s = square("3x3", 96, 14, 64, 3).shape();
  const std::vector<int32_t> in_prefix = {96, 33, 7, 96}, out_prefix = {64, 64, 17, 0};
  on_every_isa([&](const std::string& isa) {
    for (const int64_t tile : {2, 4}) {
      const int64_t across = (s.out_w + tile - 1) / tile, points = (tile + 2) * (tile + 2);
      int64_t wanted = 0;
      for (size_t n = 0; n < in_prefix.size(); ++n)
        if (out_prefix[n]) wanted += points * across * across * in_prefix[n] * lanes(s.c_out, out_prefix[n]);
      CHECK_EQUAL(counted(s, in_prefix, out_prefix, 1, tile), wanted) << isa << ", tile " << tile;
      CHECK_EQUAL(counted(s, in_prefix, out_prefix, 3, tile), wanted) << isa << ", 3 threads, tile " << tile;
    }
  });
}

// Three by three interleaved maps of five rows: two tiles along each axis of each.
TEST(winograd_executes_the_products_of_dilated_tiles) {
  ConvCase c = square("3x3, dilated", 32, 14, 48, 3);
  c.dilation_h = c.dilation_w = c.top = c.bottom = c.left = c.right = 3;
  const ConvShape s = c.shape();
  const std::vector<int32_t> in_prefix = {32, 9, 32, 32}, out_prefix = {48, 48, 17, 0};
  on_every_isa([&](const std::string& isa) {
    int64_t wanted = 0;
    for (size_t n = 0; n < in_prefix.size(); ++n)
      if (out_prefix[n]) wanted += 36 * (3 * 2) * (3 * 2) * in_prefix[n] * lanes(s.c_out, out_prefix[n]);
    CHECK_EQUAL(counted(s, in_prefix, out_prefix, 1, 4), wanted) << isa;
  });
}

// Lanes are output channels; each executes one multiply-add for each tap and input channel of its group.
TEST(small_groups_compute_whole_vectors_of_live_channels) {
  on_every_isa([](const std::string& isa) {
    for (const int64_t group : {1, 2, 4})
      for (const int64_t kernel : {3, 5}) {
        if (kernel == 5 && group > 1) continue;
        const int64_t all = 36;
        const ConvShape s = square("small groups", all, 9, all, kernel, 2, all / group).shape();
        const std::vector<int32_t> in_prefix = {36, 5, 36, 20}, out_prefix = {36, 36, 9, 0};
        const int64_t rows = valid_taps(s.out_h, s.h, s.kh, s.stride_h, s.pad_top, s.dilation_h);
        const int64_t cols = valid_taps(s.out_w, s.w, s.kw, s.stride_w, s.pad_left, s.dilation_w);
        int64_t wanted = 0;
        for (size_t n = 0; n < in_prefix.size(); ++n)
          for (int64_t c = 0; c < out_prefix[n]; c += vector_lanes())
            if (c / group * group < in_prefix[n]) wanted += vector_lanes() * group * rows * cols;
        CHECK_EQUAL(counted(s, in_prefix, out_prefix), wanted)
            << isa << ", kernel " << kernel << ", groups of " << group;
        CHECK_EQUAL(counted(s, in_prefix, out_prefix, 3), wanted) << isa << ", 3 threads, groups of " << group;
      }
  });
}

// Lanes are positions of one band (the maps are small), rows of `pitch`, the last vector whole.
TEST(contiguous_small_groups_compute_whole_vectors_of_positions) {
  on_every_isa([](const std::string& isa) {
    for (const int64_t group : {1, 3})
      for (const int64_t stride : {1, 2}) {
        const ConvShape s = square("contiguous", 12, 9, 12, 3, stride, 12 / group).shape();
        const std::vector<int32_t> in_prefix = {12, 5, 12, 0}, out_prefix = {12, 12, 4, 12};
        const int64_t pitch = s.out_w + 2 / stride, length = (s.out_h - 1) * pitch + s.out_w;
        const int64_t lanes = (length + vector_lanes() - 1) / vector_lanes() * vector_lanes();
        int64_t wanted = 0;
        for (size_t n = 0; n < in_prefix.size(); ++n)
          for (int64_t g = 0; g < s.groups; ++g)
            wanted += lanes * 9 * live_in_group(in_prefix[n], g, group) * live_in_group(out_prefix[n], g, group);
        CHECK_EQUAL(counted(s, in_prefix, out_prefix, 1, 0, DType::kFloat32, false), wanted)
            << isa << ", groups of " << group;
      }
  });
}

// Few input channels without groups: the same, for as many outputs as are live.
TEST(contiguous_few_channels_compute_whole_vectors_of_positions) {
  on_every_isa([](const std::string& isa) {
    for (const int64_t stride : {1, 2}) {
      const ConvShape s = square("stem", 3, 9, 40, 3, stride).shape();
      const std::vector<int32_t> in_prefix = {3, 1, 3, 0}, out_prefix = {40, 40, 33, 40};
      const int64_t pitch = s.out_w + 2 / stride, length = (s.out_h - 1) * pitch + s.out_w;
      const int64_t lanes = (length + vector_lanes() - 1) / vector_lanes() * vector_lanes();
      int64_t wanted = 0;
      for (size_t n = 0; n < in_prefix.size(); ++n) wanted += lanes * 9 * in_prefix[n] * out_prefix[n];
      CHECK_EQUAL(counted(s, in_prefix, out_prefix, 1, 0, DType::kFloat32, false), wanted)
          << isa << ", stride " << stride;
    }
  });
}

// 1x1: lanes are positions of the whole map, the last vector whole, for as many outputs as are live.
TEST(contiguous_1x1_computes_whole_vectors_of_positions) {
  on_every_isa([](const std::string& isa) {
    for (const int64_t stride : {1, 2}) {
      const ConvShape s = square("1x1", 300, 9 * stride, 40, 1, stride).shape();
      const std::vector<int32_t> in_prefix = {300, 270, 7, 0}, out_prefix = {40, 13, 33, 40};
      const int64_t lanes = (s.out_h * s.out_w + vector_lanes() - 1) / vector_lanes() * vector_lanes();
      int64_t wanted = 0;
      for (size_t n = 0; n < in_prefix.size(); ++n) wanted += lanes * in_prefix[n] * out_prefix[n];
      for (const int threads : {1, 3})
        CHECK_EQUAL(counted(s, in_prefix, out_prefix, threads, 0, DType::kFloat32, false), wanted)
            << isa << ", stride " << stride;
    }
  });
}

}  // namespace
}  // namespace rnp::tests
