// One call of each kernel, for callgrind to count its instructions (tests/proof/instructions.py).
//
//   rnp_instructions --list                names of the cases
//   rnp_instructions --compiler            what built it
//   rnp_instructions ISA CASE              runs it twice: once to warm up, once inside rnp_measured_call
#include <cstdio>
#include <cstring>
#include <exception>
#include <functional>
#include <vector>

#include "core/algorithm.h"
#include "core/winograd.h"
#include "cpu/isa.h"
#include "cpu/pack_weight.h"
#include "cpu/prefix_conv2d.h"
#include "cpu/prefix_conv2d_grad.h"
#include "cpu/winograd.h"

// callgrind's --toggle-collect looks for this name: it must exist, and nothing may be moved out of it.
extern "C" __attribute__((noinline)) void rnp_measured_call(const std::function<void()>& call) {
  call();
  __asm__ volatile("" ::: "memory");
}

namespace rnp::tests {
namespace {

enum class Pass { kForward, kInputGrad, kWeightGrad };

struct Case {
  const char* name;
  int64_t n, c_in, side, c_out, kernel, stride, groups;
  int in_quarters, out_quarters;  // live channels
  int winograd = 0;               // the tile to compute with
  Pass pass = Pass::kForward;
  bool contiguous = false;  // NCHW
};

// Small, and together every path of the driver: edges, in-place and copied 1x1, strides, few channels, widths.
const Case kCases[] = {
    {"3x3", 1, 64, 14, 64, 3, 1, 1, 4, 4},
    {"3x3_half", 1, 64, 14, 64, 3, 1, 1, 2, 2},
    {"3x3_wide_map", 1, 32, 56, 32, 3, 1, 1, 4, 4},
    {"3x3_7x7_map", 2, 128, 7, 64, 3, 1, 1, 4, 4},
    {"3x3_stride_2", 1, 64, 28, 64, 3, 2, 1, 4, 4},
    {"3x3_contiguous", 1, 64, 28, 64, 3, 2, 1, 4, 4, 0, Pass::kForward, true},
    {"1x1", 1, 128, 14, 128, 1, 1, 1, 4, 4},
    {"1x1_quarter", 1, 128, 14, 128, 1, 1, 1, 1, 1},
    {"1x1_stride_2", 1, 64, 28, 64, 1, 2, 1, 4, 4},
    {"1x1_copied", 1, 1024, 7, 64, 1, 1, 1, 4, 4},
    {"1x1_contiguous", 1, 128, 14, 128, 1, 1, 1, 4, 4, 0, Pass::kForward, true},
    {"1x1_contiguous_stride_2", 1, 64, 28, 64, 1, 2, 1, 2, 2, 0, Pass::kForward, true},
    {"7x7_stem", 1, 3, 56, 32, 7, 2, 1, 4, 4},
    {"grouped", 1, 64, 14, 64, 3, 1, 4, 4, 4},
    {"depthwise", 1, 64, 28, 64, 3, 1, 64, 4, 4},
    {"depthwise_5x5_stride_2", 1, 64, 28, 64, 5, 2, 64, 4, 4},
    {"depthwise_contiguous", 1, 64, 28, 64, 3, 1, 64, 4, 4, 0, Pass::kForward, true},
    {"groups_of_4", 1, 64, 28, 64, 3, 1, 16, 4, 4},
    {"groups_of_4_contiguous", 1, 64, 28, 64, 3, 1, 16, 4, 4, 0, Pass::kForward, true},
    {"winograd_4x4", 1, 64, 28, 64, 3, 1, 1, 4, 4, 4},
    {"winograd_4x4_half", 1, 64, 28, 64, 3, 1, 1, 2, 2, 4},
    {"winograd_4x4_contiguous", 1, 64, 28, 64, 3, 1, 1, 4, 4, 4, Pass::kForward, true},
    {"winograd_2x2", 1, 64, 14, 64, 3, 1, 1, 4, 4, 2},
    {"winograd_folded", 1, 3, 56, 64, 7, 2, 1, 4, 4, 4},
    {"input_grad", 1, 64, 14, 64, 3, 1, 1, 4, 4, 0, Pass::kInputGrad},
    {"input_grad_half", 1, 64, 14, 64, 3, 1, 1, 2, 2, 0, Pass::kInputGrad},
    {"input_grad_stride_2", 1, 64, 28, 64, 3, 2, 1, 4, 4, 0, Pass::kInputGrad},
    {"weight_grad", 1, 64, 14, 64, 3, 1, 1, 4, 4, 0, Pass::kWeightGrad},
    {"weight_grad_half", 1, 64, 14, 64, 3, 1, 1, 2, 2, 0, Pass::kWeightGrad},
    {"weight_grad_1x1", 1, 128, 14, 128, 1, 1, 1, 4, 4, 0, Pass::kWeightGrad},
};

void run(const Case& c) {
  ConvShape s;
  s.n = c.n, s.c_in = c.c_in, s.h = s.w = c.side, s.c_out = c.c_out, s.kh = s.kw = c.kernel;
  s.stride_h = s.stride_w = c.stride, s.groups = c.groups;
  s.pad_top = s.pad_bottom = s.pad_left = s.pad_right = c.kernel / 2;
  s.out_h = s.out_w = conv_output_size(c.side, c.kernel, c.stride, s.pad_top, s.pad_bottom, 1);
  const PackedLayout l(s);
  std::vector<float> input(static_cast<size_t>(s.n * s.c_in * s.h * s.w), 0.5f);
  std::vector<float> weight(static_cast<size_t>(s.c_out * l.icg * s.kh * s.kw), 0.25f);
  std::vector<float> output(static_cast<size_t>(s.n * s.c_out * s.out_h * s.out_w));
  std::vector<float> bias(static_cast<size_t>(s.c_out), 1.0f), packed(static_cast<size_t>(l.total_floats()));
  const std::vector<int32_t> in_prefix(static_cast<size_t>(s.n), static_cast<int32_t>(s.c_in * c.in_quarters / 4));
  const std::vector<int32_t> out_prefix(static_cast<size_t>(s.n), static_cast<int32_t>(s.c_out * c.out_quarters / 4));
  PrefixConv2dParams p;
  p.shape = s;
  p.weight_stride = {l.icg * s.kh * s.kw, s.kh * s.kw, s.kw, 1};
  p.input_stride = {s.c_in * s.h * s.w, 1, s.w * s.c_in, s.c_in};
  p.output_stride = {s.c_out * s.out_h * s.out_w, 1, s.out_w * s.c_out, s.c_out};
  if (c.contiguous) {
    p.input_stride = {s.c_in * s.h * s.w, s.h * s.w, s.w, 1};
    p.output_stride = {s.c_out * s.out_h * s.out_w, s.out_h * s.out_w, s.out_w, 1};
  }
  cpu::pack_weight({weight.data(), p.dtype, p.weight_stride}, l, packed.data(), {});
  p.input = input.data(), p.weight = weight.data(), p.packed = packed.data(), p.output = output.data();
  p.in_prefix = in_prefix.data(), p.out_prefix = out_prefix.data(), p.bias = bias.data();
  std::vector<float> transformed;
  if (c.winograd) {
    const WinogradLayout layout{c.winograd, s.c_in, s.c_out, s.kh};
    transformed.resize(static_cast<size_t>(layout.total_floats()));
    cpu::pack_winograd({weight.data(), p.dtype, p.weight_stride}, layout, transformed.data(), {});
    p.winograd = transformed.data(), p.winograd_tile = c.winograd;
  }
  set_algorithm(c.winograd == 4 ? "winograd4" : c.winograd == 2 ? "winograd2" : "direct");
  p.activation = Activation::kRelu, p.tail = Tail::kSkip;

  std::vector<float> grad_input(input.size()), grad_weight(weight.size());
  cpu::PrefixConv2dGradParams g;
  g.shape = s;
  g.in_prefix = p.in_prefix, g.out_prefix = p.out_prefix;
  g.grad_output = output.data(), g.grad_output_stride = p.output_stride;
  g.weight = weight.data(), g.weight_stride = p.weight_stride;
  g.grad_input = grad_input.data(), g.grad_input_stride = p.input_stride;
  g.input = input.data(), g.input_stride = p.input_stride;
  g.grad_weight = grad_weight.data(), g.grad_weight_stride = p.weight_stride;

  const std::function<void()> call = [&] {
    switch (c.pass) {
      case Pass::kForward:
        return cpu::prefix_conv2d(p, {});
      case Pass::kInputGrad:
        return cpu::prefix_conv2d_input_grad(g, {});
      case Pass::kWeightGrad:
        return cpu::prefix_conv2d_weight_grad(g, {});
    }
  };
  call();
  rnp_measured_call(call);
}

}  // namespace
}  // namespace rnp::tests

int main(int argc, char** argv) {
  using rnp::tests::kCases;
  if (argc == 2 && !std::strcmp(argv[1], "--list")) {
    for (const auto& c : kCases) std::puts(c.name);
    return 0;
  }
  if (argc == 2 && !std::strcmp(argv[1], "--compiler")) {
#if defined(__clang__)
    std::printf("clang %d\n", __clang_major__);
#else
    std::printf("gcc %d\n", __GNUC__);
#endif
    return 0;
  }
  for (const auto& c : kCases)
    if (argc == 3 && !std::strcmp(argv[2], c.name)) try {
        rnp::cpu::set_isa(argv[1]);
        rnp::tests::run(c);
        return 0;
      } catch (const std::exception& error) {
        std::fprintf(stderr, "rnp_instructions: %s\n", error.what());
        return 1;
      }
  std::fprintf(stderr, "usage: rnp_instructions --list | --compiler | ISA CASE\n");
  return 2;
}
