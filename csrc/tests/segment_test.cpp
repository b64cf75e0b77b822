// Segments: where maps live, and that samples in groups give the bits of the whole batch.
#include "cpu/segment.h"

#include <algorithm>
#include <utility>

#include "check.h"
#include "conv_case.h"
#include "cpu/isa.h"
#include "cpu/segment_layout.h"
#include "cpu/segment_memory.h"
#include "cpu/winograd.h"

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

std::vector<float> weights(int64_t c_in, int64_t c_out, uint64_t seed) {
  Random random(seed);
  std::vector<float> weight(static_cast<size_t>(c_out * c_in * 9));
  for (float& w : weight) w = static_cast<float>(random.next());
  return weight;
}

std::vector<float> packed(int64_t c_in, uint64_t seed, int64_t c_out = 16) {
  ConvShape s;
  s.c_in = c_in, s.c_out = c_out, s.kh = s.kw = 3;
  const std::vector<float> weight = weights(c_in, c_out, seed);
  const PackedLayout layout(s);
  std::vector<float> out(static_cast<size_t>(layout.total_floats()));
  cpu::pack_weight({weight.data(), DType::kFloat32, {c_in * 9, 9, 3, 1}}, layout, out.data(), {});
  return out;
}

std::vector<float> transformed(int64_t channels, uint64_t seed) {
  const std::vector<float> weight = weights(channels, channels, seed);
  const WinogradLayout layout{4, channels, channels};
  std::vector<float> out(static_cast<size_t>(layout.total_floats()));
  cpu::pack_winograd({weight.data(), DType::kFloat32, {channels * 9, 9, 3, 1}}, layout, out.data(), {});
  return out;
}

// Two residual blocks, the second wider than the first for some samples, narrower for others; pooling; a last layer of
// full width. Index 2 and 3: the blocks' channels, 5: those of the second sum. %: the winograd constant.
const char* const kChain =
    "slots 9 6 1\n"
    "in map 0\n"
    "in index 0 4\n"
    "in index 1 4\n"
    "prefix 0 2 48 4\nprefix 1 3 48 4\nlargest 0 1 4\nprefix 4 5 48 4\n"
    "conv 0 -1 1 -1 -1 -1 -1 1 -1 -1 -1 0 3 48 1 3 3 1 1 1 1 1 1 1 1 1 0\n"
    "conv 1 -1 2 -1 2 -1 -1 2 % -1 0 0 48 48 1 3 3 1 1 1 1 1 1 1 1 1 0\n"
    "conv 1 -1 3 -1 2 -1 -1 2 % 48 0 0 48 48 1 3 3 1 1 1 1 1 1 1 1 1 1\n"
    "conv 3 2 4 2 2 -1 -1 2 % -1 0 0 48 48 1 3 3 1 1 1 1 1 1 1 1 1 0\n"
    "conv 4 -1 5 2 3 -1 -1 2 % -1 48 0 48 48 1 3 3 1 1 1 1 1 1 1 1 1 1\n"
    "conv 5 4 6 3 3 -1 0 2 % -1 0 0 48 48 1 3 3 1 1 1 1 1 1 1 1 1 0\n"
    "max_pool 6 7 5 3 3 2 2 1 1 1\n"
    "conv 7 -1 8 5 -1 -1 -1 2 % -1 -1 0 48 48 1 3 3 1 1 1 1 1 1 1 1 0 0\n"
    "out map 8\n";

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
    tables.resize(96);
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
    call.constants = {{tables.data(), 96},
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
    for (int threads : {1, 2, 3}) CHECK(data.run(bytes, threads) == expected) << bytes << " bytes, " << threads;
}

TEST(segment_maps_that_live_at_once_never_overlap) {
  const Data data;
  const int64_t n = Data::kSamples;
  for (int64_t bytes : {int64_t{1}, int64_t{90} << 10, int64_t{200} << 10, int64_t{1} << 40}) {
    const cpu::SegmentMemory memory(data.program, data.shapes, n, bytes);
    CHECK((memory.phases.size() > 1) == (bytes == int64_t{90} << 10))
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
  // Two threads, each with groups of its own: a map has room for both.
  const cpu::SegmentMemory two(data.program, data.shapes, n, int64_t{90} << 10, 2);
  CHECK_EQUAL(two.phases.front().places, int64_t{2});
  CHECK_EQUAL(two.phases.back().places, int64_t{1});
  // Three have too few samples for that.
  const cpu::SegmentMemory three(data.program, data.shapes, n, 1, 3);
  CHECK(three.phases.size() == 1 && three.phases[0].samples == n && three.phases[0].places == 1);
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

// Maps that keep live channels only against the same maps as outputs, which have the usual layout.
TEST(segment_maps_of_live_channels_give_the_same_bits) {
  const Data data;
  const std::vector<int32_t> other = {2, 1, 4, 2, 4};
  const std::vector<float> stem = packed(3, 4, 48), inner = packed(48, 5, 48), winograd = transformed(48, 5);
  for (const char* constant : {"-1", "3"}) {
    std::string chain = kChain;
    for (size_t at; (at = chain.find('%')) != std::string::npos;) chain.replace(at, 1, constant);
    const auto run = [&](const std::string& outputs, size_t maps, int64_t bytes, int threads) {
      const cpu::SegmentProgram program(chain + outputs);
      const auto shapes = cpu::segment_shapes(program, {{3, Data::kSide, Data::kSide}});
      cpu::SegmentCall call = data.call();
      call.index_in.push_back(other.data());
      call.constants.resize(1);
      for (const std::vector<float>* c : {&stem, &inner, &winograd})
        call.constants.push_back({c->data(), static_cast<int64_t>(c->size())});
      std::vector<std::vector<float>> out(maps);
      for (size_t m = 0; m < maps; ++m) {
        const size_t slot = static_cast<size_t>(program.map_out[m]);
        out[m].assign(static_cast<size_t>(Data::kSamples * shapes[slot].floats()), NAN);
        call.map_out.push_back(out[m].data());
      }
      std::vector<float> mean(Data::kSamples * 48, NAN);
      call.vector_out = {mean.data()};
      cpu::run_segment(program, shapes, call, threads > 1 ? std_threads(threads) : Threads{}, bytes);
      out[0].insert(out[0].end(), mean.begin(), mean.end());
      return out[0];
    };
    const std::vector<float> expected = run(
        "out map 1\nout map 2\nout map 3\nout map 4\nout map 5\nout map 6\nout map 7\nout vector 0\n", 8, 1 << 30, 1);
    for (float v : expected) CHECK(v == v) << "an element was not written";
    // With small groups sums are computed far from their residuals, where a group hands over to the whole batch.
    for (int64_t bytes : {int64_t{1} << 30, int64_t{150} << 10, int64_t{60} << 10, int64_t{20} << 10, int64_t{1}})
      for (int threads : {1, 2, 3})
        CHECK(run("out vector 0\n", 1, bytes, threads) == expected)
            << bytes << " bytes, " << threads << ", " << constant;
    for (int64_t bytes : {int64_t{1} << 30, int64_t{1}}) {
      const cpu::SegmentProgram program(chain);
      const auto shapes = cpu::segment_shapes(program, {{3, Data::kSide, Data::kSide}});
      const cpu::SegmentMemory memory(program, shapes, Data::kSamples, bytes);
      const std::vector<bool> compact = cpu::compact_maps(program, memory);
      for (size_t m = 0; m < 9; ++m) CHECK_EQUAL(static_cast<bool>(compact[m]), m != 0 && m != 8);
    }
  }
}

// Pooling in the output transform of a Winograd convolution against the two steps one after the other, which an output
// in between keeps apart, with and without the mean that an agent reads. A NaN goes through both.
TEST(segment_pooling_within_winograd_gives_the_same_bits) {
  const Data data;
  const std::vector<float> stem = packed(3, 4, 48), inner = packed(48, 5, 48), winograd = transformed(48, 5);
  // Dilated, the outputs of a tile are no neighbours, and the steps stay two.
  const std::string usual = "1 1 1 1 1 1", dilated = "2 2 2 2 2 2";
  for (const std::string& geometry : {usual + " 1", usual + " 0", dilated + " 1"})
    for (const std::string choice : {"1 0", "-1 0", "1 -1", "-1 -1"}) {
      const std::string prefix = choice.substr(0, choice.find(' ')), mean = choice.substr(choice.find(' ') + 1);
      const std::string program_text = "slots 5 2 " + std::string(mean == "0" ? "1" : "0") +
                                       "\nin map 0\nin index 0 4\nprefix 0 1 48 4\n"
                                       "conv 0 -1 1 -1 -1 -1 -1 1 -1 -1 -1 0 3 48 1 3 3 1 1 1 1 1 1 1 1 1 0\n"
                                       "conv 1 -1 2 -1 " +
                                       prefix + " -1 " + mean + " 2 3 0 48 0 48 48 1 3 3 1 1 " + geometry +
                                       " 1\nmax_pool 2 3 " + prefix + " 2 2 2 2 0 0 1\nconv 3 -1 4 " + prefix +
                                       " -1 -1 -1 2 -1 -1 -1 0 48 48 1 3 3 1 1 1 1 1 1 1 1 0 0\nout map 4\n";
      const auto run = [&](const std::string& outputs, int64_t bytes, int threads) {
        const cpu::SegmentProgram program(program_text + outputs);
        const auto shapes = cpu::segment_shapes(program, {{3, Data::kSide, Data::kSide}});
        std::vector<float> images = data.images;
        images[1000] = NAN;
        cpu::SegmentCall call = data.call();
        call.map_in = {images.data()};
        call.constants.resize(1);
        for (const std::vector<float>* c : {&stem, &inner, &winograd})
          call.constants.push_back({c->data(), static_cast<int64_t>(c->size())});
        std::vector<std::vector<float>> out;
        for (int64_t slot : program.map_out)
          out.emplace_back(static_cast<size_t>(Data::kSamples * shapes[static_cast<size_t>(slot)].floats()), -1.0f);
        for (auto& map : out) call.map_out.push_back(map.data());
        std::vector<float> means(mean == "0" ? size_t{Data::kSamples * 48} : 0, -1.0f);
        if (mean == "0") call.vector_out = {means.data()};
        cpu::run_segment(program, shapes, call, threads > 1 ? std_threads(threads) : Threads{}, bytes);
        out[0].insert(out[0].end(), means.begin(), means.end());
        return out[0];
      };
      const std::string means = mean == "0" ? "out vector 0\n" : "";
      const std::vector<float> expected = run("out map 2\n" + means, 1 << 30, 1);
      const auto nans = std::count_if(expected.begin(), expected.end(), [](float v) { return v != v; });
      CHECK(nans > 0 && nans < static_cast<int64_t>(expected.size()) / 10) << nans;
      for (int64_t bytes : {int64_t{1} << 30, int64_t{1}})
        for (int threads : {1, 2, 3}) {
          const std::vector<float> found = run(means, bytes, threads);
          for (size_t i = 0; i < found.size(); ++i)
            CHECK(found[i] == expected[i] || (found[i] != found[i] && expected[i] != expected[i]))
                << i << ": " << found[i] << " and " << expected[i];
        }
    }
}

// Samples in groups of one take it behind the stem's rows, a whole batch as a step of its own.
TEST(segment_pooling_behind_a_folded_stem_gives_the_same_bits) {
  Random random(7);
  const std::vector<float> inner = packed(48, 5, 48);
  std::vector<float> weight(size_t{48 * 3 * 49}), image;
  for (float& w : weight) w = static_cast<float>(random.next());
  const cpu::WeightView view{weight.data(), DType::kFloat32, {3 * 49, 49, 7, 1}};
  ConvShape shape;
  shape.c_in = 3, shape.c_out = 48, shape.kh = shape.kw = 7;
  std::vector<float> stem(static_cast<size_t>(PackedLayout(shape).total_floats()));
  cpu::pack_weight(view, PackedLayout(shape), stem.data(), {});
  const WinogradLayout layout{4, 3, 48, 7};
  std::vector<float> folded(static_cast<size_t>(layout.total_floats()));
  cpu::pack_winograd(view, layout, folded.data(), {});
  // Samples, side, and the pooling: windows of 3 and 2, with and without padding, rows that do not divide by a tile.
  struct Sizes {
    int64_t samples, side;
    const char* pool;
  };
  const cpu::Isa before = cpu::current_isa();
  for (cpu::Isa isa : isas_of(DType::kFloat32))
    for (const Sizes& c : {Sizes{1, 224, "3 3 2 2 1 1"}, Sizes{4, 61, "3 3 2 2 0 0"}, Sizes{4, 64, "2 2 2 2 0 0"},
                           Sizes{4, 32, "3 3 1 1 1 1"}})
      for (const std::string mean : {"-1", "0"}) {
        cpu::set_isa(cpu::isa_name(isa));
        const std::string text =
            "slots 4 1 " + std::string(mean == "0" ? "1" : "0") + "\nin map 0\nin index 0 4\nconv 0 -1 1 -1 -1 -1 " +
            mean + " 1 3 0 48 0 3 48 1 7 7 2 2 3 3 3 3 1 1 1 0\nmax_pool 1 2 -1 " + c.pool +
            " 0\nconv 2 -1 3 -1 -1 -1 -1 2 -1 -1 -1 0 48 48 1 3 3 1 1 1 1 1 1 1 1 0 0\nout map 3\n";
        image.resize(static_cast<size_t>(c.samples * c.side * c.side * 3));
        for (float& v : image) v = static_cast<float>(random.next());
        image[1000] = NAN;
        std::vector<float> tables(96);
        for (float& v : tables) v = static_cast<float>(random.next());
        const std::vector<int32_t> group(static_cast<size_t>(c.samples), 4);
        const auto run = [&](const std::string& outputs, int64_t bytes, int threads) {
          const cpu::SegmentProgram program(text + outputs);
          const auto shapes = cpu::segment_shapes(program, {{3, c.side, c.side}});
          cpu::SegmentCall call;
          call.n = c.samples;
          call.map_in = {image.data()};
          call.map_in_shape = {{3, c.side, c.side}};
          call.map_in_stride = {{3 * c.side * c.side, 1, 3 * c.side, 3}};
          call.index_in = {group.data()};
          call.constants = {{tables.data(), 96}};
          for (const std::vector<float>* one : {&std::as_const(stem), &inner, &std::as_const(folded)})
            call.constants.push_back({one->data(), static_cast<int64_t>(one->size())});
          std::vector<std::vector<float>> out;
          for (int64_t map : program.map_out)
            out.emplace_back(static_cast<size_t>(c.samples * shapes[static_cast<size_t>(map)].floats()), -1.0f);
          for (auto& map : out) call.map_out.push_back(map.data());
          std::vector<float> means(mean == "0" ? static_cast<size_t>(c.samples * 48) : 0, -1.0f);
          if (mean == "0") call.vector_out = {means.data()};
          cpu::run_segment(program, shapes, call, threads > 1 ? std_threads(threads) : Threads{}, bytes);
          if (out.size() > 1) {  // the activation leaves nothing below 0
            CHECK_EQUAL(std::count(out[1].begin(), out[1].end(), -1.0f), 0) << "a map that is given out is whole";
          }
          out[0].insert(out[0].end(), means.begin(), means.end());
          return out[0];
        };
        const std::string means = mean == "0" ? "out vector 0\n" : "";
        const std::vector<float> expected = run("out map 1\n" + means, 1 << 30, 1);
        CHECK(std::count_if(expected.begin(), expected.end(), [](float v) { return v != v; }) > 0);
        for (int threads : {1, 2}) {
          const std::vector<float> found = run(means, 1, threads);
          CHECK_EQUAL(found.size(), expected.size());
          int64_t different = 0;
          for (size_t i = 0; i < found.size(); ++i)
            different += !(found[i] == expected[i] || (found[i] != found[i] && expected[i] != expected[i]));
          CHECK_EQUAL(different, 0) << cpu::isa_name(isa) << ", side " << c.side << ", pooling " << c.pool << ", mean "
                                    << mean << ", " << threads << " threads";
        }
      }
  cpu::set_isa(cpu::isa_name(before));
}

// A reader of all channels, an addition, a sum whose activation changes its residual: no map of these is compact.
TEST(segment_maps_keep_the_usual_layout_for_other_readers) {
  const std::string start =
      "slots 4 2 0\nin map 0\nin index 0 4\nprefix 0 1 16 4\n"
      "conv 0 -1 1 -1 1 -1 -1 1 -1 -1 -1 0 3 16 1 3 3 1 1 1 1 1 1 1 1 0 0\n";
  for (const char* rest : {
           "conv 1 -1 2 -1 -1 -1 -1 2 -1 -1 -1 0 16 16 1 3 3 1 1 1 1 1 1 1 1 1 0\nmax_pool 2 3 -1 1 1 1 1 0 0 0\n",
           "max_pool 1 2 -1 1 1 1 1 0 0 0\nmax_pool 2 3 -1 1 1 1 1 0 0 0\n",
           "add 1 1 2\nmax_pool 2 3 -1 1 1 1 1 0 0 0\n",
           "conv 1 -1 2 1 1 -1 -1 2 -1 -1 -1 0 16 16 2 3 3 1 1 1 1 1 1 1 1 1 0\nmax_pool 2 3 -1 1 1 1 1 0 0 0\n",
           "conv 0 1 2 -1 1 -1 -1 1 -1 -1 -1 0 3 16 1 3 3 1 1 1 1 1 1 1 1 1 0\nmax_pool 2 3 1 1 1 1 1 0 0 0\n",
       }) {
    const cpu::SegmentProgram program(start + rest + "out map 3\n");
    const auto shapes = cpu::segment_shapes(program, {{3, 8, 8}});
    const cpu::SegmentMemory memory(program, shapes, 2, 1 << 30);
    CHECK(!cpu::compact_maps(program, memory)[1]) << rest;
  }
}

TEST(segment_pixels_never_share_a_set_and_widening_keeps_them) {
  for (int64_t live = 0; live <= 4096; ++live) {
    const int64_t pixel = cpu::compact_pixel(live);
    CHECK(pixel >= live && pixel % 16 == 0 && pixel % 512 != 0 && pixel <= live + 32) << live;
  }
  std::vector<float> data(5 * 48, NAN);
  for (int64_t p = 0; p < 5; ++p)
    for (int64_t c = 0; c < 10; ++c) data[static_cast<size_t>(p * 16 + c)] = static_cast<float>(100 * p + c);
  cpu::widen_pixels(data.data(), 16, data.data(), 48, 5, 10, 40);
  for (int64_t p = 0; p < 5; ++p)
    for (int64_t c = 0; c < 40; ++c)
      CHECK_EQUAL(data[static_cast<size_t>(p * 48 + c)], c < 10 ? static_cast<float>(100 * p + c) : 0.0f);
}

}  // namespace rnp::tests
