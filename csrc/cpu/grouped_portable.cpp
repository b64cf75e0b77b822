// Portable kernels of convolutions with few channels a group: the compiler's 4-wide vectors.
#include "core/half.h"
#include "cpu/grouped_tile.h"

namespace rnp::cpu {
namespace {

struct V128 {
  typedef float T __attribute__((vector_size(16)));
  typedef float Unaligned __attribute__((vector_size(16), aligned(4), may_alias));
  struct Mask {
    int first, last;  // lanes first…last - 1, within 0…4
    bool full() const { return first == 0 && last == 4; }
  };
  static constexpr int kWidth = 4, kRegisters = 13;  // of 16: gcc needs three for products
  static constexpr bool kMasksAreFree = false;
  static constexpr bool kStreams = false;

  static RNP_INLINE T zero() { return T{}; }
  static RNP_INLINE T load(const float* p) { return *reinterpret_cast<const Unaligned*>(p); }
  static RNP_INLINE void store(float* p, T v) { *reinterpret_cast<Unaligned*>(p) = v; }
  static RNP_INLINE T set1(float v) { return T{v, v, v, v}; }
  static RNP_INLINE T fma(T a, T b, T c) { return c + a * b; }
  static RNP_INLINE T add(T a, T b) { return a + b; }
  static RNP_INLINE T mul(T a, T b) { return a * b; }
  static RNP_INLINE T relu(T v) { return v < zero() ? zero() : v; }  // a NaN is not below zero: it stays
  static RNP_INLINE Mask mask(int live) { return {0, live < 0 ? 0 : (live > 4 ? 4 : live)}; }
  static RNP_INLINE Mask range(int first, int last) { return {first, last}; }
  static RNP_INLINE T masked_load(const float* p, Mask m) {
    asm volatile("" : "+r"(m.last));  // or loops are written twice, with what the call needs on the stack
    return m.full() ? load(p) : part_load(p, m);
  }
  static RNP_INLINE void masked_store(float* p, Mask m, T v) { m.full() ? store(p, v) : part_store(p, m, v); }

  // Rare, and long where they would be repeated for every pixel of every tile.
  static __attribute__((noinline)) T part_load(const float* p, Mask m) {
    T out = zero();
    for (int i = m.first; i < m.last; ++i) out[i] = p[i];
    return out;
  }
  static __attribute__((noinline)) void part_store(float* p, Mask m, T v) {
    for (int i = m.first; i < m.last; ++i) p[i] = v[i];
  }
};

template <class Half>
struct Converted {
  static RNP_INLINE V128::T widen(const uint16_t* p) {
    V128::T v;
    for (int i = 0; i < V128::kWidth; ++i) v[i] = to_float(Half{p[i]});
    return v;
  }
  static RNP_INLINE void narrow(V128::T v, uint16_t* p) {
    for (int i = 0; i < V128::kWidth; ++i) p[i] = from_float<Half, float>(v[i]).bits;
  }
};

}  // namespace

const GroupedKernels& portable_grouped_kernels() {
  static const GroupedKernels kernels = grouped_kernels<V128, Converted<BFloat16>, Converted<Float16>>();
  return kernels;
}

}  // namespace rnp::cpu
