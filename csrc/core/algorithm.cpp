#include "core/algorithm.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <stdexcept>

#include "core/processor.h"
#include "core/winograd.h"

namespace rnp {
namespace {

struct Setting {
  const char* name;
  Algorithm forced;  // unused by "auto"
};
constexpr std::array<Setting, 4> kSettings = {{{"auto", Algorithm::kDirect},
                                               {"direct", Algorithm::kDirect},
                                               {"winograd2", Algorithm::kWinograd2},
                                               {"winograd4", Algorithm::kWinograd4}}};
std::atomic<int> setting{0};

constexpr int64_t kFewestChannels = 16;  // of the layer: below, the transforms outweigh the products they save (3 -> 64
                                         // at 224x224: 0.75 of direct)
constexpr int64_t kFewestLive = 8;       // of a sample: below, likewise (8 -> 8 of 64 at 56x56: as fast as direct)
constexpr int64_t kFewestOutputs4 = 49;  // 7x7, 512 channels, F(4x4) over F(2x2): 0.95 for a sample alone, 1.4 for two,
                                         // 1.6 for eight; over direct 1.3, 1.9 and 2.2. Smaller ones were not measured
// Where weights of 36 values a pair of channels, not 16, come past L2 slowly. Emerald Rapids, 7x7, 512 channels, of
// prepacked oneDNN's speed alone and in a batch of 8: F(4x4) 0.8 and 1.6, F(2x2) 1.1 and 1.2; 14x14, 256 channels: 1.5
// and 1.9, 1.6 and 1.7.
constexpr int64_t kFewestOutputsAfar = 100, kWeightsNear = int64_t{1} << 19;
// Stems, one thread, direct over Winograd: 3 -> 64 at 112x112 1.6 alone and 2.2 in a batch of 8, at 8x8 to 56x56 1.5 to
// 1.7; 3 -> 16 1.5, 2 -> 64 1.4, 1 -> 16 0.6 (few products to save).
constexpr int64_t kFewestFolded = 2;     // channels of the image
constexpr int64_t kFewestOutputs7 = 64;  // smaller ones were not measured
constexpr int64_t kFewestOutputs2 = 16;  // 4x4, 128 channels: 1.2 to 1.3 of direct; smaller ones were not measured

bool folds(const ConvShape& s) { return s.kh == 7; }  // of those that winograd_can

// A transform in the call must pay for a sample alone. The input's gradient, Emerald Rapids, one thread, direct over
// Winograd, batch 1 and 16: 128 channels at 20x20 0.99 and 2.3, at 28x28 1.33 and 2.5, 256 at 28x28 1.22 and 2.1, 512
// at 28x28 1.38 and 3.9, 64 at 56x56 1.9 and 2.5.
constexpr int64_t kFewestOutputsInCall = 20 * 20;

Algorithm by_shape(const ConvShape& s) {
  if (folds(s)) {
    if (s.c_in < kFewestFolded || s.c_out < kFewestChannels) return Algorithm::kDirect;
    const int64_t outputs = s.out_h * s.out_w, computed = (s.out_h + 3) / 4 * ((s.out_w + 3) / 4) * 16;
    return outputs >= kFewestOutputs7 && computed * 10 <= outputs * 14 ? Algorithm::kWinograd4 : Algorithm::kDirect;
  }
  if (std::min(s.c_in, s.c_out) < kFewestChannels) return Algorithm::kDirect;
  // Products for each pair of channels. Tiles that hang over the edge waste some: long and thin maps gain nothing.
  const int64_t outputs = s.out_h * s.out_w, direct = 9 * outputs;
  const auto products = [&](int64_t m) {
    return (m + 2) * (m + 2) * winograd_tiles(s.out_h, m, s.dilation_h) * winograd_tiles(s.out_w, m, s.dilation_w);
  };
  const bool afar = processor().slow_past_l2 && 36 * s.c_in * s.c_out > kWeightsNear;
  if (outputs >= (afar ? kFewestOutputsAfar : kFewestOutputs4) && products(4) * 10 <= direct * 6)
    return Algorithm::kWinograd4;
  if (outputs >= kFewestOutputs2 && products(2) * 10 <= direct * 7) return Algorithm::kWinograd2;
  return Algorithm::kDirect;
}

}  // namespace

bool winograd_can(const ConvShape& s, DType dtype) {
  if (dtype != DType::kFloat32 || s.kh != s.kw || s.stride_h != s.stride_w) return false;
  const bool stem = s.kh == 7 && s.stride_h == 2 && s.c_in <= 4 && s.dilation_h == 1 && s.dilation_w == 1;
  return s.groups == 1 && (stem || (s.kh == 3 && s.stride_h == 1));
}

Algorithm choose_algorithm(const ConvShape& s, DType dtype, int64_t in_live, int64_t out_live) {
  if (!winograd_can(s, dtype) || in_live == 0 || out_live == 0) return Algorithm::kDirect;
  // Not one interleaved map of more than an output: there may be more tiles than outputs.
  if (s.dilation_h > s.out_h || s.dilation_w > s.out_w) return Algorithm::kDirect;
  if (folds(s) && in_live < s.c_in) return Algorithm::kDirect;
  const int now = setting.load(std::memory_order_relaxed);
  if (now != 0) {
    const Algorithm forced = kSettings[static_cast<size_t>(now)].forced;
    return folds(s) && forced == Algorithm::kWinograd2 ? Algorithm::kDirect : forced;
  }
  if ((folds(s) ? out_live : std::min(in_live, out_live)) < kFewestLive) return Algorithm::kDirect;
  return by_shape(s);
}

int64_t winograd_tile(const ConvShape& s, DType dtype) {
  return static_cast<int64_t>(choose_algorithm(s, dtype, s.c_in, s.c_out));
}

bool transforms_in_call(const ConvShape& s, DType dtype) {
  return s.out_h * s.out_w >= kFewestOutputsInCall && winograd_tile(s, dtype) != 0 && !folds(s);
}

void set_algorithm(const std::string& name) {
  for (size_t i = 0; i < kSettings.size(); ++i)
    if (name == kSettings[i].name) return setting.store(static_cast<int>(i), std::memory_order_relaxed);
  throw std::invalid_argument("set_algorithm: the algorithm must be auto, direct, winograd2 or winograd4; got '" +
                              name + "'");
}

const char* get_algorithm() { return kSettings[static_cast<size_t>(setting.load(std::memory_order_relaxed))].name; }

}  // namespace rnp
