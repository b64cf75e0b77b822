// The CUDA weight gradient's own code on the emulator, against a double reference.
#include <cmath>
#include <string>

#include "cuda/weight_grad_kernel.h"
#include "tests/check.h"
#include "tests/gpu_case.h"

namespace rnp::tests {
namespace {

template <typename T>
double number(T v) {
  return static_cast<double>(to_float(v));
}

// A tensor in double, (n, c, h, w).
template <typename T>
std::vector<double> planes(const GpuCase<T>& g, const std::vector<T>& from, const Strides4& stride, int64_t channels,
                           int64_t h, int64_t w) {
  std::vector<double> to;
  for (int64_t n = 0; n < g.s.n; ++n)
    for (int64_t c = 0; c < channels; ++c)
      for (int64_t i = 0; i < h * w; ++i) to.push_back(number(from[g.at(stride, n, c, i / w, i % w)]));
  return to;
}

// GpuCase gives input, prefixes and a second tensor of the output's shape, which serves as the gradient here.
template <typename T>
void check_case(const ConvCase& c, DType dtype, bool channels_last, bool mixed, int multiprocessors, double unit,
                double store) {
  GpuCase<T> g(c, mixed ? GpuMode::kMixed : GpuMode::kFull, cuda::Role::kForward, dtype, channels_last);
  const ConvShape& s = g.s;
  const Strides4 grad_stride = g.p.output_stride;
  const T poison = g.output.empty() ? T{} : g.output[0];
  for (int64_t n = 0; n < s.n; ++n)
    for (int64_t o = std::min(g.p.out_live(n), s.c_out); o < s.c_out; ++o)
      for (int64_t i = 0; i < s.out_h * s.out_w; ++i)
        g.residual[g.at(grad_stride, n, o, i / s.out_w, i % s.out_w)] = poison;
  cuda::WeightGradArgs a = cuda::weight_grad_args(s, multiprocessors);
  std::vector<cuda::Sum<T>> partial(static_cast<size_t>(a.splits * a.elements()), static_cast<cuda::Sum<T>>(kNaN));
  std::vector<T> result(g.weight.size(), poison);
  a.grad = g.residual.data(), a.grad_stride = grad_stride;
  a.input = g.input.data(), a.input_stride = g.p.input_stride;
  a.in_prefix = g.p.in_prefix, a.out_prefix = g.p.out_prefix;
  a.partial = partial.data(), a.weight_grad = result.data();
  const std::string where = std::string(c.name) + (channels_last ? ", channels_last" : ", contiguous") +
                            (mixed ? ", mixed" : ", full") + ", runs " + std::to_string(a.splits);
  using Block = cuda::WeightGradBlock<T>;
  cuda::emulator::Statistics seen;
  const std::string fault = test::message_of([&] {
    seen = cuda::emulator::launch(cuda::weight_grad_tiles(a) * a.splits, cuda::kThreads, Block::kSharedBytes, 3,
                                  [&](char* shared) { Block(a, shared).run(); });
    cuda::emulator::launch(2, 64, 0, 3, [&](char*) { cuda::weight_grad_sum_block<T>(a, a.elements()); });
  });
  CHECK(fault.empty()) << where << ": " << fault;
  CHECK(seen.bank_conflicts == 0) << where << ": " << seen.bank_conflicts << " bank conflicts";
  CHECK((seen.matrix_products > 0) == (sizeof(T) == 2)) << where << ": " << seen.matrix_products << " products";
  const int64_t icg = s.group_in(), taps = s.kh * s.kw;
  const std::vector<double> input = planes(g, g.input, g.p.input_stride, s.c_in, s.h, s.w);
  const std::vector<double> grad = planes(g, g.residual, grad_stride, s.c_out, s.out_h, s.out_w);
  for (int64_t o = 0; o < s.c_out; ++o)
    for (int64_t i = 0; i < icg * taps; ++i) {
      const int64_t channel = o / s.group_out() * icg + i / taps, ky = i / s.kw % s.kh, kx = i % s.kw;
      double sum = 0, size = 0;
      for (int64_t n = 0; n < s.n; ++n) {
        if (channel >= g.p.in_live(n) || o >= g.p.out_live(n)) continue;
        for (int64_t oy = 0; oy < s.out_h; ++oy) {
          const int64_t y = oy * s.stride_h - s.pad_top + ky * s.dilation_h;
          if (y < 0 || y >= s.h) continue;
          const double* const in_row = input.data() + ((n * s.c_in + channel) * s.h + y) * s.w;
          const double* const grad_row = grad.data() + ((n * s.c_out + o) * s.out_h + oy) * s.out_w;
          for (int64_t ox = 0; ox < s.out_w; ++ox) {
            const int64_t x = ox * s.stride_w - s.pad_left + kx * s.dilation_w;
            if (x < 0 || x >= s.w) continue;
            const double v = in_row[x] * grad_row[ox];
            sum += v, size += std::abs(v);
          }
        }
      }
      const double got = number(result[static_cast<size_t>(o * icg * taps + i)]);
      CHECK(std::abs(got - sum) <= unit * size + store * std::abs(sum))
          << where << " at filter " << o << ", element " << i << ": " << got << " instead of " << sum;
    }
}

template <typename T>
void check_all(DType dtype, double unit, double store) {
  int number = 0;
  for (const ConvCase& c : conv_cases()) {
    if (c.groups > 4 && number % 2) continue;  // one block for each group and tap: slow here
    check_case<T>(c, dtype, number % 3 != 2, number % 2 == 0, number % 4 ? 1 : 132, unit, store);
    ++number;
  }
  ConvCase wide{
      .name = "aligned, two blocks on each side", .n = 4, .c_in = 72, .h = 6, .w = 7, .c_out = 136, .kh = 3, .kw = 1};
  wide.top = 1;
  check_case<T>(wide, dtype, true, true, 40, unit, store);
}

}  // namespace

TEST(gpu_weight_grad_bf16) { check_all<BFloat16>(DType::kBFloat16, 1e-6, 0x1p-8); }
TEST(gpu_weight_grad_fp16) { check_all<Float16>(DType::kFloat16, 1e-6, 0x1p-11); }
TEST(gpu_weight_grad_fp32) { check_all<float>(DType::kFloat32, 2e-6, 1e-6); }
TEST(gpu_weight_grad_fp64) { check_all<double>(DType::kFloat64, 1e-13, 1e-13); }

}  // namespace rnp::tests
