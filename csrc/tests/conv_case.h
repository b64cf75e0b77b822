// Cases, data and a double-precision reference for the tests of prefix_conv2d. The reference shares no code with the
// kernels.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>
#include <thread>
#include <vector>

#include "core/half.h"
#include "core/parallel.h"
#include "cpu/isa.h"
#include "cpu/pack_weight.h"
#include "cpu/prefix_conv2d.h"

namespace rnp::tests {

struct ConvCase {
  const char* name;
  int64_t n, c_in, h, w, c_out, kh, kw;
  int64_t stride_h = 1, stride_w = 1;
  int64_t top = 0, bottom = 0, left = 0, right = 0;
  int64_t dilation_h = 1, dilation_w = 1, groups = 1;

  ConvShape shape() const {
    ConvShape s;
    s.n = n, s.c_in = c_in, s.h = h, s.w = w, s.c_out = c_out, s.kh = kh, s.kw = kw;
    s.stride_h = stride_h, s.stride_w = stride_w, s.dilation_h = dilation_h, s.dilation_w = dilation_w,
    s.groups = groups;
    s.pad_top = top, s.pad_bottom = bottom, s.pad_left = left, s.pad_right = right;
    s.out_h = (h + top + bottom - dilation_h * (kh - 1) - 1) / stride_h + 1;
    s.out_w = (w + left + right - dilation_w * (kw - 1) - 1) / stride_w + 1;
    return s;
  }
};

// A square kernel, padded by half of itself.
ConvCase padded_case(const char* name, int64_t n, int64_t c_in, int64_t h, int64_t w, int64_t c_out, int64_t kernel,
                     int64_t stride = 1);

const std::vector<ConvCase>& conv_cases();

class Random {  // uniform in [-1, 1), the same on every machine
 public:
  explicit Random(uint64_t seed) : state_(seed * 2654435761u + 12345) {}
  double next() {
    state_ = state_ * 6364136223846793005u + 1442695040888963407u;
    return static_cast<double>(static_cast<int64_t>(state_ >> 11)) / 4503599627370496.0 - 1.0;
  }
  int32_t below(int64_t bound) { return static_cast<int32_t>((next() + 1) / 2 * static_cast<double>(bound)); }

 private:
  uint64_t state_;
};

inline Threads std_threads(int count) {
  Threads threads;
  threads.count = count;
  threads.run = [](int workers, const std::function<void(int)>& body) {
    std::vector<std::thread> pool;
    for (int i = 0; i < workers; ++i) pool.emplace_back(body, i);
    for (std::thread& t : pool) t.join();
  };
  return threads;
}

inline Strides4 strides_of(int64_t c, int64_t h, int64_t w, bool channels_last) {
  return channels_last ? Strides4{c * h * w, 1, w * c, c} : Strides4{c * h * w, h * w, w, 1};
}

// The instruction sets that differ in their kernels for this type: beyond AVX-512 only bfloat16's do.
inline std::vector<cpu::Isa> isas_of(DType dtype) {
  std::vector<cpu::Isa> all = cpu::available_isas();
  while (dtype != DType::kBFloat16 && all.back() > cpu::Isa::kAvx512) all.pop_back();
  return all;
}

constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

}  // namespace rnp::tests
