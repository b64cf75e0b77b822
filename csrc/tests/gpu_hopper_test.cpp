// The sm_90a kernel's own code on the emulator: warpgroup roles, barriers, swizzled operands, copies by im2col, by bulk
// and by cp.async, against the double reference; split K; and the same bits whatever the tile, the split and the batch.
#include <algorithm>
#include <cstring>
#include <string>

#include "cuda/hopper_kernel.h"
#include "tests/check.h"
#include "tests/gpu_run.h"

namespace rnp::tests {
namespace {

using cuda::TileName;

constexpr cuda::Device kHopper{132, true};
constexpr int64_t kBlocks = 3;

emulator::Statistics run_tile(cuda::TileLaunch& launch, int32_t element, uint64_t seed) {
  emulator::TensorMap maps[cuda::kBoxSizes];
  const cuda::Im2colBox& b = launch.box;
  for (int i = 0; i < cuda::kBoxSizes; ++i) {
    emulator::TensorMap& map = maps[i];
    map.base = static_cast<const char*>(b.base);
    const int64_t sizes[] = {b.c, b.w, b.h, b.n}, strides[] = {element, b.w_stride, b.h_stride, b.n_stride};
    std::memcpy(map.size, sizes, sizeof sizes), std::memcpy(map.stride, strides, sizeof strides);
    std::memcpy(map.lower, b.lower, sizeof b.lower), std::memcpy(map.upper, b.upper, sizeof b.upper);
    std::memcpy(map.step, b.step, sizeof b.step);
    map.element = element, map.channels = 128 / element, map.pixels = 1 << i;
  }
  switch (launch.tile) {
#define RNP_RUN(name, T, BN, registers)                                                                 \
  case TileName::name: {                                                                                \
    using Tile = cuda::HopperTile<T, BN>;                                                               \
    emulator::Statistics seen =                                                                         \
        emulator::launch(kBlocks, cuda::kHopperThreads, Tile::kSharedBytes, seed,                       \
                         [&](char* shared) { cuda::hopper_block<Tile>(launch.args, maps, shared); });   \
    if (launch.args.partial)                                                                            \
      emulator::launch(kBlocks, 64, 0, seed, [&](char*) { cuda::sum_segments_block<T>(launch.args); }); \
    return seen;                                                                                        \
  }
    RNP_HOPPER_TILES(RNP_RUN)
#undef RNP_RUN
    default:
      break;
  }
  throw std::runtime_error("no such tile");
}

// How a launch is computed instead of as the plan has it, where its layer allows that.
enum class Way {
  kPlanned,
  kNarrow,
  kMiddle,
  kWide,
  kTall,
  kTallNarrow,
  kSplit,
  kWithoutTma,
  kTallWithoutTma,
  kWindow,
  kWindowNarrow,
  kWindowWide,
  kWindowTall
};
constexpr Way kWays[] = {Way::kPlanned, Way::kNarrow, Way::kMiddle, Way::kWide, Way::kSplit, Way::kWithoutTma};
constexpr Way kTallWays[] = {Way::kTall, Way::kTallNarrow, Way::kTallWithoutTma};
const char* way_name(Way way) {
  const char* const names[] = {"as planned",
                               "64 channels",
                               "128 channels",
                               "256 channels",
                               "256 rows",
                               "256 rows, 64 channels",
                               "split",
                               "without TMA",
                               "256 rows, without TMA",
                               "windows",
                               "windows, 64 channels",
                               "windows, 256 channels",
                               "windows, 256 rows"};
  return names[static_cast<int>(way)];
}
bool is_tall(Way way) { return way == Way::kTall || way == Way::kTallNarrow || way == Way::kTallWithoutTma; }
bool is_copied(Way way) { return way == Way::kWithoutTma || way == Way::kTallWithoutTma; }

bool is_window(Way way) { return way >= Way::kWindow; }

// False where the layer cannot go that way.
bool go(Way way, cuda::TileLaunch& launch) {
  cuda::ConvArgs& a = launch.args;
  if (way == Way::kPlanned) return true;
  const int32_t segments = (a.chunks + a.segment_chunks - 1) / a.segment_chunks;
  cuda::TileSize tile{128, 64};
  if (segments == 1 && (is_tall(way) || way == Way::kWindowTall)) tile.bm = cuda::kTallRows;
  if (way == Way::kMiddle || way == Way::kTall || way == Way::kTallWithoutTma || way == Way::kWindow ||
      way == Way::kWindowTall)
    tile.bn = 128;
  if (segments == 1 && (way == Way::kWide || way == Way::kWindowWide)) tile.bn = 256;
  if (way == Way::kWithoutTma) tile = {a.cut.bm, a.cut.bn};
  if (!cuda::set_hopper_tile(launch, tile, is_window(way))) return false;
  if (is_copied(way)) a.use_tma = false;
  if (way == Way::kWithoutTma) return true;
  a.splits = way == Way::kSplit ? segments : 1;
  launch.partial_elements = a.splits > 1 ? int64_t{segments} * a.cut.n * a.cut.positions * a.c_out : 0;
  return true;
}

struct Seen {
  int64_t launches = 0, bulk = 0, im2col = 0, copied = 0, products = 0, splits = 0, wide = 0, tall = 0;
  int64_t windows = 0;
  int64_t vectors = 0, with_residual = 0;  // launches whose outputs go by 16 bytes, those that read a residual so
};

template <typename T>
Seen compute(GpuCase<T>& c, Way way, uint64_t seed) {
  pack(c);
  Seen seen;
  for (cuda::TileLaunch& launch : cuda::tile_launches(c.p, c.role, 3, true, kHopper)) {
    if (!cuda::is_hopper(launch.tile)) continue;
    const cuda::TileLaunch planned = launch;
    if (!go(way, launch)) launch = planned;
    std::vector<float> partial(static_cast<size_t>(launch.partial_elements), kNaN);
    launch.args.partial = partial.empty() ? nullptr : partial.data();
    const std::vector<cuda::Vec16> unfolded = unfold<T>(launch);
    std::vector<int32_t> order;
    set_order(launch.args, order, seed % 2 == 1);
    const emulator::Statistics one = run_tile(launch, sizeof(T), seed);
    ++seen.launches;
    seen.bulk += one.bulk_bytes, seen.im2col += one.im2col_bytes, seen.copied += one.copied_bytes;
    seen.products += one.group_products;
    seen.splits += launch.args.splits > 1, seen.wide += launch.args.cut.bn == 256;
    seen.tall += launch.args.cut.bm == cuda::kTallRows;
    seen.windows += launch.args.window_rows > 0;
    seen.vectors += launch.args.vectors, seen.with_residual += launch.args.vectors && launch.args.residual;
  }
  return seen;
}

std::vector<ConvCase> hopper_cases() {
  std::vector<ConvCase> all;
  const auto add = [&](const char* name, int64_t n, int64_t c_in, int64_t side, int64_t c_out, int64_t kernel,
                       int64_t stride, int64_t groups = 1) {
    ConvCase c{
        .name = name, .n = n, .c_in = c_in, .h = side, .w = side + 1, .c_out = c_out, .kh = kernel, .kw = kernel};
    c.stride_h = c.stride_w = stride, c.groups = groups;
    c.top = c.bottom = c.left = c.right = kernel / 2;
    all.push_back(c);
  };
  add("3x3, a tile inside one sample", 3, 64, 15, 64, 3, 1);
  add("3x3, stride 2", 5, 80, 9, 96, 3, 2);
  add("3x3, K in segments", 5, 136, 6, 72, 3, 1);
  add("1x1, K in segments, 64 outputs", 3, 1096, 2, 64, 1, 1);
  add("1x1, more than 256 outputs", 9, 72, 5, 328, 1, 1);
  add("1x1, stride 2", 4, 64, 8, 200, 1, 2);
  add("3x3, groups", 4, 128, 7, 160, 3, 1, 2);
  add("5x5, stride 3", 3, 64, 11, 64, 5, 3);
  add("a map of one pixel", 7, 64, 1, 64, 3, 1);
  add("3x3, a tall tile inside one sample", 2, 64, 19, 64, 3, 1);
  add("1x1, more tall tiles than blocks", 6, 136, 11, 200, 1, 1);
  add("3x3, tiles across samples", 5, 136, 9, 136, 3, 1);
  add("1x3, a wide map", 2, 64, 3, 72, 3, 1);
  all.back().kh = 1, all.back().top = all.back().bottom = 0, all.back().w = 70;
  all.push_back({.name = "dilated, padded unevenly",
                 .n = 3,
                 .c_in = 72,
                 .h = 9,
                 .w = 8,
                 .c_out = 64,
                 .kh = 3,
                 .kw = 2,
                 .stride_h = 1,
                 .stride_w = 2,
                 .top = 0,
                 .bottom = 4,
                 .left = 3,
                 .right = 1,
                 .dilation_h = 2,
                 .dilation_w = 3});
  for (const ConvCase& c : few_channel_cases()) all.push_back(c);
  return all;
}

template <typename T>
bool some_launch_goes(Way way, const GpuCase<T>& c) {
  for (cuda::TileLaunch& launch : cuda::tile_launches(c.p, c.role, 3, true, kHopper))
    if (cuda::is_hopper(launch.tile) && go(way, launch)) return true;
  return false;
}

template <typename T>
void check_way(const ConvCase& c, GpuMode mode, Way way, cuda::Role role, DType dtype, uint64_t seed, double store,
               const char* name, Seen& all) {
  const bool copied_before = role == cuda::Role::kForward && c.c_in <= 5;  // whatever its layout
  GpuCase<T> problem(c, mode, role, dtype, !copied_before || seed % 4 < 2);
  if (is_window(way) && !some_launch_goes(way, problem)) return;
  const std::string where = std::string(name) + ", " + c.name + ", " + mode_name(mode) + ", " + way_name(way);
  Seen seen = {};
  std::string fault;
  try {
    seen = compute(problem, way, seed);
  } catch (const std::exception& error) {
    fault = error.what();
  }
  CHECK(fault.empty()) << where << ": " << fault;
  if (!fault.empty() || seen.launches == 0) return;
  problem.cut = true;
  problem.check(where, 1e-6, store);
  CHECK(!is_copied(way) || seen.im2col == 0) << where << ": used TMA";

  CHECK(mode != GpuMode::kFull || is_copied(way) || seen.copied == 0) << where << ": used cp.async";
  all.launches += seen.launches, all.bulk += seen.bulk, all.im2col += seen.im2col, all.copied += seen.copied;
  all.products += seen.products, all.splits += seen.splits, all.wide += seen.wide, all.tall += seen.tall;
  all.windows += seen.windows, all.vectors += seen.vectors, all.with_residual += seen.with_residual;
}

// The emulated machine checks each access itself and takes a third of all tests' time under the sanitizers: there,
// every third case (of gradients, of which fewer are split, every second). All of them run without.
#if defined(__SANITIZE_ADDRESS__)
constexpr int kEvery = 3, kEveryGrad = 2;
#else
constexpr int kEvery = 1, kEveryGrad = 1;
#endif

template <typename T>
Seen check_hopper(DType dtype, cuda::Role role, double store, const char* name, int every = kEvery) {  // of the cases
  int number = 0;
  Seen all;
  const bool forward = role == cuda::Role::kForward;
  for (const ConvCase& c : hopper_cases()) {
    if (number % every != 0) {
      ++number;
      continue;
    }
    // Windows, where they can be: three modes of each case, every mode with every tile over the cases.
    constexpr Way kWindowWays[] = {Way::kWindow, Way::kWindowTall, Way::kWindowNarrow, Way::kWindowWide};
    for (int turn = 0; turn < 3; ++turn) {
      constexpr GpuMode modes[] = {GpuMode::kFull,   GpuMode::kMixed,    GpuMode::kGroups,
                                   GpuMode::kTables, GpuMode::kResidual, GpuMode::kSkip};
      const GpuMode mode = modes[forward ? (number + 2 * turn) % 6 : turn];
      check_way<T>(c, mode, kWindowWays[(turn + number) % 4], role, dtype, static_cast<uint64_t>(turn) + 3, store, name,
                   all);
    }
    // Ways and modes take turns, so that each way meets each mode over the cases and roles; tall tiles meet every case.
    for (const bool tall : {false, true}) {
      for (int turn = 0; turn < 2; ++turn) {
        const GpuMode modes[] = {GpuMode::kFull,   GpuMode::kMixed,    GpuMode::kGroups,
                                 GpuMode::kTables, GpuMode::kResidual, GpuMode::kSkip};
        const int at = 2 * number + turn, mixed = at + 3 * tall;
        const GpuMode mode = modes[forward ? mixed % 6 : mixed % 3];
        const Way way = tall                           ? kTallWays[(number + turn + number / 3) % 3]
                        : c.h * c.w <= 64 && turn == 1 ? Way::kSplit
                                                       : kWays[(at + at / 6) % 6];
        check_way<T>(c, mode, way, role, dtype, static_cast<uint64_t>(at) + 11, store, name, all);
      }
    }
    ++number;
  }
  std::printf("  %s: %d launches, %d split, %d wide, %d tall; MB by bulk copy %.1f, im2col %.1f, cp.async %.1f\n", name,
              static_cast<int>(all.launches), static_cast<int>(all.splits), static_cast<int>(all.wide),
              static_cast<int>(all.tall), static_cast<double>(all.bulk) / 1e6, static_cast<double>(all.im2col) / 1e6,
              static_cast<double>(all.copied) / 1e6);
  CHECK(all.bulk * every > 1000000 && all.im2col * every > 1000000 && all.copied * every > 100000)
      << name << ": a way to fetch was not tried";
  CHECK(all.vectors * every > 20 && (all.with_residual * every > 3 || !forward))
      << name << ": " << all.vectors << " launches by 16 bytes, " << all.with_residual << " with a residual";
  CHECK(all.windows * every > 15) << name << ": " << all.windows << " launches with windows";
  CHECK(all.splits * every > 1 && all.wide > 0 && all.tall * every > 10)
      << name << ": split, wide or tall tiles were not tried";
  return all;
}

}  // namespace

TEST(hopper_forward_bf16) { check_hopper<BFloat16>(DType::kBFloat16, cuda::Role::kForward, 0x1p-8, "wgmma bf16"); }
// What float16 has of its own are two instructions: a third of the cases.
TEST(hopper_forward_fp16) { check_hopper<Float16>(DType::kFloat16, cuda::Role::kForward, kHalfStep, "wgmma fp16", 3); }
TEST(hopper_input_grad_bf16) {
  check_hopper<BFloat16>(DType::kBFloat16, cuda::Role::kInputGrad, 0x1p-8, "wgmma bf16 grad", kEveryGrad);
}
TEST(hopper_forward_tf32) { check_hopper<float>(DType::kFloat32, cuda::Role::kForward, 1e-6, "wgmma tf32"); }
TEST(hopper_input_grad_tf32) {
  check_hopper<float>(DType::kFloat32, cuda::Role::kInputGrad, 1e-6, "wgmma tf32 grad", kEveryGrad);
}

namespace {

// Neither the tile, nor a split K, nor the way the input is fetched, nor the company of a sample may change a bit.
template <typename T>
void check_bits(DType dtype) {
  int number = 0, at = 0;
  for (const ConvCase& c : hopper_cases()) {
    if (at++ % kEvery != 0) continue;
    for (GpuMode mode : {GpuMode::kTables, GpuMode::kGroups}) {
      int turn = ++number;  // every second way of each case and mode: all of them over the cases
      GpuCase<T> batch(c, mode, cuda::Role::kForward, dtype, true);
      const GpuCase<T> fresh = batch;
      if (compute(batch, Way::kPlanned, 5).launches == 0) continue;
      for (Way way : {Way::kNarrow, Way::kMiddle, Way::kWide, Way::kTall, Way::kTallNarrow, Way::kSplit,
                      Way::kWithoutTma, Way::kTallWithoutTma, Way::kWindow, Way::kWindowWide, Way::kWindowTall}) {
        if ((way == Way::kWide && mode == GpuMode::kGroups) || ++turn % 2 == 0) continue;
        if (is_window(way) && !some_launch_goes(way, batch)) continue;
        GpuCase<T> other = fresh;
        const bool alone = way == Way::kSplit;  // one sample, as a small batch is computed
        const int64_t n = alone ? std::min<int64_t>(2, c.n - 1) : 0;
        const int64_t size = batch.to_c * batch.to_h * batch.to_w, samples = alone ? 1 : c.n;
        other.s.n = other.p.shape.n = samples;
        other.p.input = other.input.data() + n * other.p.input_stride.n;
        other.p.output = other.output.data(), other.p.weight = other.weight.data();
        other.p.in_prefix = other.in_prefix.data() + n, other.p.out_prefix = other.out_prefix.data() + n;
        if (other.p.row) other.p.row = other.row.data() + n, other.p.scale = other.scale.data();
        if (other.p.bias) other.p.bias = other.bias.data();
        compute(other, way, 6);
        CHECK(std::memcmp(other.output.data(), batch.output.data() + n * size,
                          static_cast<size_t>(samples * size) * sizeof(T)) == 0)
            << sizeof(T) << " bytes, " << c.name << ", " << mode_name(mode) << ": " << way_name(way) << " differs";
      }
    }
  }
}

}  // namespace

// Prefixes of whole chunks, 32 channels here, need no cp.async, whatever the mixture.
TEST(hopper_whole_chunks_of_float32_come_by_the_copy_engine) {
  ConvCase c = hopper_cases()[0];
  c.n = 8, c.c_in = 128, c.h = c.w = 9;
  GpuCase<float> problem(c, GpuMode::kGroups, cuda::Role::kForward, DType::kFloat32, true);
  const std::string fault = test::message_of([&] {
    const Seen seen = compute(problem, Way::kPlanned, 3);
    CHECK(seen.im2col > 0 && seen.copied == 0) << seen.copied << " bytes by cp.async";
  });
  CHECK(fault.empty()) << fault;
  problem.cut = true;
  problem.check("quarters of 128 channels", 1e-6, 1e-6);
}

namespace {

// Prefixes of whole pieces, with every epilogue: rows go by whole lines where all of a warp's have one line of the
// tables.
template <typename T>
void check_epilogues(DType dtype, double store) {
  ConvCase c{.name = "1x1, lines", .n = 6, .c_in = 64, .h = 5, .w = 13, .c_out = 256, .kh = 1, .kw = 1};
  int number = 0;
  for (const std::string tables : {"none", "bias", "both", "scale"})
    for (const bool residual : {false, true})
      for (const Way way : {Way::kWide, Way::kMiddle, Way::kTall}) {
        GpuCase<T> problem(c, GpuMode::kGroups, cuda::Role::kForward, dtype, true);
        PrefixConv2dParams& p = problem.p;
        const std::string what = "tables " + tables + (residual ? ", residual, " : ", ") + way_name(way);
        for (size_t n = 0; n < problem.row.size(); ++n) problem.row[n] = static_cast<int32_t>(n / 2 % 3);
        p.row = problem.row.data();
        if (tables == "bias" || tables == "both") p.bias = problem.bias.data(), p.bias_row_stride = problem.to_c;
        if (tables == "scale" || tables == "both") p.scale = problem.scale.data(), p.scale_row_stride = problem.to_c;
        if (residual) p.residual = problem.residual.data();
        if (number++ % 2 == 0) p.activation = Activation::kRelu;
        if (number % 3 == 0) p.tail = Tail::kSkip;
        const std::string fault = test::message_of([&] {
          CHECK(compute(problem, way, static_cast<uint64_t>(number)).vectors == 1) << what << ": not by 16 bytes";
        });
        CHECK(fault.empty()) << what << ": " << fault;
        problem.cut = true;
        problem.check(what, 1e-6, store);
      }
}

}  // namespace

TEST(hopper_epilogues_bf16) { check_epilogues<BFloat16>(DType::kBFloat16, 0x1p-8); }
TEST(hopper_epilogues_tf32) { check_epilogues<float>(DType::kFloat32, 1e-6); }

// A residual whose pairs of channels are not aligned takes the path of single elements.
TEST(hopper_residuals_may_begin_at_any_element) {
  GpuCase<float> problem(hopper_cases()[4], GpuMode::kResidual, cuda::Role::kForward, DType::kFloat32, true);
  std::vector<float> behind(problem.residual.size() + 1, kNaN);
  std::copy(problem.residual.begin(), problem.residual.end(), behind.begin() + 1);
  problem.p.residual = behind.data() + 1;
  const std::string fault =
      test::message_of([&] { CHECK(compute(problem, Way::kPlanned, 3).launches == 1) << "not by wgmma"; });
  CHECK(fault.empty()) << fault;
  problem.cut = true;
  problem.check("residual from an odd element on", 1e-6, 1e-6);
}

// wgmma cuts what mma.sync rounds, so which of the two serves must not depend on the batch; nor may where K is cut.
TEST(hopper_which_kernel_serves_is_a_rule_of_the_layer) {
  std::vector<ConvCase> cases = gpu_cases();
  for (const ConvCase& c : hopper_cases()) cases.push_back(c);
  int wgmma = 0, mma = 0;
  for (ConvCase& c : cases) {
    if (!cuda::has_tile(c.shape(), DType::kFloat32, cuda::Role::kForward)) continue;
    std::vector<int64_t> seen;
    for (int64_t n : {1, 3, 32, 257, 4096}) {
      for (bool mixed : {false, true}) {
        c.n = n;
        PrefixConv2dParams p;
        p.shape = c.shape(), p.dtype = DType::kFloat32;
        p.input_stride = p.output_stride = {c.c_in * c.h * c.w, 1, c.w * c.c_in, c.c_in};
        const int32_t prefix = 0;
        p.in_prefix = mixed ? &prefix : nullptr;
        const cuda::TileLaunch launch = cuda::tile_launches(p, cuda::Role::kForward, 1, true, kHopper).front();
        const bool hopper = cuda::is_hopper(launch.tile);
        seen.push_back(hopper ? launch.args.segment_chunks : -1);
        hopper ? ++wgmma : ++mma;
      }
    }
    CHECK(std::count(seen.begin(), seen.end(), seen[0]) == static_cast<int64_t>(seen.size())) << c.name;
  }
  CHECK(wgmma > 50 && mma > 50) << wgmma << " by wgmma, " << mma << " by mma.sync";
}

TEST(hopper_samples_are_the_same_bits_however_they_are_computed) { check_bits<BFloat16>(DType::kBFloat16); }
TEST(hopper_float32_samples_are_the_same_bits_however_they_are_computed) { check_bits<float>(DType::kFloat32); }

}  // namespace rnp::tests
