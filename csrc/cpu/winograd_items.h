// How a Winograd call is cut into items: which tiles share a block, which output channels, and where everything lies in
// a worker's scratch.
//
// A *class* is the samples of one (in, out) prefix (and, where maps keep live channels only, one layout). A large class
// is cut into items of its own; classes with few tiles share items, so that the weights of a block of output channels
// are read once for all of them. Inside an item each class is a *piece* with register tiles of its own: a sum over c
// never runs past an in-prefix, nor is it cut.
#pragma once

#include <algorithm>
#include <vector>

#include "core/prefix_conv2d.h"
#include "core/processor.h"
#include "core/winograd.h"
#include "cpu/microkernel.h"

namespace rnp::cpu {

struct WinogradCall {
  const PrefixConv2dParams& p;
  const Kernels& kernels;
  WinogradLayout layout;
  int64_t tiles_w, tiles_h;
  bool direct_input, direct_output;
  bool stream;                // stores go past the caches
  float* sums = nullptr;      // (n, tile, c_out) of the tiles, for the means
  float* row_sums = nullptr;  // (n, out_h, c_out) of the tails

  WinogradCall(const PrefixConv2dParams& params, const Kernels& k);

  int64_t tiles() const { return tiles_w * tiles_h; }
  // Output position of a tile's first output, along one axis. With a dilation d the outputs that share no input with
  // their neighbours are d interleaved maps of dilation 1: as many tiles in a row begin side by side and step by d.
  int64_t first_row(int64_t tile) const { return first_output(tile / tiles_w, p.shape.dilation_h); }
  int64_t first_col(int64_t tile) const { return first_output(tile % tiles_w, p.shape.dilation_w); }
  int index() const { return layout.folded() ? 2 : layout.tile == 4 ? 1 : 0; }
  // Blocks of output channels that are multiplied before their sums are transformed: two for wide tiles.
  int64_t blocks_at_once() const { return kernels.wide_for(layout.c_out, processor().paired_multiply_adds) ? 2 : 1; }
  // What a sample of so many live input channels sums over.
  int64_t channels(int64_t in_live) const { return layout.folded() ? layout.channels() : in_live; }

 private:
  int64_t first_output(int64_t index, int64_t dilation) const {
    return index / dilation * dilation * layout.tile + index % dilation;
  }
};

struct WinogradClass {
  int64_t in_live, out_live;
  std::vector<int64_t> samples;

  // Live output channels of a block of 32; not positive where the prefix does not reach it.
  int64_t live(int64_t block) const { return std::min(left(block), PackedLayout::kLanes); }
  // Likewise of this block and all behind it.
  int64_t left(int64_t block) const { return out_live - block * PackedLayout::kLanes; }
};

struct WinogradPiece {
  const WinogradClass* of;
  int64_t tile0, tile1;              // in the list of all tiles of the class
  int64_t before;                    // tiles of the item's earlier pieces
  int64_t v, tile_step, point_step;  // V[point][tile][c], in floats from the scratch's begin
  int64_t band;                      // likewise: its pixels, where they must be copied or folded first

  int64_t tiles() const { return tile1 - tile0; }

  // Calls f(sample, first tile, end tile, tiles before it in the piece) for every sample.
  template <typename F>
  void for_samples(int64_t tiles_of_sample, F&& f) const {
    for (int64_t t = tile0; t < tile1;) {
      const int64_t index = t / tiles_of_sample, first = t % tiles_of_sample;
      const int64_t end = first + tile1 - t < tiles_of_sample ? first + tile1 - t : tiles_of_sample;
      f(of->samples[static_cast<size_t>(index)], first, end, t - tile0);
      t += end - first;
    }
  }
};

struct WinogradItem {
  size_t piece0, piece1;   // none: the channels of sample n beyond its prefix, in rows [row0, row1)
  int64_t tiles;           // of its pieces
  int64_t block0, block1;  // blocks of 32 output channels
  int64_t n, row0, row1;
  // Floats from the scratch's begin: M[block][point][tile][32], the addresses of input pixels, the tiles, a line of
  // zeros, a row of tiles of outputs that are not contiguous, and those tiles; and how many floats the item needs.
  int64_t m, m_step, pixels, list, zeros, bare, bare_list, floats;
  double cost;

  int64_t m_of(int64_t block, const WinogradLayout& layout) const { return m + block * layout.points() * m_step; }
  bool tail() const { return piece0 == piece1; }
};

// Rows of tiles that the tiles first … last of one sample lie in, as output rows.
struct WinogradRows {
  int64_t row0, row1;
  WinogradRows(const WinogradCall& call, int64_t first, int64_t last);
};

// Floats of a sample's folded pixels for these rows, which lie before the pixels they are made of.
int64_t folded_floats(const WinogradCall& call, const WinogradRows& rows);
// Likewise of those, where they are copied.
int64_t copied_floats(const WinogradCall& call, const WinogradRows& rows, int64_t in_live);

struct WinogradItems {
  std::vector<WinogradClass> classes;  // widest output first, then widest input
  std::vector<WinogradPiece> pieces;
  std::vector<WinogradItem> items;  // most expensive first
  int64_t floats = 0;               // that an item needs at most
  double cost = 0;

  WinogradItems(const WinogradCall& call, const std::vector<int64_t>& samples, int threads);

 private:
  void cut_classes(const WinogradCall& call);
  void share_blocks(const WinogradCall& call, int threads);
  void list_tails(const WinogradCall& call, const std::vector<int64_t>& samples);
  void place(const WinogradCall& call, WinogradItem& item);
};

}  // namespace rnp::cpu
