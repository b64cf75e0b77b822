// What the kernels ask of the machine, in two versions: PTX under nvcc, and for any other compiler the emulator of
// csrc/tests, which runs the same kernel code on the CPU thread by thread (cuda/emulator.h).
#pragma once

#include <cstdint>
#include <limits>

#include "core/gpu_schedule.h"
#include "core/half.h"

#if defined(__CUDACC__)
#define RNP_DEVICE __device__ __forceinline__
#define RNP_UNROLL _Pragma("unroll")
#define RNP_ROLL _Pragma("unroll 1")
#else
#include <bit>

#include "cuda/emulator.h"
#define RNP_DEVICE inline
#define RNP_UNROLL
#define RNP_ROLL
#endif

namespace rnp::cuda {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

struct alignas(8) Pair {
  float low, high;
};

struct alignas(16) Vec16 {  // what one asynchronous copy moves
  uint32_t word[4];
};

#if defined(__CUDACC__)

RNP_DEVICE int thread_index() { return static_cast<int>(threadIdx.x); }
RNP_DEVICE int thread_count() { return static_cast<int>(blockDim.x); }
RNP_DEVICE int64_t block_index() { return blockIdx.x; }
RNP_DEVICE int64_t block_count() { return gridDim.x; }
RNP_DEVICE void sync_block() { __syncthreads(); }
// Called by whole warps: threads that meet at one address in turn cost more than a warp that agrees first.
RNP_DEVICE void max_in_block(int32_t* shared, int32_t v) {
  const int32_t most = __reduce_max_sync(0xffffffffu, v);
  if ((threadIdx.x & 31) == 0) atomicMax(shared, most);
}
RNP_DEVICE int32_t max_in_warp(int32_t v) { return __reduce_max_sync(0xffffffffu, v); }
RNP_DEVICE uint32_t ballot(bool v) { return __ballot_sync(0xffffffffu, v); }
RNP_DEVICE int lowest_bit(uint64_t v) { return __ffsll(static_cast<long long>(v)) - 1; }  // of one that is not 0
RNP_DEVICE int highest_bit(uint32_t v) { return 31 - __clz(static_cast<int>(v)); }
RNP_DEVICE int count_bits(uint32_t v) { return __popc(v); }
RNP_DEVICE int32_t take_ticket(int32_t* counter) { return atomicAdd(counter, 1); }
RNP_DEVICE int32_t add_in_block(int32_t* shared, int32_t v) { return atomicAdd(shared, v); }  // what was there
RNP_DEVICE float xor_lane(float v, int mask) { return __shfl_xor_sync(0xffffffffu, v, mask); }
// The compiler moves no access to memory across this place.
RNP_DEVICE void keep_order() { asm volatile("" ::: "memory"); }
// The same value, of which the compiler knows nothing: what is computed from it is computed where it stands, not once
// for several branches and kept in registers until then.
RNP_DEVICE int32_t opaque(int32_t v) {
  asm volatile("" : "+r"(v));
  return v;
}
RNP_DEVICE int64_t opaque(int64_t v) {
  asm volatile("" : "+l"(v));
  return v;
}
RNP_DEVICE int32_t from_lane(int32_t v, int lane) { return __shfl_sync(0xffffffffu, v, lane); }
RNP_DEVICE float multiply_add(float a, float b, float c) { return __fmaf_rn(a, b, c); }
RNP_DEVICE float relu(float v) {  // NaN passes, as in torch's
  float out;
  asm("max.NaN.f32 %0, %1, 0f00000000;\n" : "=f"(out) : "f"(v));
  return out;
}

// `bytes` (0…16) from global memory, zeros behind them, to 16 aligned bytes of shared memory. With 0 bytes nothing is
// read. Source and destination are aligned to 16.
RNP_DEVICE void copy_async(void* shared, const void* global, int bytes) {
  const uint32_t to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(to), "l"(global), "r"(bytes) : "memory");
}
RNP_DEVICE void commit_copies() { asm volatile("cp.async.commit_group;\n" ::: "memory"); }
template <int N>
RNP_DEVICE void wait_copies() {  // until at most N groups of this thread's copies are under way
  asm volatile("cp.async.wait_group %0;\n" ::"n"(N) : "memory");
}

// Four 8 x 16-byte matrices; lane l names row l % 8 of matrix l / 8, and receives word l % 4 of row l / 4 of each.
RNP_DEVICE void load_matrices(uint32_t (&r)[4], const void* shared_row) {
  const uint32_t from = static_cast<uint32_t>(__cvta_generic_to_shared(shared_row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(from)
               : "memory");
}

// The same for 8 x 8 elements of 2 bytes, each matrix transposed: lane l receives elements 2 (l % 4) and the next of
// column l / 4.
RNP_DEVICE void load_matrices_transposed(uint32_t (&r)[4], const void* shared_row) {
  const uint32_t from = static_cast<uint32_t>(__cvta_generic_to_shared(shared_row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(from)
               : "memory");
}

// The way back of load_matrices.
RNP_DEVICE void store_matrices(void* shared_row, const uint32_t (&r)[4]) {
  const uint32_t to = static_cast<uint32_t>(__cvta_generic_to_shared(shared_row));
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};\n" ::"r"(to), "r"(r[0]), "r"(r[1]),
               "r"(r[2]), "r"(r[3])
               : "memory");
}

// d (16 x 8, float32) += a (16 x 32 bytes) · b (32 bytes x 8), in the fragment layouts of mma.sync.
#define RNP_MMA(shape_and_types)                                                    \
  asm volatile("mma.sync.aligned." shape_and_types                                  \
               " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};\n" \
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                     \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1))
RNP_DEVICE void multiply_matrices(BFloat16, float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  RNP_MMA("m16n8k16.row.col.f32.bf16.bf16.f32");
}
RNP_DEVICE void multiply_matrices(Float16, float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  RNP_MMA("m16n8k16.row.col.f32.f16.f16.f32");
}
RNP_DEVICE void multiply_matrices(float, float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  RNP_MMA("m16n8k8.row.col.f32.tf32.tf32.f32");
}
#undef RNP_MMA

// The nearest TF32 value, ties away from zero; NaN and infinity stay themselves.
RNP_DEVICE uint32_t to_tf32(uint32_t float_bits) {
  uint32_t out;
  asm("cvt.rna.tf32.f32 %0, %1;\n" : "=r"(out) : "f"(__uint_as_float(float_bits)));
  return out;
}

RNP_DEVICE void store_two_floats(float* to, float a, float b) { *reinterpret_cast<float2*>(to) = make_float2(a, b); }

RNP_DEVICE float widen(float v) { return v; }
RNP_DEVICE double widen(double v) { return v; }
RNP_DEVICE float widen(BFloat16 v) { return __uint_as_float(static_cast<uint32_t>(v.bits) << 16); }
RNP_DEVICE float widen(Float16 v) {
  float out;
  asm("cvt.f32.f16 %0, %1;\n" : "=f"(out) : "h"(v.bits));
  return out;
}
// Two neighbouring elements; of 2 bytes the first in the low half.
RNP_DEVICE Pair narrow_two(float, float low, float high) { return {low, high}; }
RNP_DEVICE uint32_t narrow_two(BFloat16, float low, float high) {
  uint32_t out;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;\n" : "=r"(out) : "f"(high), "f"(low));
  return out;
}
RNP_DEVICE uint32_t narrow_two(Float16, float low, float high) {
  uint32_t out;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;\n" : "=r"(out) : "f"(high), "f"(low));
  return out;
}
// The larger one; NaN wins, as in torch. Two elements of 2 bytes at once, or the bits of one float.
#define RNP_LARGER(type)                                              \
  uint32_t out;                                                       \
  asm("max.NaN." type " %0, %1, %2;\n" : "=r"(out) : "r"(a), "r"(b)); \
  return out
RNP_DEVICE uint32_t larger(BFloat16, uint32_t a, uint32_t b) { RNP_LARGER("bf16x2"); }
RNP_DEVICE uint32_t larger(Float16, uint32_t a, uint32_t b) { RNP_LARGER("f16x2"); }
#undef RNP_LARGER
RNP_DEVICE float larger_of(float, float a, float b) {
  float out;
  asm("max.NaN.f32 %0, %1, %2;\n" : "=f"(out) : "f"(a), "f"(b));
  return out;
}
RNP_DEVICE uint32_t larger(float, uint32_t a, uint32_t b) {
  return __float_as_uint(larger_of(0.0f, __uint_as_float(a), __uint_as_float(b)));
}
template <typename T>
RNP_DEVICE T narrow(float v);
template <>
RNP_DEVICE float narrow<float>(float v) {
  return v;
}
template <>
RNP_DEVICE BFloat16 narrow<BFloat16>(float v) {
  BFloat16 out;
  asm("cvt.rn.bf16.f32 %0, %1;\n" : "=h"(out.bits) : "f"(v));
  return out;
}
template <>
RNP_DEVICE Float16 narrow<Float16>(float v) {
  Float16 out;
  asm("cvt.rn.f16.f32 %0, %1;\n" : "=h"(out.bits) : "f"(v));
  return out;
}

#else  // the emulator

inline int thread_index() { return emulator::thread(); }
inline int thread_count() { return emulator::threads(); }
inline int64_t block_index() { return emulator::block(); }
inline int64_t block_count() { return emulator::blocks(); }
inline void sync_block() { emulator::barrier(); }
inline int32_t max_in_warp(int32_t v) { return emulator::max_in_warp(v); }
inline uint32_t ballot(bool v) { return emulator::ballot(v); }
inline int lowest_bit(uint64_t v) { return __builtin_ctzll(v); }
inline int highest_bit(uint32_t v) { return 31 - __builtin_clz(v); }
inline int count_bits(uint32_t v) { return __builtin_popcount(v); }
inline void max_in_block(int32_t* shared, int32_t v) { *shared = *shared < v ? v : *shared; }
inline int32_t take_ticket(int32_t* counter) { return (*counter)++; }
inline int32_t add_in_block(int32_t* shared, int32_t v) { return (*shared += v) - v; }
inline float xor_lane(float v, int mask) { return emulator::xor_lane(v, mask); }
inline void keep_order() {}
template <typename T>
inline T opaque(T v) {
  return v;
}
inline int32_t from_lane(int32_t v, int lane) { return emulator::from_lane(v, lane); }
inline float multiply_add(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
inline float relu(float v) { return v > 0 || v != v ? v : 0.0f; }
inline void copy_async(void* shared, const void* global, int bytes) { emulator::copy_async(shared, global, bytes); }
inline void commit_copies() { emulator::commit_copies(); }
template <int N>
inline void wait_copies() {
  emulator::wait_copies(N);
}
inline void load_matrices(uint32_t (&r)[4], const void* shared_row) { emulator::load_matrices(r, shared_row, false); }
inline void load_matrices_transposed(uint32_t (&r)[4], const void* shared_row) {
  emulator::load_matrices(r, shared_row, true);
}
inline void store_matrices(void* shared_row, const uint32_t (&r)[4]) { emulator::store_matrices(shared_row, r); }
template <typename T>
inline void multiply_matrices(T, float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  emulator::multiply_matrices(T{}, d, a, b0, b1);
}
inline void store_two_floats(float* to, float a, float b) { to[0] = a, to[1] = b; }
inline uint32_t to_tf32(uint32_t float_bits) { return emulator::to_tf32(float_bits); }
template <typename T>
inline auto widen(T v) {
  return to_float(v);
}
template <typename T>
inline T narrow(float v) {
  return from_float<T, float>(v);
}
inline Pair narrow_two(float, float low, float high) { return {low, high}; }
template <typename T>
inline uint32_t narrow_two(T, float low, float high) {
  return narrow<T>(low).bits | static_cast<uint32_t>(narrow<T>(high).bits) << 16;
}
inline float larger_of(float, float a, float b) { return a != a || a > b ? a : b; }
inline uint32_t larger(float, uint32_t a, uint32_t b) {
  return std::bit_cast<uint32_t>(larger_of(0.0f, std::bit_cast<float>(a), std::bit_cast<float>(b)));
}
template <typename T>
inline uint32_t larger(T, uint32_t a, uint32_t b) {
  const auto part = [](uint32_t v, int shift) { return widen(T{static_cast<uint16_t>(v >> shift)}); };
  return narrow_two(T{}, larger_of(0.0f, part(a, 0), part(b, 0)), larger_of(0.0f, part(a, 16), part(b, 16)));
}

#endif

// The inverse of narrow_two.
RNP_DEVICE Pair widen_two(float, Pair v) { return v; }
template <typename T>
RNP_DEVICE Pair widen_two(T, uint32_t v) {
  return {widen(T{static_cast<uint16_t>(v)}), widen(T{static_cast<uint16_t>(v >> 16)})};
}

template <typename T>
RNP_DEVICE T larger_of(T, T a, T b) {
  return narrow<T>(larger_of(0.0f, widen(a), widen(b)));
}
template <typename T>
RNP_DEVICE Vec16 larger_of(T, const Vec16& a, const Vec16& b) {
  Vec16 out;
  RNP_UNROLL
  for (int i = 0; i < 4; ++i) out.word[i] = larger(T{}, a.word[i], b.word[i]);
  return out;
}

// What narrow_two makes of a floor, and both elements or the floor where that is more: 0 is ReLU, -infinity nothing.
RNP_DEVICE float floor_of(float, float floor) { return floor; }
template <typename T>
RNP_DEVICE uint32_t floor_of(T, float floor) {
  return narrow_two(T{}, floor, floor);
}
RNP_DEVICE Pair no_less(float, Pair v, float floor) {
  return {larger_of(0.0f, v.low, floor), larger_of(0.0f, v.high, floor)};
}
template <typename T>
RNP_DEVICE uint32_t no_less(T, uint32_t v, uint32_t floor) {
  return larger(T{}, v, floor);
}

}  // namespace rnp::cuda
