// The Winograd driver. A block of tiles goes through all three steps while it sits in the cache:
//
//   V[point][tile][c]  = B^T d B                              (winograd_transform.h)
//   M[point][tile][oc] = sum over c of V * U, for 32 output channels at a time: (m + 2)^2 small products, with the
//                        register tiles of the direct kernels (a product of tiles x channels is a 1x1 convolution)
//   output             = epilogue(A^T M A)
//
// Tiles of samples with equal prefixes stand in one list, and a block takes neighbours from it: on small maps the
// weights are then read once for several samples. No bit depends on that: every sum over c is one chain in the order of
// the channels, for each tile by itself, and both transforms work tile by tile.
#include "cpu/winograd.h"

#include <algorithm>
#include <atomic>
#include <map>

#include "core/algorithm.h"
#include "cpu/band.h"
#include "cpu/epilogue.h"

namespace rnp::cpu {
namespace {

constexpr int64_t kLanes = PackedLayout::kLanes;
// Most tiles of a block, in register tiles: each weight read from L3 or memory serves that many, and M stays in L2.
constexpr int64_t kRegisterTiles = 2;
constexpr int64_t kTailRows = 16;      // output rows of a tail item
constexpr double kCostOfThread = 5e4;  // as in prefix_conv2d.cpp: about cycles
constexpr int kItemsPerThread = 3;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t round_up(int64_t v) { return (v + 15) / 16 * 16; }
int64_t odd_lines(int64_t floats) { return (ceil_div(floats, 16) | 1) * 16; }  // neighbours in different cache sets

struct Group {  // samples of one (in, out) prefix
  int64_t in_live, out_live;
  std::vector<int64_t> samples;
};

struct Item {
  const Group* group;
  int64_t tile0, tile1;    // in the list of all tiles of the group
  int64_t block0, block1;  // blocks of 32 output channels
  int64_t n, row0, row1;   // group null: the channels of sample n beyond its prefix, in these rows
  double cost;
};

struct Call {
  const PrefixConv2dParams& p;
  const Kernels& kernels;
  WinogradLayout layout;
  int64_t tiles_w, tiles_h;
  bool direct_input, direct_output;
  float* sums = nullptr;      // (n, tile, c_out) of the tiles, for the means
  float* row_sums = nullptr;  // (n, out_h, c_out) of the tails

  Call(const PrefixConv2dParams& params, const Kernels& k)
      : p(params),
        kernels(k),
        layout{params.winograd_tile, params.shape.c_in, params.shape.c_out},
        tiles_w(ceil_div(params.shape.out_w, layout.tile)),
        tiles_h(ceil_div(params.shape.out_h, layout.tile)),
        direct_input(params.input_stride.c == 1),
        direct_output(params.output_stride.c == 1 && (!params.residual || params.residual_stride.c == 1)) {}

  int64_t tiles() const { return tiles_w * tiles_h; }
  int index() const { return layout.tile == 4 ? 1 : 0; }
};

// Where the pieces of a worker's scratch are, in floats, for blocks of at most `tiles` tiles.
struct Scratch {
  int64_t tile_step, v_step, m_step;
  int64_t v, m, pixels, tiles, zeros, band, total;

  Scratch(const Call& call, int64_t in_live, int64_t count, int64_t band_floats) {
    const int64_t points = call.layout.points();
    tile_step = odd_lines(in_live);
    v_step = odd_lines(count * tile_step);
    m_step = odd_lines(count * kLanes);
    v = 0;
    m = v + points * v_step;
    pixels = m + points * m_step;
    tiles = pixels + round_up(count * points * 2);
    zeros = tiles + round_up(count * static_cast<int64_t>(sizeof(WinogradTile) / sizeof(float)));
    band = zeros + round_up(in_live);
    total = band + round_up(band_floats) + kLanes * 16;  // and one tile of sums for outputs that are not contiguous
  }
};

// Rows of tiles that the tiles [first, last] of one sample lie in, as output rows.
struct Rows {
  int64_t row0, row1;
  Rows(const Call& call, int64_t first, int64_t last)
      : row0(first / call.tiles_w * call.layout.tile),
        row1(std::min(call.p.shape.out_h, (last / call.tiles_w + 1) * call.layout.tile)) {}
};

// Calls f(sample, first tile, end tile, tiles before it in the item) for every sample of the item.
template <typename F>
void for_samples(const Call& call, const Item& item, F&& f) {
  for (int64_t t = item.tile0; t < item.tile1;) {
    const int64_t index = t / call.tiles(), first = t % call.tiles();
    const int64_t end = std::min(call.tiles(), first + item.tile1 - t);
    f(item.group->samples[static_cast<size_t>(index)], first, end, t - item.tile0);
    t += end - first;
  }
}

int64_t band_floats(const Call& call, const Item& item) {
  if (call.direct_input) return 0;
  int64_t floats = 0;
  for_samples(call, item, [&](int64_t, int64_t first, int64_t end, int64_t) {
    const Rows rows(call, first, end - 1);
    floats += BandGeometry(call.p.shape, rows.row0, rows.row1).pixels() * item.group->in_live;
  });
  return floats;
}

void transform_input(const Call& call, const Item& item, const Scratch& at, float* memory) {
  const PrefixConv2dParams& p = call.p;
  const ConvShape& s = p.shape;
  const int64_t edge = call.layout.edge(), in_live = item.group->in_live;
  const auto pixels = reinterpret_cast<const float**>(memory + at.pixels);
  float* zeros = memory + at.zeros;
  std::fill(zeros, zeros + in_live, 0.0f);
  float* band = memory + at.band;
  for_samples(call, item, [&](int64_t n, int64_t first, int64_t end, int64_t before) {
    // A window of the sample whose pixel (y0, x0) is at `base`.
    const float* base = static_cast<const float*>(p.input) + n * p.input_stride.n;
    int64_t y0 = 0, x0 = 0, rows = s.h, cols = s.w, row_step = p.input_stride.h, col_step = p.input_stride.w;
    if (!call.direct_input) {
      const Rows r(call, first, end - 1);
      const BandGeometry g(s, r.row0, r.row1);
      copy_band(p, g, n, 0, in_live, in_live, in_live, call.kernels.copy_pixels, band);
      base = band;
      y0 = g.y0, x0 = g.x0, rows = g.rows_in, cols = g.cols_in;
      col_step = in_live, row_step = cols * col_step;
      band += g.pixels() * in_live;
    }
    const float** to = pixels + before * edge * edge;
    for (int64_t t = first; t < end; ++t) {
      const int64_t top = t / call.tiles_w * call.layout.tile - s.pad_top - y0,
                    left = t % call.tiles_w * call.layout.tile - s.pad_left - x0;
      for (int64_t y = top; y < top + edge; ++y)
        for (int64_t x = left; x < left + edge; ++x)
          *to++ = y < 0 || y >= rows || x < 0 || x >= cols ? zeros : base + y * row_step + x * col_step;
    }
  });
  const WinogradInputArgs args{pixels, item.tile1 - item.tile0, in_live, memory + at.v, at.v_step, at.tile_step};
  call.kernels.winograd.input[call.index()](args);
}

// All products of one block of output channels.
void multiply(const Call& call, const Item& item, int64_t block, int64_t live, const Scratch& at, float* memory) {
  const int64_t count = item.tile1 - item.tile0;
  const int64_t parts = ceil_div(count, call.kernels.max_cols);
  const Run run{0, 0, item.group->in_live, 0, kSkipNone};
  TileArgs args = {};
  args.runs = &run;
  args.run_count = 1;
  args.first = true;
  args.x_col_step = at.tile_step;
  args.w_step = call.layout.lanes(block);
  args.partial_col_step = kLanes;
  for (int64_t point = 0; point < call.layout.points(); ++point) {
    const float* u = call.p.winograd + call.layout.panel_at(block, point);
    for (int64_t sub = 0, lanes = 0; sub < live; sub += lanes) {
      const TileWidth& width = call.kernels.width_for(live - sub);
      lanes = std::min<int64_t>(width.lanes, live - sub);
      args.w = u + sub;
      args.live = static_cast<int32_t>(lanes);
      for (int64_t i = 0; i < parts; ++i) {
        const int64_t t0 = count * i / parts, t1 = count * (i + 1) / parts;
        args.x = memory + at.v + point * at.v_step + t0 * at.tile_step;
        args.partial = memory + at.m + point * at.m_step + t0 * kLanes + sub;
        width.tile[0][t1 - t0 - 1](args);
      }
    }
  }
}

void list_tiles(const Call& call, const Item& item, WinogradTile* to) {
  const PrefixConv2dParams& p = call.p;
  const ConvShape& s = p.shape;
  const int64_t edge = call.layout.tile;
  for_samples(call, item, [&](int64_t n, int64_t first, int64_t end, int64_t) {
    const int64_t line = p.row ? p.row[n] : 0;
    const auto table = [&](const void* data, int64_t row_stride) {
      return data ? static_cast<const float*>(data) + line * row_stride : nullptr;
    };
    for (int64_t t = first; t < end; ++t, ++to) {
      const int64_t y = t / call.tiles_w * edge, x = t % call.tiles_w * edge;
      to->out = static_cast<float*>(p.output) + n * p.output_stride.n + y * p.output_stride.h + x * p.output_stride.w;
      const Strides4& r = p.residual_stride;
      to->residual = p.residual ? static_cast<const float*>(p.residual) + n * r.n + y * r.h + x * r.w : nullptr;
      to->scale = table(p.scale, p.scale_row_stride);
      to->bias = table(p.bias, p.bias_row_stride);
      to->sum = call.sums ? call.sums + (n * call.tiles() + t) * s.c_out : nullptr;
      to->rows = static_cast<int32_t>(std::min(edge, s.out_h - y));
      to->cols = static_cast<int32_t>(std::min(edge, s.out_w - x));
    }
  });
}

// The epilogue of one tile whose channels are not neighbours in memory, from its bare outputs y[row][col][32].
void scatter(const PrefixConv2dParams& p, const WinogradTile& tile, int64_t channel0, int64_t live, int64_t edge,
             const float* y) {
  const Strides4 &o = p.output_stride, &r = p.residual_stride;
  for (int64_t c = 0; c < live; ++c) {
    const int64_t channel = channel0 + c;
    const float scale = tile.scale ? tile.scale[channel] : 1.0f, bias = tile.bias ? tile.bias[channel] : 0.0f;
    float sum = 0;
    for (int64_t i = 0; i < tile.rows; ++i)
      for (int64_t j = 0; j < tile.cols; ++j) {
        float v = y[(i * edge + j) * kLanes + c] * scale + bias;
        if (tile.residual) v += tile.residual[i * r.h + j * r.w + channel * r.c];
        if (p.activation == Activation::kRelu) v = v < 0 ? 0.0f : v;  // a NaN stays
        tile.out[i * o.h + j * o.w + channel * o.c] = v;
        sum += v;
      }
    if (tile.sum) tile.sum[channel] = sum;
  }
}

void transform_output(const Call& call, const Item& item, int64_t block, int64_t live, const Scratch& at,
                      float* memory) {
  const PrefixConv2dParams& p = call.p;
  const auto tiles = reinterpret_cast<const WinogradTile*>(memory + at.tiles);
  const int64_t count = item.tile1 - item.tile0, edge = call.layout.tile;
  const auto transform = call.kernels.winograd.output[call.index()];
  WinogradOutputArgs args = {};
  args.m = memory + at.m;
  args.point_step = at.m_step;
  args.live = static_cast<int32_t>(live);
  if (call.direct_output) {
    args.tiles = tiles;
    args.tile_count = count;
    args.channel0 = block * kLanes;
    args.out_row_step = p.output_stride.h, args.out_col_step = p.output_stride.w;
    args.residual_row_step = p.residual_stride.h, args.residual_col_step = p.residual_stride.w;
    args.relu = p.activation == Activation::kRelu;
    return transform(args);
  }
  float* y = memory + at.total - kLanes * 16;
  args.tile_count = 1;
  args.out_row_step = edge * kLanes, args.out_col_step = kLanes;
  for (int64_t t = 0; t < count; ++t) {
    const WinogradTile bare{y, nullptr, nullptr, nullptr, nullptr, tiles[t].rows, tiles[t].cols};
    args.tiles = &bare;
    args.m = memory + at.m + t * kLanes;
    transform(args);
    scatter(p, tiles[t], block * kLanes, live, edge, y);
  }
}

void run_item(const Call& call, const Item& item, float* memory) {
  const PrefixConv2dParams& p = call.p;
  if (!item.group) {
    fill_tail(p, item.n, item.row0, item.row1, p.out_live(item.n), p.shape.c_out);
    if (call.row_sums) sum_rows(p, item.n, item.row0, item.row1, p.out_live(item.n), p.shape.c_out, call.row_sums);
    return;
  }
  const Scratch at(call, item.group->in_live, item.tile1 - item.tile0, band_floats(call, item));
  transform_input(call, item, at, memory);
  list_tiles(call, item, reinterpret_cast<WinogradTile*>(memory + at.tiles));
  for (int64_t block = item.block0; block < item.block1; ++block) {
    const int64_t live = std::min(kLanes, item.group->out_live - block * kLanes);
    multiply(call, item, block, live, at, memory);
    transform_output(call, item, block, live, at, memory);
  }
}

std::vector<Group> group_samples(const Call& call, const std::vector<int64_t>& samples) {
  std::map<std::pair<int64_t, int64_t>, std::vector<int64_t>> by_prefix;
  for (int64_t n : samples) by_prefix[{call.p.in_live(n), call.p.out_live(n)}].push_back(n);
  std::vector<Group> groups;
  for (auto& [prefix, list] : by_prefix) groups.push_back({prefix.first, prefix.second, std::move(list)});
  return groups;
}

std::vector<Item> list_items(const Call& call, const std::vector<Group>& groups, const std::vector<int64_t>& samples,
                             int threads) {
  const PrefixConv2dParams& p = call.p;
  std::vector<Item> items;
  const int64_t wanted = threads > 1 ? static_cast<int64_t>(threads) * kItemsPerThread : 1;
  for (const Group& g : groups) {
    const int64_t tiles = static_cast<int64_t>(g.samples.size()) * call.tiles(), blocks = ceil_div(g.out_live, kLanes);
    const int64_t parts = ceil_div(tiles, kRegisterTiles * call.kernels.max_cols);
    const int64_t needed = ceil_div(wanted, static_cast<int64_t>(groups.size()));
    const int64_t ranges = std::clamp<int64_t>(ceil_div(needed, parts), 1, blocks);
    for (int64_t i = 0; i < parts; ++i)
      for (int64_t r = 0; r < ranges; ++r) {
        Item item{
            &g, tiles * i / parts, tiles * (i + 1) / parts, blocks * r / ranges, blocks * (r + 1) / ranges, 0, 0, 0, 0};
        item.cost = static_cast<double>((item.tile1 - item.tile0) * call.layout.points() * g.in_live) *
                    static_cast<double>((item.block1 - item.block0) * 2 + 1);
        items.push_back(item);
      }
  }
  if (p.tail == Tail::kZero)
    for (int64_t n : samples)
      for (int64_t row = 0; row < p.shape.out_h && p.out_live(n) < p.shape.c_out; row += kTailRows) {
        const int64_t end = std::min(row + kTailRows, p.shape.out_h);
        const double cost = static_cast<double>((end - row) * p.shape.out_w * (p.shape.c_out - p.out_live(n))) / 8;
        items.push_back({nullptr, 0, 0, 0, 0, n, row, end, cost});
      }
  std::stable_sort(items.begin(), items.end(), [](const Item& a, const Item& b) { return a.cost > b.cost; });
  return items;
}

void finish_means(const Call& call, int64_t n) {
  const PrefixConv2dParams& p = call.p;
  const ConvShape& s = p.shape;
  float* out = p.pooled + n * s.c_out;
  std::fill(out, out + s.c_out, 0.0f);
  for (int64_t t = 0; t < call.tiles(); ++t) {
    const float* sums = call.sums + (n * call.tiles() + t) * s.c_out;
    for (int64_t c = 0; c < p.out_live(n); ++c) out[c] += sums[c];
  }
  if (call.row_sums)
    for (int64_t r = 0; r < s.out_h; ++r) {
      const float* sums = call.row_sums + (n * s.out_h + r) * s.c_out;
      for (int64_t c = p.out_live(n); c < s.c_out; ++c) out[c] += sums[c];
    }
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
  Call call(p, kernels);
  const std::vector<Group> groups = group_samples(call, samples);
  const std::vector<Item> items = list_items(call, groups, samples, threads.count);
  std::vector<float> sums, row_sums;
  if (p.pooled) {
    sums.resize(static_cast<size_t>(p.shape.n * call.tiles() * p.shape.c_out));
    call.sums = sums.data();
    if (p.residual) {  // otherwise the tails are 0
      row_sums.resize(static_cast<size_t>(p.shape.n * p.shape.out_h * p.shape.c_out));
      call.row_sums = row_sums.data();
    }
  }
  int64_t need = 0;
  double cost = 0;
  for (const Item& item : items) {
    if (item.group)
      need = std::max(need, Scratch(call, item.group->in_live, item.tile1 - item.tile0, band_floats(call, item)).total);
    cost += item.cost;
  }
  need = round_up(need);
  const int64_t useful = static_cast<int64_t>(cost / kCostOfThread) + 1;
  const int workers = static_cast<int>(std::min<int64_t>({threads.count, static_cast<int64_t>(items.size()), useful}));
  float* memory = scratch(static_cast<size_t>(need * workers));
  std::atomic<size_t> next{0};
  threads(workers, [&](int worker) {
    for (size_t i = next++; i < items.size(); i = next++) run_item(call, items[i], memory + worker * need);
  });
  if (p.pooled)
    for (int64_t n : samples) finish_means(call, n);
}

}  // namespace rnp::cpu
