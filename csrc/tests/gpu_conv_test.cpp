// The CUDA kernels' own code on the emulator: each tile against the double reference, in every role, with NaN poison,
// asynchronous copies that land late, threads in random order; and the same bits alone as in a batch.
#include <cmath>
#include <cstring>
#include <string>

#include "cuda/conv_kernel.h"
#include "tests/check.h"
#include "tests/gpu_run.h"

namespace rnp::tests {
namespace {

using cuda::TileName;
namespace emulator = cuda::emulator;

emulator::Statistics run_tile(const cuda::TileLaunch& launch, uint64_t seed) {
  constexpr int64_t kBlocks = 3;
  switch (launch.tile) {
#define RNP_RUN(name, T, math, BM, BN, blocks, registers)                                        \
  case TileName::name: {                                                                         \
    using Tile = cuda::Tile<T, cuda::math, BM, BN>;                                              \
    return emulator::launch(kBlocks, cuda::kThreads, Tile::kSharedBytes, seed,                   \
                            [&](char* shared) { cuda::conv_block<Tile>(launch.args, shared); }); \
  }
    RNP_CUDA_TILES(RNP_RUN)
#undef RNP_RUN
    default:
      break;
  }
  throw std::runtime_error("no such tile");
}

// The tile that `force` names, where the launch can use it.
void force_tile(cuda::TileLaunch& launch, TileName first, int offset) {
  if (launch.args.gather) return;  // always 128 x 64
  launch.tile = static_cast<TileName>(static_cast<int>(first) + offset);
  launch.args.cut.bm = offset == 2 ? 64 : 128;
  launch.args.cut.bn = offset == 0 ? 128 : 64;
}

template <typename T>
emulator::Statistics compute(GpuCase<T>& c, bool tf32, int offset, uint64_t seed) {
  pack(c);
  emulator::Statistics all;
  for (cuda::TileLaunch& launch : cuda::tile_launches(c.p, c.role, 3, tf32, cuda::Device{132, false})) {
    if (offset >= 0) {
      const TileName first = sizeof(T) == 4
                                 ? TileName::tf32_128x128
                                 : (c.p.dtype == DType::kBFloat16 ? TileName::bf16_128x128 : TileName::fp16_128x128);
      force_tile(launch, first, offset);
    }
    const std::vector<cuda::Vec16> unfolded = unfold<T>(launch);
    std::vector<int32_t> order;
    set_order(launch.args, order, seed % 2 == 1);
    const emulator::Statistics one = run_tile(launch, seed);
    all.bank_conflicts += one.bank_conflicts, all.matrix_products += one.matrix_products;
    all.copied_bytes += one.copied_bytes;
  }
  return all;
}

template <typename T>
void check_role(DType dtype, cuda::Role role, bool tf32, double unit, double store, const char* name) {
  int number = 0;
  int64_t copied = 0, products = 0;
  for (const ConvCase& c : gpu_cases()) {
    if (!cuda::has_tile(c.shape(), dtype, role)) continue;
    for (bool channels_last : {true, false}) {
      // Modes and tiles take turns: each tile meets each mode over the cases.
      const GpuMode mode = kModes[role == cuda::Role::kForward ? (number + number / 5) % 5 : number / 2 % 2];
      const int offset = sizeof(T) == 4 && !tf32 ? -1 : number / 2 % 3;
      GpuCase<T> problem(c, mode, role, dtype, channels_last);
      const std::string where = std::string(name) + ", " + c.name + ", " + mode_name(mode) +
                                (channels_last ? ", channels_last, tile " : ", contiguous, tile ") +
                                std::to_string(offset);
      emulator::Statistics seen;
      const std::string fault =
          test::message_of([&] { seen = compute(problem, tf32, offset, static_cast<uint64_t>(number)); });
      CHECK(fault.empty()) << where << ": " << fault;
      if (fault.empty()) problem.check(where, unit, store);
      CHECK(seen.bank_conflicts == 0) << where << ": " << seen.bank_conflicts << " bank conflicts";
      copied += seen.copied_bytes, products += seen.matrix_products;
      ++number;
    }
  }
  CHECK(copied > 1000000) << name << ": only " << copied << " bytes went through cp.async";
  CHECK((products > 10000) == (sizeof(T) == 2 || tf32)) << name << ": " << products << " products";
}

}  // namespace

TEST(gpu_forward_bf16) { check_role<BFloat16>(DType::kBFloat16, cuda::Role::kForward, false, 1e-6, 0x1p-8, "bf16"); }
TEST(gpu_forward_fp16) { check_role<Float16>(DType::kFloat16, cuda::Role::kForward, false, 1e-6, kHalfStep, "fp16"); }
TEST(gpu_forward_tf32) {
  check_role<float>(DType::kFloat32, cuda::Role::kForward, true, 2.5 * kHalfStep, 1e-6, "tf32");
}
TEST(gpu_forward_fp32) { check_role<float>(DType::kFloat32, cuda::Role::kForward, false, 2e-6, 1e-6, "fp32"); }
TEST(gpu_input_grad_bf16) {
  check_role<BFloat16>(DType::kBFloat16, cuda::Role::kInputGrad, false, 1e-6, 0x1p-8, "bf16 grad");
}
TEST(gpu_input_grad_fp32) {
  check_role<float>(DType::kFloat32, cuda::Role::kInputGrad, false, 2e-6, 1e-6, "fp32 grad");
}

namespace {

template <typename T>
void check_plain(DType dtype, double unit, double store, const char* name) {
  int number = 0;
  for (const ConvCase& c : gpu_cases()) {
    for (cuda::Role role : {cuda::Role::kForward, cuda::Role::kInputGrad}) {
      const GpuMode mode = kModes[role == cuda::Role::kForward ? number % 5 : number % 2];
      GpuCase<T> problem(c, mode, role, dtype, number % 3 != 0);
      const cuda::PlainArgs args = cuda::plain_args(problem.p, role, 3);
      emulator::launch(3, 32, 0, 1, [&](char*) { cuda::plain_block<T>(args); });
      problem.check(std::string("plain ") + name + ", " + c.name + ", " + mode_name(mode), unit, store);
      ++number;
    }
  }
}

}  // namespace

TEST(gpu_plain_kernel_computes_everything) {
  check_plain<double>(DType::kFloat64, 1e-13, 1e-13, "float64");
  check_plain<float>(DType::kFloat32, 2e-6, 1e-6, "float32");
  check_plain<BFloat16>(DType::kBFloat16, 2e-6, 0x1p-8, "bf16");
  check_plain<Float16>(DType::kFloat16, 2e-6, kHalfStep, "fp16");
}

TEST(gpu_means_are_those_of_the_stored_output) {
  for (const ConvCase& c : gpu_cases()) {
    for (bool channels_last : {true, false}) {
      GpuCase<BFloat16> problem(c, GpuMode::kSkip, cuda::Role::kForward, DType::kBFloat16, channels_last);
      const cuda::PlainArgs args = cuda::plain_args(problem.p, problem.role, 1);
      emulator::launch(1, 32, 0, 1, [&](char*) { cuda::plain_block<BFloat16>(args); });
      cuda::MeanArgs m;
      m.n = c.n, m.positions = problem.to_h * problem.to_w, m.channels = static_cast<int32_t>(c.c_out);
      m.out_w = static_cast<int32_t>(problem.to_w), m.output = problem.output.data();
      m.output_stride = problem.p.output_stride, m.out_prefix = problem.p.out_prefix, m.mean = problem.means.data();
      emulator::launch(2, 128, 128 * sizeof(float), 1, [&](char* shared) { cuda::mean_block<BFloat16>(m, shared); });
      for (int64_t n = 0; n < c.n; ++n)
        for (int64_t k = 0; k < c.c_out; ++k) {
          double sum = 0;
          for (int64_t y = 0; y < problem.to_h && k < problem.to_live(n); ++y)
            for (int64_t x = 0; x < problem.to_w; ++x)
              sum += to_float(problem.output[problem.at(problem.p.output_stride, n, k, y, x)]);
          const double mean = sum / static_cast<double>(m.positions);
          const double got = problem.means[static_cast<size_t>(n * c.c_out + k)];
          CHECK(std::abs(got - mean) <= 1e-5 * (1 + std::abs(mean))) << c.name << ": " << got << " instead of " << mean;
        }
    }
  }
}

// A sample alone gives the bits it gives in a batch, whatever tile either uses and whoever takes which tile.
TEST(gpu_samples_are_the_same_bits_alone_and_in_a_batch) {
  for (const ConvCase& c : gpu_cases()) {
    if (!cuda::has_tile(c.shape(), DType::kBFloat16, cuda::Role::kForward)) continue;
    GpuCase<BFloat16> batch(c, GpuMode::kTables, cuda::Role::kForward, DType::kBFloat16, true);
    compute(batch, false, 0, 5);
    const int64_t n = std::min<int64_t>(2, c.n - 1), size = batch.to_c * batch.to_h * batch.to_w;
    GpuCase<BFloat16> alone = batch;
    alone.output.assign(batch.output.size(), BFloat16{0x7fc0});
    alone.s.n = alone.p.shape.n = 1;
    alone.p.input = alone.input.data() + n * alone.p.input_stride.n;
    alone.p.output = alone.output.data(), alone.p.weight = alone.weight.data();
    alone.p.in_prefix = alone.in_prefix.data() + n, alone.p.out_prefix = alone.out_prefix.data() + n;
    alone.p.row = alone.row.data() + n, alone.p.scale = alone.scale.data(), alone.p.bias = alone.bias.data();
    compute(alone, false, 2, 6);
    CHECK(std::memcmp(alone.output.data(), batch.output.data() + n * size, static_cast<size_t>(size) * 2) == 0)
        << c.name << ": sample " << n << " differs";
  }
}

}  // namespace rnp::tests
