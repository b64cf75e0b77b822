#include "cpu/sum_pixels.h"

#include <cstring>

#include "cpu/isa.h"

// The body below is inlined into one function per instruction set; vectors never cross a call.
#define RNP_INLINE inline __attribute__((always_inline))

namespace rnp::cpu {
namespace {

constexpr int64_t kLanes = 16;
typedef float Vec __attribute__((vector_size(kLanes * sizeof(float))));

// R vectors of channels, whose sums stay in registers.
template <int R>
RNP_INLINE void some_channels(const float* x, int64_t step, int64_t pixels, float* sums) {
  Vec total[R];
  std::memcpy(total, sums, sizeof total);
  for (int64_t i = 0; i < pixels; ++i, x += step) {
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      Vec v;
      std::memcpy(&v, x + r * kLanes, sizeof v);
      total[r] += v;
    }
  }
  std::memcpy(sums, total, sizeof total);
}

RNP_INLINE void all_channels(const float* x, int64_t step, int64_t pixels, int64_t channels, float* sums) {
  int64_t c = 0;
  for (; c + 4 * kLanes <= channels; c += 4 * kLanes) some_channels<4>(x + c, step, pixels, sums + c);
  for (; c + kLanes <= channels; c += kLanes) some_channels<1>(x + c, step, pixels, sums + c);
  for (; c < channels; ++c)
    for (int64_t i = 0; i < pixels; ++i) sums[c] += x[i * step + c];
}

void portable(const float* x, int64_t step, int64_t pixels, int64_t channels, float* sums) {
  all_channels(x, step, pixels, channels, sums);
}

#if defined(__x86_64__)
__attribute__((target("avx2,fma"))) void avx2(const float* x, int64_t step, int64_t pixels, int64_t channels,
                                              float* sums) {
  all_channels(x, step, pixels, channels, sums);
}

__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma"))) void avx512(const float* x, int64_t step,
                                                                              int64_t pixels, int64_t channels,
                                                                              float* sums) {
  all_channels(x, step, pixels, channels, sums);
}
#endif

}  // namespace

void sum_pixels(const float* x, int64_t step, int64_t pixels, int64_t channels, float* sums) {
#if defined(__x86_64__)
  switch (current_isa()) {
    case Isa::kAvx512Amx:
    case Isa::kAvx512Bf16:
    case Isa::kAvx512:
      return avx512(x, step, pixels, channels, sums);
    case Isa::kAvx2:
      return avx2(x, step, pixels, channels, sums);
    case Isa::kPortable:
      break;
  }
#endif
  portable(x, step, pixels, channels, sums);
}

}  // namespace rnp::cpu
