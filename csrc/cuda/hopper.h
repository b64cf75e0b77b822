// What the sm_90a kernel asks of the machine beyond device.h: barriers in shared memory that count arrivals and bytes,
// the bulk copy engine, warpgroup products and registers that change hands. PTX under nvcc, else the emulator of
// csrc/tests. Names in brackets are the PTX ISA's.
#pragma once

#include "cuda/device.h"

#if defined(__CUDACC__)
#include <cuda.h>
#endif

namespace rnp::cuda {

// Where 16-byte piece `piece` of 128-byte row `row` stands, from a multiple of 1024 on: the 128-byte swizzle, which
// exclusive-ors bits 4 … 6 of an address with bits 7 … 9.
RNP_DEVICE int swizzled(int row, int piece) { return row * 128 + ((piece ^ (row & 7)) << 4); }

// A wgmma operand's descriptor [matrix-descriptor]: rows of 128 bytes along K, swizzled by 128 bytes (bits 62 … 63: 1),
// eight of them 1024 bytes from the next eight (bits 32 … 45, in units of 16); bits 16 … 29 mean nothing here. A step
// of 32 bytes along K is 2 units more of the address: the swizzle applies to the address that results.
RNP_DEVICE uint64_t operand_descriptor(uint32_t shared_address) {
  return static_cast<uint64_t>((shared_address & 0x3ffff) >> 4) | uint64_t{1} << 16 | uint64_t{1024 >> 4} << 32 |
         uint64_t{1} << 62;
}
constexpr uint64_t kDescriptorStep = 32 >> 4;

#if defined(__CUDACC__)

using TensorMap = CUtensorMap;

RNP_DEVICE uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

// ---- barriers ----

// A barrier's phase ends when `arrivals` threads have arrived and all bytes that were announced have come.
RNP_DEVICE void init_barrier(uint64_t* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;\n" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}
// After the barriers were made: the copy engine sees them too.
RNP_DEVICE void publish_barriers() {
  asm volatile("fence.mbarrier_init.release.cluster;\nfence.proxy.async.shared::cta;\n" ::: "memory");
}
RNP_DEVICE void arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];\n" ::"r"(shared_address(barrier)) : "memory");
}
// As `count` threads would.
RNP_DEVICE void arrive_for(uint64_t* barrier, int count) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0], %1;\n" ::"r"(shared_address(barrier)), "r"(count) : "memory");
}
// Once all cp.async that this thread has begun have landed; the thread goes on at once.
RNP_DEVICE void arrive_after_copies(uint64_t* barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];\n" ::"r"(shared_address(barrier)) : "memory");
}
// Announces bytes to the phase that is under way; no arrival.
RNP_DEVICE void expect_bytes(uint64_t* barrier, uint32_t bytes) {
  asm volatile("mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%0], %1;\n" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}
// Until the phase of this parity has ended; of a new barrier, the phase of parity 1 has.
RNP_DEVICE void wait_barrier(uint64_t* barrier, uint32_t parity) {
  uint32_t done;
  do {
    asm volatile(
        "{\n.reg .pred done;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%1], %2;\n"
        "selp.u32 %0, 1, 0, done;\n}\n"
        : "=r"(done)
        : "r"(shared_address(barrier)), "r"(parity)
        : "memory");
  } while (!done);
}
// Orders what the lanes of a warp wrote before what any of them does next.
RNP_DEVICE void sync_warp() { __syncwarp(); }
// Among `threads` threads that use the same number, 1 … 15.
RNP_DEVICE void sync_threads(int number, int threads) {
  asm volatile("bar.sync %0, %1;\n" ::"r"(number), "r"(threads) : "memory");
}

// ---- copies ----

// What threads wrote to shared memory by ordinary stores or cp.async, and this thread has waited for, is seen by the
// wgmma that it issues next [fence.proxy.async].
RNP_DEVICE void wrote(const void*) {}  // 16 bytes, by an ordinary store that wgmma must see: the emulator checks that
RNP_DEVICE void publish_writes() { asm volatile("fence.proxy.async.shared::cta;\n" ::: "memory"); }

// `bytes`, a multiple of 16, by the copy engine; they count towards the barrier. All addresses are aligned to 16.
RNP_DEVICE void copy_bulk(void* shared, const void* global, uint32_t bytes, uint64_t* barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];\n" ::"r"(
                   shared_address(shared)),
               "l"(global), "r"(bytes), "r"(shared_address(barrier))
               : "memory");
}

// One column of the map's im2col matrix: its pixels from (w, h, n) on, moved by the tap's offset, 128 bytes of
// channels from c on. What lies outside the tensor comes as zeros, and all bytes of the box count towards the barrier.
RNP_DEVICE void copy_im2col(void* shared, const TensorMap* map, uint64_t* barrier, int32_t c, int32_t w, int32_t h,
                            int32_t n, uint16_t offset_w, uint16_t offset_h) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.im2col.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4, "
      "%5}], "
      "[%6], {%7, %8};\n" ::"r"(shared_address(shared)),
      "l"(map), "r"(c), "r"(w), "r"(h), "r"(n), "r"(shared_address(barrier)), "h"(offset_w), "h"(offset_h)
      : "memory");
}

RNP_DEVICE Pair load_pair(const float* from) {
  const float2 two = __ldg(reinterpret_cast<const float2*>(from));
  return {two.x, two.y};
}
// A map that copies will name soon.
RNP_DEVICE void prefetch_map(const TensorMap* map) { asm volatile("prefetch.tensormap [%0];\n" ::"l"(map)); }
// Asks for the line of an address, which somebody will read soon.
RNP_DEVICE void prefetch(const void* global) { asm volatile("prefetch.global.L2 [%0];\n" ::"l"(global)); }

// The 16 bytes that lie `away` from an address, by one predicated load; zeros where not `live`.
RNP_DEVICE Vec16 load_vector(bool live, const void* near, int64_t away) {
  uint64_t low = 0, high = 0;
  asm volatile(
      "{\n.reg .pred live;\n.reg .b64 at;\nsetp.ne.u32 live, %2, 0;\nadd.s64 at, %3, %4;\n"
      "@live ld.global.v2.u64 {%0, %1}, [at];\n}\n"
      : "+l"(low), "+l"(high)
      : "r"(static_cast<uint32_t>(live)), "l"(near), "l"(away)
      : "memory");
  return {{static_cast<uint32_t>(low), static_cast<uint32_t>(low >> 32), static_cast<uint32_t>(high),
           static_cast<uint32_t>(high >> 32)}};
}

// ---- warpgroups ----

template <int N>
RNP_DEVICE void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;\n" ::"n"(N));
}
template <int N>
RNP_DEVICE void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;\n" ::"n"(N));
}

// Before the first product that touches registers which other instructions wrote.
RNP_DEVICE void begin_products() { asm volatile("wgmma.fence.sync.aligned;\n" ::: "memory"); }
RNP_DEVICE void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;\n" ::: "memory"); }
template <int N>
RNP_DEVICE void wait_products() {  // until at most N groups of products are under way
  asm volatile("wgmma.wait_group.sync.aligned %0;\n" ::"n"(N) : "memory");
}
// Keeps the compiler from moving a use of the sums across this place.
template <int N>
RNP_DEVICE void pin(float (&sums)[N]) {
  RNP_UNROLL
  for (int i = 0; i < N; ++i) asm volatile("" : "+f"(sums[i])::"memory");
}

#else  // the emulator

using TensorMap = emulator::TensorMap;

inline uint32_t shared_address(const void* p) { return emulator::shared_address(p); }
inline void init_barrier(uint64_t* barrier, int arrivals) { emulator::init_barrier(barrier, arrivals); }
inline void publish_barriers() { emulator::publish_barriers(); }
inline void arrive(uint64_t* barrier) { emulator::arrive(barrier, 1); }
inline void arrive_for(uint64_t* barrier, int count) { emulator::arrive(barrier, count); }
inline void arrive_after_copies(uint64_t* barrier) { emulator::arrive_after_copies(barrier); }
inline void expect_bytes(uint64_t* barrier, uint32_t bytes) { emulator::expect_bytes(barrier, bytes); }
inline void wait_barrier(uint64_t* barrier, uint32_t parity) { emulator::wait_barrier(barrier, parity); }
inline void sync_warp() { emulator::sync_warp(); }
inline void sync_threads(int number, int threads) { emulator::sync_threads(number, threads); }
inline void wrote(const void* shared) { emulator::wrote(shared); }
inline void publish_writes() { emulator::publish_writes(); }
inline void copy_bulk(void* shared, const void* global, uint32_t bytes, uint64_t* barrier) {
  emulator::copy_bulk(shared, global, bytes, barrier);
}
inline void copy_im2col(void* shared, const TensorMap* map, uint64_t* barrier, int32_t c, int32_t w, int32_t h,
                        int32_t n, uint16_t offset_w, uint16_t offset_h) {
  emulator::copy_im2col(shared, *map, barrier, c, w, h, n, offset_w, offset_h);
}
inline Pair load_pair(const float* from) {
  emulator::check_aligned(from, 8);
  return {from[0], from[1]};
}
inline void prefetch_map(const TensorMap*) {}
inline void prefetch(const void*) {}
inline Vec16 load_vector(bool live, const void* near, int64_t away) {
  Vec16 v = {};
  if (!live) return v;
  const void* from = static_cast<const char*>(near) + away;
  emulator::check_aligned(from, 16);
  __builtin_memcpy(&v, from, 16);
  return v;
}
template <int N>
inline void take_registers() {}
template <int N>
inline void give_registers() {}
inline void begin_products() { emulator::begin_products(); }
inline void commit_products() { emulator::commit_products(); }
template <int N>
inline void wait_products() {
  emulator::wait_products(N);
}
template <int N>
inline void pin(float (&)[N]) {}

#endif

}  // namespace rnp::cuda
