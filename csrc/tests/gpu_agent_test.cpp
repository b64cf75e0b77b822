// The CUDA agent's step and max-pooling on the emulator, against the CPU's kernels.
#include <cmath>

#include "cpu/agent_step.h"
#include "cpu/max_pool2d.h"
#include "cuda/agent_kernels.h"
#include "tests/check.h"
#include "tests/conv_case.h"

namespace rnp::tests {
namespace {

std::vector<float> random_floats(int64_t count, Random& random) {
  std::vector<float> out;
  for (int64_t i = 0; i < count; ++i) out.push_back(static_cast<float>(random.next()));
  return out;
}

}  // namespace

TEST(gpu_agent_step_is_the_cpu_agent_step) {
  constexpr int64_t kSamples = 19, kFeatures = 70, kCode = 33, kHidden = 24, kActions = 4, kChannels = 50;
  Random random(4);
  for (bool remembers : {false, true}) {
    const int64_t input = remembers ? kCode + kActions : kCode;
    const auto pooled = random_floats(kSamples * kFeatures, random), hidden = random_floats(kSamples * kHidden, random);
    const auto mean = random_floats(kFeatures, random), inv_std = random_floats(kFeatures, random);
    const auto encoder = random_floats(kCode * kFeatures, random), encoder_bias = random_floats(kCode, random);
    const auto ih = random_floats(3 * kHidden * input, random), hh = random_floats(3 * kHidden * kHidden, random);
    const auto bias_ih = random_floats(3 * kHidden, random), bias_hh = random_floats(3 * kHidden, random);
    const auto decoder = random_floats(kActions * kHidden, random), decoder_bias = random_floats(kActions, random);
    std::vector<int32_t> previous;
    for (int64_t i = 0; i < kSamples; ++i) previous.push_back(1 + random.below(kActions));

    cpu::AgentStepParams c;
    c.samples = kSamples, c.features = kFeatures, c.code = kCode, c.hidden = kHidden, c.actions = kActions;
    c.channels = kChannels, c.shift = 0.03f, c.input = input;
    c.pooled = pooled.data(), c.mean = mean.data(), c.inv_std = inv_std.data();
    c.hidden_in = remembers ? hidden.data() : nullptr, c.previous = remembers ? previous.data() : nullptr;
    c.encoder_weight = encoder.data(), c.encoder_bias = encoder_bias.data();
    c.weight_ih = ih.data(), c.weight_hh = hh.data(), c.bias_ih = bias_ih.data(), c.bias_hh = bias_hh.data();
    c.decoder_weight = decoder.data(), c.decoder_bias = decoder_bias.data();
    std::vector<float> expected_hidden(kSamples * kHidden), expected_q(kSamples * kActions);
    std::vector<int32_t> expected_action(kSamples), expected_prefix(kSamples);
    c.hidden_out = expected_hidden.data(), c.q = expected_q.data();
    c.action = expected_action.data(), c.out_prefix = expected_prefix.data();
    std::vector<float> scratch(static_cast<size_t>(cpu::agent_step_scratch(c)));
    cpu::agent_step(c, 0, kSamples, scratch.data());

    cuda::AgentStepArgs g;
    g.samples = kSamples, g.features = kFeatures, g.code = kCode, g.hidden = kHidden, g.actions = kActions;
    g.channels = kChannels, g.shift = c.shift, g.input = static_cast<int32_t>(input);
    g.pooled = c.pooled, g.mean = c.mean, g.inv_std = c.inv_std, g.hidden_in = c.hidden_in, g.previous = c.previous;
    g.encoder_weight = c.encoder_weight, g.encoder_bias = c.encoder_bias;
    g.weight_ih = c.weight_ih, g.weight_hh = c.weight_hh, g.bias_ih = c.bias_ih, g.bias_hh = c.bias_hh;
    g.decoder_weight = c.decoder_weight, g.decoder_bias = c.decoder_bias;
    std::vector<float> got_hidden(kSamples * kHidden, kNaN), got_q(kSamples * kActions, kNaN);
    std::vector<int32_t> got_action(kSamples), got_prefix(kSamples);
    g.hidden_out = got_hidden.data(), g.q = got_q.data(), g.action = got_action.data(),
    g.out_prefix = got_prefix.data();
    const auto run = [&](const cuda::AgentStepArgs& args, int64_t blocks, uint64_t seed) {
      cuda::emulator::launch(blocks, cuda::kAgentThreads, static_cast<size_t>(args.shared_floats()) * 4, seed,
                             [&](char* shared) { cuda::agent_step_block(args, reinterpret_cast<float*>(shared)); });
    };
    run(g, 5, 1);
    for (size_t i = 0; i < got_hidden.size(); ++i)
      CHECK(std::abs(got_hidden[i] - expected_hidden[i]) < 1e-5f)
          << "hidden " << got_hidden[i] << ", " << expected_hidden[i];
    for (size_t i = 0; i < got_q.size(); ++i)
      CHECK(std::abs(got_q[i] - expected_q[i]) < 2e-5f) << "q " << got_q[i] << " instead of " << expected_q[i];
    CHECK(got_action == expected_action) << "actions differ";
    CHECK(got_prefix == expected_prefix) << "prefixes differ";
    // One sample alone: the same bits.
    cuda::AgentStepArgs alone = g;
    std::vector<float> one(kHidden, kNaN), one_q(kActions, kNaN);
    alone.samples = 1, alone.pooled += 7 * kFeatures, alone.hidden_out = one.data(), alone.q = one_q.data();
    if (remembers) alone.hidden_in += 7 * kHidden, alone.previous += 7;
    run(alone, 1, 9);
    for (size_t i = 0; i < one.size(); ++i) CHECK_EQUAL(one[i], got_hidden[7 * kHidden + i]);
    for (size_t i = 0; i < one_q.size(); ++i) CHECK_EQUAL(one_q[i], got_q[7 * kActions + i]);
  }
}

TEST(gpu_max_pool2d_is_the_cpu_max_pool2d) {
  Random random(8);
  for (int64_t stride : {1, 2, 3}) {
    cpu::MaxPoolParams c;
    c.n = 4, c.c = 21, c.h = 9, c.w = 8, c.kernel_h = 3, c.kernel_w = 2;
    c.stride_h = stride, c.stride_w = 2, c.pad_h = 1, c.pad_w = 1, c.zero_tail = stride != 2;
    c.out_h = conv_output_size(c.h, 3, stride, 1, 1, 1), c.out_w = conv_output_size(c.w, 2, 2, 1, 1, 1);
    std::vector<float> input = random_floats(c.n * c.h * c.w * c.c, random);
    input[40] = kNaN;
    const std::vector<int32_t> prefix = {21, 0, 8, 1};
    const size_t size = static_cast<size_t>(c.n * c.out_h * c.out_w * c.c);
    std::vector<float> expected(size, -7.0f), got(size, -7.0f);
    c.input = input.data(), c.prefix = prefix.data(), c.output = expected.data();
    cpu::max_pool2d(c, 0, c.n * c.out_h);
    cuda::MaxPoolArgs g;
    g.n = 4, g.c = 21, g.h = 9, g.w = 8, g.kernel_h = 3, g.kernel_w = 2;
    g.out_h = static_cast<int32_t>(c.out_h), g.out_w = static_cast<int32_t>(c.out_w);
    g.stride_h = static_cast<int32_t>(stride), g.stride_w = 2, g.pad_h = g.pad_w = 1, g.zero_tail = c.zero_tail;
    g.input = input.data(), g.prefix = prefix.data(), g.output = got.data();
    cuda::emulator::launch(3, 64, 0, 2, [&](char*) { cuda::max_pool2d_block<float, false>(g); });
    for (size_t i = 0; i < size; ++i)
      CHECK(got[i] == expected[i] || (got[i] != got[i] && expected[i] != expected[i]))
          << "stride " << stride << ": " << got[i] << " instead of " << expected[i];
  }
}

namespace {

struct PoolCase {
  const char* name;
  int32_t c, h, w, kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w;
};
constexpr PoolCase kPools[] = {
    {"2x2", 32, 8, 10, 2, 2, 2, 2, 0, 0},
    {"3x3, stride 2, padded", 24, 9, 11, 3, 3, 2, 2, 1, 1},
    {"3x3, overlapping", 40, 7, 5, 3, 3, 1, 1, 1, 1},
    {"5x4, uneven strides", 16, 12, 9, 5, 4, 3, 1, 2, 0},
    {"one pixel", 8, 1, 1, 1, 1, 1, 1, 0, 0},
    {"odd channels", 19, 6, 6, 3, 2, 1, 2, 1, 1},
};

// Against a plain loop: every dtype, by pieces where channels allow and by elements; NaN in a window wins, what lies
// behind the prefix is NaN and not read, and a skipped tail keeps what was there.
template <typename T>
void check_pools(DType dtype) {
  constexpr int64_t kSamples = 5;
  const T untouched = from_float<T, float>(-7.0f);
  int by_pieces = 0;
  for (const PoolCase& c : kPools)
    for (bool zero_tail : {true, false})
      for (bool with_prefix : {true, false})
        for (bool pieces : {true, false}) {
          cuda::MaxPoolArgs g;
          g.n = kSamples, g.c = c.c, g.h = c.h, g.w = c.w, g.kernel_h = c.kernel_h, g.kernel_w = c.kernel_w;
          g.stride_h = c.stride_h, g.stride_w = c.stride_w, g.pad_h = c.pad_h, g.pad_w = c.pad_w;
          g.out_h = static_cast<int32_t>(conv_output_size(c.h, c.kernel_h, c.stride_h, c.pad_h, c.pad_h, 1));
          g.out_w = static_cast<int32_t>(conv_output_size(c.w, c.kernel_w, c.stride_w, c.pad_w, c.pad_w, 1));
          g.zero_tail = zero_tail;
          const std::vector<int32_t> prefix = {c.c, 0, c.c / 2 + 1, c.c + 5, 1};
          Random random(static_cast<uint64_t>(c.c + c.h));
          std::vector<T> input(static_cast<size_t>(kSamples * c.h * c.w * c.c));
          for (size_t i = 0; i < input.size(); ++i) {
            const int64_t channel = static_cast<int64_t>(i) % c.c, n = static_cast<int64_t>(i) / c.c / c.w / c.h;
            const bool dead = with_prefix && channel >= prefix[static_cast<size_t>(n)];
            float v = static_cast<float>(random.next());
            if (random.below(40) == 0) v = random.below(2) == 0 ? kNaN : -std::numeric_limits<float>::infinity();
            input[i] = from_float<T, float>(dead ? kNaN : v);
          }
          std::vector<T> got(static_cast<size_t>(kSamples * g.out_h * g.out_w * c.c), untouched);
          g.input = input.data(), g.prefix = with_prefix ? prefix.data() : nullptr, g.output = got.data();
          if (pieces && !g.pieces(sizeof(T))) continue;
          by_pieces += pieces;
          cuda::emulator::launch(3, 64, 0, 2, [&](char*) {
            pieces ? cuda::max_pool2d_block<T, true>(g) : cuda::max_pool2d_block<T, false>(g);
          });
          int64_t wrong = 0;
          for (size_t i = 0; i < got.size(); ++i) {
            const int64_t channel = static_cast<int64_t>(i) % c.c, pixel = static_cast<int64_t>(i) / c.c;
            const int64_t ox = pixel % g.out_w, oy = pixel / g.out_w % g.out_h, n = pixel / g.out_w / g.out_h;
            float most = -std::numeric_limits<float>::infinity();
            for (int64_t y = oy * c.stride_h - c.pad_h; y < oy * c.stride_h - c.pad_h + c.kernel_h; ++y)
              for (int64_t x = ox * c.stride_w - c.pad_w; x < ox * c.stride_w - c.pad_w + c.kernel_w; ++x) {
                if (y < 0 || y >= c.h || x < 0 || x >= c.w) continue;
                const float v = to_float(input[static_cast<size_t>(((n * c.h + y) * c.w + x) * c.c + channel)]);
                if (v > most || v != v) most = v;
              }
            if (with_prefix && channel >= prefix[static_cast<size_t>(n)]) most = zero_tail ? 0.0f : -7.0f;
            const float value = to_float(got[i]);
            wrong += !(value == most || (value != value && most != most));
          }
          CHECK(wrong == 0) << c.name << ", dtype " << static_cast<int>(dtype) << ", tail " << zero_tail << ", prefix "
                            << with_prefix << ", pieces " << pieces << ": " << wrong << " elements";
        }
  CHECK(by_pieces >= 16) << by_pieces << " by pieces";
}

}  // namespace

TEST(gpu_max_pool2d_is_a_plain_loop_in_every_dtype) {
  check_pools<float>(DType::kFloat32);
  check_pools<BFloat16>(DType::kBFloat16);
  check_pools<Float16>(DType::kFloat16);
}

TEST(gpu_max_pool2d_moves_pieces_only_where_they_are_aligned) {
  alignas(16) static char memory[64];
  cuda::MaxPoolArgs g;
  g.c = 24, g.input = memory, g.output = memory + 16;
  CHECK(g.pieces(2) && g.pieces(4));
  g.c = 20;
  CHECK(!g.pieces(2) && g.pieces(4));
  g.c = 24, g.input = memory + 2;
  CHECK(!g.pieces(2));
  g.input = memory, g.output = memory + 8;
  CHECK(!g.pieces(2));
}

}  // namespace rnp::tests
