#include "cpu/agent_step.h"

#include <cstring>

#include "cpu/isa.h"

// The body below is inlined into one function per instruction set; vectors never cross a call.
#define RNP_INLINE inline __attribute__((always_inline))

namespace rnp::cpu {
namespace {

constexpr int64_t kLanes = 16;
typedef float Vec __attribute__((vector_size(kLanes * sizeof(float))));
typedef int32_t IVec __attribute__((vector_size(kLanes * sizeof(int32_t))));

RNP_INLINE void load(Vec& v, const float* p) { std::memcpy(&v, p, sizeof v); }
RNP_INLINE void store(float* p, const Vec& v) { std::memcpy(p, &v, sizeof v); }

RNP_INLINE float sum(const Vec& v) {
  float lane[kLanes];
  store(lane, v);
  for (int64_t half = kLanes / 2; half > 0; half /= 2)
    for (int64_t i = 0; i < half; ++i) lane[i] += lane[i + half];
  return lane[0];
}

// out[r] = bias[r] + Σ_c w[r · stride + c] · x[c] for R rows that share each load of x.
template <int R>
RNP_INLINE void dot_rows(const float* w, int64_t stride, const float* bias, const float* x, int64_t n, float* out) {
  Vec acc[R] = {};
  int64_t c = 0;
  for (; c + kLanes <= n; c += kLanes) {
    Vec xv;
    load(xv, x + c);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      Vec wv;
      load(wv, w + r * stride + c);
      acc[r] += wv * xv;
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    float total = sum(acc[r]);
    for (int64_t t = c; t < n; ++t) total += w[r * stride + t] * x[t];
    out[r] = total + bias[r];
  }
}

RNP_INLINE void linear(const float* w, int64_t stride, const float* bias, const float* x, int64_t n, int64_t rows,
                       float* out) {
  int64_t r = 0;
  for (; r + 8 <= rows; r += 8) dot_rows<8>(w + r * stride, stride, bias + r, x, n, out + r);
  for (; r < rows; ++r) dot_rows<1>(w + r * stride, stride, bias + r, x, n, out + r);
}

// e^x to about 2 units in the last place: 2^round(x / ln 2) times a polynomial on ±ln 2 / 2 (Cephes expf). x is clamped
// to ±87, which no sigmoid or tanh in float can tell from infinity; NaN stays NaN.
RNP_INLINE void exponential(Vec& y, const Vec& v) {
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

RNP_INLINE void sigmoid(Vec& y, const Vec& x) {
  Vec e;
  exponential(e, -x);
  y = 1.0f / (1.0f + e);
}

// 1 − 2 / (e^2x + 1); a Taylor polynomial where that would cancel.
RNP_INLINE void hyperbolic_tangent(Vec& y, const Vec& x) {
  Vec e;
  exponential(e, x + x);
  const Vec x2 = x * x;
  const Vec series = x * (1.0f + x2 * (-0.333333333f + x2 * (0.133333333f - 0.0539682540f * x2)));
  y = x2 < 0.015625f ? series : 1.0f - 2.0f / (e + 1.0f);
}

int64_t padded(int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }

struct Scratch {
  float *x, *code, *from_input, *from_hidden, *zeros;
};

RNP_INLINE void one_sample(const AgentStepParams& p, int64_t s, const Scratch& at) {
  const int64_t h = p.hidden, gates = 3 * h;
  const float* pooled = p.pooled + s * p.features;
  for (int64_t c = 0; c < p.features; ++c) at.x[c] = (pooled[c] - p.mean[c]) * p.inv_std[c];
  linear(p.encoder_weight, p.features, p.encoder_bias, at.x, p.features, p.code, at.code);
  for (int64_t c = 0; c < p.code; ++c) at.code[c] = at.code[c] < 0 ? 0 : at.code[c];
  linear(p.weight_ih, p.input, p.bias_ih, at.code, p.code, gates, at.from_input);
  if (p.previous) {
    const float* column = p.weight_ih + p.code + p.previous[s] - 1;
    for (int64_t g = 0; g < gates; ++g) at.from_input[g] += column[g * p.input];
  }
  const float* before = p.hidden_in ? p.hidden_in + s * h : at.zeros;
  linear(p.weight_hh, h, p.bias_hh, before, h, gates, at.from_hidden);
  for (int64_t i = 0; i < h; i += kLanes) {  // the scratch is padded, so whole vectors may be read beyond h
    const int64_t live = h - i < kLanes ? h - i : kLanes;
    Vec r_i, r_h, z_i, z_h, n_i, n_h, old = {}, reset, update, fresh;
    load(r_i, at.from_input + i), load(r_h, at.from_hidden + i);
    load(z_i, at.from_input + h + i), load(z_h, at.from_hidden + h + i);
    load(n_i, at.from_input + 2 * h + i), load(n_h, at.from_hidden + 2 * h + i);
    std::memcpy(&old, before + i, static_cast<size_t>(live) * sizeof(float));
    sigmoid(reset, r_i + r_h);
    sigmoid(update, z_i + z_h);
    hyperbolic_tangent(fresh, n_i + reset * n_h);
    const Vec next = fresh + update * (old - fresh);
    std::memcpy(p.hidden_out + s * h + i, &next, static_cast<size_t>(live) * sizeof(float));
  }
  float* q = p.q + s * p.actions;
  linear(p.decoder_weight, h, p.decoder_bias, p.hidden_out + s * h, h, p.actions, q);
  int64_t best = 0;
  float best_value = q[0];
  for (int64_t i = 1; i < p.actions; ++i) {
    const float value = q[i] + static_cast<float>(i) * p.shift;
    if (value > best_value) best = i, best_value = value;
  }
  p.action[s] = static_cast<int32_t>(best + 1);
  p.out_prefix[s] = static_cast<int32_t>(((best + 1) * p.channels + p.actions - 1) / p.actions);
}

RNP_INLINE void all_samples(const AgentStepParams& p, int64_t begin, int64_t end, const Scratch& at) {
  for (int64_t s = begin; s < end; ++s) one_sample(p, s, at);
}

void portable(const AgentStepParams& p, int64_t begin, int64_t end, const Scratch& at) {
  all_samples(p, begin, end, at);
}

#if defined(__x86_64__)
__attribute__((target("avx2,fma"))) void avx2(const AgentStepParams& p, int64_t begin, int64_t end, const Scratch& at) {
  all_samples(p, begin, end, at);
}

__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma"))) void avx512(const AgentStepParams& p, int64_t begin,
                                                                              int64_t end, const Scratch& at) {
  all_samples(p, begin, end, at);
}
#endif

}  // namespace

int64_t agent_step_scratch(const AgentStepParams& p) {
  return padded(p.features) + padded(p.code) + 2 * padded(3 * p.hidden + kLanes) + padded(p.hidden);
}

void agent_step(const AgentStepParams& p, int64_t begin, int64_t end, float* scratch) {
  std::memset(scratch, 0, static_cast<size_t>(agent_step_scratch(p)) * sizeof(float));
  Scratch at = {};
  at.x = scratch;
  at.code = at.x + padded(p.features);
  at.from_input = at.code + padded(p.code);
  at.from_hidden = at.from_input + padded(3 * p.hidden + kLanes);
  at.zeros = at.from_hidden + padded(3 * p.hidden + kLanes);
#if defined(__x86_64__)
  switch (current_isa()) {
    case Isa::kAvx512:
      return avx512(p, begin, end, at);
    case Isa::kAvx2:
      return avx2(p, begin, end, at);
    case Isa::kPortable:
      break;
  }
#endif
  portable(p, begin, end, at);
}

}  // namespace rnp::cpu
