// A call of the convolution for the CUDA kernels on the emulator, with its reference in double: forward, and both
// gradients. NaN stands wherever nothing may be read, and wherever something must be written.
#pragma once

#include <string>
#include <vector>

#include "cuda/plan.h"
#include "tests/check.h"
#include "tests/conv_case.h"

namespace rnp::tests {

// kGroups: prefixes in quarters, as a network of four groups has them; else any.
enum class GpuMode { kFull, kMixed, kTables, kResidual, kSkip, kGroups };

template <typename T>
struct GpuCase {
  ConvShape s;
  cuda::Role role;
  std::vector<T> input, weight, residual, output;
  std::vector<char> packed;
  std::vector<float> scale, bias, means;
  std::vector<int32_t> in_prefix, out_prefix, row;
  PrefixConv2dParams p;
  bool cut = false;  // the reference's operands too: TF32 as wgmma takes it, without the low 13 bits
  int64_t from_c, from_h, from_w, to_c, to_h, to_w;  // of what is read and what is written

  GpuCase(const ConvCase& c, GpuMode mode, cuda::Role role, DType dtype, bool channels_last);

  static size_t at(const Strides4& st, int64_t n, int64_t c, int64_t y, int64_t x) {
    return static_cast<size_t>(n * st.n + c * st.c + y * st.h + x * st.w);
  }

  int64_t from_live(int64_t n) const { return role == cuda::Role::kForward ? p.in_live(n) : p.out_live(n); }
  int64_t to_live(int64_t n) const { return role == cuda::Role::kForward ? p.out_live(n) : p.in_live(n); }

  // Compares the output with the double reference; `unit` is the rounding error of one operand, relative.
  void check(const std::string& where, double unit, double store_unit) const;

 private:
  void reference(std::vector<double>& sums, std::vector<double>& sizes) const;
};

// Beside the cases of every backend: channels that cp.async can fetch, several blocks, runs and chunks.
std::vector<ConvCase> gpu_cases();

// Fewer channels than one step of the matrix unit, with and without dilation and strides along x.
std::vector<ConvCase> few_channel_cases();

extern template struct GpuCase<float>;
extern template struct GpuCase<double>;
extern template struct GpuCase<BFloat16>;
extern template struct GpuCase<Float16>;

}  // namespace rnp::tests
