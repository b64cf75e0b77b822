// Kernels for processors that multiply matrices of bfloat16 (AMX): 16 pixels x 16 words by 16 words x 16 output
// channels at once. Both lie ready in memory: the words of neighbouring pixels, and the packed weights' words with
// their lanes.
//
// tdpbf16ps adds the products of a matrix's 16 words by themselves, first and second channels apart, and then both to
// the sum; it treats subnormals as vdpbf16ps does (kernels_avx512bf16.cpp).
#if defined(__x86_64__)
#include <immintrin.h>

// GCC 12 warns about its own _mm512_undefined_ps.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"

#include "cpu/matrix_kernels.h"
#include "cpu/matrix_registers.h"
#include "cpu/microkernel_tile.h"
#include "cpu/pairs_vector.h"

namespace rnp::cpu {
namespace {

// Registers: 0 to 3 hold sums, 4 and 5 weights, 6 and 7 pixels.
constexpr int64_t kSumStep = 2 * kMatrix * sizeof(float);  // bytes between the sums of neighbouring pixels

const char* bytes(const float* p) { return reinterpret_cast<const char*>(p); }

// Scale, bias, residual, activation and rounding of C neighbouring pixels.
template <int C, int NB>
RNP_INLINE void finish_pixels(const TileArgs& f, const MatrixPixels& at, const float* sums) {
  const auto place = [&](int64_t row_step, int64_t col_step) { return 2 * (at.row * row_step + at.col * col_step); };
  TileArgs a = f;
  a.first = a.last = true;
  a.stream = false;
  a.out = reinterpret_cast<float*>(reinterpret_cast<char*>(f.out) + place(f.out_row_step, f.out_col_step));
  if (f.residual)
    a.residual = reinterpret_cast<const float*>(bytes(f.residual) + place(f.residual_row_step, f.residual_col_step));
  __m512 acc[1][C][NB];
  RNP_UNROLL
  for (int c = 0; c < C; ++c)
    RNP_UNROLL for (int v = 0; v < NB; ++v) acc[0][c][v] =
        Pairs512::load(sums + at.sums + c * 2 * kMatrix + v * kMatrix);
  Tile<Pairs512, 1, C, NB>::finish(acc, a);
}

// The same of the next `count` pending groups.
template <int NB>
RNP_INLINE void finish(const TileArgs& f, MatrixPending& pending, int64_t count) {
  const float* sums = pending.sums[pending.filled];
  const MatrixPixels* at = pending.next;
  const MatrixPixels* end = pending.end - at > count ? at + count : pending.end;
  pending.next = end;
  for (; at < end; ++at) {
    if (at->count == 4) {
      finish_pixels<4, NB>(f, *at, sums);
    } else if (at->count == 2) {
      finish_pixels<2, NB>(f, *at, sums);
    } else {
      finish_pixels<1, NB>(f, *at, sums);
    }
  }
}

template <int NB>
void flush(const TileArgs& f, MatrixPending& pending) {
  finish<NB>(f, pending, pending.end - pending.next);
}

template <int NA, int NB>
void multiply(const MatrixPass& pass, int64_t tile, MatrixPending& pending) {
  const MatrixTile* tiles = pass.tiles + tile;
  float* partial = pass.partial + tile * kMatrixSums;
  RNP_MATRIX_FENCE();
  if (pass.first) {
    RNP_MATRIX_ZERO(0);
    if constexpr (NB > 1) RNP_MATRIX_ZERO(1);
    if constexpr (NA > 1) RNP_MATRIX_ZERO(2);
    if constexpr (NA > 1 && NB > 1) RNP_MATRIX_ZERO(3);
  } else {
    load_sums<NA, NB>(partial, partial + kMatrixSums, kSumStep);
  }
  const int64_t x_step = pass.x_step, chunk_step = pass.chunk_step, w_step = pass.w_step, share = pass.ahead_share;
  const int64_t run0 = NA > 1 && tiles[1].run0 < tiles[0].run0 ? tiles[1].run0 : tiles[0].run0;
  const int64_t run1 = NA > 1 && tiles[1].run1 > tiles[0].run1 ? tiles[1].run1 : tiles[0].run1;
  const char* first = bytes(pass.x) + tiles[0].record * pass.record;
  const char* second = NA > 1 ? bytes(pass.x) + tiles[1].record * pass.record : nullptr;
  for (int64_t i = run0; i < run1; ++i) {
    const MatrixRun& run = pass.runs[i];
    const char* x0 = first + run.x * pass.record;
    const char* x1 = second + run.x * pass.record;
    const char* w = bytes(pass.w) + run.w * w_step;
    for (int64_t c = pass.chunks; c > 0; --c) {
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
        x1 += chunk_step;
      }
      x0 += chunk_step;
      w += kMatrix * w_step;
      if (pending.next < pending.end) finish<NB>(*pass.finish, pending, 1);
      if (pending.ahead_left > 0) {
        for (int64_t l = 0; l < share; ++l) __builtin_prefetch(pending.ahead + l * 64, 0, 2);
        pending.ahead += share * 64;
        pending.ahead_left -= share;
      }
    }
  }
  if (!pass.finish) {
    store_sums<NA, NB>(partial, partial + kMatrixSums, kSumStep);
    return;
  }
  finish<NB>(*pass.finish, pending, pending.end - pending.next);
  pending.filled ^= 1;
  float* sums = pending.sums[pending.filled];
  store_sums<NA, NB>(sums, sums + kMatrixSums, kSumStep);
  pending.next = pass.pixels + tiles[0].first;
  pending.end = pass.pixels + tiles[NA - 1].end;
}

}  // namespace

const Kernels& amx_kernels() {
  static const MatrixKernels matrix = {{{&multiply<1, 1>, &multiply<1, 2>}, {&multiply<2, 1>, &multiply<2, 2>}},
                                       {&flush<1>, &flush<2>},
                                       &start_matrices,
                                       &stop_matrices};
  static const Kernels kernels = [] {
    Kernels k = avx512bf16_kernels();
    k.matrix = &matrix;
    return k;
  }();
  return kernels;
}

}  // namespace rnp::cpu
#endif
