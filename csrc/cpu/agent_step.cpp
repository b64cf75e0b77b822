#include "cpu/agent_step.h"

#include <cstring>

#include "cpu/isa.h"

// The body below is inlined into one function per instruction set; vectors never cross a call.
#define RNP_INLINE inline __attribute__((always_inline))

namespace rnp::cpu {
namespace {

// A vector holds one number of each of 16 samples: no sum ever runs across lanes, and whether the other lanes are other
// samples or padding changes nothing.
constexpr int64_t kLanes = 16;
typedef float Vec __attribute__((vector_size(kLanes * sizeof(float))));
typedef int32_t IVec __attribute__((vector_size(kLanes * sizeof(int32_t))));

RNP_INLINE void load(Vec& v, const float* p) { std::memcpy(&v, p, sizeof v); }
RNP_INLINE void store(float* p, const Vec& v) { std::memcpy(p, &v, sizeof v); }

// out[r] = bias[r] + Σ_c w[r · stride + c] · x[c] for R rows that share each load of x. Partial sums of 64 terms keep
// the rounding error of long rows small.
template <int R>
RNP_INLINE void some_rows(const float* w, int64_t stride, const float* bias, const float* x, int64_t n, float* out) {
  Vec total[R];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) total[r] = Vec{} + bias[r];
  for (int64_t first = 0; first < n; first += 64) {
    const int64_t last = n - first < 64 ? n : first + 64;
    Vec part[R] = {};
    for (int64_t c = first; c < last; ++c) {
      Vec xv;
      load(xv, x + c * kLanes);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) part[r] += w[r * stride + c] * xv;
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) total[r] += part[r];
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) store(out + r * kLanes, total[r]);
}

// x (n, 16) → out (rows, 16)
RNP_INLINE void linear(const float* w, int64_t stride, const float* bias, const float* x, int64_t n, int64_t rows,
                       float* out) {
  int64_t r = 0;
  for (; r + 8 <= rows; r += 8) some_rows<8>(w + r * stride, stride, bias + r, x, n, out + r * kLanes);
  for (; r < rows; ++r) some_rows<1>(w + r * stride, stride, bias + r, x, n, out + r * kLanes);
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

struct Scratch {
  float *x, *code, *hidden, *from_input, *from_hidden, *q;  // (…, 16) each
};

// `count` ≤ 16 samples from `first` on.
RNP_INLINE void one_block(const AgentStepParams& p, int64_t first, int64_t count, const Scratch& at) {
  const int64_t h = p.hidden, gates = 3 * h;
  std::memset(at.hidden, 0, static_cast<size_t>(h * kLanes) * sizeof(float));  // the block before left its own there
  for (int64_t s = 0; s < count; ++s) {
    const float* pooled = p.pooled + (first + s) * p.features;
    for (int64_t c = 0; c < p.features; ++c) at.x[c * kLanes + s] = (pooled[c] - p.mean[c]) * p.inv_std[c];
    if (p.hidden_in)
      for (int64_t i = 0; i < h; ++i) at.hidden[i * kLanes + s] = p.hidden_in[(first + s) * h + i];
  }
  linear(p.encoder_weight, p.features, p.encoder_bias, at.x, p.features, p.code, at.code);
  for (int64_t i = 0; i < p.code * kLanes; ++i) at.code[i] = at.code[i] < 0 ? 0 : at.code[i];
  linear(p.weight_ih, p.input, p.bias_ih, at.code, p.code, gates, at.from_input);
  if (p.previous) {
    for (int64_t s = 0; s < count; ++s) {
      const float* column = p.weight_ih + p.code + p.previous[first + s] - 1;
      for (int64_t g = 0; g < gates; ++g) at.from_input[g * kLanes + s] += column[g * p.input];
    }
  }
  linear(p.weight_hh, h, p.bias_hh, at.hidden, h, gates, at.from_hidden);
  for (int64_t i = 0; i < h; ++i) {
    Vec r_i, r_h, z_i, z_h, n_i, n_h, old, reset, update, fresh;
    load(r_i, at.from_input + i * kLanes), load(r_h, at.from_hidden + i * kLanes);
    load(z_i, at.from_input + (h + i) * kLanes), load(z_h, at.from_hidden + (h + i) * kLanes);
    load(n_i, at.from_input + (2 * h + i) * kLanes), load(n_h, at.from_hidden + (2 * h + i) * kLanes);
    load(old, at.hidden + i * kLanes);
    sigmoid(reset, r_i + r_h);
    sigmoid(update, z_i + z_h);
    hyperbolic_tangent(fresh, n_i + reset * n_h);
    store(at.hidden + i * kLanes, fresh + update * (old - fresh));
  }
  linear(p.decoder_weight, h, p.decoder_bias, at.hidden, h, p.actions, at.q);
  for (int64_t s = 0; s < count; ++s) {
    for (int64_t i = 0; i < h; ++i) p.hidden_out[(first + s) * h + i] = at.hidden[i * kLanes + s];
    int64_t best = 0;
    float best_value = 0;
    for (int64_t i = 0; i < p.actions; ++i) {
      const float q = at.q[i * kLanes + s], value = q + static_cast<float>(i) * p.shift;
      p.q[(first + s) * p.actions + i] = q;
      if (i == 0 || value > best_value) best = i, best_value = value;
    }
    p.action[first + s] = static_cast<int32_t>(best + 1);
    p.out_prefix[first + s] = static_cast<int32_t>(((best + 1) * p.channels + p.actions - 1) / p.actions);
  }
}

RNP_INLINE void all_blocks(const AgentStepParams& p, int64_t begin, int64_t end, const Scratch& at) {
  for (int64_t first = begin; first < end; first += kLanes)
    one_block(p, first, end - first < kLanes ? end - first : kLanes, at);
}

void portable(const AgentStepParams& p, int64_t begin, int64_t end, const Scratch& at) {
  all_blocks(p, begin, end, at);
}

#if defined(__x86_64__)
__attribute__((target("avx2,fma"))) void avx2(const AgentStepParams& p, int64_t begin, int64_t end, const Scratch& at) {
  all_blocks(p, begin, end, at);
}

__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma"))) void avx512(const AgentStepParams& p, int64_t begin,
                                                                              int64_t end, const Scratch& at) {
  all_blocks(p, begin, end, at);
}
#endif

}  // namespace

int64_t agent_step_scratch(const AgentStepParams& p) {
  return kLanes * (p.features + p.code + 7 * p.hidden + p.actions);
}

void agent_step(const AgentStepParams& p, int64_t begin, int64_t end, float* scratch) {
  std::memset(scratch, 0, static_cast<size_t>(agent_step_scratch(p)) * sizeof(float));
  Scratch at = {};
  at.x = scratch;
  at.code = at.x + kLanes * p.features;
  at.hidden = at.code + kLanes * p.code;
  at.from_input = at.hidden + kLanes * p.hidden;
  at.from_hidden = at.from_input + kLanes * 3 * p.hidden;
  at.q = at.from_hidden + kLanes * 3 * p.hidden;
#if defined(__x86_64__)
  switch (current_isa()) {
    case Isa::kAvx512Bf16:
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
