// The weight's gradient with matrices of bfloat16 (AMX): 16 output channels x 32 positions by 16 words of two positions
// x 16 input channels at once. Four products take two loads of either operand, and no row of them crosses a cache line:
// loads are what the products wait for.
#if defined(__x86_64__)
#include "core/count.h"
#include "cpu/matrix_registers.h"
#include "cpu/pair_grad_kernel.h"

namespace rnp::cpu {
namespace {

template <int NA, int NB>
void tile(const PairGradArgs& a) {
  constexpr int64_t kHalf = kPairLanes / 2, kLanesBytes = kPairLanes * sizeof(float);
  float* second = a.sums + a.sums_step;
  RNP_MATRIX_FENCE();
  load_sums<NA, NB>(a.sums, second, kLanesBytes);
  const uint16_t *g0 = a.g, *g1 = a.g + kPairPanel * a.g_step;
  const uint32_t* x = a.x;
  const int64_t g_bytes = a.g_step * 2;
  for (int64_t n = a.chunks; n > 0; --n) {
    RNP_COUNT_FMA(NA * NB * kPairPanel * kHalf * kPairChunk);
    RNP_MATRIX_LOAD(4, x, kLanesBytes);
    RNP_MATRIX_LOAD(6, g0, g_bytes);
    RNP_MATRIX_MULTIPLY(0, 6, 4);
    if constexpr (NB > 1) {
      RNP_MATRIX_LOAD(5, x + kHalf, kLanesBytes);
      RNP_MATRIX_MULTIPLY(1, 6, 5);
    }
    if constexpr (NA > 1) {
      RNP_MATRIX_LOAD(7, g1, g_bytes);
      RNP_MATRIX_MULTIPLY(2, 7, 4);
      if constexpr (NB > 1) RNP_MATRIX_MULTIPLY(3, 7, 5);
      g1 += kPairChunk;
    }
    g0 += kPairChunk;
    x += kPairChunk / 2 * kPairLanes;
  }
  store_sums<NA, NB>(a.sums, second, kLanesBytes);
}

}  // namespace

const PairGradKernels& amx_pair_grad_kernels() {
  static const PairGradKernels kernels = [] {
    PairGradKernels k = avx512bf16_pair_grad_kernels();
    k.tile[0][0] = &tile<1, 1>, k.tile[0][1] = &tile<1, 2>;
    k.tile[1][0] = &tile<2, 1>, k.tile[1][1] = &tile<2, 2>;
    k.start = &start_matrices, k.stop = &stop_matrices;
    return k;
  }();
  return kernels;
}

}  // namespace rnp::cpu
#endif
