// The gradients execute the multiply-adds of the prefixes, up to this rounding:
//
//   input's gradient   what the forward executes for the same convolution of grad_output, prefixes exchanged
//   weight's gradient  output channels up to a whole vector; taps in the padding are left out. Neighbouring
//                      samples of a small map are computed together, with the largest of their prefixes.
//                      bfloat16: both channels up to a matrix of 16; positions lie in one row with the zeros between
//                      rows and between images, up to a chunk of 32, and taps in the padding multiply those zeros
#include <algorithm>
#include <string>

#include "core/algorithm.h"
#include "core/count.h"
#include "core/macs.h"
#include "cpu/isa.h"
#include "cpu/prefix_conv2d_grad.h"
#include "cpu/winograd.h"
#include "tests/check.h"
#include "tests/conv_case.h"

namespace rnp::tests {
namespace {

using Prefixes = std::vector<int32_t>;

int64_t vector_lanes() {
  const std::string name = cpu::isa_name(cpu::current_isa());
  return name.starts_with("avx512") ? 16 : name == "avx2" ? 8 : 4;
}

int64_t round_up(int64_t v, int64_t to) { return (v + to - 1) / to * to; }

struct Counts {
  int64_t forward, input_grad, weight_grad;
};

// Whether the input's gradient may go through Winograd (cpu/input_grad.cpp): then so does the forward here.
bool transformed_for_its_gradient(const ConvShape& s) {
  return s.kh == 3 && s.stride_h == 1 && s.out_h * s.out_w >= 400;
}

// Multiply-adds of the three calls of a training step.
Counts counted(const ConvShape& s, const Prefixes& in_prefix, const Prefixes& out_prefix, int threads = 1) {
  const auto map = [](int64_t n, int64_t c, int64_t h, int64_t w) {
    return std::vector<float>(static_cast<size_t>(n * c * h * w), 0.5f);
  };
  std::vector<float> input = map(s.n, s.c_in, s.h, s.w), grad_input = input;
  std::vector<float> output = map(s.n, s.c_out, s.out_h, s.out_w), grad_output = output;
  std::vector<float> weight = map(s.c_out, s.group_in(), s.kh, s.kw), grad_weight = weight;
  const Threads pool = threads == 1 ? Threads{} : std_threads(threads);

  const PackedLayout layout(s);
  std::vector<float> packed(static_cast<size_t>(layout.total_floats()));
  PrefixConv2dParams f;
  f.shape = s;
  f.weight_stride = strides_of(s.group_in(), s.kh, s.kw, false);
  f.input_stride = strides_of(s.c_in, s.h, s.w, true);
  f.output_stride = strides_of(s.c_out, s.out_h, s.out_w, true);
  cpu::pack_weight({weight.data(), f.dtype, f.weight_stride}, layout, packed.data(), {});
  f.input = input.data(), f.weight = weight.data(), f.packed = packed.data(), f.output = output.data();
  f.in_prefix = in_prefix.data(), f.out_prefix = out_prefix.data();
  std::vector<float> transformed;
  if (transformed_for_its_gradient(s) && winograd_tile(s, f.dtype)) {
    const WinogradLayout winograd{winograd_tile(s, f.dtype), s.c_in, s.c_out};
    transformed.resize(static_cast<size_t>(winograd.total_floats()));
    cpu::pack_winograd({weight.data(), f.dtype, f.weight_stride}, winograd, transformed.data(), {});
    f.winograd = transformed.data(), f.winograd_tile = winograd.tile;
  }

  cpu::PrefixConv2dGradParams g;
  g.shape = s;
  g.grad_output = grad_output.data(), g.weight = weight.data(), g.input = input.data();
  g.grad_input = grad_input.data(), g.grad_weight = grad_weight.data();
  g.grad_output_stride = f.output_stride, g.weight_stride = g.grad_weight_stride = f.weight_stride;
  g.grad_input_stride = g.input_stride = f.input_stride;
  g.in_prefix = f.in_prefix, g.out_prefix = f.out_prefix;

  Counts counts;
  take_fma_count();
  cpu::prefix_conv2d(f, pool);
  counts.forward = take_fma_count();
  cpu::prefix_conv2d_input_grad(g, pool);
  counts.input_grad = take_fma_count();
  cpu::prefix_conv2d_weight_grad(g, pool);
  counts.weight_grad = take_fma_count();
  return counts;
}

ConvCase square(int64_t c_in, int64_t side, int64_t c_out, int64_t kernel, int64_t stride = 1, int64_t groups = 1) {
  ConvCase c = {.name = "", .n = 4, .c_in = c_in, .h = side, .w = side, .c_out = c_out, .kh = kernel, .kw = kernel};
  c.stride_h = c.stride_w = stride;
  c.groups = groups;
  c.top = c.bottom = c.left = c.right = kernel / 2;
  return c;
}

template <typename F>
void on_every_isa(F&& body) {
  for (cpu::Isa isa : cpu::available_isas()) {
    cpu::set_isa(cpu::isa_name(isa));
    body(std::string(cpu::isa_name(isa)));
  }
  cpu::set_isa("auto");
}

const Prefixes kFull = {96, 96, 96, 96}, kMixed = {96, 0, 33, 48}, kOther = {7, 96, 96, 64};

TEST(input_grad_executes_what_the_forward_does_the_other_way_round) {
  for (const char* algorithm : {"auto", "direct"}) {
    set_algorithm(algorithm);
    on_every_isa([&](const std::string& isa) {
      for (const int64_t kernel : {1, 3}) {
        for (const int64_t side : {7, 20}) {
          // Stride 1 and half the kernel as padding: its own transpose.
          const ConvShape s = square(96, side, 96, kernel).shape();
          for (const auto& [in, out] : {std::pair{kFull, kFull}, {kMixed, kOther}, {kOther, kMixed}}) {
            const int64_t found = counted(s, in, out).input_grad, wanted = counted(s, out, in).forward;
            CHECK_EQUAL(found, wanted) << isa << ", " << algorithm << ", kernel " << kernel << " on " << side;
            CHECK_EQUAL(counted(s, in, out, 3).input_grad, found) << isa << ", 3 threads";
          }
        }
      }
    });
  }
  set_algorithm("auto");
}

// Behind a stride of 2 each tap meets every second position: no product is spent on the zeros between them.
TEST(input_grad_of_a_strided_convolution_costs_its_macs) {
  ConvCase c = square(64, 17, 64, 3, 2);
  c.top = c.bottom = c.left = c.right = 0;
  const ConvShape s = c.shape();
  const Prefixes in = {64, 32, 48, 16}, out = {16, 64, 32, 48};
  int64_t macs = 0;
  for (size_t n = 0; n < 4; ++n) macs += conv_macs(s, in[n], out[n]);
  on_every_isa([&](const std::string& isa) { CHECK_EQUAL(counted(s, in, out).input_grad, macs) << isa; });
}

TEST(weight_grad_executes_whole_vectors_of_live_channels) {
  on_every_isa([](const std::string& isa) {
    for (const int64_t kernel : {1, 3}) {
      for (const int64_t stride : {1, 2}) {
        const ConvShape s = square(96, 41, 96, kernel, stride).shape();  // large enough for each sample to be alone
        for (const auto& [in, out] : {std::pair{kFull, kFull}, {kMixed, kOther}, {kOther, kMixed}}) {
          int64_t taps = 0;  // of an axis, that meet the input
          for (int64_t o = 0; o < s.out_h; ++o)
            for (int64_t k = 0; k < kernel; ++k) {
              const int64_t at = o * stride - kernel / 2 + k;
              taps += at >= 0 && at < s.h;
            }
          int64_t wanted = 0;
          for (size_t n = 0; n < in.size(); ++n) wanted += in[n] * round_up(out[n], vector_lanes()) * taps * taps;
          CHECK_EQUAL(counted(s, in, out).weight_grad, wanted) << isa << ", kernel " << kernel << ", stride " << stride;
          CHECK_EQUAL(counted(s, in, out, 3).weight_grad, wanted) << isa << ", 3 threads";
        }
      }
    }
  });
}

// Multiply-adds of the weight's gradient in bfloat16.
int64_t counted_in_pairs(const ConvShape& s, const Prefixes& in_prefix, const Prefixes& out_prefix, int threads) {
  const auto map = [](int64_t n, int64_t c, int64_t h, int64_t w) {
    return std::vector<BFloat16>(static_cast<size_t>(n * c * h * w), from_float<BFloat16, float>(0.5f));
  };
  std::vector<BFloat16> input = map(s.n, s.c_in, s.h, s.w), grad_output = map(s.n, s.c_out, s.out_h, s.out_w),
                        grad_weight = map(s.c_out, s.c_in, s.kh, s.kw);
  cpu::PrefixConv2dGradParams g;
  g.shape = s;
  g.dtype = g.grad_weight_dtype = DType::kBFloat16;
  g.grad_output = grad_output.data(), g.input = input.data(), g.grad_weight = grad_weight.data();
  g.grad_output_stride = strides_of(s.c_out, s.out_h, s.out_w, true);
  g.input_stride = strides_of(s.c_in, s.h, s.w, true);
  g.grad_weight_stride = strides_of(s.c_in, s.kh, s.kw, false);
  g.in_prefix = in_prefix.data(), g.out_prefix = out_prefix.data();
  take_fma_count();
  cpu::prefix_conv2d_weight_grad(g, threads == 1 ? Threads{} : std_threads(threads));
  return take_fma_count();
}

TEST(weight_grad_in_bfloat16_executes_whole_matrices_of_live_channels) {
  on_every_isa([](const std::string& isa) {
    if (cpu::current_isa() < cpu::Isa::kAvx512Bf16) return;
    for (const int64_t kernel : {1, 3}) {
      // One zero between rows and one row of them between images serve both sides of a 3x3 kernel.
      const ConvShape s = square(128, 13, 128, kernel).shape();
      const int64_t pitch = s.w + kernel / 2, image = round_up(pitch * pitch, 2), rows = (s.h - 1) * pitch + s.w;
      const auto chunks = [&](int64_t images) { return round_up((images - 1) * image + rows, 32); };
      const Prefixes full(4, 128), narrow(4, 48), third = {0, 0, 32, 0}, none(4, 0);
      const auto expect = [&](const Prefixes& in, const Prefixes& out, int64_t wanted) {
        for (const int threads : {1, 3})
          CHECK_EQUAL(counted_in_pairs(s, in, out, threads), kernel * kernel * wanted)
              << isa << ", kernel " << kernel << ", " << threads << " threads";
      };
      expect(full, full, 128 * 128 * chunks(4));
      expect(narrow, full, 48 * 128 * chunks(4));
      expect(Prefixes(4, 33), Prefixes(4, 64), 48 * 64 * chunks(4));
      expect(full, third, 128 * 32 * chunks(1));  // the plan puts it first
      expect(none, full, 0);
    }
  });
}

TEST(weight_grad_of_small_maps_and_groups) {
  on_every_isa([](const std::string& isa) {
    for (const int64_t groups : {1, 4}) {
      const ConvShape s = square(128, 5, 128, 3, 1, groups).shape();
      for (const int32_t live : {128, 64, 32}) {
        const Prefixes prefix(4, live);
        const int64_t taps = 3 * s.h - 2;
        int64_t wanted = 0;
        for (int64_t g = 0; g < groups; ++g)
          wanted += 4 * live_in_group(live, g, s.group_in()) *
                    round_up(live_in_group(live, g, s.group_out()), vector_lanes()) * taps * taps;
        CHECK_EQUAL(counted(s, prefix, prefix).weight_grad, wanted)
            << isa << ", groups " << groups << ", live " << live;
      }
    }
  });
}

}  // namespace
}  // namespace rnp::tests
