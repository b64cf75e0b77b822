// The schedule of the CUDA kernels (core/gpu_schedule.h): every live output once, no dead tile, and what it costs.
#include "core/gpu_schedule.h"

#include <algorithm>
#include <cstdio>
#include <map>
#include <string>
#include <vector>

#include "cuda/tiles.h"
#include "tests/check.h"
#include "tests/conv_case.h"

namespace rnp::tests {
namespace {

struct Batch {
  std::vector<int32_t> in, out;
};

struct Sorted {
  std::vector<int32_t> sample, in, out;
  gpu::Order order;
};

Sorted sorted(const Batch& batch, int32_t c_in, int32_t c_out) {
  const int32_t n = static_cast<int32_t>(batch.in.size());
  Sorted s;
  s.sample.assign(batch.in.size(), -1), s.in = s.out = s.sample;
  for (int32_t i = 0; i < n; ++i) {
    const size_t at = static_cast<size_t>(gpu::place_of(i, n, batch.in.data(), batch.out.data(), c_in, c_out));
    s.sample[at] = i;
    s.in[at] = gpu::clamp_prefix(batch.in[static_cast<size_t>(i)], c_in);
    s.out[at] = gpu::clamp_prefix(batch.out[static_cast<size_t>(i)], c_out);
  }
  s.order = {s.sample.data(), s.in.data(), s.out.data(), c_in, c_out};
  return s;
}

// Random prefixes and adversarial ones: one class, one outlier, each sample another, zeros, out of range.
std::vector<Batch> batches(int32_t n, int32_t c_in, int32_t c_out) {
  std::vector<Batch> all;
  Random random(static_cast<uint64_t>(n * 1000 + c_in));
  auto make = [&](auto&& in, auto&& out) {
    Batch b;
    for (int32_t i = 0; i < n; ++i) b.in.push_back(in(i)), b.out.push_back(out(i));
    all.push_back(b);
  };
  make([&](int32_t) { return (1 + random.below(4)) * c_in / 4; },
       [&](int32_t) { return (1 + random.below(4)) * c_out / 4; });
  make([&](int32_t) { return random.below(c_in + 1); }, [&](int32_t) { return random.below(c_out + 1); });
  make([&](int32_t) { return c_in; }, [&](int32_t) { return c_out; });
  make([&](int32_t) { return 0; }, [&](int32_t) { return 0; });
  make([&](int32_t) { return 1; }, [&](int32_t) { return 1; });
  make([&](int32_t i) { return i == n / 2 ? c_in : 1; }, [&](int32_t i) { return i == n / 2 ? c_out : 1; });
  make([&](int32_t i) { return i % (c_in + 1); }, [&](int32_t i) { return i % 2 ? c_out : 0; });
  make([&](int32_t i) { return i - 3; }, [&](int32_t i) { return c_out + 3 - i; });
  make([&](int32_t) { return INT32_MIN; }, [&](int32_t) { return INT32_MAX; });
  return all;
}

}  // namespace

TEST(gpu_order_is_a_stable_permutation) {
  for (int32_t n : {0, 1, 7, 64, 300}) {
    for (const Batch& b : batches(n, 20, 33)) {
      const Sorted s = sorted(b, 20, 33);
      for (size_t i = 0; i < s.sample.size(); ++i) {
        CHECK(s.sample[i] >= 0) << "place " << i << " is empty";
        if (i == 0) continue;
        CHECK(s.out[i - 1] >= s.out[i]) << "out-prefixes ascend at " << i;
        if (s.out[i - 1] != s.out[i]) continue;
        CHECK(s.in[i - 1] >= s.in[i]) << "in-prefixes ascend at " << i;
        CHECK(s.in[i - 1] > s.in[i] || s.sample[i - 1] < s.sample[i]) << "not stable at " << i;
      }
    }
  }
}

TEST(gpu_schedule_covers_every_live_output_once_and_visits_no_dead_tile) {
  struct Layer {
    int32_t groups, group_in, group_out;
    int64_t positions;
  };
  for (const Layer& layer : {Layer{1, 20, 33, 49}, Layer{1, 64, 130, 10}, Layer{3, 8, 12, 81}, Layer{1, 16, 256, 1},
                             Layer{2, 5, 129, 300}, Layer{40, 1, 1, 4}}) {
    const int32_t c_in = layer.groups * layer.group_in, c_out = layer.groups * layer.group_out;
    for (int32_t n : {0, 1, 9, 40}) {
      for (const Batch& b : batches(n, c_in, c_out)) {
        const Sorted s = sorted(b, c_in, c_out);
        for (const auto& [bm, bn] : {std::pair{128, 128}, std::pair{64, 64}, std::pair{128, 64}, std::pair{128, 256},
                                     std::pair{256, 128}, std::pair{256, 64}}) {
          const gpu::Cut cut{n, layer.positions, layer.groups, layer.group_in, layer.group_out, bm, bn};
          // (sample, pixel) → how often each block of channels was computed.
          std::map<std::pair<int32_t, uint32_t>, std::map<int32_t, int>> seen;
          int64_t tiles = 0;
          gpu::Cursor at;
          for (; at.seek(cut, s.order, tiles); ++tiles) {
            int live_rows = 0;
            for (int32_t r = 0; r < bm; ++r) {
              const gpu::RowPlace row = gpu::place_row(cut, at, r);
              if (!row.live) continue;
              const int32_t out =
                  gpu::live_of_group(s.order.out_at(row.place), at.group, layer.group_out) - at.block * bn;
              if (out <= 0) continue;
              ++live_rows;
              ++seen[{s.order.sample_at(row.place), row.pixel}][at.group * cut.blocks() + at.block];
            }
            CHECK(live_rows > 0) << "dead tile " << tiles;
          }
          CHECK(tiles <= cut.most_tiles()) << tiles << " tiles, at most " << cut.most_tiles();
          for (int32_t i = 0; i < n; ++i) {
            const int32_t out = gpu::clamp_prefix(b.out[static_cast<size_t>(i)], c_out);
            for (uint32_t pixel = 0; pixel < layer.positions; ++pixel) {
              const auto& blocks = seen[{i, pixel}];
              for (int32_t c = 0; c < c_out; ++c) {
                const int32_t block = c / layer.group_out * cut.blocks() + c % layer.group_out / bn;
                const auto found = blocks.find(block);
                const int times = found == blocks.end() ? 0 : found->second;
                CHECK(times <= 1 && (c >= out || times == 1)) << "sample " << i << " channel " << c << ": " << times;
              }
            }
          }
        }
      }
    }
  }
}

TEST(gpu_segments_cover_every_live_chunk_once) {
  for (int64_t positions : {1, 49, 64, 65, 196}) {
    for (int32_t chunks = 1; chunks <= 40; ++chunks) {
      for (int32_t taps : {1, 9, 25}) {
        const int32_t length = cuda::segment_chunks(positions, chunks, taps, 1);
        const int32_t segments = (chunks + length - 1) / length;
        CHECK(segments <= 8 && (segments == 1 || length * taps >= 8)) << chunks << " chunks in " << segments;
        CHECK(positions <= 64 || segments == 1) << positions << " positions, " << segments << " segments";
        for (int32_t live = 0; live <= chunks; ++live) {
          std::vector<int> seen(static_cast<size_t>(chunks), 0);
          int32_t with_work = 0;
          for (int32_t segment = 0; segment < segments; ++segment) {
            const gpu::ChunkRange range = gpu::chunks_of(live, length, segment, segments);
            with_work += range.first < range.end;
            for (int32_t c = range.first; c < range.end; ++c) ++seen[static_cast<size_t>(c)];
          }
          for (int32_t c = 0; c < chunks; ++c)
            CHECK(seen[static_cast<size_t>(c)] == (c < live)) << "chunk " << c << " of " << live;
          // What the second pass adds up (sum_segments_block): as many as have work.
          CHECK(with_work == (live + length - 1) / length) << with_work << " of " << segments << " segments";
        }
      }
    }
  }
}

// The share of the FLOP-theoretical speed-up over full width, for random actions (k = 4), if a tile's time were its
// matrix steps plus a fixed cost: 132 multiprocessors, each taking the next tile when it is free. What a device adds
// (memory, clocks, two blocks sharing a multiprocessor) is not in it.
namespace {

constexpr int kMultiprocessors = 132;
constexpr double kTileCost = 48;  // fill and drain of a tile, in steps of one 16 x 16 block of outputs over 16 channels

// sm_90a: one block to a multiprocessor, whose consumers store a tile before they begin the next. In the same steps,
// from an H200's data sheet rates: a 16 x 16 block of outputs takes 14 to store; half a microsecond of latency is 512.
constexpr double kHopperTileCost = 512, kHopperStoreCost = 14;

// A split launch is followed by the sum of its segments, about two microseconds.
constexpr double kSecondPass = 2048;

double makespan(const gpu::Cut& cut, const gpu::Order& order, bool hopper, int32_t segment, int32_t splits) {
  std::vector<double> load(kMultiprocessors, 0.0);
  gpu::Cursor at;
  for (int64_t t = 0; at.seek(cut, order, t / splits); ++t) {
    int32_t k = 0, width = 0;
    for (int32_t r = 0; r < cut.bm; ++r) {
      const gpu::RowPlace row = gpu::place_row(cut, at, r);
      if (!row.live) continue;
      k = std::max(k, order.in_at(row.place));
      width = std::max(width, std::min(cut.bn, order.out_at(row.place) - at.block * cut.bn));
    }
    const gpu::ChunkRange range = gpu::chunks_of((k + 63) / 64, segment, static_cast<int32_t>(t % splits), splits);
    if (splits > 1) k = std::max(0, std::min(k, range.end * 64) - range.first * 64);
    const int grain = hopper && cut.bn == 256 ? 2 : 1;  // runs of 16 channels that are multiplied together
    const double runs = ((width + 16 * grain - 1) / (16 * grain)) * grain, blocks = runs * cut.bm / 16;
    double& least = *std::min_element(load.begin(), load.end());
    if (splits == 1 || k > 0)
      least += (hopper ? kHopperTileCost + kHopperStoreCost * blocks : kTileCost) + 9.0 * ((k + 15) / 16) * blocks;
  }
  return *std::max_element(load.begin(), load.end()) + (splits > 1 ? kSecondPass : 0);
}

}  // namespace

namespace {

struct Simulated {
  int32_t channels;
  int64_t side;
  int32_t batch;
  double least;
};

// A tile, and in how many segments at once its K is summed.
struct How {
  cuda::TileSize tile;
  int32_t splits = 1;
};

void check_share(const Simulated& row, const How& whole, const How& mixed, bool hopper, int32_t segment = 1) {
  const int32_t c = row.channels;
  const int64_t positions = row.side * row.side;
  const auto cut = [&](const How& how) { return gpu::Cut{row.batch, positions, 1, c, c, how.tile.bm, how.tile.bn}; };
  const Batch b = batches(row.batch, c, c)[0];
  const Sorted s = sorted(b, c, c);
  double macs = 0;
  for (size_t i = 0; i < b.in.size(); ++i) macs += static_cast<double>(b.in[i]) * b.out[i] / c / c;
  const double theory = row.batch / macs;
  const double full = makespan(cut(whole), {nullptr, nullptr, nullptr, c, c}, hopper, segment, whole.splits);
  const double share = full / makespan(cut(mixed), s.order, hopper, segment, mixed.splits) / theory;
  std::printf(
      "  simulated, sm_%s: %3d channels, %2d^2, batch %3d, tiles %dx%d and %dx%d, mixed in %d segments at once: %.2f "
      "of %.2fx\n",
      hopper ? "90a" : "80", c, static_cast<int>(row.side), row.batch, whole.tile.bm, whole.tile.bn, mixed.tile.bm,
      mixed.tile.bn, mixed.splits, share, theory);
  CHECK(share >= row.least) << c << " channels, batch " << row.batch << ": " << share;
}

}  // namespace

TEST(gpu_schedule_keeps_its_simulated_share) {
  for (const Simulated& row :
       {Simulated{64, 56, 256, 0.93}, Simulated{128, 28, 256, 0.95}, Simulated{256, 14, 256, 0.87},
        Simulated{512, 7, 256, 0.85}, Simulated{64, 56, 32, 0.84}, Simulated{128, 28, 32, 0.87},
        Simulated{256, 14, 32, 0.68}, Simulated{512, 7, 32, 0.88}}) {
    const How how{cuda::choose_tile_sm80(row.batch * row.side * row.side, row.channels, 1, kMultiprocessors)};
    check_share(row, how, how, false);
  }
}

TEST(gpu_schedule_keeps_its_simulated_share_on_hopper) {
  for (const Simulated& row :
       {Simulated{64, 56, 256, 0.71}, Simulated{128, 28, 256, 0.78}, Simulated{256, 14, 256, 0.75},
        Simulated{512, 7, 256, 0.61}, Simulated{64, 56, 32, 0.59}, Simulated{128, 28, 32, 0.80},
        Simulated{256, 14, 32, 0.64}, Simulated{512, 7, 32, 0.44}}) {
    const int64_t positions = row.side * row.side, chunks = (row.channels + 63) / 64;
    const int32_t segment = cuda::segment_chunks(positions, chunks, 9, 1);
    const int32_t segments = static_cast<int32_t>((chunks + segment - 1) / segment);
    const auto choose = [&](bool mixed) {
      const cuda::HopperChoice choice = cuda::choose_tile_sm90(
          {row.batch, positions, row.channels, 1, chunks, 9, segments, 2, mixed, {}}, kMultiprocessors);
      return How{choice.tile, choice.split ? segments : 1};
    };
    check_share(row, choose(false), choose(true), true, segment);
  }
}

}  // namespace rnp::tests
