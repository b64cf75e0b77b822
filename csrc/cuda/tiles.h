// The tiles of the CUDA convolution: one table of everything that is compiled, with the budget each entry must keep
// (tests/test_cuda_disassembly.py reads it here and checks the built library), and the choice between them.
//
// A block of 128 threads computes BM rows (sample, pixel) by BN output channels. K advances in chunks of 64 bytes of
// channels for one tap of the kernel, always in the order (chunk, ky, kx), in steps of 32 bytes (16 channels of 2
// bytes, 8 of 4): neither the tile nor the batch can change a sum's bits.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/gpu_schedule.h"
#include "core/half.h"

namespace rnp::cuda {

constexpr int kThreads = 128;
constexpr int kChunkBytes = 64;  // a row of a stage: four pieces of 16 bytes
constexpr int kStepBytes = 32;   // K of one mma.sync
constexpr int kMaxTaps = 16;     // along one axis: a row's valid taps are two 16-bit masks
constexpr int kSlab = 64;        // output channels that the epilogue stages at a time

// How the products are made.
enum class Math { kMatrix, kFfma };

// T: storage type (float on kMatrix: TF32). kGather: elements are fetched one by one (any strides, few channels), else
// 16 bytes at a time by cp.async (channels_last, aligned).
template <typename T_, Math kMath_, bool kGather_, int BM_, int BN_>
struct Tile {
  using T = T_;
  static constexpr Math kMath = kMath_;
  static constexpr bool kGather = kGather_;
  static constexpr int BM = BM_, BN = BN_;
  static constexpr int kPiece = 16 / static_cast<int>(sizeof(T));         // channels of one 16-byte piece
  static constexpr int BK = kChunkBytes / static_cast<int>(sizeof(T));    // channels of one chunk
  static constexpr int kStep = kStepBytes / static_cast<int>(sizeof(T));  // channels of one mma
  static constexpr int kStages = 4;

  // Warps: 4 along the rows, or 2 by 2. A warp owns 32 rows and every WN-th run of 16 channels, so that each live width
  // that is a multiple of 16 · WN keeps all warps equally busy.
  static constexpr int WM = BM / 32, WN = 4 / WM;
  static constexpr int kRuns = BN / 16 / WN;  // runs of 16 channels of one warp

  static constexpr int kStageBytes = (BM + BN) * kChunkBytes;
  static constexpr int kPipelineBytes = kStages * kStageBytes;
  static constexpr int kSlabStride = kSlab + 4;                // floats: 4 more keep rows off one bank
  static constexpr int kEpilogueBytes = BM * kSlabStride * 4;  // overlays the pipeline
  static constexpr int kRowBytes = BM * 48;                    // struct Row
  static constexpr int kSharedBytes =
      kRowBytes + 16 + (kPipelineBytes > kEpilogueBytes ? kPipelineBytes : kEpilogueBytes);

  static_assert(WM * WN * 32 == kThreads && BN % (16 * WN) == 0 && BN <= 128);
  static_assert(kMath == Math::kMatrix || (BM == 128 && BN == 64 && sizeof(T) == 4), "FFMA: 8 x 8 sums of a thread");
  static_assert(BM * 4 % kThreads == 0 && BN * 4 % kThreads == 0, "pieces of a stage are dealt out evenly");
};

// X(name, storage, math, gather, BM, BN, blocks, registers): all tiles that are compiled. `blocks` is how many of the
// kernel shall fit on a multiprocessor (so many registers remain: 65536 / 128 / blocks), `registers` the budget of one
// thread; shared memory is Tile::kSharedBytes. The limits:
//   128 x 128  128 sums a thread and 70 KB: two blocks on sm_80 (164 KB) and three on sm_90 (228 KB)
//   128 x 64   64 sums and 54 KB: three blocks
//   64 x 64    32 sums and 35 KB: four blocks
#define RNP_CUDA_TILES(X)                                           \
  X(bf16_128x128, BFloat16, Math::kMatrix, false, 128, 128, 2, 255) \
  X(bf16_128x64, BFloat16, Math::kMatrix, false, 128, 64, 3, 168)   \
  X(bf16_64x64, BFloat16, Math::kMatrix, false, 64, 64, 4, 128)     \
  X(bf16_gather, BFloat16, Math::kMatrix, true, 128, 64, 3, 168)    \
  X(fp16_128x128, Float16, Math::kMatrix, false, 128, 128, 2, 255)  \
  X(fp16_128x64, Float16, Math::kMatrix, false, 128, 64, 3, 168)    \
  X(fp16_64x64, Float16, Math::kMatrix, false, 64, 64, 4, 128)      \
  X(fp16_gather, Float16, Math::kMatrix, true, 128, 64, 3, 168)     \
  X(tf32_128x128, float, Math::kMatrix, false, 128, 128, 2, 255)    \
  X(tf32_128x64, float, Math::kMatrix, false, 128, 64, 3, 168)      \
  X(tf32_64x64, float, Math::kMatrix, false, 64, 64, 4, 128)        \
  X(tf32_gather, float, Math::kMatrix, true, 128, 64, 3, 168)       \
  X(fp32_128x64, float, Math::kFfma, false, 128, 64, 3, 168)        \
  X(fp32_gather, float, Math::kFfma, true, 128, 64, 3, 168)

enum class TileName : int {
#define RNP_NAME(name, ...) name,
  RNP_CUDA_TILES(RNP_NAME)
#undef RNP_NAME
      kCount
};
static_assert(static_cast<int>(TileName::kCount) + 4 + 4 <= 24,
              "with the plain kernel and the weight gradient in four dtypes, at most 24 instantiations");

struct TileSize {
  int bm, bn;
};

// sm_80 and later, cp.async path: the largest tile that still gives each multiprocessor at least eight of them at full
// width, since a mixed batch halves their number and spreads their cost 1 : 16; in the simulation of
// gpu_schedule_test.cpp fewer lose more than the smaller tile does. Narrow layers need no wide tile. The batch size may
// steer this: no tile changes a sum's bits.
constexpr TileSize choose_tile_sm80(int64_t rows, int64_t group_out, int64_t groups, int multiprocessors) {
  const auto tiles = [&](int64_t bm, int64_t bn) {
    return (rows + bm - 1) / bm * ((group_out + bn - 1) / bn) * groups;
  };
  const int64_t wanted = int64_t{8} * multiprocessors;
  if (group_out > 64 && tiles(128, 128) >= wanted) return {128, 128};
  if (tiles(128, 64) >= wanted) return {128, 64};  // 64 channels or fewer, or too few larger tiles
  return {64, 64};                                 // small maps and small batches
}

}  // namespace rnp::cuda
