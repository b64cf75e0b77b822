#include "cpu/matrix_item.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "cpu/block_output.h"
#include "cpu/epilogue.h"

namespace rnp::cpu {
namespace {

int64_t whole(int64_t count) { return (count + kMatrix - 1) / kMatrix * kMatrix; }

// How an item's words are laid out, and the places of its memory in floats.
struct Item {
  const Call& call;
  const WorkItem& item;
  const ConvShape& s;
  const PackedLayout& l;
  BandGeometry geometry;
  int64_t in_live, ic_blocks;  // words; blocks of them
  bool direct;                 // records are pixels of the input tensor itself
  bool ragged;                 // the last chunk of the last block is filled up: its weights are copied
  int64_t taps_w;              // records of a kernel row: kw, or 1 where a record holds all of it
  MatrixGrid grid;
  ChunkedBand band;
  struct {
    int64_t row = 0, band = 0, tail = 0, weights = 0, sums = 0, end = 0;
  } at;

  Item(const Call& c, const WorkItem& i)
      : call(c),
        item(i),
        s(c.p.shape),
        l(c.layout),
        geometry(s, i.row0, i.row1),
        in_live(c.in_words(i)),
        ic_blocks(l.live_ic_blocks(in_live)),
        direct(c.direct_input && in_live % kMatrix == 0),
        ragged(in_live % kMatrix != 0),
        taps_w(s.kw) {
    const int64_t rows = i.row1 - i.row0;
    grid = {rows, s.out_w, geometry.cols_in, geometry.row_step, geometry.col_step};
    if (c.flat) grid = {1, rows * s.out_w, rows * s.out_w, 1, 1};
    if (in_live < kMatrix && s.dilation_w == 1 && whole(s.kw * in_live) < s.kw * kMatrix && in_live > 0) {
      taps_w = 1;
      grid.cols_in = s.out_w;
      grid.col_step = 1;
    }
    band = {s.kw / taps_w, c.flat ? s.out_w : grid.cols_in, s.kw / taps_w * in_live, 0};
    band.chunk = geometry.rows_in * band.cols * kMatrix;
    at.band = whole(geometry.cols_in * in_live + kMatrix);
    // Matrices that hang over the end read records that are not there; nobody stores what becomes of them.
    const int64_t over = kMatrix * kMatrix * grid.col_step;
    at.tail = at.band + (direct ? 0 : band.chunks() * band.chunk + over);
    at.weights = at.tail + (direct ? kMatrix * in_live : 0);
    at.sums = at.weights + (ragged ? s.kh * s.kw * whole(count(ic_blocks - 1)) * PackedLayout::kLanes : 0);
    at.end = at.sums + grid.rows * ((grid.cols + kMatrix - 1) / kMatrix) * kMatrixSums;
  }

  int64_t count(int64_t ib) const { return std::clamp<int64_t>(in_live - ib * l.ic_block, 0, l.ic_block); }
  bool copies_weights(int64_t ib) const { return ragged && ib == ic_blocks - 1; }
  int64_t chunks(int64_t ib) const { return whole(taps_w < s.kw ? band.words : count(ib)) / kMatrix; }
  const float* input() const {
    const Strides4 st = call.p.input_at(item.n);
    return call.advance(static_cast<const float*>(call.p.input), item.n * st.n + item.g * l.icg + item.row0 * st.h);
  }
  int64_t input_step() const { return call.input_step(call.p.input_at(item.n).w); }

  void copy_input(const MatrixPlan& plan, float* memory) const {
    if (!direct)
      return copy_band_chunks(call.p, geometry, item.n, item.g * l.icg,
                              live_in_group(call.p.in_live(item.n), item.g, l.icg), band, call.kernels.copy_pixels,
                              memory + at.row, memory + at.band);
    if (plan.paired == static_cast<int64_t>(plan.tiles.size())) return;
    const int64_t first = plan.tiles.back().record;
    for (int64_t c = 0; c < in_live; c += kMatrix)
      call.kernels.copy_pixels(input() + first * input_step() + c, input_step(), grid.cols - first, kMatrix, kMatrix,
                               memory + at.tail + c * kMatrix);
  }

  // The weights of the last block, as its records lie.
  void copy_weights(const float* w, int64_t lanes, float* to) const {
    const int64_t ib = ic_blocks - 1, live = count(ib), packed = l.ic_count(ib), record = chunks(ib) * kMatrix;
    std::memset(to, 0, sizeof(float) * static_cast<size_t>(s.kh * taps_w * record * lanes));
    for (int64_t i = 0; i < s.kh; ++i)
      for (int64_t j = 0; j < s.kw; ++j) {
        const int64_t word = taps_w < s.kw ? i * record + j * live : (i * s.kw + j) * record;
        std::memcpy(to + word * lanes, w + (i * s.kw + j) * packed * lanes,
                    sizeof(float) * static_cast<size_t>(live * lanes));
      }
  }

  // Kernel rows in order, each of taps_w runs.
  std::vector<MatrixRun> runs(int64_t ib) const {
    const int64_t words = copies_weights(ib) ? chunks(ib) * kMatrix : l.ic_count(ib);
    std::vector<MatrixRun> out;
    for (int64_t i = 0; i < s.kh; ++i)
      for (int64_t j = 0; j < taps_w; ++j)
        out.push_back({i * s.dilation_h * grid.cols_in + j * s.dilation_w, (i * taps_w + j) * words});
    return out;
  }

  // The runs of each tile: kernel rows that lie in the padding for all its pixels are left out.
  void choose_runs(std::vector<MatrixTile>& tiles) const {
    for (MatrixTile& tile : tiles) {
      const int64_t top = (item.row0 + tile.row0) * s.stride_h - s.pad_top,
                    bottom = (item.row0 + tile.row1 - 1) * s.stride_h - s.pad_top;
      int64_t first = 0, end = s.kh;
      while (!call.flat && first < end && bottom + first * s.dilation_h < 0) ++first;
      while (!call.flat && end > first && top + (end - 1) * s.dilation_h >= s.h) --end;
      tile.run0 = first * taps_w;
      tile.run1 = end * taps_w;
    }
  }

  // Weights of the next pass come into L2 during this one, a share with every chunk of it.
  void fetch_next(int64_t b, int64_t ib, MatrixPass& pass, int64_t tiles, MatrixPending& pending) const {
    const bool last = ib + 1 == ic_blocks;
    pending.ahead_left = 0;
    if (last && b + 1 == item.block1) return;
    const int64_t next_b = last ? b + 1 : b, next_ib = last ? 0 : ib + 1;
    pending.ahead = reinterpret_cast<const char*>(call.p.packed + l.panel_at(item.g, next_b, next_ib));
    pending.ahead_left = l.area() * l.ic_count(next_ib) * l.lanes(next_b) / kMatrix;
    const int64_t steps = std::max<int64_t>(1, tiles / 2 * pass.chunks * s.kh * taps_w);
    pass.ahead_share = (pending.ahead_left + steps - 1) / steps;
  }
};

// The passes of an item, one for each block of input channels; what depends on the output channels is still open.
struct Passes {
  std::vector<MatrixPass> all, tail;  // tail: of the tile that is computed by itself
  std::vector<std::vector<MatrixRun>> runs;

  Passes(const Item& item, const MatrixPlan& plan, float* memory) {
    constexpr int64_t kChunkBytes = kMatrix * sizeof(float);
    for (int64_t ib = 0; ib < item.ic_blocks; ++ib) {
      const int64_t first_chunk = ib * item.l.ic_block / kMatrix;
      MatrixPass pass = {};
      runs.push_back(item.runs(ib));
      pass.runs = runs.back().data();
      pass.chunks = item.chunks(ib);
      pass.first = ib == 0;
      pass.partial = memory + item.at.sums;
      pass.tiles = plan.tiles.data();
      pass.pixels = plan.pixels.data();
      pass.x = memory + item.at.band + first_chunk * item.band.chunk;
      pass.record = kChunkBytes;
      pass.chunk_step = item.band.chunk * static_cast<int64_t>(sizeof(float));
      if (item.direct) {
        pass.x = memory + item.at.tail + first_chunk * kMatrix * kMatrix - plan.tiles.back().record * kMatrix;
        pass.x_step = kChunkBytes;
        pass.chunk_step = kMatrix * kChunkBytes;
        tail.push_back(pass);
        pass.x = item.input() + ib * item.l.ic_block;
        pass.record = item.input_step() * static_cast<int64_t>(sizeof(float));
        pass.chunk_step = kChunkBytes;
      }
      pass.x_step = pass.record * item.grid.col_step;
      all.push_back(pass);
    }
    if (tail.empty()) tail = all;
  }
};

}  // namespace

int64_t MatrixWorker::floats(const Call& call, const WorkItem& item) { return Item(call, item).at.end; }

void MatrixWorker::run(const Call& call, const WorkItem& work, const WorkItem* following, float* memory) {
  const Item item(call, work);
  const PrefixConv2dParams& p = call.p;
  const ConvShape& s = p.shape;
  const PackedLayout& l = call.layout;
  const MatrixKernels& kernels = *call.kernels.matrix;
  if (!plan_ || !plan_->same(item.grid, item.direct)) plan_.emplace(item.grid, item.direct);
  MatrixPlan& plan = *plan_;
  const int64_t tiles = static_cast<int64_t>(plan.tiles.size());
  item.copy_input(plan, memory);
  item.choose_runs(plan.tiles);
  Passes passes(item, plan, memory);
  const int64_t out_live = live_in_group(p.out_live(work.n), work.g, l.ocg);
  Prefetcher next;
  if (following && following->block0 < following->block1)
    next = Prefetcher(p, *following, following->g * l.icg, live_in_group(p.in_live(following->n), following->g, l.icg),
                      call.element, (tiles + 1) / 2 * (work.block1 - work.block0) * item.ic_blocks);
  MatrixPending pending;
  kernels.start();
  for (int64_t b = work.block0; b < work.block1; ++b) {
    const BlockOutput output(call, work, b, out_live);
    const int64_t lanes = l.lanes(b), wide = output.live > kMatrix ? 1 : 0;
    for (int64_t ib = 0; ib < item.ic_blocks; ++ib) {
      MatrixPass &pass = passes.all[static_cast<size_t>(ib)], &tail = passes.tail[static_cast<size_t>(ib)];
      pass.w = p.packed + l.panel_at(work.g, b, ib);
      if (item.copies_weights(ib)) {
        item.copy_weights(pass.w, lanes, memory + item.at.weights);
        pass.w = memory + item.at.weights;
      }
      pass.w_step = lanes * static_cast<int64_t>(sizeof(float));
      pass.finish = ib == item.ic_blocks - 1 && call.direct_output ? &output.args : nullptr;
      item.fetch_next(b, ib, pass, tiles, pending);
      tail.w = pass.w, tail.w_step = pass.w_step, tail.finish = pass.finish, tail.ahead_share = pass.ahead_share;
      int64_t t = 0;
      for (; t + 1 < plan.paired; t += 2) {
        next.step();
        kernels.multiply[1][wide](pass, t, pending);
      }
      if (t < plan.paired) kernels.multiply[0][wide](pass, t, pending);
      if (plan.paired < tiles) kernels.multiply[0][wide](tail, plan.paired, pending);
    }
    if (call.direct_output) {
      kernels.flush[wide](output.args, pending);
    } else {
      const int64_t row_sums = call.flat ? s.out_w * 2 * kMatrix : plan.row_sums;
      finish_patch(p, {work.n, work.row0, work.row1 - work.row0, 0, s.out_w}, output.channel0, output.live,
                   {memory + item.at.sums, row_sums, 2 * kMatrix}, call.kernels.transpose);
    }
  }
  kernels.stop();
}

}  // namespace rnp::cpu
