// The instructions of the matrix registers (AMX), as assembly: the compiler needs no flag for them. Included by
// translation units that CMake builds only where the assembler knows them (RNP_AMX).
#pragma once

#include <cstdint>

#include "cpu/inlining.h"

namespace rnp::cpu {
namespace {

// The number of a register is part of the instruction. `step`: bytes between rows.
#define RNP_MATRIX_ZERO(to) asm volatile("tilezero %%tmm" #to ::)
#define RNP_MATRIX_LOAD(to, from, step) asm volatile("tileloadd (%0,%1,1), %%tmm" #to ::"r"(from), "r"(step))
#define RNP_MATRIX_STORE(from, to, step) asm volatile("tilestored %%tmm" #from ", (%0,%1,1)" ::"r"(to), "r"(step))
#define RNP_MATRIX_MULTIPLY(sums, x, w) asm volatile("tdpbf16ps %%tmm" #w ", %%tmm" #x ", %%tmm" #sums ::)
// The instructions above do not tell the compiler which memory they read and write.
#define RNP_MATRIX_FENCE() asm volatile("" ::: "memory")

// Sums of one or two times 16 rows, each of one or two times 16 columns, are registers 0 to 3; `first` and `second`
// hold them in memory, `step` bytes from row to row.
template <int NA, int NB>
RNP_INLINE void load_sums(const float* first, const float* second, int64_t step) {
  RNP_MATRIX_LOAD(0, first, step);
  if constexpr (NB > 1) RNP_MATRIX_LOAD(1, first + 16, step);
  if constexpr (NA > 1) RNP_MATRIX_LOAD(2, second, step);
  if constexpr (NA > 1 && NB > 1) RNP_MATRIX_LOAD(3, second + 16, step);
}

template <int NA, int NB>
RNP_INLINE void store_sums(float* first, float* second, int64_t step) {
  RNP_MATRIX_STORE(0, first, step);
  if constexpr (NB > 1) RNP_MATRIX_STORE(1, first + 16, step);
  if constexpr (NA > 1) RNP_MATRIX_STORE(2, second, step);
  if constexpr (NA > 1 && NB > 1) RNP_MATRIX_STORE(3, second + 16, step);
  RNP_MATRIX_FENCE();
}

// All eight registers hold 16 rows of 64 bytes. Fewer rows would save nothing where columns or words are 16, and a
// change costs as much as ten products and clears the sums: so what is left over is zeros in memory, or rows that
// nobody stores.
inline void start_matrices() {
  struct alignas(64) {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
  } config;
  static_assert(sizeof(config) == 64);
  asm volatile("ldtilecfg %0" ::"m"(config));
}

inline void stop_matrices() { asm volatile("tilerelease" ::); }

}  // namespace
}  // namespace rnp::cpu
