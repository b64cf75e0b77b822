// The agent's step and max-pooling, one thread block's view; see agent_args.h.
#pragma once

#include <cmath>
#include <type_traits>

#include "cuda/agent_args.h"
#include "cuda/device.h"

namespace rnp::cuda {

// out[r] = bias[r] + Σ_c w[r · stride + c] · x[c]: a warp for each row, lanes over columns, then halves of the warp are
// added in a fixed order. No other sample has a part in it.
RNP_DEVICE void linear(const float* w, int64_t stride, const float* bias, const float* x, int32_t columns, int32_t rows,
                       float* out) {
  const int lane = thread_index() & 31, warps = thread_count() / 32;
  for (int32_t r = thread_index() / 32; r < rows; r += warps) {
    float sum = 0;
    for (int32_t c = lane; c < columns; c += 32) sum = multiply_add(w[r * stride + c], x[c], sum);
    for (int mask = 16; mask > 0; mask /= 2) sum += xor_lane(sum, mask);
    if (lane == 0) out[r] = sum + bias[r];
  }
}

RNP_DEVICE float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

// One sample a block. shared: AgentStepArgs::shared_floats() floats.
RNP_DEVICE void agent_step_block(const AgentStepArgs& p, float* shared) {
  float* x = shared;
  float* code = x + p.features;
  float* hidden = code + p.code;
  float* from_input = hidden + p.hidden;
  float* from_hidden = from_input + 3 * p.hidden;
  float* q = from_hidden + 3 * p.hidden;
  const int32_t gates = 3 * p.hidden, h = p.hidden;
  for (int64_t s = block_index(); s < p.samples; s += block_count()) {
    for (int32_t c = thread_index(); c < p.features; c += thread_count())
      x[c] = (p.pooled[s * p.features + c] - p.mean[c]) * p.inv_std[c];
    for (int32_t i = thread_index(); i < h; i += thread_count())
      hidden[i] = p.hidden_in ? p.hidden_in[s * h + i] : 0.0f;
    sync_block();
    linear(p.encoder_weight, p.features, p.encoder_bias, x, p.features, p.code, code);
    linear(p.weight_hh, h, p.bias_hh, hidden, h, gates, from_hidden);
    sync_block();
    for (int32_t i = thread_index(); i < p.code; i += thread_count()) code[i] = code[i] < 0 ? 0.0f : code[i];
    sync_block();
    linear(p.weight_ih, p.input, p.bias_ih, code, p.code, gates, from_input);
    sync_block();
    for (int32_t i = thread_index(); i < h; i += thread_count()) {
      float add[3] = {0.0f, 0.0f, 0.0f};
      if (p.previous) {  // the one-hot columns of the previous action
        const int32_t column = p.code + gpu::clamp_prefix(p.previous[s] - 1, p.actions - 1);
        RNP_UNROLL
        for (int gate = 0; gate < 3; ++gate) add[gate] = p.weight_ih[int64_t{gate * h + i} * p.input + column];
      }
      const float reset = sigmoid(from_input[i] + add[0] + from_hidden[i]);
      const float update = sigmoid(from_input[h + i] + add[1] + from_hidden[h + i]);
      const float fresh = tanhf(from_input[2 * h + i] + add[2] + reset * from_hidden[2 * h + i]);
      const float value = fresh + update * (hidden[i] - fresh);
      hidden[i] = value;
      p.hidden_out[s * h + i] = value;
    }
    sync_block();
    linear(p.decoder_weight, h, p.decoder_bias, hidden, h, p.actions, q);
    sync_block();
    if (thread_index() == 0) {
      int32_t best = 0;
      float most = 0;
      for (int32_t i = 0; i < p.actions; ++i) {
        const float value = q[i] + static_cast<float>(i) * p.shift;
        p.q[s * p.actions + i] = q[i];
        if (i == 0 || value > most) best = i, most = value;  // a tie goes to the smaller action
      }
      p.action[s] = best + 1;
      p.out_prefix[s] = static_cast<int32_t>((int64_t{best + 1} * p.channels + p.actions - 1) / p.actions);
    }
    sync_block();
  }
}

struct PoolWindow {  // rows and columns inside the map; never empty
  int32_t first_y, last_y, first_x, last_x;
};

// The largest of each channel of a Piece (one element, or 16 bytes of them) over a window, whose pixels are `pixel`
// elements apart. Two rows by two columns a step, so that four loads are under way at once: where a window ends within
// a step its last pixels are read twice, from a cache.
template <typename T, typename Piece>
RNP_DEVICE Piece largest(const T* channels, const PoolWindow& window, int64_t row, int64_t pixel) {
  const auto at = [&](int32_t y, int32_t x) { return *reinterpret_cast<const Piece*>(channels + y * row + x * pixel); };
  Piece most = at(window.first_y, window.first_x);
  RNP_ROLL
  for (int32_t y = window.first_y; y < window.last_y; y += 2) {
    const int32_t next_y = y + 1 < window.last_y ? y + 1 : y;
    RNP_ROLL
    for (int32_t x = window.first_x; x < window.last_x; x += 2) {
      const int32_t next_x = x + 1 < window.last_x ? x + 1 : x;
      const Piece a = at(y, x), b = at(y, next_x), c = at(next_y, x), d = at(next_y, next_x);
      most = larger_of(T{}, most, larger_of(T{}, larger_of(T{}, a, b), larger_of(T{}, c, d)));
    }
  }
  return most;
}

// A thread for one output pixel's next Piece of channels: neighbouring threads read and write neighbouring channels,
// then columns. kPieces: 16 bytes each, where channels and memory allow (MaxPoolArgs::pieces).
template <typename T, bool kPieces>
RNP_DEVICE void max_pool2d_block(const MaxPoolArgs& p) {
  using Piece = std::conditional_t<kPieces, Vec16, T>;
  constexpr int32_t kChannels = static_cast<int32_t>(sizeof(Piece) / sizeof(T));
  const int32_t runs = p.c / kChannels;
  const int64_t pieces = p.n * p.out_h * p.out_w * runs, step = block_count() * thread_count();
  for (int64_t i = block_index() * thread_count() + thread_index(); i < pieces; i += step) {
    const int64_t pixel = gpu::quotient(i, runs), line = gpu::quotient(pixel, p.out_w);
    const int64_t n = gpu::quotient(line, p.out_h);
    const int32_t c = static_cast<int32_t>(i - pixel * runs) * kChannels;
    const int32_t live = p.prefix ? p.prefix[n] - c : kChannels;
    T* const output = static_cast<T*>(p.output) + pixel * p.c + c;
    if (live <= 0 && !p.zero_tail) continue;
    const int32_t top = static_cast<int32_t>(line - n * p.out_h) * p.stride_h - p.pad_h;
    const int32_t left = static_cast<int32_t>(pixel - line * p.out_w) * p.stride_w - p.pad_w;
    const PoolWindow window = {top < 0 ? 0 : top, top + p.kernel_h < p.h ? top + p.kernel_h : p.h, left < 0 ? 0 : left,
                               left + p.kernel_w < p.w ? left + p.kernel_w : p.w};
    const T* const image = static_cast<const T*>(p.input) + n * p.h * p.w * p.c + c;
    const int64_t row = int64_t{p.w} * p.c;
    if (live >= kChannels) {
      *reinterpret_cast<Piece*>(output) = largest<T, Piece>(image, window, row, p.c);
    } else if (live <= 0) {
      *reinterpret_cast<Piece*>(output) = Piece{};
    } else {  // a prefix that ends in the piece: nothing behind it is read
      RNP_ROLL
      for (int32_t e = 0; e < kChannels; ++e)
        if (e < live)
          output[e] = largest<T, T>(image + e, window, row, p.c);
        else if (p.zero_tail)
          output[e] = T{};
    }
  }
}

}  // namespace rnp::cuda
