#include "cpu/winograd_items.h"

#include <algorithm>
#include <array>
#include <map>

#include "cpu/band.h"
#include "cpu/call.h"
#include "cpu/winograd.h"

namespace rnp::cpu {
namespace {

constexpr int64_t kLanes = PackedLayout::kLanes;
// Most tiles of an item, in register tiles. Each weight read from L3 or memory serves that many. M stays in L2 with the
// smaller number; the larger one is for weights that come from memory, where V is in L3 either way.
constexpr int64_t kRegisterTiles = 2, kRegisterTilesFromMemory = 6;
constexpr int64_t kWeightsInCache = int64_t{12} << 20;  // bytes
constexpr int64_t kTailRows = 16;                       // output rows of a tail item
constexpr int kItemsPerThread = 3;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t round_up(int64_t v) { return (v + 15) / 16 * 16; }
int64_t odd_lines(int64_t floats) { return (ceil_div(floats, 16) | 1) * 16; }  // neighbours in different cache sets

// Tiles that an item should have at most where so many channels are the most in it.
int64_t most_tiles(const WinogradLayout& layout, int64_t channels, int64_t out_live, int64_t max_cols) {
  const int64_t weights = layout.points() * channels * out_live * static_cast<int64_t>(sizeof(float));
  return (weights <= kWeightsInCache ? kRegisterTiles : kRegisterTilesFromMemory) * max_cols;
}

int64_t band_floats(const WinogradCall& call, const WinogradPiece& piece) {
  if (call.direct_input) return 0;
  int64_t floats = 0;
  piece.for_samples(call.tiles(), [&](int64_t, int64_t first, int64_t end, int64_t) {
    const WinogradRows rows(call, first, end - 1);
    floats += folded_floats(call, rows) + copied_floats(call, rows, piece.of->in_live);
  });
  return floats;
}

}  // namespace

int64_t folded_floats(const WinogradCall& call, const WinogradRows& rows) {
  const int64_t more = call.layout.taps() - 1;
  return call.layout.folded() ? (rows.row1 - rows.row0 + more) * (call.p.shape.out_w + more) * kFoldedPixel : 0;
}

int64_t copied_floats(const WinogradCall& call, const WinogradRows& rows, int64_t in_live) {
  const int64_t floats = BandGeometry(call.p.shape, rows.row0, rows.row1).pixels() * in_live;
  return round_up(floats + (call.layout.folded() ? kFoldedPixel : 0));
}

WinogradCall::WinogradCall(const PrefixConv2dParams& params, const Kernels& k)
    : p(params),
      kernels(k),
      layout{params.winograd_tile, params.shape.c_in, params.shape.c_out, params.shape.kh},
      tiles_w(winograd_tiles(params.shape.out_w, layout.tile, params.shape.dilation_w)),
      tiles_h(winograd_tiles(params.shape.out_h, layout.tile, params.shape.dilation_h)),
      direct_input(params.input_stride.c == 1 && !layout.folded()),
      direct_output(params.output_stride.c == 1 && (!params.residual || params.residual_stride.c == 1)) {
  const ConvShape& s = p.shape;
  const Strides4& o = p.output_stride;
  const bool aligned = reinterpret_cast<uintptr_t>(p.output) % 64 == 0 && o.n % 16 == 0 &&
                       (p.output_pixel || (o.w % 16 == 0 && o.h % 16 == 0));
  const int64_t positions = p.max_pool ? s.out_h * s.out_w / 4 : s.out_h * s.out_w;
  const int64_t bytes = output_channels(p) * positions * static_cast<int64_t>(sizeof(float));
  stream = k.streams && direct_output && aligned && bytes > kStreamAbove && !p.ring;
}

int64_t winograd_ring_rows(const ConvShape& s, int64_t tile, int64_t before) {
  const WinogradLayout layout{tile, s.c_in, s.c_out, s.kh};
  // Rows of tiles: those of an item, one more where it begins within a row, and those of the rows before.
  const int64_t item = ceil_div(most_tiles(layout, layout.channels(), s.c_out, kMaxCols), ceil_div(s.out_w, tile));
  return (item + 1 + ceil_div(before, tile)) * tile;
}

WinogradRows::WinogradRows(const WinogradCall& call, int64_t first, int64_t last) {
  // Interleaved rows of tiles have their rows in common.
  const int64_t dilation = call.p.shape.dilation_h, tiles = call.tiles_w * dilation, rows = call.layout.tile * dilation;
  row0 = first / tiles * rows;
  row1 = std::min(call.p.shape.out_h, (last / tiles + 1) * rows);
}

WinogradItems::WinogradItems(const WinogradCall& call, const std::vector<int64_t>& samples, int threads) {
  // One piece, one distance between its output's pixels, and its residual's.
  std::map<std::array<int64_t, 4>, std::vector<int64_t>> by_prefix;
  for (int64_t n : samples)
    by_prefix[{-call.p.out_live(n), -call.p.in_live(n), call.p.output_at(n).w, call.p.residual_at(n).w}].push_back(n);
  for (auto& [prefix, list] : by_prefix) classes.push_back({-prefix[1], -prefix[0], std::move(list)});
  cut_classes(call);
  share_blocks(call, threads);
  list_tails(call, samples);
  for (const WinogradItem& item : items) {
    floats = std::max(floats, item.floats);
    cost += item.cost;
  }
  floats = round_up(floats);
  std::stable_sort(items.begin(), items.end(),
                   [](const WinogradItem& a, const WinogradItem& b) { return a.cost > b.cost; });
}

// Items over all output channels: equal parts of each large class, and small classes together.
void WinogradItems::cut_classes(const WinogradCall& call) {
  const auto add = [&](const WinogradClass& c, int64_t tile0, int64_t tile1) {
    WinogradItem& item = items.back();
    pieces.push_back({&c, tile0, tile1, item.tiles, 0, 0, 0, 0});
    item.piece1 = pieces.size();
    item.tiles += tile1 - tile0;
  };
  int64_t room = 0;  // tiles that the last item can take yet
  for (const WinogradClass& c : classes) {
    const int64_t tiles = static_cast<int64_t>(c.samples.size()) * call.tiles();
    if (tiles <= room) {
      add(c, 0, tiles);
      room -= tiles;
      continue;
    }
    const int64_t most = most_tiles(call.layout, call.channels(c.in_live), c.out_live, call.kernels.max_cols),
                  parts = ceil_div(tiles, most);
    for (int64_t i = 0; i < parts; ++i) {
      WinogradItem item = {};
      item.piece0 = pieces.size();
      item.block1 = ceil_div(c.out_live, kLanes);
      items.push_back(item);
      add(c, tiles * i / parts, tiles * (i + 1) / parts);
    }
    room = parts == 1 ? most - tiles : 0;
  }
}

void WinogradItems::place(const WinogradCall& call, WinogradItem& item) {
  const int64_t points = call.layout.points();
  int64_t at = 0, widest = 0;
  const auto take = [&](int64_t count) {
    at += round_up(count);
    return at - round_up(count);
  };
  for (size_t i = item.piece0; i < item.piece1; ++i) {
    WinogradPiece& piece = pieces[i];
    piece.tile_step = odd_lines(call.channels(piece.of->in_live));
    piece.point_step = odd_lines(piece.tiles() * piece.tile_step);
    piece.v = take(points * piece.point_step);
    widest = std::max(widest, call.channels(piece.of->in_live));
  }
  item.m_step = odd_lines(item.tiles * kLanes);
  item.m = take(call.blocks_at_once() * points * item.m_step);
  item.pixels = take(item.tiles * points * static_cast<int64_t>(sizeof(const float*) / sizeof(float)));
  const auto list = [&](int64_t tiles) {
    return take(tiles * static_cast<int64_t>(sizeof(WinogradTile) / sizeof(float)));
  };
  item.list = list(item.tiles);
  item.zeros = take(widest);
  const int64_t row = call.direct_output ? 0 : std::min(item.tiles, call.tiles_w);
  item.bare = take(row * kLanes * call.layout.tile * call.layout.tile);
  item.bare_list = list(row);
  for (size_t i = item.piece0; i < item.piece1; ++i) pieces[i].band = take(band_floats(call, pieces[i]));
  item.floats = at;
}

// Where there are fewer items than the threads want, each serves a range of the blocks only.
void WinogradItems::share_blocks(const WinogradCall& call, int threads) {
  const int64_t wanted = threads > 1 ? static_cast<int64_t>(threads) * kItemsPerThread : 1;
  std::vector<WinogradItem> whole;
  whole.swap(items);
  for (WinogradItem& item : whole) {
    place(call, item);
    const int64_t blocks = item.block1;
    const int64_t ranges = std::clamp<int64_t>(ceil_div(wanted, static_cast<int64_t>(whole.size())), 1, blocks);
    for (int64_t r = 0; r < ranges; ++r) {
      WinogradItem part = item;
      part.block0 = blocks * r / ranges, part.block1 = blocks * (r + 1) / ranges;
      while (pieces[part.piece1 - 1].of->live(part.block0) <= 0) part.tiles -= pieces[--part.piece1].tiles();
      for (size_t i = part.piece0; i < part.piece1; ++i) {
        const WinogradClass& c = *pieces[i].of;
        const int64_t reached = std::min(part.block1, ceil_div(c.out_live, kLanes)) - part.block0;
        part.cost += static_cast<double>(pieces[i].tiles() * call.layout.points() * call.channels(c.in_live)) *
                     static_cast<double>(reached * 2 + 1);
      }
      items.push_back(part);
    }
  }
}

void WinogradItems::list_tails(const WinogradCall& call, const std::vector<int64_t>& samples) {
  const PrefixConv2dParams& p = call.p;
  if (p.tail == Tail::kSkip || (p.tail == Tail::kKeep && !p.pooled)) return;
  for (int64_t n : samples)
    for (int64_t row = 0; row < p.shape.out_h && p.out_live(n) < p.tail_end(n); row += kTailRows) {
      WinogradItem item = {};
      item.n = n, item.row0 = row, item.row1 = std::min(row + kTailRows, p.shape.out_h);
      item.cost = static_cast<double>((item.row1 - row) * p.shape.out_w * (p.tail_end(n) - p.out_live(n))) / 8;
      items.push_back(item);
    }
}

}  // namespace rnp::cpu
