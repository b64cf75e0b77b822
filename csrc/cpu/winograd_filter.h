// Winograd's transform of weights, in double precision, eight output channels at a time. Included by one translation
// unit per ISA, inside its flags, which forbid fused multiply-adds: all give the same bits. Internal linkage, as in
// microkernel_tile.h.
#pragma once

#include "cpu/inlining.h"
#include "cpu/winograd_kernels.h"

namespace rnp::cpu {
namespace {

typedef double Doubles __attribute__((vector_size(64)));
typedef float Floats __attribute__((vector_size(32), aligned(4), may_alias));
constexpr int kDoubles = 8;

// G g G^T; sums in the order of the taps.
template <int kEdge, int kTaps>
void transform_filters(const WinogradFilterArgs& a) {
  constexpr int kLines = WinogradFilterArgs::kMaxTaps;
  for (int64_t lane = 0; lane < a.lanes; lane += kDoubles) {
    float* to = a.to + lane;
    for (int i = 0; i < kEdge; ++i) {
      Doubles half[kTaps];
      RNP_UNROLL
      for (int j = 0; j < kTaps; ++j) {
        half[j] = Doubles{};
        RNP_UNROLL
        for (int k = 0; k < kTaps; ++k)
          half[j] += a.g[i * kLines + k] * *reinterpret_cast<const Doubles*>(&a.tap[k][j][lane]);
      }
      for (int j = 0; j < kEdge; ++j, to += a.point_step) {
        Doubles sum = {};
        RNP_UNROLL
        for (int k = 0; k < kTaps; ++k) sum += half[k] * a.g[j * kLines + k];
        *reinterpret_cast<Floats*>(to) = __builtin_convertvector(sum, Floats);
      }
    }
  }
}

}  // namespace
}  // namespace rnp::cpu
