// Portable kernels of the weight's gradient: the compiler's 4-wide vectors, 4 input x 8 output channels.
#include "cpu/weight_grad_tile.h"

namespace rnp::cpu {
namespace {

struct V128 {
  typedef float T __attribute__((vector_size(16)));
  typedef float Unaligned __attribute__((vector_size(16), aligned(4), may_alias));
  static constexpr int kWidth = 4;
  static T zero() { return T{}; }
  static T load(const float* p) { return *reinterpret_cast<const Unaligned*>(p); }
  static void store(float* p, T v) { *reinterpret_cast<Unaligned*>(p) = v; }
  static T broadcast(const float* p) { return T{*p, *p, *p, *p}; }
  static T add(T a, T b) { return a + b; }
  static T fma(T a, T b, T c) { return c + a * b; }
};

}  // namespace

const WeightGradKernels& portable_weight_grad_kernels() {
  static const WeightGradKernels kernels = {
      weight_grad_tiles<V128, 4, 1>(), weight_grad_tiles<V128, 4, 2>(), {}, nullptr};
  return kernels;
}

}  // namespace rnp::cpu
