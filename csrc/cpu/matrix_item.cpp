#include "cpu/matrix_item.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "cpu/block_output.h"
#include "cpu/epilogue.h"

namespace rnp::cpu {
namespace {

int64_t whole(int64_t count) { return (count + kMatrix - 1) / kMatrix * kMatrix; }

// How the words of a block of input channels are multiplied.
struct Records {
  bool copied;     // otherwise a record is a pixel as it stands
  int64_t taps_w;  // records of a kernel row: kw, or 1 where a record holds all of it
  int64_t words;   // of a record, whole chunks

  Records(const ConvShape& s, int64_t count, bool only_block) : copied(false), taps_w(s.kw), words(count) {
    if (count % kMatrix == 0) return;
    copied = true;
    words = whole(count);
    if (!only_block || s.kw * words <= whole(s.kw * count)) return;
    taps_w = 1;
    words = whole(s.kw * count);
  }
};

// The places of an item's memory, in floats.
struct Memory {
  int64_t band = 0, records = 0, tail = 0, weights = 0, sums = 0, end = 0;
};

class Item {
 public:
  Item(const Call& c, const WorkItem& i)
      : call(c),
        item(i),
        s(c.p.shape),
        l(c.layout),
        geometry(s, i.row0, i.row1),
        in_live(c.in_words(i)),
        ic_blocks(std::max<int64_t>(1, (in_live + l.ic_block - 1) / l.ic_block)),
        ragged(s, count(ic_blocks - 1), ic_blocks == 1) {
    const int64_t rows = i.row1 - i.row0;
    grid = {rows, s.out_w, geometry.cols_in, geometry.row_step, geometry.col_step};
    if (c.flat) grid = {1, rows * s.out_w, rows * s.out_w, 1, 1};
    if (ragged.copied && ragged.taps_w < s.kw) grid = {rows, s.out_w, s.out_w, geometry.row_step, 1};
    // Matrices that hang over the end read records that are not there; nobody stores what becomes of them.
    const int64_t over = kMatrix * grid.col_step;
    if (!c.direct_input) at.records = whole(geometry.pixels() * in_live + over * count(0));
    at.tail = at.records;
    if (ragged.copied)
      at.tail += ((c.flat ? grid.cols : geometry.rows_in * grid.cols_in) + over) * ragged.words;
    at.weights = at.tail + (c.direct_input ? kMatrix * whole(in_live) : 0);
    at.sums = at.weights + (ragged.copied ? s.kh * ragged.taps_w * ragged.words * PackedLayout::kLanes : 0);
    at.end = at.sums + grid.rows * ((grid.cols + kMatrix - 1) / kMatrix) * kMatrixSums;
  }

  const Call& call;
  const WorkItem& item;
  const ConvShape& s;
  const PackedLayout& l;
  BandGeometry geometry;
  int64_t in_live, ic_blocks;  // words; blocks of them
  Records ragged;              // of the last block; the others are whole chunks
  MatrixGrid grid;
  Memory at;

  int64_t count(int64_t ib) const { return std::clamp<int64_t>(in_live - ib * l.ic_block, 0, l.ic_block); }
  bool copied(int64_t ib) const { return ragged.copied && ib == ic_blocks - 1; }
  const float* input() const {
    const Strides4 st = call.p.input_at(item.n);
    return call.advance(static_cast<const float*>(call.p.input), item.n * st.n + item.g * l.icg + item.row0 * st.h);
  }
  int64_t input_step() const { return call.input_step(call.p.input_at(item.n).w); }

  void copy_input(const MatrixPlan& plan, float* memory) const {
    if (!call.direct_input)
      copy_band_pairs(call.p, geometry, item.n, item.g * l.icg, live_in_group(call.p.in_live(item.n), item.g, l.icg),
                      l.ic_block, call.kernels.copy_pixels, memory + at.band);
    if (ragged.copied) copy_records(memory);
    if (plan.paired < static_cast<int64_t>(plan.tiles.size())) {
      const int64_t first = plan.tiles.back().record;
      call.kernels.copy_pixels(input() + first * input_step(), input_step(), grid.cols - first, in_live,
                               whole(in_live), memory + at.tail);
    }
  }

  void copy_records(float* memory) const {
    const int64_t ib = ic_blocks - 1, live = count(ib), taps = ragged.taps_w < s.kw ? s.kw : 1;
    const int64_t step = call.direct_input ? input_step() : live;
    const float* from = call.direct_input ? input() + ib * l.ic_block
                                          : memory + at.band + ib * l.ic_block * geometry.pixels();
    const int64_t rows = call.flat ? 1 : geometry.rows_in, cols_in = call.flat ? grid.cols : geometry.cols_in;
    const int64_t col_step = taps > 1 ? geometry.col_step : 1;
    float* to = memory + at.records;
    std::memset(to, 0, sizeof(float) * static_cast<size_t>(rows * grid.cols_in * ragged.words));
    const bool touch = taps == 1 || (s.dilation_w == 1 && step == live);  // the words of a record, where they come from
    for (int64_t r = 0; r < rows; ++r, from += cols_in * step, to += grid.cols_in * ragged.words)
      for (int64_t j = 0; j < (touch ? 1 : taps); ++j)
        call.kernels.copy_pixels(from + j * s.dilation_w * step, col_step * step, grid.cols_in,
                                 touch ? taps * live : live, ragged.words, to + j * live);
  }

  // The weights of a copied block, as its records lie.
  void copy_weights(const float* w, int64_t lanes, float* to) const {
    const int64_t ib = ic_blocks - 1, live = count(ib), packed = l.ic_count(ib);
    std::memset(to, 0, sizeof(float) * static_cast<size_t>(s.kh * ragged.taps_w * ragged.words * lanes));
    for (int64_t i = 0; i < s.kh; ++i)
      for (int64_t j = 0; j < s.kw; ++j) {
        const int64_t word = ragged.taps_w < s.kw ? i * ragged.words + j * live : (i * s.kw + j) * ragged.words;
        std::memcpy(to + word * lanes, w + (i * s.kw + j) * packed * lanes,
                    sizeof(float) * static_cast<size_t>(live * lanes));
      }
  }

  // Kernel rows in order, each of ragged.taps_w or kw runs. `step`: words of a record.
  std::vector<MatrixRun> runs(int64_t ib, int64_t step) const {
    const bool copy = copied(ib);
    const int64_t taps_w = copy ? ragged.taps_w : s.kw, words = copy ? ragged.words : count(ib);
    const int64_t packed = copy ? ragged.words : l.ic_count(ib);
    std::vector<MatrixRun> out;
    for (int64_t i = 0; i < s.kh; ++i)
      for (int64_t j = 0; j < taps_w; ++j)
        out.push_back({(i * s.dilation_h * grid.cols_in + j * s.dilation_w) * step, (i * taps_w + j) * packed,
                       words / kMatrix});
    return out;
  }
};

// A block of input channels, ready to be multiplied.
struct Block {
  const float* x;
  int64_t step;  // words between records
  const float* tail;
  int64_t tail_step;
  std::vector<MatrixRun> runs;
};

}  // namespace

int64_t MatrixWorker::floats(const Call& call, const WorkItem& item) { return Item(call, item).at.end; }

void MatrixWorker::run(const Call& call, const WorkItem& work, const WorkItem* following, float* memory) {
  const Item item(call, work);
  const ConvShape& s = item.s;
  const PackedLayout& l = item.l;
  const PrefixConv2dParams& p = call.p;
  const MatrixKernels& kernels = *call.kernels.matrix;
  if (!plan_ || !plan_->same(item.grid, call.direct_input)) plan_.emplace(item.grid, call.direct_input);
  const MatrixPlan& plan = *plan_;
  item.copy_input(plan, memory);

  std::vector<Block> blocks;
  for (int64_t ib = 0; ib < item.ic_blocks; ++ib) {
    const bool copied = item.copied(ib);
    Block block = {};
    block.step = copied ? item.ragged.words : call.direct_input ? item.input_step() : item.count(ib);
    block.x = copied              ? memory + item.at.records
              : call.direct_input ? item.input() + ib * l.ic_block
                                  : memory + item.at.band + ib * l.ic_block * item.geometry.pixels();
    block.tail = copied ? block.x + plan.tiles.back().record * block.step : memory + item.at.tail + ib * l.ic_block;
    block.tail_step = copied ? block.step : whole(item.in_live);
    block.runs = item.runs(ib, block.step);
    blocks.push_back(std::move(block));
  }

  const int64_t out_live = live_in_group(p.out_live(work.n), work.g, l.ocg);
  const int64_t count = static_cast<int64_t>(plan.tiles.size());
  Prefetcher next;
  if (following && following->block0 < following->block1)
    next = Prefetcher(p, *following, following->g * l.icg, live_in_group(p.in_live(following->n), following->g, l.icg),
                      call.element, (count + 1) / 2 * (work.block1 - work.block0) * item.ic_blocks);
  float* sums = memory + item.at.sums;
  MatrixPending pending;
  kernels.start();
  for (int64_t b = work.block0; b < work.block1; ++b) {
    const BlockOutput output(call, work, b, out_live);
    const int64_t lanes = l.lanes(b), wide = output.live > kMatrix ? 1 : 0;
    for (int64_t ib = 0; ib < item.ic_blocks; ++ib) {
      const Block& block = blocks[static_cast<size_t>(ib)];
      MatrixArgs args = {};
      args.w = p.packed + l.panel_at(work.g, b, ib);
      if (item.copied(ib)) {
        item.copy_weights(args.w, lanes, memory + item.at.weights);
        args.w = memory + item.at.weights;
      }
      args.w_step = lanes * static_cast<int64_t>(sizeof(float));
      args.first = ib == 0;
      args.finish = ib == item.ic_blocks - 1 && call.direct_output ? &output.args : nullptr;
      const int64_t per_row = static_cast<int64_t>(block.runs.size()) / s.kh;
      for (int64_t t = 0, together = 0; t < count; t += together) {
        together = plan.together(t);
        const MatrixTile &first = plan.tiles[static_cast<size_t>(t)],
                         &last = plan.tiles[static_cast<size_t>(t + together - 1)];
        const bool tail = t >= plan.paired;
        args.x[0] = tail ? block.tail : block.x + first.record * block.step;
        args.x[1] = block.x + last.record * block.step;
        args.x_step = (tail ? block.tail_step : block.step * item.grid.col_step) * static_cast<int64_t>(sizeof(float));
        args.partial[0] = sums + t * kMatrixSums;
        args.partial[1] = args.partial[0] + kMatrixSums;
        // Kernel rows that lie in the padding for all of these pixels are left out.
        int64_t row0 = 0, row1 = s.kh;
        if (!call.flat) {
          const int64_t top = (work.row0 + first.row0) * s.stride_h - s.pad_top,
                        bottom = (work.row0 + last.row1 - 1) * s.stride_h - s.pad_top;
          while (row0 < row1 && bottom + row0 * s.dilation_h < 0) ++row0;
          while (row1 > row0 && top + (row1 - 1) * s.dilation_h >= s.h) --row1;
        }
        args.runs = block.runs.data() + row0 * per_row;
        args.run_count = (row1 - row0) * per_row;
        args.chunks = args.run_count * block.runs[0].chunks;
        args.pixels = plan.pixels.data() + first.first;
        args.pixel_count = last.end - first.first;
        next.step();
        kernels.multiply[together - 1][wide](args, pending);
      }
    }
    if (call.direct_output) {
      kernels.flush[wide](output.args, pending);
    } else {
      const int64_t row_sums = call.flat ? s.out_w * 2 * kMatrix : plan.row_sums;
      finish_patch(p, {work.n, work.row0, work.row1 - work.row0, 0, s.out_w}, output.channel0, output.live,
                   {sums, row_sums, 2 * kMatrix}, call.kernels.transpose);
    }
  }
  kernels.stop();
}

}  // namespace rnp::cpu
