// The tiles of the CUDA convolution: the tables of everything that is compiled, with the budget each entry must keep
// (tests/test_cuda_disassembly.py reads it here and checks the built library), and the choice between them.
//
// sm_80 (conv_kernel.h), also what a Hopper GPU runs where wgmma does not fit: a block of 128 threads computes BM rows
// (sample, pixel) by BN output channels. K advances in chunks of 64 bytes of channels for one tap of the kernel, always
// in the order (chunk, ky, kx), in steps of 32 bytes (16 channels of 2 bytes, 8 of 4): neither the tile nor the batch
// can change a sum's bits.
//
// sm_90a (hopper_kernel.h): two warpgroups of consumers and one that describes and fetches for them. Chunks are 128
// bytes, in the same order, so a GPU's tiles agree among themselves. float is TF32 there too, but wgmma cuts the low 13
// bits of both operands off, where the sm_80 kernel rounds them: which of the two serves is a rule of the layer.
#pragma once

#include <algorithm>
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
constexpr int kPackBytes = 128;  // a row of packed weights: one output channel's share of a chunk of wgmma
constexpr int kTallRows = 256;   // of a tall tile of sm_90a

template <typename T>
constexpr int kPackChannels = kPackBytes / static_cast<int>(sizeof(T));

// How the products are made.
enum class Math { kMatrix, kFfma };

// T: storage type (float on kMatrix: TF32). Its rows are fetched 16 bytes at a time by cp.async (channels_last,
// aligned) or one by one (ConvArgs::gather: any strides, few channels in groups).
template <typename T_, Math kMath_, int BM_, int BN_>
struct Tile {
  using T = T_;
  static constexpr Math kMath = kMath_;
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

// X(name, storage, math, BM, BN, blocks, registers): all tiles of sm_80 that are compiled. `blocks` is how many of the
// kernel shall fit on a multiprocessor (so many registers remain: 65536 / 128 / blocks), `registers` the budget of one
// thread; shared memory is Tile::kSharedBytes. The limits:
//   128 x 128  128 sums a thread and 70 KB: two blocks on sm_80 (164 KB) and three on sm_90 (228 KB)
//   128 x 64   64 sums and 54 KB: three blocks
//   64 x 64    32 sums and 35 KB: four blocks
#define RNP_CUDA_TILES(X)                                    \
  X(bf16_128x128, BFloat16, Math::kMatrix, 128, 128, 2, 255) \
  X(bf16_128x64, BFloat16, Math::kMatrix, 128, 64, 3, 168)   \
  X(bf16_64x64, BFloat16, Math::kMatrix, 64, 64, 4, 128)     \
  X(fp16_128x128, Float16, Math::kMatrix, 128, 128, 2, 255)  \
  X(fp16_128x64, Float16, Math::kMatrix, 128, 64, 3, 168)    \
  X(fp16_64x64, Float16, Math::kMatrix, 64, 64, 4, 128)      \
  X(tf32_128x128, float, Math::kMatrix, 128, 128, 2, 255)    \
  X(tf32_128x64, float, Math::kMatrix, 128, 64, 3, 168)      \
  X(tf32_64x64, float, Math::kMatrix, 64, 64, 4, 128)        \
  X(fp32_128x64, float, Math::kFfma, 128, 64, 3, 168)

// A tile of sm_90a: BM x BN outputs; a stage of the pipeline is BM rows of input and BN of weights, 128 bytes each, all
// swizzled as wgmma and the copy engine want them. Of float a row is 32 channels and a step of K 8, and its products
// take twice the time: a stage is the same bytes, instructions and cycles for every dtype. Tiles are described twice
// over, since their description is up to a tile ahead of their products. One block to a multiprocessor.
//
// A narrow tile belongs to one warpgroup of consumers, which has 128 sums a thread for it: the two take turns, and one
// stores while the other multiplies. The two share a wide tile, 64 rows each, and the narrow ones of layers whose K is
// summed in segments (64 sums of a segment and 64 of all).
//
// The narrow kernel also computes tall tiles, of 256 rows (ConvArgs::cut says so, a property of the launch): 128 of
// each warpgroup, by the main loops of its turns, on the same stages at the same time. Twice the rows share a stage's
// weights; the same memory holds four such stages instead of six.
template <typename T_, int BN_>
struct HopperTile {
  using T = T_;
  static constexpr int kElement = static_cast<int>(sizeof(T));
  static constexpr int BM = 128, BN = BN_, BK = kPackChannels<T>, kStep = kStepBytes / kElement;
  static constexpr int kPiece = 16 / kElement;  // channels of one 16-byte piece
  static constexpr int kGrain = BN / 8;  // widths of one wgmma: multiples of this, so eight main loops are compiled
  static constexpr bool kTurns = BN <= 128;
  static constexpr int kStages = BN == 256 ? 4 : 6;
  static constexpr int kMostRows = kTurns ? kTallRows : BM;

  static constexpr int kStageBytes = (BM + BN) * kPackBytes;
  static constexpr int kTallStages = kStages * kStageBytes / ((kTallRows + BN) * kPackBytes);
  static constexpr int kSlab = BK;                      // channels that a warp stages at a time
  static constexpr int kStagedBytes = 16 * kPackBytes;  // its 16 rows of them
  static constexpr int kStagingBytes = 8 * kStagedBytes;
  static constexpr int kRunBytes = 2 * (kMostRows + 1) * 24;  // struct Run of two tiles
  static constexpr int kRowBytes = kMostRows * 16;            // struct CopiedRow
  static constexpr int kStateBytes = 640;  // barriers, the states of two tiles, the boxes that bring their rows
  // 1024 more: the pipeline begins at a multiple of them, where the swizzle does.
  static constexpr int kSharedBytes =
      1024 + kStages * kStageBytes + kStagingBytes + kRunBytes + kRowBytes + kStateBytes;
  static_assert((kElement == 2 || kElement == 4) && (BN == 128 || BN == 256), "what hopper_wgmma.h has");
};

constexpr int kHopperLoaders = 64, kHopperConsumers = 256, kHopperThreads = 384;
constexpr int kBoxSizes = 8;    // of the boxes that im2col copies bring: 1, 2, 4 … 128 rows of a tile
constexpr int kMostBoxes = 32;  // of a tile
// Registers of a thread of either kind: 128 · 72 + 256 · 216 = 384 · 168, what the kernel starts with. A consumer holds
// up to 128 sums, a producer addresses.
constexpr int kProducerRegisters = 72, kConsumerRegisters = 216;
static_assert(128 * kProducerRegisters + kHopperConsumers * kConsumerRegisters == kHopperThreads * 168);

// X(name, storage, BN, registers): all tiles of sm_90a. `registers`: of one thread at the start, 65536 / 384 rounded
// down to eight. Shared memory: HopperTile::kSharedBytes, 226 KB of the 227 that a block may have.
//   128 x 256  a weight tile read by both warpgroups for 128 rows: what large layers want
//   128 x 128  smaller maps, fewer channels, and the layers whose K is summed in segments; 256 rows on larger maps
#define RNP_HOPPER_TILES(X)                \
  X(sm90_bf16_128x128, BFloat16, 128, 168) \
  X(sm90_bf16_128x256, BFloat16, 256, 168) \
  X(sm90_fp16_128x128, Float16, 128, 168)  \
  X(sm90_fp16_128x256, Float16, 256, 168)  \
  X(sm90_tf32_128x128, float, 128, 168)    \
  X(sm90_tf32_128x256, float, 256, 168)

enum class TileName : int {
#define RNP_NAME(name, ...) name,
  RNP_CUDA_TILES(RNP_NAME) RNP_HOPPER_TILES(RNP_NAME)
#undef RNP_NAME
      kCount
};
static_assert(
    static_cast<int>(TileName::kCount) + 4 + 4 + 3 <= 27,
    "with the plain kernel and the weight gradient in four dtypes, and the sum of segments in three, at most 27 "
    "instantiations: three more than before float32 had wgmma too, which most calls are");

constexpr bool is_hopper(TileName name) { return name >= TileName::sm90_bf16_128x128; }

// The tile of sm_90a of this one's storage that has so many channels; tiles of up to 128 are the narrow kernel's.
constexpr TileName hopper_tile(TileName name, int bn) {
  const int first = static_cast<int>(TileName::sm90_bf16_128x128), at = static_cast<int>(name) - first;
  return static_cast<TileName>(first + at / 2 * 2 + (bn == 256 ? 1 : 0));
}

constexpr bool is_float(TileName name) { return name >= TileName::sm90_tf32_128x128; }  // of those of sm_90a

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

// How the K of a layer is summed on sm_90a: in runs of `chunks` chunks of 128 bytes, each from zero, then added in
// order. A rule of the layer alone, so that a launch may give the segments to different blocks (split) or not: the bits
// are the same. Only maps of at most 64 pixels, whose launches are too small for a GPU at small batches; a segment
// keeps at least eight steps of the pipeline, and there are at most eight.
constexpr int32_t segment_chunks(int64_t positions, int64_t chunks, int64_t taps, int64_t groups) {
  if (positions > 64 || groups != 1 || chunks * taps < 16) return static_cast<int32_t>(chunks);
  const int64_t for_length = (8 + taps - 1) / taps, for_number = (chunks + 7) / 8;
  return static_cast<int32_t>(for_length > for_number ? for_length : for_number);
}

// Cycles of a tile of sm_90a with `width` live channels of `element` bytes, but for its stages: describing, filling the
// pipeline, storing. Fitted, like the stages below, to 19 layers in bfloat16 on an H200 (bench/results/nvidia-h200,
// commit b831f02), where 1.8 cycles are a nanosecond: within 15 % nearly everywhere. Of float32 stores are taken to
// cost twice; with stages of the same bytes and cycles the choice is then nearly the same.
constexpr int64_t overhead_cycles_sm90(const TileSize& tile, int64_t width, int element) {
  const int64_t twice = width * element / 2;
  if (tile.bm == kTallRows) return 4574 + twice * 67 / 4;
  return 2448 + (tile.bn == 256 ? twice * 8 : twice * 57 / 4);
}

// The whole tile, where every tap fetches its input: 1,234 cycles a stage of 256 channels, 672 of 128, 508 of 64; of
// 256 rows 1,318 and 836.
constexpr int64_t tile_cycles_sm90(const TileSize& tile, int64_t width, int64_t stages, int element) {
  const int64_t narrow = 344 + width * 41 / 16;
  const int64_t stage =
      tile.bm == kTallRows ? 354 + width * 15 / 2 : (tile.bn == 256 ? std::max(narrow, 110 + width * 35 / 8) : narrow);
  return stages * stage + overhead_cycles_sm90(tile, width, element);
}

// How a layer's input can be kept for all taps of a chunk (conv_args.h, Stream); 0 positions: it cannot.
struct StreamShape {
  int64_t positions = 0;  // of a sample, those included that are no outputs
  int32_t halo = 0;

  constexpr int32_t window_rows(int bm) const { return (bm + halo + 7) / 8 * 8; }
};

// Stages of weights beside two windows in the memory of the stages; at most as many as there are barriers for.
constexpr int32_t window_stages(const TileSize& tile, int32_t window_rows) {
  constexpr int32_t kBytes = 192 * 1024;
  const int32_t left = kBytes - 2 * window_rows * kPackBytes, most = tile.bn == 256 ? 4 : 6;
  return left <= 0 ? 0 : std::min(most, left / (tile.bn * kPackBytes));
}

// The same as tile_cycles_sm90 for a tile whose input comes by windows. What holds a stage elsewhere is the copy
// engine, which takes 3.7 cycles for a row of an im2col copy and one for 84 bytes of weights, as fitted to the figures
// above; a window needs a row once for all taps. So products bound most tiles: of a step 64 rows take width / 2 cycles,
// and reading 2 KB of input and 32 bytes of weights a channel of shared memory 128 bytes a cycle, which is more below
// 64 channels. No device has run windows yet.
constexpr int64_t window_cycles_sm90(const TileSize& tile, int32_t window_rows, int64_t width, int64_t chunks,
                                     int64_t taps, int element) {
  const int64_t products = taps * tile.bm / 16 * std::max(width / 2, 16 + width / 4);
  const int64_t copies = int64_t{window_rows} * 37 / 10 + taps * width * kPackBytes / 84;
  return chunks * std::max(products, copies) + overhead_cycles_sm90(tile, width, element);
}

// sm_90a, one block to a multiprocessor: the tile whose launch takes the least time, and whether its input comes by
// windows. At full width tiles come in rounds, one on each multiprocessor. Of a mixed batch quarters of the widths
// stand for all; its list is dealt out evenly, but its end waits for a third of a tile more, and nothing is shorter
// than its longest tile. What no device has run must promise a sixteenth, and tall tiles an eighth: the fit makes 512
// channels to 128 (1x1, 28x28) a tenth faster by them, and they were a tenth slower. Layers summed in segments have no
// registers for wide and tall tiles; their segments become tiles of their own where the tiles would keep at most a
// quarter of the multiprocessors busy (of three times as many, split lost half: 512 channels at 7x7, batch 32). Shapes
// alone decide, and no bit depends on it.
struct HopperLayer {
  int64_t n, positions, group_out, groups, chunks, taps;
  int32_t segments;
  int element;
  bool mixed;
  StreamShape stream;
};
struct HopperChoice {
  TileSize tile;
  bool window;
  bool split;  // segments are tiles of their own
};
constexpr HopperChoice choose_tile_sm90(const HopperLayer& l, int multiprocessors) {
  HopperChoice best{{128, 64}, false, false};
  int64_t least = INT64_MAX, number = 0;
  for (const TileSize tile :
       {best.tile, TileSize{128, 128}, TileSize{128, 256}, TileSize{kTallRows, 64}, TileSize{kTallRows, 128}})
    for (const bool window : {false, true}) {
      const bool tall = tile.bm == kTallRows;
      if (l.segments > 1 && (tall || tile.bn == 256 || window)) continue;
      if (tile.bn > 64 && l.group_out <= tile.bn / 2) continue;
      const int32_t window_rows = l.stream.window_rows(tile.bm);
      if (window && (l.stream.positions == 0 || window_stages(tile, window_rows) < 3)) continue;
      const auto one = [&](int64_t width) {
        return window ? window_cycles_sm90(tile, window_rows, width, l.chunks, l.taps, l.element)
                      : tile_cycles_sm90(tile, width, l.chunks * l.taps, l.element);
      };
      // Of the tiles side by side that cover so many channels.
      const auto cycles = [&](int64_t width) {
        const int64_t rest = width % tile.bn;
        return width / tile.bn * one(tile.bn) + (rest > 0 ? one(rest) : 0);
      };
      const int64_t rows = l.n * (window ? l.stream.positions : l.positions);
      const int64_t row_tiles = (rows + tile.bm - 1) / tile.bm * l.groups;
      const int64_t tiles = row_tiles * ((l.group_out + tile.bn - 1) / tile.bn);
      int64_t time = (tiles + multiprocessors - 1) / multiprocessors * cycles(l.group_out) * row_tiles / tiles;
      if (l.mixed) {
        const int64_t longest = one(std::min<int64_t>(tile.bn, l.group_out));
        int64_t quarters = 0;
        for (int64_t q = 1; q <= 4; ++q) quarters += cycles(l.group_out * q / 4);
        time = std::max(longest, row_tiles * quarters / 4 * 5 / 8 / multiprocessors + longest / 3);  // 5/8: of K
      }
      if (window) time += time / 16;
      if (tall && !window) time += time / 8;
      if (time <= least) best.tile = tile, best.window = window, least = time, number = tiles;
    }
  best.split = l.segments > 1 && number * 4 <= multiprocessors;
  return best;
}

}  // namespace rnp::cuda
