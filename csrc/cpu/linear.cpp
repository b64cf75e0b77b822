#include "cpu/linear.h"

#include <algorithm>
#include <cstring>
#include <numeric>

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

// Neighbours in the order that are multiplied at once: all have the same live inputs, so that no sum runs past its own.
struct Group {
  int64_t first, end;  // in the list of samples
  int64_t whole;       // live inputs in whole vectors
};

// `kMost`: samples of a group at most. A sample's group changes nothing of its sums.
template <int kWidth, int kMost>
RNP_INLINE void some_outputs(const LinearParams& p, const int64_t* order, int64_t samples, int64_t begin, int64_t end,
                             float* scratch) {
  Group groups[kSamples];
  int64_t group_count = 0;
  for (int64_t first = 0; first < samples;) {
    int64_t same = first + 1;
    while (same < samples && p.live_of(order[same]) == p.live_of(order[first])) ++same;
    const int64_t parts = (same - first + kMost - 1) / kMost, count = same - first;
    for (int64_t i = 0; i < parts; ++i)
      groups[group_count++] = {first + count * i / parts, first + count * (i + 1) / parts,
                               p.live_of(order[first]) / kWidth * kWidth};
    first = same;
  }
  const int64_t longest = group_count > 0 ? groups[0].whole : 0;
  const int64_t depth = std::min(group_count == 1 ? kDepthOfOneGroup : kDepth, longest);
  float* sums = scratch;
  float* block = scratch + samples * kLinearOutputs * kWidth;
  std::memset(sums, 0, static_cast<size_t>(samples * kLinearOutputs * kWidth) * sizeof(float));
  for (int64_t k = 0; k < longest; k += depth) {
    // Groups that reach this block: the first ones. Each has its inputs as [vector][sample], `depth` floats a sample.
    int64_t reached = 0;
    for (; reached < group_count && groups[reached].whole > k; ++reached) {
      const Group& g = groups[reached];
      const int64_t length = std::min(depth, g.whole - k), width = (g.end - g.first) * kWidth;
      for (int64_t s = g.first; s < g.end; ++s) {
        const float* from = p.input + order[s] * p.inputs + k;
        float* to = block + g.first * depth + (s - g.first) * kWidth;
        for (int64_t i = 0; i < length; i += kWidth, to += width) std::memcpy(to, from + i, kWidth * sizeof(float));
      }
    }
    for (int64_t o = begin; o < end;) {
      const int64_t rows = o + kRows <= end ? kRows : 1;
      for (int64_t i = 0; i < reached; ++i) {
        const Group& g = groups[i];
        const int64_t vectors = std::min(depth, g.whole - k) / kWidth;
        const float* weight = p.weight + o * p.inputs + k;
        const float* from = block + g.first * depth;
        float* to = sums + (g.first * kLinearOutputs + o - begin) * kWidth;
        if (rows == kRows) {
          multiply_group<kWidth, kRows, kMost>(g.end - g.first, weight, p.inputs, from, vectors, to);
        } else {
          multiply_group<kWidth, 1, kMost>(g.end - g.first, weight, p.inputs, from, vectors, to);
        }
      }
      o += rows;
    }
  }
  for (int64_t s = 0; s < samples; ++s) {
    const int64_t n = order[s], live = p.live_of(n);
    for (int64_t o = begin; o < end; ++o) {
      float* lanes = sums + (s * kLinearOutputs + o - begin) * kWidth;
      for (int half = kWidth / 2; half > 0; half /= 2)
        for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
      float sum = lanes[0];
      for (int64_t k = live / kWidth * kWidth; k < live; ++k)
        sum += p.weight[o * p.inputs + k] * p.input[n * p.inputs + k];
      p.output[n * p.outputs + o] = p.bias ? sum + p.bias[o] : sum;
    }
  }
}

void portable(const LinearParams& p, const int64_t* order, int64_t samples, int64_t begin, int64_t end,
              float* scratch) {
  some_outputs<4, 2>(p, order, samples, begin, end, scratch);
}

#if defined(__x86_64__)
__attribute__((target("avx2,fma"))) void avx2(const LinearParams& p, const int64_t* order, int64_t samples,
                                              int64_t begin, int64_t end, float* scratch) {
  some_outputs<8, 2>(p, order, samples, begin, end, scratch);
}

__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma"))) void avx512(const LinearParams& p,
                                                                              const int64_t* order, int64_t samples,
                                                                              int64_t begin, int64_t end,
                                                                              float* scratch) {
  some_outputs<16, 6>(p, order, samples, begin, end, scratch);
}
#endif

}  // namespace

int64_t linear_scratch(const LinearParams& p) {
  const int64_t samples = std::min(kSamples, p.samples);
  return samples * (kLinearOutputs * kWidest + std::min(p.inputs, samples <= 6 ? kDepthOfOneGroup : kDepth));
}

LinearOrder linear_order(const LinearParams& p) {
  LinearOrder order(static_cast<size_t>(p.samples));
  std::iota(order.begin(), order.end(), int64_t{0});
  if (p.live) std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return p.live[a] > p.live[b]; });
  return order;
}

void linear(const LinearParams& p, const LinearOrder& order, int64_t begin, int64_t end, float* scratch) {
  auto run = portable;
#if defined(__x86_64__)
  const Isa isa = current_isa();
  if (isa >= Isa::kAvx512) {
    run = avx512;
  } else if (isa == Isa::kAvx2) {
    run = avx2;
  }
#endif
  for (int64_t n = 0; n < p.samples; n += kSamples)
    run(p, order.data() + n, std::min(kSamples, p.samples - n), begin, end, scratch);
}

}  // namespace rnp::cpu
