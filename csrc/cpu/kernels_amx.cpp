// Kernels for processors that multiply matrices of bfloat16 (AMX): 16 pixels x 16 words by 16 words x 16 output channels
// at once. Both lie ready in memory: the words of neighbouring pixels, and the packed weights' words with their lanes.
//
// tdpbf16ps adds the products of a matrix's 16 words by themselves, first and second channels apart, and then both to
// the sum; it treats subnormals as vdpbf16ps does (kernels_avx512bf16.cpp).
#if defined(__x86_64__)
#include <immintrin.h>

// GCC 12 warns about its own _mm512_undefined_ps.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"

#include "cpu/matrix_kernels.h"
#include "cpu/microkernel_tile.h"
#include "cpu/pairs_vector.h"

namespace rnp::cpu {
namespace {

// Registers: 0 to 3 hold sums, 4 and 5 weights, 6 and 7 pixels. The number is part of the instruction.
#define RNP_MATRIX_ZERO(to) asm volatile("tilezero %%tmm" #to ::)
#define RNP_MATRIX_LOAD(to, from, step) asm volatile("tileloadd (%0,%1,1), %%tmm" #to ::"r"(from), "r"(step))
#define RNP_MATRIX_STORE(from, to, step) asm volatile("tilestored %%tmm" #from ", (%0,%1,1)" ::"r"(to), "r"(step))
#define RNP_MATRIX_MULTIPLY(sums, x, w) asm volatile("tdpbf16ps %%tmm" #w ", %%tmm" #x ", %%tmm" #sums ::)
// The instructions above do not tell the compiler which memory they read and write.
#define RNP_MATRIX_FENCE() asm volatile("" ::: "memory")

constexpr int64_t kSumStep = 2 * kMatrix * sizeof(float);  // bytes between the sums of neighbouring pixels

const char* bytes(const float* p) { return reinterpret_cast<const char*>(p); }

// Scale, bias, residual, activation and rounding of up to `count` pending pixels.
template <int NB>
RNP_INLINE void finish(const TileArgs& f, MatrixPending& pending, int64_t count) {
  const float* sums = pending.sums[pending.filled];
  const MatrixPixel* at = pending.next;
  count = count < pending.left ? count : pending.left;
  pending.left -= count;
  pending.next = at + count;
  for (; count > 0; --count, ++at) {
    const auto place = [&](int64_t row_step, int64_t col_step) { return 2 * (at->row * row_step + at->col * col_step); };
    TileArgs a = f;
    a.first = a.last = true;
    a.stream = false;
    a.out = reinterpret_cast<float*>(reinterpret_cast<char*>(f.out) + place(f.out_row_step, f.out_col_step));
    if (f.residual)
      a.residual =
          reinterpret_cast<const float*>(bytes(f.residual) + place(f.residual_row_step, f.residual_col_step));
    __m512 acc[1][1][NB];
    RNP_UNROLL
    for (int v = 0; v < NB; ++v) acc[0][0][v] = Pairs512::load(sums + at->sums + v * kMatrix);
    Tile<Pairs512, 1, 1, NB>::finish(acc, a);
  }
}

template <int NB>
void flush(const TileArgs& f, MatrixPending& pending) {
  finish<NB>(f, pending, pending.left);
}

template <int NA, int NB>
void multiply(const MatrixArgs& a, MatrixPending& pending) {
  RNP_MATRIX_FENCE();
  if (a.first) {
    RNP_MATRIX_ZERO(0);
    if constexpr (NB > 1) RNP_MATRIX_ZERO(1);
    if constexpr (NA > 1) RNP_MATRIX_ZERO(2);
    if constexpr (NA > 1 && NB > 1) RNP_MATRIX_ZERO(3);
  } else {
    RNP_MATRIX_LOAD(0, a.partial[0], kSumStep);
    if constexpr (NB > 1) RNP_MATRIX_LOAD(1, a.partial[0] + kMatrix, kSumStep);
    if constexpr (NA > 1) RNP_MATRIX_LOAD(2, a.partial[1], kSumStep);
    if constexpr (NA > 1 && NB > 1) RNP_MATRIX_LOAD(3, a.partial[1] + kMatrix, kSumStep);
  }
  const int64_t x_step = a.x_step, w_step = a.w_step;
  // What is pending is spread over the chunks.
  const int64_t share = pending.left > 0 && a.chunks > 0 ? (pending.left + a.chunks - 1) / a.chunks : 0;
  for (int64_t i = 0; i < a.run_count; ++i) {
    const MatrixRun& run = a.runs[i];
    const char* x0 = bytes(a.x[0] + run.x);
    const char* x1 = NA > 1 ? bytes(a.x[1] + run.x) : nullptr;
    const char* w = bytes(a.w) + run.w * w_step;
    for (int64_t c = run.chunks; c > 0; --c) {
      RNP_COUNT_FMA(NA * NB * kMatrix * kMatrix * 2 * kMatrix);
      RNP_MATRIX_LOAD(4, w, w_step);
      RNP_MATRIX_LOAD(6, x0, x_step);
      RNP_MATRIX_MULTIPLY(0, 6, 4);
      if constexpr (NB > 1) {
        RNP_MATRIX_LOAD(5, w + kMatrix * sizeof(float), w_step);
        RNP_MATRIX_MULTIPLY(1, 6, 5);
      }
      if constexpr (NA > 1) {
        RNP_MATRIX_LOAD(7, x1, x_step);
        RNP_MATRIX_MULTIPLY(2, 7, 4);
        if constexpr (NB > 1) RNP_MATRIX_MULTIPLY(3, 7, 5);
        x1 += kMatrix * sizeof(float);
      }
      x0 += kMatrix * sizeof(float);
      w += kMatrix * w_step;
      if (share > 0) finish<NB>(*a.finish, pending, share);
    }
  }
  if (!a.finish) {
    RNP_MATRIX_STORE(0, a.partial[0], kSumStep);
    if constexpr (NB > 1) RNP_MATRIX_STORE(1, a.partial[0] + kMatrix, kSumStep);
    if constexpr (NA > 1) RNP_MATRIX_STORE(2, a.partial[1], kSumStep);
    if constexpr (NA > 1 && NB > 1) RNP_MATRIX_STORE(3, a.partial[1] + kMatrix, kSumStep);
    RNP_MATRIX_FENCE();
    return;
  }
  finish<NB>(*a.finish, pending, pending.left);
  pending.filled ^= 1;
  float* sums = pending.sums[pending.filled];
  RNP_MATRIX_STORE(0, sums, kSumStep);
  if constexpr (NB > 1) RNP_MATRIX_STORE(1, sums + kMatrix, kSumStep);
  if constexpr (NA > 1) RNP_MATRIX_STORE(2, sums + kMatrixSums, kSumStep);
  if constexpr (NA > 1 && NB > 1) RNP_MATRIX_STORE(3, sums + kMatrixSums + kMatrix, kSumStep);
  RNP_MATRIX_FENCE();
  pending.next = a.pixels;
  pending.left = a.pixel_count;
}

// All eight registers hold 16 rows of 64 bytes. Fewer rows would save nothing where columns or words are 16, and a change
// costs as much as ten products and clears the sums: so what is left over is zeros in memory, or rows that nobody stores.
void start() {
  struct alignas(64) {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
  } config;
  static_assert(sizeof(config) == 64);
  asm volatile("ldtilecfg %0" ::"m"(config));
}

void stop() { asm volatile("tilerelease" ::); }

}  // namespace

const Kernels& amx_kernels() {
  static const MatrixKernels matrix = {{{&multiply<1, 1>, &multiply<1, 2>}, {&multiply<2, 1>, &multiply<2, 2>}},
                                       {&flush<1>, &flush<2>},
                                       &start,
                                       &stop};
  static const Kernels kernels = [] {
    Kernels k = avx512bf16_kernels();
    k.matrix = &matrix;
    return k;
  }();
  return kernels;
}

}  // namespace rnp::cpu
#endif
