#include "cpu/agent_step.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "cpu/isa.h"

// The body below is inlined into one function per instruction set; vectors never cross a call.
#define RNP_INLINE inline __attribute__((always_inline))

namespace rnp::cpu {
namespace {

// Vectors are as wide as the registers, W floats, and their lanes are neighbours in a row of weights: one sample alone
// is no dearer than one of many. Every sum is the same chain of additions whatever samples share the loads of weights.
template <int W>
struct Vector {
  typedef float Vec __attribute__((vector_size(W * sizeof(float))));
  typedef int32_t IVec __attribute__((vector_size(W * sizeof(int32_t))));
};

constexpr int64_t kPad = 16;      // places in the scratch are multiples of it: whole vectors may be read
constexpr int64_t kTogether = 4;  // samples that share the loads of weights
constexpr int64_t kChain = 32;    // terms of a lane that are added up by themselves: long rows lose less to rounding

int64_t padded(int64_t n) { return (n + kPad - 1) / kPad * kPad; }

template <typename V>
RNP_INLINE void load(V& v, const float* p) {
  std::memcpy(&v, p, sizeof v);
}
template <typename V>
RNP_INLINE void store(float* p, const V& v) {
  std::memcpy(p, &v, sizeof v);
}

// Lane i of the result is that of a where i is below W / 2, of b above: two neighbouring runs of `Half` lanes added up.
template <int W, int Half, int... I>
RNP_INLINE void add_halves(typename Vector<W>::Vec& sum, const typename Vector<W>::Vec& a,
                           const typename Vector<W>::Vec& b, std::integer_sequence<int, I...>) {
  sum = __builtin_shufflevector(a, b, (I / Half * 2 * Half + I % Half)...) +
        __builtin_shufflevector(a, b, (I / Half * 2 * Half + Half + I % Half)...);
}

// out[i] = the sum over the lanes of v[i], always halves onto halves; N vectors share the additions. v is overwritten.
template <int W, int N, int Half = W / 2>
RNP_INLINE void sums_of_lanes(typename Vector<W>::Vec* v, float* out) {
  constexpr auto lanes = std::make_integer_sequence<int, W>{};
  if constexpr (Half == 0) {
    for (int i = 0; i < N; ++i) store(out + i * W, v[i]);
  } else {
#pragma GCC unroll 8
    for (int i = 0; i < N; i += 2) add_halves<W, Half>(v[i / 2], v[i], v[i + 1 < N ? i + 1 : i], lanes);
    sums_of_lanes<W, (N + 1) / 2, Half / 2>(v, out);
  }
}

// out[s][r] = bias[r] + Σ_c w[r · stride + c] · x[s][c] for R rows and S samples, whose x are 0 from n on.
template <int W, int R, int S>
RNP_INLINE void some_rows(const float* w, int64_t stride, const float* bias, const float* x, int64_t x_step, int64_t n,
                          float* out, int64_t out_step) {
  using Vec = typename Vector<W>::Vec;
  Vec total[S][R] = {};
  const int64_t whole = n / W * W;
  for (int64_t first = 0; first < whole; first += kChain * W) {
    const int64_t last = whole - first < kChain * W ? whole : first + kChain * W;
    Vec part[R][S] = {};
    for (int64_t c = first; c < last; c += W) {
      Vec xv[S];
#pragma GCC unroll 8
      for (int s = 0; s < S; ++s) load(xv[s], x + s * x_step + c);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        Vec wv;
        load(wv, w + r * stride + c);
#pragma GCC unroll 8
        for (int s = 0; s < S; ++s) part[r][s] += wv * xv[s];
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
      for (int s = 0; s < S; ++s) total[s][r] += part[r][s];
  }
  if (whole < n) {
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      Vec wv = {};
      std::memcpy(&wv, w + r * stride + whole, static_cast<size_t>(n - whole) * sizeof(float));
#pragma GCC unroll 8
      for (int s = 0; s < S; ++s) {
        Vec xv;
        load(xv, x + s * x_step + whole);
        total[s][r] += wv * xv;
      }
    }
  }
  float sums[R * S < W ? W : R * S];
  sums_of_lanes<W, R * S>(total[0], sums);
  constexpr int kRun = R % 4 == 0 ? 4 : 1;  // outputs of a sample that are stored together
  using Outputs = typename Vector<kRun>::Vec;
#pragma GCC unroll 8
  for (int i = 0; i < R * S; i += kRun) {
    Outputs sum, added;
    load(sum, sums + i), load(added, bias + i % R);
    store(out + i / R * out_step + i % R, added + sum);
  }
}

// x (S, n) → out (S, rows)
template <int W, int S>
RNP_INLINE void linear(const float* w, int64_t stride, const float* bias, const float* x, int64_t x_step, int64_t n,
                       int64_t rows, float* out, int64_t out_step) {
  constexpr int R =
      W == 16 && S > 1 ? 16 / S : 8 / S;  // the sums fit the registers, with the loads of S samples and a row
  int64_t r = 0;
  for (; r + R <= rows; r += R) some_rows<W, R, S>(w + r * stride, stride, bias + r, x, x_step, n, out + r, out_step);
  for (; r < rows; ++r) some_rows<W, 1, S>(w + r * stride, stride, bias + r, x, x_step, n, out + r, out_step);
}

// e^x to about 2 units in the last place: 2^round(x / ln 2) times a polynomial on ±ln 2 / 2 (Cephes expf). x is clamped
// to ±87, which no sigmoid or tanh in float can tell from infinity; NaN stays NaN.
template <typename Vec>
RNP_INLINE void exponential(Vec& y, const Vec& v) {
  using IVec = typename Vector<static_cast<int>(sizeof(Vec) / sizeof(float))>::IVec;
  Vec x = v;
  const Vec top = Vec{} + 87.0f, bottom = Vec{} - 87.0f;
  x = x > top ? top : x;
  x = x < bottom ? bottom : x;
  const Vec magic = Vec{} + 12582912.0f;  // 1.5 · 2^23: adding it rounds to an integer
  const Vec shifted = x * 1.44269504088896341f + magic;
  const Vec n = shifted - magic;
  const Vec r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  Vec p = Vec{} + 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  IVec bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  const IVec power = ((bits - 0x4b400000) + 127) << 23;
  Vec scale;
  std::memcpy(&scale, &power, sizeof scale);
  y = x == x ? p * scale : x;
}

template <typename Vec>
RNP_INLINE void sigmoid(Vec& y, const Vec& x) {
  Vec e;
  exponential(e, -x);
  y = 1.0f / (1.0f + e);
}

// 1 − 2 / (e^2x + 1); a Taylor polynomial where that would cancel.
template <typename Vec>
RNP_INLINE void hyperbolic_tangent(Vec& y, const Vec& x) {
  Vec e;
  exponential(e, x + x);
  const Vec x2 = x * x;
  const Vec series = x * (1.0f + x2 * (-0.333333333f + x2 * (0.133333333f - 0.0539682540f * x2)));
  y = x2 < 0.015625f ? series : 1.0f - 2.0f / (e + 1.0f);
}

// Of one sample: where its numbers begin in its part of the scratch, and how long that is.
struct Places {
  int64_t code, hidden, from_input, from_hidden, q, size;

  explicit Places(const AgentStepParams& p) {
    code = padded(p.features);
    hidden = code + padded(p.code);
    from_input = hidden + padded(p.hidden);
    from_hidden = from_input + padded(3 * p.hidden) + kPad;  // the last gate is read in whole vectors
    q = from_hidden + padded(3 * p.hidden) + kPad;
    size = q + padded(p.actions);
  }
};

template <int W>
RNP_INLINE void gate_units_of(const float* from_input, const float* from_hidden, int64_t h, float* hidden) {
  using Vec = typename Vector<W>::Vec;
  for (int64_t i = 0; i < h; i += W) {
    Vec r_i, r_h, z_i, z_h, n_i, n_h, old, reset, update, fresh;
    load(r_i, from_input + i), load(r_h, from_hidden + i);
    load(z_i, from_input + h + i), load(z_h, from_hidden + h + i);
    load(n_i, from_input + 2 * h + i), load(n_h, from_hidden + 2 * h + i);
    load(old, hidden + i);
    sigmoid(reset, r_i + r_h);
    sigmoid(update, z_i + z_h);
    hyperbolic_tangent(fresh, n_i + reset * n_h);
    store(hidden + i, fresh + update * (old - fresh));
  }
  std::fill(hidden + h, hidden + padded(h), 0.0f);
}

// Not inlined: the constants of its polynomials are more than some instruction sets have registers, and tests that look
// for accumulators on the stack pass it by (tests/test_cpu_disassembly.py).
template <int W>
__attribute__((noinline)) void gate_units(const float* from_input, const float* from_hidden, int64_t h, float* hidden) {
  gate_units_of<W>(from_input, from_hidden, h, hidden);
}
#if defined(__x86_64__)
template <>
__attribute__((noinline, target("avx2,fma"))) void gate_units<8>(const float* from_input, const float* from_hidden,
                                                                 int64_t h, float* hidden) {
  gate_units_of<8>(from_input, from_hidden, h, hidden);
}
template <>
__attribute__((noinline, target("avx512f,avx512bw,avx512dq,avx512vl,fma"))) void gate_units<16>(
    const float* from_input, const float* from_hidden, int64_t h, float* hidden) {
  gate_units_of<16>(from_input, from_hidden, h, hidden);
}
#endif

// Samples first … first + S − 1.
template <int W, int S>
RNP_INLINE void some_samples(const AgentStepParams& p, int64_t first, const Places& at, float* scratch) {
  const int64_t h = p.hidden, gates = 3 * h;
  for (int64_t s = 0; s < S; ++s) {
    const float* pooled = p.pooled + (first + s) * p.features;
    float* x = scratch + s * at.size;
    for (int64_t c = 0; c < p.features; ++c) x[c] = (pooled[c] - p.mean[c]) * p.inv_std[c];
    float* hidden = x + at.hidden;
    if (p.hidden_in) {
      std::copy(p.hidden_in + (first + s) * h, p.hidden_in + (first + s + 1) * h, hidden);
    } else {
      std::fill(hidden, hidden + h, 0.0f);  // the samples before have left their own there
    }
  }
  const auto layer = [&](const float* w, int64_t stride, const float* bias, int64_t from, int64_t n, int64_t rows,
                         int64_t to) __attribute__((always_inline)) {
    linear<W, S>(w, stride, bias, scratch + from, at.size, n, rows, scratch + to, at.size);
  };
  layer(p.encoder_weight, p.features, p.encoder_bias, 0, p.features, p.code, at.code);
  for (int64_t s = 0; s < S; ++s) {
    float* code = scratch + s * at.size + at.code;
    for (int64_t i = 0; i < p.code; ++i) code[i] = code[i] < 0 ? 0 : code[i];
  }
  layer(p.weight_ih, p.input, p.bias_ih, at.code, p.code, gates, at.from_input);
  layer(p.weight_hh, h, p.bias_hh, at.hidden, h, gates, at.from_hidden);
  for (int64_t s = 0; s < S; ++s) {
    float* x = scratch + s * at.size;
    if (p.previous) {
      const float* column = p.weight_ih + p.code + p.previous[first + s] - 1;
      for (int64_t g = 0; g < gates; ++g) x[at.from_input + g] += column[g * p.input];
    }
    gate_units<W>(x + at.from_input, x + at.from_hidden, h, x + at.hidden);
    std::copy(x + at.hidden, x + at.hidden + h, p.hidden_out + (first + s) * h);
  }
  layer(p.decoder_weight, h, p.decoder_bias, at.hidden, h, p.actions, at.q);
  for (int64_t s = 0; s < S; ++s) {
    const float* q = scratch + s * at.size + at.q;
    int64_t best = 0;
    float best_value = 0;
    for (int64_t i = 0; i < p.actions; ++i) {
      const float value = q[i] + static_cast<float>(i) * p.shift;
      p.q[(first + s) * p.actions + i] = q[i];
      if (i == 0 || value > best_value) best = i, best_value = value;
    }
    p.action[first + s] = static_cast<int32_t>(best + 1);
    p.out_prefix[first + s] = static_cast<int32_t>(((best + 1) * p.channels + p.actions - 1) / p.actions);
  }
}

template <int W>
RNP_INLINE void all_samples(const AgentStepParams& p, int64_t begin, int64_t end, const Places& at, float* scratch) {
  int64_t s = begin;
  for (; s + kTogether <= end; s += kTogether) some_samples<W, kTogether>(p, s, at, scratch);
  for (; s < end; ++s) some_samples<W, 1>(p, s, at, scratch);
}

void portable(const AgentStepParams& p, int64_t begin, int64_t end, const Places& at, float* scratch) {
  all_samples<4>(p, begin, end, at, scratch);
}

#if defined(__x86_64__)
__attribute__((target("avx2,fma"))) void avx2(const AgentStepParams& p, int64_t begin, int64_t end, const Places& at,
                                              float* scratch) {
  all_samples<8>(p, begin, end, at, scratch);
}

__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma"))) void avx512(const AgentStepParams& p, int64_t begin,
                                                                              int64_t end, const Places& at,
                                                                              float* scratch) {
  all_samples<16>(p, begin, end, at, scratch);
}
#endif

}  // namespace

int64_t agent_step_scratch(const AgentStepParams& p) { return kTogether * Places(p).size; }

void agent_step(const AgentStepParams& p, int64_t begin, int64_t end, float* scratch) {
  const Places at(p);
  std::fill(scratch, scratch + std::min(kTogether, end - begin) * at.size, 0.0f);
#if defined(__x86_64__)
  switch (current_isa()) {
    case Isa::kAvx512Amx:
    case Isa::kAvx512Bf16:
    case Isa::kAvx512:
      return avx512(p, begin, end, at, scratch);
    case Isa::kAvx2:
      return avx2(p, begin, end, at, scratch);
    case Isa::kPortable:
      break;
  }
#endif
  portable(p, begin, end, at, scratch);
}

}  // namespace rnp::cpu
