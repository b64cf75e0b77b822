// wgmma.mma_async for every width that the tiles use: d (64 x N, float32) += a (64 x 32 bytes) · b (32 bytes x N), both
// operands in shared memory, K along their 128-byte rows. Of a float it takes what TF32 has, and ignores the low 13
// bits.
//
// N / 2 sums of each thread; lane l of warp w of the group holds rows 16 w + l / 4 and + 8, columns 8 j + 2 (l % 4) and
// + 1: d[4 j + 2 (row / 8 % 2) + column % 2].
#pragma once

#include <type_traits>

#include "cuda/hopper.h"

namespace rnp::cuda {

template <int N>
using Width = std::integral_constant<int, N>;

#if defined(__CUDACC__)

// Operands of the instruction's text, and the registers behind them, by eight.
#define RNP_AT_0 "%0, %1, %2, %3, %4, %5, %6, %7"
#define RNP_AT_1 RNP_AT_0 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define RNP_AT_2 RNP_AT_1 ", %16, %17, %18, %19, %20, %21, %22, %23"
#define RNP_AT_3 RNP_AT_2 ", %24, %25, %26, %27, %28, %29, %30, %31"
#define RNP_AT_4 RNP_AT_3 ", %32, %33, %34, %35, %36, %37, %38, %39"
#define RNP_AT_5 RNP_AT_4 ", %40, %41, %42, %43, %44, %45, %46, %47"
#define RNP_AT_6 RNP_AT_5 ", %48, %49, %50, %51, %52, %53, %54, %55"
#define RNP_AT_7 RNP_AT_6 ", %56, %57, %58, %59, %60, %61, %62, %63"
#define RNP_AT_8 RNP_AT_7 ", %64, %65, %66, %67, %68, %69, %70, %71"
#define RNP_AT_9 RNP_AT_8 ", %72, %73, %74, %75, %76, %77, %78, %79"
#define RNP_AT_10 RNP_AT_9 ", %80, %81, %82, %83, %84, %85, %86, %87"
#define RNP_AT_11 RNP_AT_10 ", %88, %89, %90, %91, %92, %93, %94, %95"
#define RNP_AT_12 RNP_AT_11 ", %96, %97, %98, %99, %100, %101, %102, %103"
#define RNP_AT_13 RNP_AT_12 ", %104, %105, %106, %107, %108, %109, %110, %111"
#define RNP_AT_14 RNP_AT_13 ", %112, %113, %114, %115, %116, %117, %118, %119"
#define RNP_AT_15 RNP_AT_14 ", %120, %121, %122, %123, %124, %125, %126, %127"
#define RNP_EIGHT(i)                                                                                          \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), \
      "+f"(d[i + 7])
#define RNP_OF_0 RNP_EIGHT(0)
#define RNP_OF_1 RNP_OF_0, RNP_EIGHT(8)
#define RNP_OF_2 RNP_OF_1, RNP_EIGHT(16)
#define RNP_OF_3 RNP_OF_2, RNP_EIGHT(24)
#define RNP_OF_4 RNP_OF_3, RNP_EIGHT(32)
#define RNP_OF_5 RNP_OF_4, RNP_EIGHT(40)
#define RNP_OF_6 RNP_OF_5, RNP_EIGHT(48)
#define RNP_OF_7 RNP_OF_6, RNP_EIGHT(56)
#define RNP_OF_8 RNP_OF_7, RNP_EIGHT(64)
#define RNP_OF_9 RNP_OF_8, RNP_EIGHT(72)
#define RNP_OF_10 RNP_OF_9, RNP_EIGHT(80)
#define RNP_OF_11 RNP_OF_10, RNP_EIGHT(88)
#define RNP_OF_12 RNP_OF_11, RNP_EIGHT(96)
#define RNP_OF_13 RNP_OF_12, RNP_EIGHT(104)
#define RNP_OF_14 RNP_OF_13, RNP_EIGHT(112)
#define RNP_OF_15 RNP_OF_14, RNP_EIGHT(120)

// The sums are always added to: a block sets them to zero itself. No operand is negated or transposed, which `ends`
// says: TF32 has no choice of the second.
#define RNP_WGMMA(Type, k, type, ends, n, last, a_at, b_at)                                                        \
  RNP_DEVICE void multiply_warpgroup(Type, Width<n>, float* d, uint64_t a, uint64_t b) {                           \
    asm volatile("{\n.reg .pred add;\nsetp.eq.u32 add, 0, 0;\nwgmma.mma_async.sync.aligned.m64n" #n k ".f32." type \
                 "." type " {" RNP_AT_##last "}, %" #a_at ", %" #b_at ", add, " ends ";\n}\n"                      \
                 : RNP_OF_##last                                                                                   \
                 : "l"(a), "l"(b));                                                                                \
  }
#define RNP_WGMMA_WIDTHS(Type, k, type, ends)       \
  RNP_WGMMA(Type, k, type, ends, 16, 0, 8, 9)       \
  RNP_WGMMA(Type, k, type, ends, 32, 1, 16, 17)     \
  RNP_WGMMA(Type, k, type, ends, 48, 2, 24, 25)     \
  RNP_WGMMA(Type, k, type, ends, 64, 3, 32, 33)     \
  RNP_WGMMA(Type, k, type, ends, 80, 4, 40, 41)     \
  RNP_WGMMA(Type, k, type, ends, 96, 5, 48, 49)     \
  RNP_WGMMA(Type, k, type, ends, 112, 6, 56, 57)    \
  RNP_WGMMA(Type, k, type, ends, 128, 7, 64, 65)    \
  RNP_WGMMA(Type, k, type, ends, 160, 9, 80, 81)    \
  RNP_WGMMA(Type, k, type, ends, 192, 11, 96, 97)   \
  RNP_WGMMA(Type, k, type, ends, 224, 13, 112, 113) \
  RNP_WGMMA(Type, k, type, ends, 256, 15, 128, 129)
RNP_WGMMA_WIDTHS(BFloat16, "k16", "bf16", "1, 1, 0, 0")
RNP_WGMMA_WIDTHS(Float16, "k16", "f16", "1, 1, 0, 0")
RNP_WGMMA_WIDTHS(float, "k8", "tf32", "1, 1")

#undef RNP_AT_0
#undef RNP_OF_0
#undef RNP_AT_1
#undef RNP_OF_1
#undef RNP_AT_2
#undef RNP_OF_2
#undef RNP_AT_3
#undef RNP_OF_3
#undef RNP_AT_4
#undef RNP_OF_4
#undef RNP_AT_5
#undef RNP_OF_5
#undef RNP_AT_6
#undef RNP_OF_6
#undef RNP_AT_7
#undef RNP_OF_7
#undef RNP_AT_8
#undef RNP_OF_8
#undef RNP_AT_9
#undef RNP_OF_9
#undef RNP_AT_10
#undef RNP_OF_10
#undef RNP_AT_11
#undef RNP_OF_11
#undef RNP_AT_12
#undef RNP_OF_12
#undef RNP_AT_13
#undef RNP_OF_13
#undef RNP_AT_14
#undef RNP_OF_14
#undef RNP_AT_15
#undef RNP_OF_15
#undef RNP_EIGHT
#undef RNP_WGMMA
#undef RNP_WGMMA_WIDTHS

#else  // the emulator

template <typename T, int N>
inline void multiply_warpgroup(T, Width<N>, float* d, uint64_t a, uint64_t b) {
  emulator::multiply_warpgroup(T{}, N, d, a, b);
}

#endif

}  // namespace rnp::cuda
