#include "cpu/max_pool2d.h"

#include <algorithm>
#include <cstring>

#include "cpu/isa.h"

// The body below is inlined into one function per instruction set, where the compiler vectorises the loops over
// channels.
#define RNP_INLINE inline __attribute__((always_inline))

namespace rnp::cpu {
namespace {

constexpr int64_t kLine = 16;         // channels of a cache line
constexpr int64_t kPixelsAhead = 16;  // that are asked for: the live channels of pruned samples lie in pieces, which no
                                      // hardware prefetcher follows

// out[c] = max(out[c], v[c]); NaN wins.
RNP_INLINE void take_larger(float* __restrict out, const float* __restrict v, int64_t channels) {
  for (int64_t c = 0; c < channels; ++c) out[c] = ((v[c] > out[c]) | (v[c] != v[c])) ? v[c] : out[c];
}

RNP_INLINE void some_rows(const MaxPoolParams& p, int64_t begin, int64_t end) {
  const int64_t input_sample = p.input_sample > 0 ? p.input_sample : p.h * p.w * p.c;
  const int64_t output_sample = p.output_sample > 0 ? p.output_sample : p.out_h * p.out_w * p.c;
  for (int64_t row = begin; row < end; ++row) {
    const int64_t sample = row / p.out_h, top = (row % p.out_h) * p.stride_h - p.pad_h;
    const int64_t first_h = std::max<int64_t>(top, 0), last_h = std::min(top + p.kernel_h, p.h);
    const int64_t live = p.prefix ? p.prefix[sample] : p.c;
    const int64_t from = p.input_pixel ? p.input_pixel[sample] : p.c, row_stride = p.w * from;
    const int64_t to = p.output_pixel ? p.output_pixel[sample] : p.c;
    const float* image = p.input + sample * input_sample;
    const int64_t kept = p.input_ring > 0 ? p.input_ring : p.h, start = first_h % kept;
    // Floats from the window's first row to its i-th: in a ring, back to the front behind the last.
    const auto below = [&](int64_t i) { return (start + i < kept ? i : i - kept) * row_stride; };
    float* out = p.output + sample * output_sample + row % p.out_h * p.out_w * to;
    for (int64_t x = 0; x < p.out_w; ++x, out += to) {
      const int64_t left = x * p.stride_w - p.pad_w;
      const int64_t first_w = std::max<int64_t>(left, 0), last_w = std::min(left + p.kernel_w, p.w);
      const float* window = image + start * row_stride + first_w * from;
      if (live + kLine <= from) {
        for (int64_t i = 0; i < last_h - first_h; ++i)
          for (int64_t j = 0; j < p.stride_w; ++j)
            for (int64_t c = 0; c < live; c += kLine)
              __builtin_prefetch(window + below(i) + (kPixelsAhead + j) * from + c);
      }
      std::memcpy(out, window, static_cast<size_t>(live) * sizeof(float));
      for (int64_t i = 0; i < last_h - first_h; ++i)
        for (int64_t j = i == 0 ? 1 : 0; j < last_w - first_w; ++j)
          take_larger(out, window + below(i) + j * from, live);
      if (p.zero_tail && live < p.c) std::memset(out + live, 0, static_cast<size_t>(p.c - live) * sizeof(float));
    }
  }
}

void portable(const MaxPoolParams& p, int64_t begin, int64_t end) { some_rows(p, begin, end); }

#if defined(__x86_64__)
__attribute__((target("avx2,fma"))) void avx2(const MaxPoolParams& p, int64_t begin, int64_t end) {
  some_rows(p, begin, end);
}

__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma"))) void avx512(const MaxPoolParams& p, int64_t begin,
                                                                              int64_t end) {
  some_rows(p, begin, end);
}
#endif

}  // namespace

void max_pool2d(const MaxPoolParams& p, int64_t begin, int64_t end) {
#if defined(__x86_64__)
  switch (current_isa()) {
    case Isa::kAvx512Amx:
    case Isa::kAvx512Bf16:
    case Isa::kAvx512:
      return avx512(p, begin, end);
    case Isa::kAvx2:
      return avx2(p, begin, end);
    case Isa::kPortable:
      break;
  }
#endif
  portable(p, begin, end);
}

}  // namespace rnp::cpu
