// AVX-512 kernels of the weight's gradient: 6 input x 64 output channels, 24 sums + 4 + 1 of the 32 registers and 10
// reads for 24 multiply-adds; where one panel is alone, 8 x 32, 10 reads for 16 (bench/NOTES.md, "Two processors").
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
  // In place: GCC 12 would give sums other registers, and spill some.
  static T fma(T a, T b, T c) {
    asm("vfmadd231ps %1, %2, %0" : "+v"(c) : "v"(a), "v"(b));
    return c;
  }
};

// One vector of output channels: a broadcast serves one multiply-add, which may as well read it itself.
struct V512Alone : V512 {
  static T fma(T a, T b, T c) { return _mm512_fmadd_ps(a, b, c); }
};

}  // namespace

const WeightGradKernels& avx512_weight_grad_kernels() {
  static const WeightGradKernels kernels = {weight_grad_tiles<V512Alone, 16, 1>(), weight_grad_tiles<V512, 8, 2>(),
                                            weight_grad_tiles<V512, 6, 4>(), &transpose};
  return kernels;
}

}  // namespace rnp::cpu
#endif
