// How loops over registers are spelled in kernels.
#pragma once

#define RNP_INLINE inline __attribute__((always_inline))
#define RNP_LAMBDA __attribute__((always_inline))
#define RNP_UNROLL _Pragma("GCC unroll 16")
