#include "cpu/linear.h"

#include <algorithm>
#include <cstring>

#include "cpu/isa.h"

// The body below is inlined into one function per instruction set. Vectors are handed on by address: no call may
// depend on the registers of the caller's instruction set.
#define RNP_INLINE inline __attribute__((always_inline))
#define RNP_LAMBDA __attribute__((always_inline))
#define RNP_UNROLL _Pragma("GCC unroll 8")

namespace rnp::cpu {
namespace {

// Inputs of a block: the weights of four outputs stay in L1 while groups of samples pass. One group needs no blocks:
// long rows come faster from memory.
constexpr int64_t kDepth = 512, kDepthOfOneGroup = 8192;
constexpr int64_t kSamples = 64;  // that share one reading of the weights
constexpr int64_t kWidest = 16;   // lanes of the widest vector
constexpr int kRows = 4;          // outputs in registers

// GCC drops the attributes of an alias template whose size depends on a parameter.
template <int kWidth>
struct Vector;
#define RNP_VECTOR(width)                                                                                   \
  template <>                                                                                               \
  struct Vector<width> {                                                                                    \
    typedef float T __attribute__((vector_size(width * sizeof(float)), aligned(sizeof(float)), may_alias)); \
  };
RNP_VECTOR(4)
RNP_VECTOR(8)
RNP_VECTOR(16)

// sums[s][r] += the products of `count` whole vectors of inputs. `input` is [count][S] vectors. Sums lie kLinearOutputs
// vectors apart from sample to sample.
template <int kWidth, int R, int S>
RNP_INLINE void multiply(const float* weight, int64_t inputs, const float* input, int64_t count, float* sums) {
  using V = typename Vector<kWidth>::T;
  constexpr int64_t kStep = kLinearOutputs * kWidth;
  V acc[S][R];
  RNP_UNROLL
  for (int s = 0; s < S; ++s) {
    RNP_UNROLL
    for (int r = 0; r < R; ++r) acc[s][r] = *reinterpret_cast<const V*>(sums + s * kStep + r * kWidth);
  }
  const float* next = weight + R * inputs;  // the rows that come next: pieces too short for the hardware to follow
  for (int64_t k = 0; k < count * kWidth; k += kWidth, input += S * kWidth) {
    V w[R];
    RNP_UNROLL
    for (int r = 0; r < R; ++r) {
      w[r] = *reinterpret_cast<const V*>(weight + r * inputs + k);
      if (kWidth >= 16 || k % 16 == 0) __builtin_prefetch(next + r * inputs + k);
    }
    RNP_UNROLL
    for (int s = 0; s < S; ++s) {
      const V x = *reinterpret_cast<const V*>(input + s * kWidth);
      RNP_UNROLL
      for (int r = 0; r < R; ++r) acc[s][r] += w[r] * x;
    }
  }
  RNP_UNROLL
  for (int s = 0; s < S; ++s) {
    RNP_UNROLL
    for (int r = 0; r < R; ++r) *reinterpret_cast<V*>(sums + s * kStep + r * kWidth) = acc[s][r];
  }
}

template <int kWidth, int R, int S>
RNP_INLINE void multiply_group(int64_t samples, const float* weight, int64_t inputs, const float* input, int64_t count,
                               float* sums) {
  if (samples == S) return multiply<kWidth, R, S>(weight, inputs, input, count, sums);
  if constexpr (S > 1) multiply_group<kWidth, R, S - 1>(samples, weight, inputs, input, count, sums);
}

// `kMost`: samples that are multiplied at once. A sample's group changes nothing of its sums.
template <int kWidth, int kMost>
RNP_INLINE void some_outputs(const LinearParams& p, int64_t begin, int64_t end, float* scratch) {
  const int64_t whole = p.inputs / kWidth * kWidth;
  for (int64_t n = 0; n < p.samples; n += kSamples) {
    const int64_t samples = std::min(kSamples, p.samples - n), groups = (samples + kMost - 1) / kMost;
    const auto first = [&](int64_t g) RNP_LAMBDA { return samples * g / groups; };
    const int64_t depth = groups == 1 ? kDepthOfOneGroup : kDepth;
    const float* input = p.input + n * p.inputs;
    float* sums = scratch;
    float* block = scratch + samples * kLinearOutputs * kWidth;
    std::memset(sums, 0, static_cast<size_t>(samples * kLinearOutputs * kWidth) * sizeof(float));
    for (int64_t k = 0; k < whole; k += depth) {
      const int64_t length = std::min(depth, whole - k);
      for (int64_t g = 0; g < groups; ++g) {
        const int64_t s0 = first(g), s1 = first(g + 1);
        for (int64_t s = s0; s < s1; ++s) {
          const float* from = input + s * p.inputs + k;
          float* to = block + s0 * length + (s - s0) * kWidth;
          for (int64_t i = 0; i < length; i += kWidth, to += (s1 - s0) * kWidth)
            std::memcpy(to, from + i, kWidth * sizeof(float));
        }
      }
      for (int64_t o = begin; o < end;) {
        const int64_t rows = o + kRows <= end ? kRows : 1;
        for (int64_t g = 0; g < groups; ++g) {
          const int64_t s0 = first(g), count = first(g + 1) - s0;
          const float* weight = p.weight + o * p.inputs + k;
          float* to = sums + (s0 * kLinearOutputs + o - begin) * kWidth;
          if (rows == kRows) {
            multiply_group<kWidth, kRows, kMost>(count, weight, p.inputs, block + s0 * length, length / kWidth, to);
          } else {
            multiply_group<kWidth, 1, kMost>(count, weight, p.inputs, block + s0 * length, length / kWidth, to);
          }
        }
        o += rows;
      }
    }
    for (int64_t s = 0; s < samples; ++s)
      for (int64_t o = begin; o < end; ++o) {
        float* lanes = sums + (s * kLinearOutputs + o - begin) * kWidth;
        for (int half = kWidth / 2; half > 0; half /= 2)
          for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
        float sum = lanes[0];
        for (int64_t k = whole; k < p.inputs; ++k) sum += p.weight[o * p.inputs + k] * input[s * p.inputs + k];
        p.output[(n + s) * p.outputs + o] = p.bias ? sum + p.bias[o] : sum;
      }
  }
}

void portable(const LinearParams& p, int64_t begin, int64_t end, float* scratch) {
  some_outputs<4, 2>(p, begin, end, scratch);
}

#if defined(__x86_64__)
__attribute__((target("avx2,fma"))) void avx2(const LinearParams& p, int64_t begin, int64_t end, float* scratch) {
  some_outputs<8, 2>(p, begin, end, scratch);
}

__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma"))) void avx512(const LinearParams& p, int64_t begin,
                                                                              int64_t end, float* scratch) {
  some_outputs<16, 6>(p, begin, end, scratch);
}
#endif

}  // namespace

int64_t linear_scratch(const LinearParams& p) {
  const int64_t samples = std::min(kSamples, p.samples);
  return samples * (kLinearOutputs * kWidest + std::min(p.inputs, samples <= 6 ? kDepthOfOneGroup : kDepth));
}

void linear(const LinearParams& p, int64_t begin, int64_t end, float* scratch) {
#if defined(__x86_64__)
  const Isa isa = current_isa();
  if (isa >= Isa::kAvx512) return avx512(p, begin, end, scratch);
  if (isa == Isa::kAvx2) return avx2(p, begin, end, scratch);
#endif
  portable(p, begin, end, scratch);
}

}  // namespace rnp::cpu
