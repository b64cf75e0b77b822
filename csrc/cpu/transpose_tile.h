// Transposing between planes and pixels, in registers. Included by the translation units of AVX2 and AVX-512, inside
// their flags; everything here has internal linkage.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace rnp::cpu {
namespace {

// Columns of r[0…7] become rows.
inline void transpose_registers(__m256 (&r)[8]) {
  __m256 pairs[8], fours[8];
#pragma GCC unroll 8
  for (int i = 0; i < 8; i += 2) {  // elements 0, 1, 4, 5 and 2, 3, 6, 7 of two rows
    pairs[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
    pairs[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
  }
#pragma GCC unroll 8
  for (int h = 0; h < 8; h += 4) {  // elements i and i + 4 of four rows
#pragma GCC unroll 8
    for (int i = 0; i < 2; ++i) {
      fours[h + 2 * i] = _mm256_shuffle_ps(pairs[h + i], pairs[h + i + 2], 0x44);
      fours[h + 2 * i + 1] = _mm256_shuffle_ps(pairs[h + i], pairs[h + i + 2], 0xee);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < 4; ++i) {
    r[i] = _mm256_permute2f128_ps(fours[i], fours[i + 4], 0x20);
    r[i + 4] = _mm256_permute2f128_ps(fours[i], fours[i + 4], 0x31);
  }
}

inline __m256i first_lanes(int64_t count) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(count)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

// Up to 8 x 8; no element outside of them is touched.
inline void transpose_block(const float* from, int64_t from_step, int64_t rows, int64_t cols, float* to,
                            int64_t to_step) {
  __m256 r[8];
  if (rows >= 8 && cols >= 8) {
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) r[i] = _mm256_loadu_ps(from + i * from_step);
    transpose_registers(r);
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) _mm256_storeu_ps(to + i * to_step, r[i]);
    return;
  }
  const __m256i row = first_lanes(cols), col = first_lanes(rows);
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) r[i] = i < rows ? _mm256_maskload_ps(from + i * from_step, row) : _mm256_setzero_ps();
  transpose_registers(r);
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i)
    if (i < cols) _mm256_maskstore_ps(to + i * to_step, col, r[i]);
}

// As microkernel.h says of Transpose. Cache lines are read and written whole, one after the other: planes may lie so
// that all of them share a set.
void transpose(const float* from, int64_t from_step, int64_t rows, int64_t cols, float* to, int64_t to_step) {
  constexpr int64_t kLine = 16;
  for (int64_t r0 = 0; r0 < rows; r0 += kLine)
    for (int64_t c0 = 0; c0 < cols; c0 += kLine)
      for (int64_t r = r0; r < rows && r < r0 + kLine; r += 8)
        for (int64_t c = c0; c < cols && c < c0 + kLine; c += 8)
          transpose_block(from + r * from_step + c, from_step, rows - r, cols - c, to + c * to_step + r, to_step);
}

}  // namespace
}  // namespace rnp::cpu
