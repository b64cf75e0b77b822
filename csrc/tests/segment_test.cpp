// Segments: where maps live, and that samples in groups give the bits of the whole batch.
#include "cpu/segment.h"

#include <algorithm>

#include "check.h"
#include "conv_case.h"
#include "cpu/segment_memory.h"

namespace rnp::tests {
namespace {

// A stem, pooling, a residual block, two more convolutions; a decision-like prefix for the middle.
const char* const kProgram =
    "slots 8 2 1\n"
    "in map 0\n"
    "in index 0 4\n"
    "prefix 0 1 16 4\n"
    "conv 0 -1 1 -1 -1 -1 -1 1 -1 -1 -1 0 3 16 1 3 3 1 1 1 1 1 1 1 1 1 0\n"
    "max_pool 1 2 -1 2 2 2 2 0 0 0\n"
    "conv 2 -1 3 -1 1 -1 -1 2 -1 0 16 0 16 16 1 3 3 1 1 1 1 1 1 1 1 1 1\n"
    "conv 3 2 4 1 -1 -1 -1 2 -1 -1 16 0 16 16 1 3 3 1 1 1 1 1 1 1 1 1 0\n"
    "conv 4 -1 5 -1 -1 -1 -1 2 -1 -1 -1 0 16 16 1 3 3 2 2 1 1 1 1 1 1 0 0\n"
    "conv 5 -1 6 -1 -1 -1 -1 2 -1 -1 -1 0 16 16 1 3 3 2 2 1 1 1 1 1 1 1 0\n"
    "add 6 6 7\n"
    "out map 7\n";

std::vector<float> packed(int64_t c_in, uint64_t seed) {
  ConvShape s;
  s.c_in = c_in, s.c_out = 16, s.kh = s.kw = 3;
  Random random(seed);
  std::vector<float> weight(static_cast<size_t>(16 * c_in * 9));
  for (float& w : weight) w = static_cast<float>(random.next());
  const PackedLayout layout(s);
  std::vector<float> out(static_cast<size_t>(layout.total_floats()));
  cpu::pack_weight({weight.data(), DType::kFloat32, {c_in * 9, 9, 3, 1}}, layout, out.data(), {});
  return out;
}

struct Data {
  static constexpr int64_t kSamples = 5, kSide = 32;
  cpu::SegmentProgram program{kProgram};
  std::vector<float> images, first = packed(3, 1), other = packed(16, 2), tables;
  std::vector<int32_t> group = {1, 4, 2, 3, 4};
  std::vector<cpu::MapShape> shapes;

  Data() {
    Random random(3);
    images.resize(kSamples * 3 * kSide * kSide);
    for (float& v : images) v = static_cast<float>(random.next());
    tables.resize(32);
    for (float& v : tables) v = static_cast<float>(random.next());
    shapes = cpu::segment_shapes(program, {{3, kSide, kSide}});
  }

  std::vector<float> run(int64_t group_bytes, int threads) const {
    std::vector<float> out(static_cast<size_t>(kSamples * shapes[7].floats()), NAN);
    cpu::SegmentCall call = this->call();
    call.map_out = {out.data()};
    cpu::run_segment(program, shapes, call, threads > 1 ? std_threads(threads) : Threads{}, group_bytes);
    return out;
  }

  cpu::SegmentCall call() const {
    cpu::SegmentCall call;
    call.n = kSamples;
    call.map_in = {images.data()};
    call.map_in_shape = {{3, kSide, kSide}};
    call.map_in_stride = {{3 * kSide * kSide, 1, 3 * kSide, 3}};
    call.index_in = {group.data()};
    call.constants = {{tables.data(), 32},
                      {first.data(), static_cast<int64_t>(first.size())},
                      {other.data(), static_cast<int64_t>(other.size())}};
    return call;
  }
};

}  // namespace

TEST(segment_groups_and_threads_do_not_change_a_bit) {
  const Data data;
  const std::vector<float> expected = data.run(int64_t{1} << 40, 1);
  for (float v : expected) CHECK(v == v) << "an element was not written";
  for (int64_t bytes : {int64_t{1}, int64_t{90} << 10, int64_t{200} << 10, int64_t{400} << 10})
    for (int threads : {1, 3}) CHECK(data.run(bytes, threads) == expected) << bytes << " bytes, " << threads;
}

TEST(segment_maps_that_live_at_once_never_overlap) {
  const Data data;
  const int64_t n = Data::kSamples;
  for (int64_t bytes : {int64_t{1}, int64_t{90} << 10, int64_t{200} << 10, int64_t{1} << 40}) {
    const cpu::SegmentMemory memory(data.program, data.shapes, n, bytes);
    CHECK((memory.phases.size() > 1) == (bytes == int64_t{90} << 10 || bytes == int64_t{200} << 10))
        << memory.phases.size() << " phases for " << bytes;
    CHECK_EQUAL(memory.phases.front().first, size_t{0});
    CHECK_EQUAL(memory.phases.back().end, data.program.steps.size());
    const bool one_phase = memory.phases.size() == 1;
    CHECK(!one_phase || memory.offset[4] == memory.offset[2]) << "the sum does not take its residual's place";
    for (size_t a = 1; a < 7; ++a)
      for (size_t b = a + 1; b < 7; ++b) {
        if (data.program.last_use[a] < data.program.first_use[b] || (a == 2 && b == 4)) continue;
        const auto end = [&](size_t m) {
          return memory.offset[m] + (memory.whole_batch[m] ? n : 1) * data.shapes[m].floats();
        };
        CHECK(end(a) <= memory.offset[b] || end(b) <= memory.offset[a]) << "maps " << a << " and " << b;
      }
  }
  const cpu::SegmentMemory together(data.program, data.shapes, n, int64_t{1} << 40);
  const cpu::SegmentMemory grouped(data.program, data.shapes, n, 1);
  CHECK(grouped.floats * n <= together.floats + 16 * n) << grouped.floats << " and " << together.floats;
}

// A sum written over its residual leaves the channels beyond its prefix alone where a ReLU has made them, and only
// there.
TEST(segment_sums_in_place_give_what_sums_beside_their_residual_give) {
  const Data data;
  for (const char* maker_relu : {"1", "0"})
    for (const char* relu : {"1", "0"}) {
      const std::string start =
          "slots 5 2 0\nin map 0\nin index 0 4\nprefix 0 1 16 4\n"
          "conv 0 -1 1 -1 -1 -1 -1 1 -1 -1 -1 0 3 16 1 3 3 1 1 1 1 1 1 1 1 1 0\n"
          "conv 1 -1 2 -1 -1 -1 -1 2 -1 -1 -1 0 16 16 1 3 3 1 1 1 1 1 1 1 1 ";
      const std::string sum =
          " 0\nconv 1 2 3 -1 1 -1 -1 2 -1 -1 -1 0 16 16 1 3 3 1 1 1 1 1 1 1 1 " + std::string(relu) + " 0\n";
      const auto run = [&](const std::string& last, size_t outputs) {
        const cpu::SegmentProgram program(start + maker_relu + sum + last);
        const auto shapes = cpu::segment_shapes(program, {{3, Data::kSide, Data::kSide}});
        std::vector<std::vector<float>> out(outputs);
        cpu::SegmentCall call = data.call();
        for (auto& map : out) {
          map.assign(static_cast<size_t>(Data::kSamples * shapes[3].floats()), NAN);
          call.map_out.push_back(map.data());
        }
        cpu::run_segment(program, shapes, call, {}, int64_t{1} << 40);
        return out.front();
      };
      // max_pool of one pixel copies the sum: it is not an output itself then, and can lie in its residual's place.
      const std::string copy = "max_pool 3 4 -1 1 1 1 1 0 0 0\nout map 4\n";
      const std::vector<float> in_place = run(copy, 1), beside = run(copy + "out map 2\n", 2);
      CHECK(in_place == beside) << "ReLU of the residual " << maker_relu << ", of the sum " << relu;
      const bool negative = std::any_of(in_place.begin(), in_place.end(), [](float v) { return v < 0; });
      CHECK_EQUAL(negative, relu[0] == '0');
    }
}

}  // namespace rnp::tests
