// The Winograd driver. A block of tiles goes through all three steps while it sits in the caches:
//
//   V[point][tile][c]  = B^T d B                              (winograd_transform.h)
//   M[point][tile][oc] = sum over c of V * U, for 32 output channels at a time: (m + 2)^2 small products, with the
//                        register tiles of the direct kernels (a product of tiles x channels is a 1x1 convolution)
//   output             = epilogue(A^T M A)
//
// Which tiles share a block is decided in winograd_items.cpp. No bit depends on that: every sum over c is one chain in
// the order of the channels, for each tile by itself, and both transforms work tile by tile.
#include "cpu/winograd.h"

#include <algorithm>
#include <atomic>

#include "core/algorithm.h"
#include "core/processor.h"
#include "cpu/band.h"
#include "cpu/epilogue.h"
#include "cpu/inlining.h"
#include "cpu/sum_pixels.h"
#include "cpu/weights_ahead.h"
#include "cpu/winograd_items.h"

namespace rnp::cpu {
namespace {

constexpr int64_t kLanes = PackedLayout::kLanes;
constexpr double kCostOfThread = 5e4;  // as in prefix_conv2d.cpp: about cycles

// An item, its pieces, and the scratch of the worker that computes it.
struct Work {
  const WinogradCall& call;
  const WinogradItem& item;
  const WinogradPiece* pieces;
  float* memory;

  const WinogradPiece* begin() const { return pieces + item.piece0; }
  const WinogradPiece* end() const { return pieces + item.piece1; }
};

void transform_input(const Work& work, const WinogradPiece& piece) {
  const WinogradCall& call = work.call;
  const PrefixConv2dParams& p = call.p;
  const ConvShape& s = p.shape;
  const int64_t edge = call.layout.edge(), in_live = piece.of->in_live, channels = call.channels(in_live);
  const int64_t y_span = (edge - 1) * s.dilation_h, x_span = (edge - 1) * s.dilation_w;
  const auto pixels = reinterpret_cast<const float**>(work.memory + work.item.pixels);
  float* zeros = work.memory + work.item.zeros;
  std::fill(zeros, zeros + channels, 0.0f);
  float* band = work.memory + piece.band;
  piece.for_samples(call.tiles(), [&](int64_t n, int64_t first, int64_t end, int64_t before) {
    // A window of the sample whose pixel (y0, x0) is at `base`.
    const Strides4 in = p.input_at(n);
    const float* base = static_cast<const float*>(p.input) + n * in.n;
    // Where the first tile's window would begin there, of output pixel (0, 0).
    int64_t y0 = -s.pad_top, x0 = -s.pad_left, rows = s.h, cols = s.w, row_step = in.h, col_step = in.w;
    if (!call.direct_input) {
      const WinogradRows r(call, first, end - 1);
      const BandGeometry g(s, r.row0, r.row1);
      float* copied = band + folded_floats(call, r);
      copy_band(p, g, n, 0, in_live, in_live, in_live, call.kernels, copied);
      y0 = -r.row0, x0 = 0;
      if (call.layout.folded()) {
        rows = r.row1 - r.row0 + call.layout.taps() - 1, cols = s.out_w + call.layout.taps() - 1;
        col_step = kFoldedPixel;
        fold_band(copied, g, in_live, rows, cols, band);
        base = band;
      } else {
        rows = g.rows_in, cols = g.cols_in;
        col_step = in_live;
        base = copied;
      }
      row_step = cols * col_step;
      band = copied + copied_floats(call, r, in_live);
    }
    const float** to = pixels + before * edge * edge;
    for (int64_t t = first; t < end; ++t) {
      const int64_t top = call.first_row(t) + y0, left = call.first_col(t) + x0;
      if (top >= 0 && left >= 0 && top + y_span < rows && left + x_span < cols) {  // most: nothing to look at
        const float* row = base + top * row_step + left * col_step;
        for (int64_t y = 0; y < edge; ++y, row += s.dilation_h * row_step, to += edge)
          for (int64_t x = 0; x < edge; ++x) to[x] = row + x * s.dilation_w * col_step;
        continue;
      }
      for (int64_t y = top; y <= top + y_span; y += s.dilation_h)
        for (int64_t x = left; x <= left + x_span; x += s.dilation_w)
          *to++ = y < 0 || y >= rows || x < 0 || x >= cols ? zeros : base + y * row_step + x * col_step;
    }
  });
  call.kernels.winograd.input[call.index()](
      {pixels, piece.tiles(), channels, work.memory + piece.v, piece.point_step, piece.tile_step});
}

// Register tiles over the tiles of a piece: what all points, pieces and blocks have in common is set once.
class Products {
 public:
  explicit Products(const Work& work) : work_(work) {
    args_.run_count = 1;
    args_.runs = &channels_;
    args_.first = true;
    args_.partial_col_step = kLanes;
    args_.partial_block_step = work.call.layout.points() * work.item.m_step;
  }

  // Of a piece at a point whose sums begin at `m`, channels of which lie at `v`.
  RNP_INLINE void begin(const WinogradPiece& piece, const float* v, float* m) {
    channels_.count = work_.call.channels(piece.of->in_live);
    args_.x_col_step = piece.tile_step;
    count_ = piece.tiles(), v_ = v, m_ = m + piece.before * kLanes;
  }

  // One width of tiles: `live` output channels from `sub` on of the block with weights `u`, `w_step` apart, and sums
  // `block_sums` behind those of the first.
  RNP_INLINE void run(const TileWidth& width, int64_t max_cols, const float* u, int64_t w_step, int64_t sub,
                      int64_t live, int64_t block_sums, WeightsAhead* ahead) {
    const int64_t count = count_, parts = (count + max_cols - 1) / max_cols, tile_step = args_.x_col_step;
    const float* v = v_;
    args_.w = u + sub;
    args_.w_step = w_step;
    args_.live = static_cast<int32_t>(live);
    args_.ahead_lines = 0;
    float* m = m_ + block_sums + sub;
    for (int64_t i = 0; i < parts; ++i) {
      const int64_t t0 = count * i / parts, t1 = count * (i + 1) / parts;
      args_.x = v + t0 * tile_step;
      args_.partial = m + t0 * kLanes;
      if (ahead) ahead->give(args_, parts);
      width.tile[0][t1 - t0 - 1](args_);
    }
  }

  void set_block_step(int64_t floats) { args_.w_block_step = floats; }
  int64_t block_sums() const { return args_.partial_block_step; }

 private:
  const Work& work_;
  Run channels_{0, 0, 0, 0, kSkipNone};
  TileArgs args_ = {};
  int64_t count_ = 0;
  const float* v_ = nullptr;
  float* m_ = nullptr;
};

// All products of `blocks` blocks of output channels, one or two. A panel of weights serves every piece that its block
// reaches.
void multiply(const Work& work, int64_t first, int64_t blocks) {
  const WinogradCall& call = work.call;
  const Kernels& kernels = call.kernels;
  const bool paired = processor().paired_multiply_adds;
  Products products(work);
  const int64_t w_step[2] = {call.layout.lanes(first), blocks == 2 ? call.layout.lanes(first + 1) : 0};
  for (int64_t point = 0; point < call.layout.points(); ++point) {
    const float* u = call.p.winograd + call.layout.panel_at(first, point);
    const float* u1 = blocks == 2 ? call.p.winograd + call.layout.panel_at(first + 1, point) : nullptr;
    float* m = work.memory + work.item.m + point * work.item.m_step;
    WeightsAhead ahead, *asks = nullptr;  // asks: the tiles of the first piece
    if (blocks == 2) {                    // the next point's weights, or those of the blocks to come
      const int64_t next = point + 1 < call.layout.points() ? first : first + 2;
      if (next < work.item.block1)
        ahead = WeightsAhead(call.p.winograd + call.layout.panel_at(next, next == first ? point + 1 : 0), u1 - u,
                             call.channels(work.begin()->of->in_live) * kLanes);
      products.set_block_step(u1 - u);
      asks = &ahead;
    }
    for (const WinogradPiece& piece : work) {
      products.begin(piece, work.memory + piece.v + point * piece.point_step, m);
      const TileWidth* wide = blocks == 2 ? kernels.wide_for(piece.of->left(first), paired) : nullptr;
      if (wide) {
        products.run(*wide, kernels.wide_cols, u, kLanes, 0, wide->lanes, 0, asks);
        asks = nullptr;
        continue;
      }
      for (int64_t b = 0; b < blocks; ++b) {
        const int64_t live = piece.of->live(first + b);
        for (int64_t sub = 0, lanes = 0; sub < live; sub += lanes) {
          const TileWidth& width =
              call.layout.folded() ? kernels.pointwise_width_for(live - sub, paired) : kernels.width_for(live - sub);
          lanes = std::min<int64_t>(width.lanes, live - sub);
          products.run(width, kernels.max_cols, b ? u1 : u, w_step[b], sub, lanes, b * products.block_sums(), nullptr);
        }
      }
    }
  }
}

void list_tiles(const Work& work, const WinogradPiece& piece) {
  const WinogradCall& call = work.call;
  const PrefixConv2dParams& p = call.p;
  const ConvShape& s = p.shape;
  const int64_t edge = call.layout.tile;
  WinogradTile* to = reinterpret_cast<WinogradTile*>(work.memory + work.item.list) + piece.before;
  piece.for_samples(call.tiles(), [&](int64_t n, int64_t first, int64_t end, int64_t) {
    const int64_t line = p.row ? p.row[n] : 0;
    const auto table = [&](const void* data, int64_t row_stride) {
      return data ? static_cast<const float*>(data) + line * row_stride : nullptr;
    };
    const Strides4 o = p.output_at(n), r = p.residual_at(n);
    const int halved = p.max_pool ? 1 : 0;
    const int64_t kept = p.ring ? p.ring->rows : s.out_h;
    // Outputs of a tile along an axis; none where the last of the interleaved maps are shorter.
    const auto outputs = [edge](int64_t left, int64_t dilation) {
      return static_cast<int32_t>(std::clamp<int64_t>((left + dilation - 1) / dilation, 0, edge));
    };
    for (int64_t t = first; t < end; ++t, ++to) {
      const int64_t y = call.first_row(t), x = call.first_col(t);
      to->out = static_cast<float*>(p.output) + n * o.n + (y % kept >> halved) * o.h + (x >> halved) * o.w;
      to->residual = p.residual ? static_cast<const float*>(p.residual) + n * r.n + y * r.h + x * r.w : nullptr;
      to->scale = table(p.scale, p.scale_row_stride);
      to->bias = table(p.bias, p.bias_row_stride);
      to->sum = call.sums ? call.sums + (n * call.tiles() + t) * s.c_out : nullptr;
      to->rows = outputs(s.out_h - y, s.dilation_h);
      to->cols = outputs(s.out_w - x, s.dilation_w);
    }
  });
}

// Distances between the outputs of a tile.
Strides4 stepped(const ConvShape& s, const Strides4& st) {
  return {st.n, st.c, st.h * s.dilation_h, st.w * s.dilation_w};
}

// Of a tile whose outputs lie in planes, in the order in which the transforms add them up.
void sum_tile(const PrefixConv2dParams& p, const WinogradTile& tile, int64_t channel0, int64_t live) {
  const Strides4 o = stepped(p.shape, p.output_stride);
  for (int64_t c = channel0; c < channel0 + live; ++c) {
    float sum = 0;
    for (int64_t i = 0; i < tile.rows; ++i)
      for (int64_t j = 0; j < tile.cols; ++j) sum += tile.out[i * o.h + j * o.w + c * o.c];
    tile.sum[c] = sum;
  }
}

// Bare outputs y[row][col][32] of neighbouring tiles, then the epilogue of all of them: where channels are no
// neighbours in memory. Dilated tiles have gaps, and go one by one.
void transform_to_planes(const Work& work, const WinogradPiece& piece, int64_t block, WinogradOutputArgs& args) {
  const WinogradCall& call = work.call;
  const PrefixConv2dParams& p = call.p;
  const ConvShape& s = p.shape;
  const int64_t edge = call.layout.tile;
  const auto* tiles = reinterpret_cast<const WinogradTile*>(work.memory + work.item.list) + piece.before;
  const float* m = args.m;
  float* y = work.memory + work.item.bare;
  auto* bare = reinterpret_cast<WinogradTile*>(work.memory + work.item.bare_list);
  args.tiles = bare;
  args.out_col_step = kLanes;
  piece.for_samples(call.tiles(), [&](int64_t n, int64_t first, int64_t end, int64_t before) {
    for (int64_t t = first, next = t; t < end; t = next) {
      const int64_t row_end = std::min(end, (t / call.tiles_w + 1) * call.tiles_w);
      next = s.dilation_w > 1 ? t + 1 : row_end;
      const WinogradTile* of = tiles + before + t - first;
      args.tile_count = next - t;
      args.out_row_step = args.tile_count * edge * kLanes;
      args.m = m + (before + t - first) * kLanes;
      for (int64_t i = 0; i < args.tile_count; ++i)
        bare[i] = {y + i * edge * kLanes, nullptr, nullptr, nullptr, nullptr, of[i].rows, of[i].cols};
      call.kernels.winograd.output[call.index()](args);
      const int64_t cols = (args.tile_count - 1) * edge + of[args.tile_count - 1].cols;
      finish_patch(p, {n, call.first_row(t), of->rows, call.first_col(t), cols, s.dilation_h, s.dilation_w},
                   block * kLanes, args.live, {y, args.out_row_step, kLanes}, call.kernels.transpose);
      for (int64_t i = 0; i < args.tile_count && of->sum; ++i) sum_tile(p, of[i], block * kLanes, args.live);
    }
  });
}

void transform_output(const Work& work, const WinogradPiece& piece, int64_t block, int64_t m_block) {
  const WinogradCall& call = work.call;
  const PrefixConv2dParams& p = call.p;
  const int64_t live = piece.of->live(block);
  if (live <= 0) return;
  const WinogradTile* tiles = reinterpret_cast<const WinogradTile*>(work.memory + work.item.list) + piece.before;
  WinogradOutputArgs args = {};
  args.m = work.memory + work.item.m_of(m_block, call.layout) + piece.before * kLanes;
  args.point_step = work.item.m_step;
  args.live = static_cast<int32_t>(live);
  if (call.direct_output) {
    args.tiles = tiles;
    args.tile_count = piece.tiles();
    args.channel0 = block * kLanes;
    const int64_t n = piece.of->samples[0];
    const Strides4 o = stepped(p.shape, p.output_at(n)), r = stepped(p.shape, p.residual_at(n));
    args.out_row_step = o.h, args.out_col_step = o.w;
    args.residual_row_step = r.h, args.residual_col_step = r.w;
    args.relu = p.activation == Activation::kRelu;
    args.pool = p.max_pool;
    args.stream = call.stream && live % 16 == 0;
    return call.kernels.winograd.output[call.index()](args);
  }
  transform_to_planes(work, piece, block, args);
}

void run_item(const Work& work) {
  const WinogradItem& item = work.item;
  if (item.tail()) {
    const PrefixConv2dParams& p = work.call.p;
    const int64_t live = p.out_live(item.n);
    fill_tail(p, item.n, item.row0, item.row1, live, p.shape.c_out);
    if (work.call.row_sums) sum_rows(p, item.n, item.row0, item.row1, live, p.tail_end(item.n), work.call.row_sums);
    return;
  }
  for (const WinogradPiece& piece : work) {
    transform_input(work, piece);
    list_tiles(work, piece);
  }
  for (int64_t block = item.block0, blocks = 0; block < item.block1; block += blocks) {
    blocks = std::min(work.call.blocks_at_once(), item.block1 - block);
    multiply(work, block, blocks);
    for (int64_t i = 0; i < blocks; ++i)
      for (const WinogradPiece& piece : work) transform_output(work, piece, block + i, i);
  }
}

void finish_means(const WinogradCall& call, int64_t n) {
  const PrefixConv2dParams& p = call.p;
  const ConvShape& s = p.shape;
  float* out = p.pooled + n * s.c_out;
  const int64_t live = p.out_live(n);
  std::fill(out, out + s.c_out, 0.0f);
  sum_pixels(call.sums + n * call.tiles() * s.c_out, s.c_out, call.tiles(), live, out);
  if (call.row_sums)
    sum_pixels(call.row_sums + n * s.out_h * s.c_out + live, s.c_out, s.out_h, s.c_out - live, out + live);
  for (int64_t c = 0; c < s.c_out; ++c) out[c] /= static_cast<float>(s.out_h * s.out_w);
}

}  // namespace

WinogradSamples::WinogradSamples(const PrefixConv2dParams& p) {
  if (!p.winograd) return;
  chosen.resize(static_cast<size_t>(p.shape.n));
  for (int64_t n = 0; n < p.shape.n; ++n) {
    const Algorithm algorithm = choose_algorithm(p.shape, p.dtype, p.in_live(n), p.out_live(n));
    if (static_cast<int64_t>(algorithm) != p.winograd_tile) continue;
    chosen[static_cast<size_t>(n)] = 1;
    samples.push_back(n);
  }
}

void winograd_conv2d(const PrefixConv2dParams& p, const std::vector<int64_t>& samples, const Kernels& kernels,
                     const Threads& threads, const std::function<float*(size_t)>& scratch) {
  WinogradCall call(p, kernels);
  const WinogradItems all(call, samples, threads.count);
  const int64_t count = static_cast<int64_t>(all.items.size()), useful = static_cast<int64_t>(all.cost / kCostOfThread);
  const int workers = static_cast<int>(std::min<int64_t>({threads.count, count, useful + 1}));
  // Sums lie behind the workers' memory: those of tiles need no zeros, every one that is read has been stored.
  const int64_t sums = p.pooled ? p.shape.n * call.tiles() * p.shape.c_out : 0;
  float* memory = scratch(static_cast<size_t>(all.floats * workers + sums));
  std::vector<float> row_sums;
  if (p.pooled) {
    call.sums = memory + all.floats * workers;
    if (p.residual) {  // otherwise the tails are 0
      row_sums.resize(static_cast<size_t>(p.shape.n * p.shape.out_h * p.shape.c_out));
      call.row_sums = row_sums.data();
    }
  }
  if (p.ring) {
    std::vector<const WinogradItem*> in_order;
    for (const WinogradItem& item : all.items) in_order.push_back(&item);
    const auto first_tile = [&](const WinogradItem* item) { return all.pieces[item->piece0].tile0; };
    std::stable_sort(in_order.begin(), in_order.end(),
                     [&](const auto* a, const auto* b) { return first_tile(a) < first_tile(b); });
    for (const WinogradItem* item : in_order) {
      run_item({call, *item, all.pieces.data(), memory});
      const int64_t tiles = all.pieces[item->piece0].tile1;
      p.ring->done(tiles == call.tiles() ? p.shape.out_h : tiles / call.tiles_w * call.layout.tile);
    }
    if (p.pooled) finish_means(call, samples[0]);
    return;
  }
  std::atomic<size_t> next{0};
  threads(workers, [&](int worker) {
    for (size_t i = next++; i < all.items.size(); i = next++)
      run_item({call, all.items[i], all.pieces.data(), memory + worker * all.floats});
#if defined(__x86_64__)
    if (call.stream) __builtin_ia32_sfence();  // before anyone reads what this thread has stored
#endif
  });
  if (p.pooled)
    for (int64_t n : samples) finish_means(call, n);
}

}  // namespace rnp::cpu
