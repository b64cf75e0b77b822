// Packing, scheduling, half conversions.
#include <algorithm>
#include <map>

#include "core/schedule.h"
#include "tests/check.h"
#include "tests/conv_case.h"

namespace rnp::tests {

TEST(packed_weights_hold_every_weight_once_and_zeros_elsewhere) {
  for (const ConvCase& c : conv_cases()) {
    const ConvShape s = c.shape();
    const PackedLayout l(s);
    std::vector<float> weight(static_cast<size_t>(s.c_out * l.icg * s.kh * s.kw));
    for (size_t i = 0; i < weight.size(); ++i) weight[i] = static_cast<float>(i + 1);
    std::vector<float> packed(static_cast<size_t>(l.total_floats()), -1.0f);
    cpu::pack_weight({weight.data(), DType::kFloat32, strides_of(l.icg, s.kh, s.kw, false)}, l, packed.data(),
                     std_threads(2));
    std::map<float, int> seen;
    for (size_t i = static_cast<size_t>(l.data_at()); i < packed.size(); ++i) ++seen[packed[i]];
    CHECK(seen.count(-1.0f) == 0) << c.name << ": unwritten floats";
    for (float w : weight) CHECK(seen[w] == 1) << c.name << ": weight " << w << " appears " << seen[w] << " times";
    // The place of some weights, from the documented layout: [kh][kw][ic][lanes] within a panel.
    if (l.small_groups()) continue;
    for (int64_t oc = 0; oc < s.c_out; oc += 7) {
      for (int64_t k = 0; k < l.icg * s.kh * s.kw; k += 5) {
        const int64_t ic = k / l.area(), tap = k % l.area(), g = oc / l.ocg, o = oc % l.ocg, ib = ic / l.ic_block;
        const int64_t at =
            l.panel_at(g, o / 32, ib) + (tap * l.ic_count(ib) + ic % l.ic_block) * l.lanes(o / 32) + o % 32;
        CHECK(packed[static_cast<size_t>(at)] == weight[static_cast<size_t>(oc * l.icg * l.area() + k)])
            << c.name << " oc " << oc << " k " << k;
      }
    }
  }
}

TEST(packed_weights_know_their_shape_and_notice_edits) {
  const ConvShape s = conv_cases()[1].shape();
  const PackedLayout l(s);
  std::vector<float> weight(static_cast<size_t>(s.c_out * s.c_in * 9), 0.5f);
  const cpu::WeightView view{weight.data(), DType::kFloat32, strides_of(s.c_in, 3, 3, false)};
  std::vector<float> packed(static_cast<size_t>(l.total_floats()));
  cpu::pack_weight(view, l, packed.data(), {});
  CHECK(cpu::packed_mismatch(packed.data(), l.total_floats(), l) == nullptr) << "its own shape";
  CHECK(cpu::packed_mismatch(packed.data(), l.total_floats() - 1, l) != nullptr) << "cut short";
  CHECK(cpu::packed_mismatch(weight.data(), l.total_floats(), l) != nullptr) << "not packed at all";
  ConvShape other = s;
  other.c_in /= 2;
  CHECK(cpu::packed_mismatch(packed.data(), l.total_floats(), PackedLayout(other)) != nullptr) << "another shape";
  CHECK(cpu::packed_is_fresh(view, l, packed.data())) << "unchanged weights";
  const size_t filter = static_cast<size_t>(s.c_in * 9);
  for (size_t i = 0; i < filter; ++i) weight[3 * filter + i] = 0.25f;
  CHECK(!cpu::packed_is_fresh(view, l, packed.data())) << "one filter was replaced";
}

TEST(schedule_covers_every_row_and_block_once) {
  for (const ConvCase& c : conv_cases()) {
    PrefixConv2dParams p;
    p.shape = c.shape();
    const ConvShape& s = p.shape;
    Random random(7);
    std::vector<int32_t> in, out;
    for (int64_t n = 0; n < s.n; ++n) {
      in.push_back(random.below(s.c_in + 1));
      out.push_back(n == 0 ? 0 : random.below(s.c_out + 1));
    }
    p.in_prefix = in.data();
    p.out_prefix = out.data();
    for (int threads : {1, 2, 7}) {
      std::map<std::vector<int64_t>, int> blocks, tails;
      double last = 1e300;
      for (const WorkItem& item : schedule(p, threads)) {
        CHECK(item.cost <= last) << c.name << ": not longest first";
        last = item.cost;
        CHECK(item.row0 < item.row1 && item.row1 <= s.out_h) << c.name << ": rows " << item.row0 << " to " << item.row1;
        for (int64_t r = item.row0; r < item.row1; ++r) {
          for (int64_t b = item.block0; b < item.block1; ++b) ++blocks[{item.n, item.g, r, b}];
          if (item.tail) ++tails[{item.n, item.g, r}];
        }
      }
      size_t expected = 0;
      for (int64_t n = 0; n < s.n; ++n)
        for (int64_t g = 0; g < s.groups; ++g)
          expected += static_cast<size_t>(s.out_h * ((live_in_group(out[n], g, s.group_out()) + 31) / 32));
      CHECK(blocks.size() == expected) << c.name << ": " << blocks.size() << " of " << expected
                                       << " (row, block) pairs";
      for (const auto& [key, count] : blocks) CHECK(count == 1) << c.name << ": block computed " << count << " times";
      CHECK(tails.size() == static_cast<size_t>(s.n * s.groups * s.out_h)) << c.name << ": tails " << tails.size();
      for (const auto& [key, count] : tails) CHECK(count == 1) << c.name << ": tail written " << count << " times";
    }
  }
}

TEST(batch_of_one_feeds_two_threads) {
  for (const ConvCase& c : conv_cases()) {
    PrefixConv2dParams p;
    p.shape = c.shape();
    p.shape.n = 1;
    if (p.shape.out_h == 1 && p.shape.group_out() <= 32) continue;  // one row of one block is one item
    if (PackedLayout(p.shape).small_groups()) continue;             // cut in grouped.cpp
    CHECK(schedule(p, 2).size() >= 2) << c.name;
  }
}

TEST(a_wide_sample_among_narrow_ones_is_shared_among_the_threads) {
  const ConvCase cases[] = {
      {.name = "1x1", .n = 8, .c_in = 256, .h = 14, .w = 14, .c_out = 1024, .kh = 1, .kw = 1},
      {.name = "1x1 on 7x7", .n = 8, .c_in = 512, .h = 7, .w = 7, .c_out = 2048, .kh = 1, .kw = 1},
      {.name = "3x3", .n = 8, .c_in = 256, .h = 14, .w = 14, .c_out = 256, .kh = 3, .kw = 3},
  };
  for (const ConvCase& c : cases)
    for (int threads : {2, 4}) {
      PrefixConv2dParams p;
      p.shape = c.shape();
      p.input_stride = strides_of(c.c_in, c.h, c.w, true);
      std::vector<int32_t> in, out;
      for (int64_t n = 0; n < c.n; ++n) {
        in.push_back(static_cast<int32_t>(n == 3 ? c.c_in : c.c_in / 4));
        out.push_back(static_cast<int32_t>(n == 3 ? c.c_out : c.c_out / 4));
      }
      p.in_prefix = in.data(), p.out_prefix = out.data();
      std::vector<double> busy(static_cast<size_t>(threads), 0.0);
      double whole = 0;
      for (const WorkItem& item : schedule(p, threads)) {
        *std::min_element(busy.begin(), busy.end()) += item.cost;
        whole += item.cost;
      }
      CHECK(*std::max_element(busy.begin(), busy.end()) <= 1.25 * whole / threads) << c.name << ", " << threads;
    }
}

TEST(halves_round_to_nearest_even) {
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {  // every value survives the round trip
    const BFloat16 b{static_cast<uint16_t>(bits)};
    const Float16 h{static_cast<uint16_t>(bits)};
    const float bf = to_float(b), hf = to_float(h);
    if (bf == bf) {
      CHECK((from_float<BFloat16, float>(bf).bits == bits)) << "bfloat16 " << bits;
    }
    if (hf == hf) {
      CHECK((from_float<Float16, float>(hf).bits == bits)) << "float16 " << bits;
    }
    if (bf != bf) {
      CHECK(to_float(from_float<BFloat16, float>(bf)) != bf) << "bfloat16 NaN " << bits;
    }
    if (hf != hf) {
      CHECK(to_float(from_float<Float16, float>(hf)) != hf) << "float16 NaN " << bits;
    }
  }
  CHECK((from_float<Float16, float>(1.0f + 0x1p-11f).bits == 0x3c00)) << "a tie goes to even, down";
  CHECK((from_float<Float16, float>(1.0f + 3 * 0x1p-11f).bits == 0x3c02)) << "a tie goes to even, up";
  CHECK((from_float<Float16, float>(65519.0f).bits == 0x7bff)) << "the largest finite value";
  CHECK((from_float<Float16, float>(65520.0f).bits == 0x7c00)) << "overflow to infinity";
  CHECK((from_float<BFloat16, float>(1.0f + 0x1p-8f).bits == 0x3f80)) << "bfloat16 tie";
  CHECK((from_float<BFloat16, float>(1.0f + 3 * 0x1p-8f).bits == 0x3f82)) << "bfloat16 tie";
}

}  // namespace rnp::tests
