// AVX2 + FMA kernels of the weight's gradient: 4 input x 16 output channels, 8 sums + 2 + 1 of the 16 registers.
#if defined(__x86_64__)
#include <immintrin.h>

#include "cpu/transpose_tile.h"
#include "cpu/weight_grad_tile.h"

namespace rnp::cpu {
namespace {

struct V256 {
  using T = __m256;
  static constexpr int kWidth = 8;
  static T zero() { return _mm256_setzero_ps(); }
  static T load(const float* p) { return _mm256_loadu_ps(p); }
  static void store(float* p, T v) { _mm256_storeu_ps(p, v); }
  static T broadcast(const float* p) { return _mm256_broadcast_ss(p); }
  static T add(T a, T b) { return _mm256_add_ps(a, b); }
  static T fma(T a, T b, T c) { return _mm256_fmadd_ps(a, b, c); }
};

}  // namespace

const WeightGradKernels& avx2_weight_grad_kernels() {
  static const WeightGradKernels kernels = {
      weight_grad_tiles<V256, 4, 1>(), weight_grad_tiles<V256, 4, 2>(), {}, &transpose};
  return kernels;
}

}  // namespace rnp::cpu
#endif
