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

Algorithm by_shape(const ConvShape& s) {
  if (std::min(s.c_in, s.c_out) < 16) return Algorithm::kDirect;
  if (s.out_h * s.out_w < 49) return Algorithm::kDirect;
  return Algorithm::kWinograd4;
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
  if (std::min(in_live, out_live) < 16) return Algorithm::kDirect;
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
