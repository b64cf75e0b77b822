// AVX-512 kernels of the weight's gradient: 8 input x 32 output channels, 16 sums + 2 + 1 of the 32 registers. Eight
// channels are a panel, and four chains of additions would already fill one FMA unit.
#if defined(__x86_64__)
#include <immintrin.h>

#include "cpu/transpose_tile.h"
#include "cpu/weight_grad_tile.h"

namespace rnp::cpu {
namespace {

struct V512 {
  using T = __m512;
  static constexpr int kWidth = 16;
  static T zero() { return _mm512_setzero_ps(); }
  static T load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, T v) { _mm512_storeu_ps(p, v); }
  static T broadcast(const float* p) { return _mm512_set1_ps(*p); }
  static T add(T a, T b) { return _mm512_add_ps(a, b); }
  static T fma(T a, T b, T c) { return _mm512_fmadd_ps(a, b, c); }
};

}  // namespace

const WeightGradKernels& avx512_weight_grad_kernels() {
  static const WeightGradKernels kernels = weight_grad_kernels<V512, 8>(&transpose);
  return kernels;
}

}  // namespace rnp::cpu
#endif
