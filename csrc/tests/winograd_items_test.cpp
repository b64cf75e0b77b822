// How a Winograd call is cut into items: every tile and live channel exactly once, scratch bounded, and whatever
// company a sample is given there, its bits are those it has alone.
#include "cpu/winograd_items.h"

#include <algorithm>
#include <cstring>
#include <map>
#include <set>
#include <string>

#include "core/algorithm.h"
#include "cpu/isa.h"
#include "cpu/winograd.h"
#include "tests/check.h"
#include "tests/conv_case.h"

namespace rnp::tests {
namespace {

constexpr int64_t kIn = 48, kOut = 80;

// Samples with prefixes of their own, NaN beyond the input's.
struct Batch {
  ConvShape s;
  std::vector<int32_t> in, out;
  std::vector<float> input, weight, transformed, packed, output, pooled;
  PrefixConv2dParams p;

  Batch(int64_t n, int64_t side, uint64_t seed, int64_t tile = 4) {
    s = ConvCase{.name = "",
                 .n = n,
                 .c_in = kIn,
                 .h = side,
                 .w = side,
                 .c_out = kOut,
                 .kh = 3,
                 .kw = 3,
                 .top = 1,
                 .bottom = 1,
                 .left = 1,
                 .right = 1}
            .shape();
    Random random(seed);
    const int64_t ins[] = {0, 1, 12, 24, 36, 48}, outs[] = {0, 1, 20, 40, 60, 80};
    for (int64_t i = 0; i < n; ++i) {
      in.push_back(static_cast<int32_t>(ins[random.below(6)]));
      out.push_back(static_cast<int32_t>(outs[random.below(6)]));
    }
    for (int64_t i = 0; i < n * side * side; ++i)
      for (int64_t c = 0; c < kIn; ++c)
        input.push_back(c < in[static_cast<size_t>(i / (side * side))] ? static_cast<float>(random.next()) : kNaN);
    for (int64_t i = 0; i < kOut * kIn * 9; ++i) weight.push_back(static_cast<float>(random.next()));
    const cpu::WeightView view{weight.data(), DType::kFloat32, strides_of(kIn, 3, 3, false)};
    const WinogradLayout layout{tile, kIn, kOut};
    transformed.resize(static_cast<size_t>(layout.total_floats()));
    cpu::pack_winograd(view, layout, transformed.data(), {});
    packed.resize(static_cast<size_t>(PackedLayout(s).total_floats()));
    cpu::pack_weight(view, PackedLayout(s), packed.data(), {});
    output.assign(static_cast<size_t>(n * side * side * kOut), kNaN);
    pooled.assign(static_cast<size_t>(n * kOut), kNaN);
    p.shape = s;
    p.input_stride = strides_of(kIn, side, side, true);
    p.output_stride = strides_of(kOut, side, side, true);
    p.weight_stride = view.stride;
    p.input = input.data(), p.weight = weight.data(), p.output = output.data(), p.pooled = pooled.data();
    p.in_prefix = in.data(), p.out_prefix = out.data();
    p.packed = packed.data(), p.winograd = transformed.data(), p.winograd_tile = tile;
  }

  // The same samples in another order.
  Batch in_order(const std::vector<int64_t>& order) const {
    Batch other = *this;
    const size_t x = input.size() / in.size();
    for (size_t i = 0; i < order.size(); ++i) {
      const auto from = static_cast<size_t>(order[i]);
      std::copy_n(input.begin() + static_cast<std::ptrdiff_t>(from * x), x,
                  other.input.begin() + static_cast<std::ptrdiff_t>(i * x));
      other.in[i] = in[from], other.out[i] = out[from];
    }
    other.p.input = other.input.data(), other.p.output = other.output.data(), other.p.pooled = other.pooled.data();
    other.p.in_prefix = other.in.data(), other.p.out_prefix = other.out.data();
    return other;
  }

  bool sample_is(size_t i, const Batch& other, size_t j) const {
    const size_t y = output.size() / in.size();
    return std::memcmp(output.data() + i * y, other.output.data() + j * y, 4 * y) == 0 &&
           std::memcmp(pooled.data() + i * kOut, other.pooled.data() + j * kOut, 4 * kOut) == 0;
  }
};

const cpu::Kernels& kernels() { return cpu::portable_kernels(); }

}  // namespace

TEST(winograd_items_hold_every_tile_and_live_channel_once) {
  set_algorithm("winograd4");
  for (int64_t n : {1, 2, 7, 33})
    for (int64_t side : {4, 7, 14, 40})
      for (int threads : {1, 2, 8}) {
        const Batch batch(n, side, static_cast<uint64_t>(n * 100 + side));
        const cpu::WinogradSamples split(batch.p);
        const cpu::WinogradCall call(batch.p, kernels());
        const cpu::WinogradItems all(call, split.samples, threads);
        std::map<std::pair<int64_t, int64_t>, int64_t> left;  // sample, block → tiles
        for (int64_t i : split.samples)
          for (int64_t block = 0; block * 32 < batch.p.out_live(i); ++block) left[{i, block}] = call.tiles();
        std::set<std::vector<int64_t>> seen;
        double before = all.items.empty() ? 0 : all.items.front().cost;
        for (const cpu::WinogradItem& item : all.items) {
          CHECK(item.cost <= before) << "not the most expensive first";
          before = item.cost;
          CHECK(item.floats <= all.floats);
          int64_t tiles = 0;
          for (size_t i = item.piece0; i < item.piece1; ++i) {
            const cpu::WinogradPiece& piece = all.pieces[i];
            CHECK_EQUAL(piece.before, tiles);
            tiles += piece.tiles();
            CHECK(piece.of->live(item.block0) > 0) << "a piece that the item's blocks do not reach";
            piece.for_samples(call.tiles(), [&](int64_t sample, int64_t first, int64_t end, int64_t) {
              for (int64_t block = item.block0; block < item.block1 && piece.of->live(block) > 0; ++block)
                for (int64_t t = first; t < end; ++t) {
                  CHECK(seen.insert({sample, block, t}).second) << "sample " << sample << " twice";
                  --left[{sample, block}];
                }
            });
          }
          CHECK_EQUAL(tiles, item.tiles);
          CHECK(tiles <= 6 * kernels().max_cols) << "scratch is not bounded";
        }
        for (const auto& [where, tiles] : left) CHECK_EQUAL(tiles, 0) << "sample " << where.first;
      }
  set_algorithm("auto");
}

TEST(winograd_gives_a_sample_the_same_bits_in_every_mixed_company) {
  const cpu::Isa before = cpu::current_isa();
  for (cpu::Isa isa : isas_of(DType::kFloat32))
    for (int64_t tile : {2, 4}) {
      cpu::set_isa(cpu::isa_name(isa));
      set_algorithm(tile == 2 ? "winograd2" : "winograd4");
      for (int64_t side : {7, 14}) {
        constexpr int64_t kSamples = 33;
        Batch whole(kSamples, side, static_cast<uint64_t>(side), tile);
        cpu::prefix_conv2d(whole.p, {});
        for (float v : whole.output) CHECK(v == v) << "a NaN was read, or an element was not written";
        for (int64_t step : {1, 2, 5, 10, 26}) {  // no divisor of 33: another order of the prefixes each
          std::vector<int64_t> order;
          for (int64_t i = 0; i < kSamples; ++i) order.push_back(i * step % kSamples);
          for (int64_t count : {int64_t{1}, int64_t{2}, 3 + step, kSamples}) {
            Batch other = whole.in_order(order);
            std::fill(other.output.begin(), other.output.end(), kNaN);
            other.p.shape.n = count;
            cpu::prefix_conv2d(other.p, std_threads(static_cast<int>(step % 4 + 1)));
            for (int64_t i = 0; i < count; ++i)
              CHECK(other.sample_is(static_cast<size_t>(i), whole, static_cast<size_t>(order[static_cast<size_t>(i)])))
                  << cpu::isa_name(isa) << ", tile " << tile << ", " << side << ": sample "
                  << order[static_cast<size_t>(i)] << " among " << count;
          }
        }
      }
    }
  set_algorithm("auto");
  cpu::set_isa(cpu::isa_name(before));
}

}  // namespace rnp::tests
