#include "core/algorithm.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <stdexcept>

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
constexpr int64_t kFewestOutputs2 = 16;  // 4x4, 128 channels: 1.2 to 1.3 of direct; smaller ones were not measured

Algorithm by_shape(const ConvShape& s) {
  if (std::min(s.c_in, s.c_out) < kFewestChannels) return Algorithm::kDirect;
  // Products for each pair of channels. Tiles that hang over the edge waste some: long and thin maps gain nothing.
  const int64_t outputs = s.out_h * s.out_w, direct = 9 * outputs;
  const auto products = [&](int64_t m) {
    return (m + 2) * (m + 2) * ((s.out_h + m - 1) / m) * ((s.out_w + m - 1) / m);
  };
  if (outputs >= kFewestOutputs4 && products(4) * 10 <= direct * 6) return Algorithm::kWinograd4;
  if (outputs >= kFewestOutputs2 && products(2) * 10 <= direct * 7) return Algorithm::kWinograd2;
  return Algorithm::kDirect;
}

}  // namespace

bool winograd_can(const ConvShape& s, DType dtype) {
  return dtype == DType::kFloat32 && s.kh == 3 && s.kw == 3 && s.stride_h == 1 && s.stride_w == 1 &&
         s.dilation_h == 1 && s.dilation_w == 1 && s.groups == 1;
}

Algorithm choose_algorithm(const ConvShape& s, DType dtype, int64_t in_live, int64_t out_live) {
  if (!winograd_can(s, dtype) || in_live == 0 || out_live == 0) return Algorithm::kDirect;
  const int now = setting.load(std::memory_order_relaxed);
  if (now != 0) return kSettings[static_cast<size_t>(now)].forced;
  if (std::min(in_live, out_live) < kFewestLive) return Algorithm::kDirect;
  return by_shape(s);
}

int64_t winograd_tile(const ConvShape& s, DType dtype) {
  return static_cast<int64_t>(choose_algorithm(s, dtype, s.c_in, s.c_out));
}

void set_algorithm(const std::string& name) {
  for (size_t i = 0; i < kSettings.size(); ++i)
    if (name == kSettings[i].name) return setting.store(static_cast<int>(i), std::memory_order_relaxed);
  throw std::invalid_argument("set_algorithm: the algorithm must be auto, direct, winograd2 or winograd4; got '" +
                              name + "'");
}

const char* get_algorithm() { return kSettings[static_cast<size_t>(setting.load(std::memory_order_relaxed))].name; }

}  // namespace rnp
