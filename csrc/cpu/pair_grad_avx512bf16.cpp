// The weight's gradient with vdpbf16ps: 8 output channels x 32 input channels in registers while pairs of positions
// pass, 16 sums + 2 + 1 of the 32 registers. And packing for it, and for matrices, in registers of 512 bits.
#if defined(__x86_64__)
#include <immintrin.h>

// GCC 12 warns about its own _mm512_undefined_epi32.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"

#include "core/count.h"
#include "cpu/inlining.h"
#include "cpu/pair_grad_kernel.h"

namespace rnp::cpu {
namespace {

constexpr int64_t kHalf = kPairLanes / 2;

// Both positions' products at once. In place: GCC 12 would give sums other registers, and spill some.
RNP_INLINE void dot(__m512& sum, __m512 g, __m512 x) { asm("vdpbf16ps %1, %2, %0" : "+v"(sum) : "v"(g), "v"(x)); }

RNP_INLINE __m512 both_positions(const uint16_t* g) {
  int32_t word;
  __builtin_memcpy(&word, g, sizeof(word));
  return _mm512_castsi512_ps(_mm512_set1_epi32(word));
}

// C neighbouring output channels. Sums go on from where they were, as in matrices: where a call ends, and which chunks
// of zeros it passes, changes no bit.
template <int C, int NB>
RNP_INLINE void channels(const uint16_t* g, int64_t step, const uint32_t* x, int64_t chunks, float* sums) {
  const auto at = [&](int c, int v) { return sums + c * kPairLanes + v * kHalf; };
  __m512 acc[C][NB];
  RNP_UNROLL
  for (int c = 0; c < C; ++c) {
    RNP_UNROLL
    for (int v = 0; v < NB; ++v) acc[c][v] = _mm512_loadu_ps(at(c, v));
  }
  for (int64_t n = chunks * (kPairChunk / 2); n > 0; --n) {
    RNP_COUNT_FMA(C * NB * kHalf * 2);
    __m512 lanes[NB];
    RNP_UNROLL
    for (int v = 0; v < NB; ++v) lanes[v] = _mm512_loadu_ps(x + v * kHalf);
    RNP_UNROLL
    for (int c = 0; c < C; ++c) {
      const __m512 pair = both_positions(g + c * step);
      RNP_UNROLL
      for (int v = 0; v < NB; ++v) dot(acc[c][v], pair, lanes[v]);
    }
    g += 2;
    x += kPairLanes;
  }
  RNP_UNROLL
  for (int c = 0; c < C; ++c) {
    RNP_UNROLL
    for (int v = 0; v < NB; ++v) _mm512_storeu_ps(at(c, v), acc[c][v]);
  }
}

template <int NA, int NB>
void tile(const PairGradArgs& a) {
  for (int panel = 0; panel < NA; ++panel) {
    const int64_t live = panel == NA - 1 ? a.channels : kPairPanel;
    for (int64_t c = 0; c < live; c += 8) {
      const uint16_t* g = a.g + (panel * kPairPanel + c) * a.g_step;
      float* sums = a.sums + panel * a.sums_step + c * kPairLanes;
      if (live - c > 4) {
        channels<8, NB>(g, a.g_step, a.x, a.chunks, sums);
      } else {
        channels<4, NB>(g, a.g_step, a.x, a.chunks, sums);
      }
    }
  }
}

// Bits of the first `live` channels.
RNP_INLINE uint32_t live_bits(int64_t live) { return live >= 32 ? ~0u : live <= 0 ? 0u : (1u << live) - 1; }

// Words of channels [0, 16) and [16, 32) of two positions.
RNP_INLINE void words_of(__m512i first, __m512i second, __m512i& low, __m512i& high) {
  const __m512i order_low = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6,
                                             37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
  const __m512i order_high = _mm512_add_epi16(order_low, _mm512_set1_epi16(16));
  low = _mm512_permutex2var_epi16(first, order_low, second);
  high = _mm512_permutex2var_epi16(first, order_high, second);
}

void interleave(const PairPositions& from, int64_t channel, uint32_t* to) {
  for (int64_t q = 0; q < from.count; q += 2, to += kPairLanes) {
    __m512i low, high;
    words_of(_mm512_maskz_loadu_epi16(live_bits(from.live[q] - channel), from.pixel[q] + channel),
             _mm512_maskz_loadu_epi16(live_bits(from.live[q + 1] - channel), from.pixel[q + 1] + channel), low, high);
    _mm512_storeu_si512(to, low);
    _mm512_storeu_si512(to + kHalf, high);
  }
}

// Columns of r[0…15], of 32 bits, become rows.
RNP_INLINE void transpose_words(__m512i (&r)[16]) {
  __m512i a[16], b[16];
  RNP_UNROLL
  for (int i = 0; i < 16; i += 2) {
    a[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    a[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
  RNP_UNROLL
  for (int i = 0; i < 16; i += 4) {  // b[i + k]: element k of each quarter, of four rows
    b[i] = _mm512_unpacklo_epi64(a[i], a[i + 2]);
    b[i + 1] = _mm512_unpackhi_epi64(a[i], a[i + 2]);
    b[i + 2] = _mm512_unpacklo_epi64(a[i + 1], a[i + 3]);
    b[i + 3] = _mm512_unpackhi_epi64(a[i + 1], a[i + 3]);
  }
  RNP_UNROLL
  for (int k = 0; k < 4; ++k) {  // quarters 0 and 2, 1 and 3 of eight rows
    a[k] = _mm512_shuffle_i32x4(b[k], b[k + 4], 0x88);
    a[k + 4] = _mm512_shuffle_i32x4(b[k], b[k + 4], 0xdd);
    a[k + 8] = _mm512_shuffle_i32x4(b[k + 8], b[k + 12], 0x88);
    a[k + 12] = _mm512_shuffle_i32x4(b[k + 8], b[k + 12], 0xdd);
  }
  RNP_UNROLL
  for (int k = 0; k < 4; ++k) {
    r[k] = _mm512_shuffle_i32x4(a[k], a[k + 8], 0x88);
    r[k + 8] = _mm512_shuffle_i32x4(a[k], a[k + 8], 0xdd);
    r[k + 4] = _mm512_shuffle_i32x4(a[k + 4], a[k + 12], 0x88);
    r[k + 12] = _mm512_shuffle_i32x4(a[k + 4], a[k + 12], 0xdd);
  }
}

void interleave_planes(const uint16_t* from, int64_t from_step, int64_t positions, uint32_t* to) {
  for (int64_t q = 0; q < positions; q += kPairChunk)
    for (int64_t half = 0; half < 2; ++half) {
      __m512i words[16];
      RNP_UNROLL
      for (int i = 0; i < 16; ++i) words[i] = _mm512_loadu_si512(from + (half * kHalf + i) * from_step + q);
      transpose_words(words);
      RNP_UNROLL
      for (int i = 0; i < 16; ++i) _mm512_storeu_si512(to + (q / 2 + i) * kPairLanes + half * kHalf, words[i]);
    }
}

void transpose(const PairPositions& from, int64_t channel, uint16_t* to, int64_t to_step) {
  for (int64_t q = 0; q < from.count; q += kPairChunk) {
    __m512i words[16];
    RNP_UNROLL
    for (int i = 0; i < 16; ++i) {
      const auto half = [&](int64_t at) {
        return _mm512_castsi256_si512(_mm256_maskz_loadu_epi16(
            static_cast<__mmask16>(live_bits(from.live[at] - channel)), from.pixel[at] + channel));
      };
      __m512i unused;
      words_of(half(q + 2 * i), half(q + 2 * i + 1), words[i], unused);
    }
    transpose_words(words);
    RNP_UNROLL
    for (int i = 0; i < 16; ++i) _mm512_storeu_si512(to + i * to_step + q, words[i]);
  }
}

void round(const float* sums, uint16_t* to) {
  for (int64_t i = 0; i < kPairLanes; i += kHalf) {
    __m256i halves;
    asm("vcvtneps2bf16 %1, %0" : "=v"(halves) : "v"(_mm512_loadu_ps(sums + i)));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + i), halves);
  }
}

}  // namespace

const PairGradKernels& avx512bf16_pair_grad_kernels() {
  static const PairGradKernels kernels = {{{&tile<1, 1>, &tile<1, 2>}, {&tile<2, 1>, &tile<2, 2>}},
                                          nullptr,
                                          nullptr,
                                          &interleave,
                                          &interleave_planes,
                                          &transpose,
                                          &round};
  return kernels;
}

}  // namespace rnp::cpu
#endif
