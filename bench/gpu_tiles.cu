// Times the CUDA tile kernels alone, without torch: a second or two for what takes bench/gpu.py a minute, for tuning on
// a borrowed GPU. bfloat16, or float32 by TF32 products; channels_last, tail="skip"; every launch is checked first, on
// 4,096 outputs, against a plain kernel. Built where nvcc is, and carried to the GPU if that is elsewhere:
//
//   cmake -S . -B build/gpu-tiles -DRNP_CUDA=1 -DRNP_CUDA_ARCHS=90a -DRNP_BUILD_TESTS=OFF
//   cmake --build build/gpu-tiles --target gpu_tiles
//   build/gpu-tiles/gpu_tiles [ways] [layers] [batches] [dtypes] [epilogues]
//
// ways: planned, 256, 128, 64 (channels of a tile of sm_90a), tall128, tall64 (of 256 rows), w256, w128, w64, wtall128,
// wtall64 (the input of a chunk kept for all taps), copied (planned, input by cp.async), sm80; all by default. dtypes:
// bf16 (the default), tf32. epilogues: plain (the default), tables (scale and bias, four lines of them, the in-prefix's
// quarter chooses), residual (tables, a residual, ReLU). Prints for each way TFLOP/s of the valid taps and microseconds
// at full width, and the share of the theoretical speed-up over that for random widths (k = 4) of both sides, and of
// the input alone. Medians of seven, the L2 cache flushed before each, launches not in a graph: below some 30
// microseconds the host's time is in them.
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <sstream>
#include <string>
#include <vector>

#include "cuda/launch.h"

namespace {

using namespace rnp;
using namespace rnp::cuda;

void require(const char* error) {
  if (!error) return;
  std::fprintf(stderr, "gpu_tiles: %s\n", error);
  std::exit(1);
}
void require(cudaError_t error) { require(error == cudaSuccess ? nullptr : cudaGetErrorString(error)); }

template <typename T>
struct Memory {
  T* at = nullptr;
  explicit Memory(size_t count) { require(cudaMalloc(reinterpret_cast<void**>(&at), count * sizeof(T) + 256)); }
  ~Memory() { cudaFree(at); }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
};

// uint16_t holds a bfloat16.
__device__ float widened(uint16_t v) { return __uint_as_float(static_cast<uint32_t>(v) << 16); }
__device__ float widened(float v) { return v; }
__device__ void narrow_to(uint16_t* to, float v) { *to = static_cast<uint16_t>((__float_as_uint(v) + 0x8000) >> 16); }
__device__ void narrow_to(float* to, float v) { *to = v; }

__device__ uint32_t mixed(uint32_t v) {
  v = (v ^ v >> 16) * 2246822519u;
  v = (v ^ v >> 13) * 3266489917u;
  return v ^ v >> 16;
}

template <typename T>
__global__ void fill(T* to, size_t count, uint32_t seed, float scale) {
  for (size_t i = blockIdx.x * size_t{blockDim.x} + threadIdx.x; i < count; i += size_t{gridDim.x} * blockDim.x) {
    const uint32_t h = mixed(static_cast<uint32_t>(i) * 2654435761u + seed);
    const float v = (static_cast<float>((h & 0xffff) + (h >> 16)) / 65536 - 1) * 2.45f * scale;
    narrow_to(to + i, v);
  }
}

// What follows the sum of products; null pointers where nothing does. Tables are (lines, c_out).
template <typename T>
struct After {
  const int32_t* row = nullptr;
  const float *scale = nullptr, *bias = nullptr;
  const T* residual = nullptr;
};

// Squares of the error and of the truth, summed over live outputs drawn by chance.
template <typename T>
__global__ void compare(const T* x, const T* w, const T* y, ConvShape s, const int32_t* in, const int32_t* out,
                        After<T> after, float* sums) {
  uint32_t h = mixed(blockIdx.x * blockDim.x + threadIdx.x + 1);
  const auto draw = [&](int64_t limit) { return static_cast<int64_t>((h = mixed(h + 7)) >> 4) % limit; };
  const int64_t n = draw(s.n), oy = draw(s.out_h), ox = draw(s.out_w), o = draw(out ? out[n] : s.c_out);
  float sum = 0;
  for (int64_t c = 0; c < (in ? in[n] : s.c_in); ++c)
    for (int64_t ky = 0; ky < s.kh; ++ky)
      for (int64_t kx = 0; kx < s.kw; ++kx) {
        const int64_t iy = oy * s.stride_h - s.pad_top + ky, ix = ox * s.stride_w - s.pad_left + kx;
        if (iy < 0 || ix < 0 || iy >= s.h || ix >= s.w) continue;
        sum += widened(x[((n * s.h + iy) * s.w + ix) * s.c_in + c]) *
               widened(w[((o * s.c_in + c) * s.kh + ky) * s.kw + kx]);
      }
  const int64_t at = ((n * s.out_h + oy) * s.out_w + ox) * s.c_out + o;
  if (after.scale) {
    const int64_t entry = after.row[n] * s.c_out + o;
    sum = sum * after.scale[entry] + after.bias[entry];
  }
  if (after.residual) sum = fmaxf(sum + widened(after.residual[at]), 0.0f);
  const float error = widened(y[at]) - sum;
  atomicAdd(sums, error * error);
  atomicAdd(sums + 1, sum * sum);
}

struct Layer {
  const char* name;
  int64_t c_in, size, c_out, kernel, stride;
};
constexpr Layer kLayers[] = {
    {"vgg1_2", 64, 224, 64, 3, 1},       {"vgg2_2", 128, 112, 128, 3, 1},      {"vgg3_2", 256, 56, 256, 3, 1},
    {"vgg4_2", 512, 28, 512, 3, 1},      {"vgg5", 512, 14, 512, 3, 1},         {"r1_3x3", 64, 56, 64, 3, 1},
    {"r2_3x3", 128, 28, 128, 3, 1},      {"r3_3x3", 256, 14, 256, 3, 1},       {"r4_3x3", 512, 7, 512, 3, 1},
    {"r2_3x3s2", 64, 56, 128, 3, 2},     {"r3_3x3s2", 128, 28, 256, 3, 2},     {"r1_1x1_up", 64, 56, 256, 1, 1},
    {"r1_1x1_down", 256, 56, 64, 1, 1},  {"r2_1x1_up", 128, 28, 512, 1, 1},    {"r2_1x1_down", 512, 28, 128, 1, 1},
    {"r3_1x1_up", 256, 14, 1024, 1, 1},  {"r3_1x1_down", 1024, 14, 256, 1, 1}, {"r4_1x1_up", 512, 7, 2048, 1, 1},
    {"r4_1x1_down", 2048, 7, 512, 1, 1}, {"vgg1_1", 3, 224, 64, 3, 1},         {"r_stem", 3, 224, 64, 7, 2}};

constexpr const char* kWays = "planned,256,128,64,tall128,tall64,w256,w128,w64,wtall128,wtall64,copied,sm80";
constexpr const char* kDtypes = "bf16,tf32";
constexpr const char* kEpilogues = "plain,tables,residual";
constexpr int32_t kLines = 4;

// Which sides of a layer have random widths.
enum class Mixed { kNone, kBoth, kInput };

// Makes the launch go `way`; false where its layer cannot.
bool go(const std::string& way, TileLaunch& launch) {
  ConvArgs& a = launch.args;
  if (way == "planned" || way == "sm80") return true;
  if (!is_hopper(launch.tile)) return false;
  if (way == "copied") {
    const bool can = set_hopper_tile(launch, {a.cut.bm, a.cut.bn}, false);
    a.use_tma = false;
    return can;
  }
  const bool window = way[0] == 'w', tall = way.find("tall") != std::string::npos;
  const int bn = std::atoi(way.c_str() + (window ? 1 : 0) + (tall ? 4 : 0));
  if (bn == 0 || a.cut.group_out <= bn / 2) return false;
  if ((tall || bn == 256) && a.segment_chunks < a.chunks) return false;
  a.splits = 1, launch.partial_elements = 0;
  return set_hopper_tile(launch, {tall ? kTallRows : 128, bn}, window);
}

std::vector<std::string> split(const std::string& text) {
  std::vector<std::string> parts;
  std::stringstream stream(text);
  for (std::string part; std::getline(stream, part, ',');) parts.push_back(part);
  return parts;
}

// Every word is one of `known`.
void require_known(const char* what, const std::vector<std::string>& words, const std::vector<std::string>& known) {
  for (const std::string& word : words) {
    if (std::find(known.begin(), known.end(), word) != known.end()) continue;
    std::string all;
    for (const std::string& one : known) all += (all.empty() ? "" : ", ") + one;
    require((std::string(what) + " must be of " + all + "; got " + word).c_str());
  }
}

template <typename T>
struct Problem {
  static constexpr DType kDType = sizeof(T) == 2 ? DType::kBFloat16 : DType::kFloat32;
  // Of the root mean square: a rounding of bfloat16 outputs, or both operands of every product cut to TF32 (some 2^-11
  // each on average).
  static constexpr float kAllowed = sizeof(T) == 2 ? 5e-3f : 2e-3f;
  ConvShape s;
  Memory<T> x, w, y, packed, residual;
  Memory<int32_t> in, out, order, row, last;
  Memory<float> scale, bias, sums{2};
  double theory = 0, theory_in = 0, flops = 0;

  static ConvShape shape(const Layer& l, int64_t batch) {
    ConvShape s;
    s.n = batch, s.c_in = l.c_in, s.h = s.w = l.size, s.c_out = l.c_out, s.kh = s.kw = l.kernel;
    s.stride_h = s.stride_w = l.stride, s.dilation_h = s.dilation_w = 1, s.groups = 1;
    s.pad_top = s.pad_bottom = s.pad_left = s.pad_right = l.kernel / 2;
    s.out_h = s.out_w = (l.size + 2 * (l.kernel / 2) - l.kernel) / l.stride + 1;
    return s;
  }
  PackArgs pack() const {
    return pack_args(s, kDType, Role::kForward, w.at, {s.c_in * s.kh * s.kw, s.kh * s.kw, s.kw, 1}, packed.at);
  }

  Problem(const Layer& l, int64_t batch)
      : s(shape(l, batch)),
        x(static_cast<size_t>(s.n * s.c_in * s.h * s.w)),
        w(static_cast<size_t>(s.c_out * s.c_in * s.kh * s.kw)),
        y(static_cast<size_t>(s.n * s.c_out * s.out_h * s.out_w)),
        packed(static_cast<size_t>(pack_args(s, kDType, Role::kForward, nullptr, {}, nullptr).layout.elements())),
        residual(static_cast<size_t>(s.n * s.c_out * s.out_h * s.out_w)),
        in(static_cast<size_t>(s.n)),
        out(static_cast<size_t>(s.n)),
        order(static_cast<size_t>(4 * s.n + s.c_out)),
        row(static_cast<size_t>(s.n)),
        last(static_cast<size_t>(s.n)),
        scale(static_cast<size_t>(kLines * s.c_out)),
        bias(static_cast<size_t>(kLines * s.c_out)) {
    fill<<<1024, 256>>>(x.at, static_cast<size_t>(s.n * s.c_in * s.h * s.w), 1, 1);
    fill<<<1024, 256>>>(w.at, static_cast<size_t>(s.c_out * s.c_in * s.kh * s.kw), 2,
                        1 / std::sqrt(static_cast<float>(s.c_in * s.kh * s.kw)));
    fill<<<1024, 256>>>(residual.at, static_cast<size_t>(s.n * s.c_out * s.out_h * s.out_w), 3, 1);
    fill<<<64, 256>>>(scale.at, static_cast<size_t>(kLines * s.c_out), 4, 1);
    fill<<<64, 256>>>(bias.at, static_cast<size_t>(kLines * s.c_out), 5, 1);
    require(launch_pack(pack(), nullptr));
    std::vector<int32_t> ins, outs, rows, lasts;
    std::mt19937 random(7);
    double macs = 0, macs_in = 0, taps = 0;
    for (int64_t i = 0; i < s.n; ++i) {
      rows.push_back(static_cast<int32_t>(random() % kLines));
      lasts.push_back(kLines - 1);
      ins.push_back(static_cast<int32_t>((1 + rows.back()) * s.c_in / kLines));
      outs.push_back(static_cast<int32_t>((1 + random() % 4) * s.c_out / 4));
      macs += double{1} * ins.back() * outs.back();
      macs_in += double{1} * ins.back() * s.c_out;
    }
    const auto upload = [](const Memory<int32_t>& to, const std::vector<int32_t>& from) {
      require(cudaMemcpy(to.at, from.data(), from.size() * 4, cudaMemcpyHostToDevice));
    };
    upload(in, ins), upload(out, outs), upload(row, rows), upload(last, lasts);
    for (int64_t o = 0; o < s.out_h; ++o)
      for (int64_t k = 0; k < s.kh; ++k) {
        const int64_t at = o * s.stride_h - s.pad_top + k;
        taps += at >= 0 && at < s.h;
      }
    theory = static_cast<double>(s.c_in * s.c_out * s.n) / macs;
    theory_in = static_cast<double>(s.c_in * s.c_out * s.n) / macs_in;
    flops = 2.0 * static_cast<double>(s.c_in * s.c_out * s.n) * taps * taps;
  }

  // Milliseconds, or a negative number where the way is not this layer's; NaN for a wrong result.
  double time(const std::string& way, const std::string& epilogue, Mixed mixed, const Device& device, char* flush,
              size_t flush_bytes) {
    const int32_t* const in_prefix = mixed == Mixed::kNone ? nullptr : in.at;
    const int32_t* const out_prefix = mixed == Mixed::kBoth ? out.at : nullptr;
    PrefixConv2dParams p;
    p.dtype = kDType, p.shape = s, p.tail = Tail::kSkip;
    p.input = x.at, p.input_stride = {s.c_in * s.h * s.w, 1, s.w * s.c_in, s.c_in};
    p.weight = w.at, p.packed = reinterpret_cast<const float*>(packed.at);
    p.output = y.at, p.output_stride = {s.c_out * s.out_h * s.out_w, 1, s.out_w * s.c_out, s.c_out};
    p.in_prefix = in_prefix, p.out_prefix = out_prefix;
    After<T> after;
    if (epilogue != "plain") {
      after.row = p.row = in_prefix ? row.at : last.at;
      after.scale = scale.at, after.bias = bias.at;
      p.scale = scale.at, p.bias = bias.at, p.scale_row_stride = p.bias_row_stride = s.c_out;
    }
    if (epilogue == "residual") {
      after.residual = residual.at;
      p.residual = residual.at, p.residual_stride = p.output_stride, p.activation = Activation::kRelu;
    }
    Device used = device;
    used.hopper = device.hopper && way != "sm80";
    TileLaunch launch = tile_launches(p, Role::kForward, kLines, true, used).front();
    if (!go(way, launch)) return -1;
    Memory<float> partial(static_cast<size_t>(launch.partial_elements));
    launch.args.partial = launch.partial_elements ? partial.at : nullptr;
    Memory<char> unfolded(static_cast<size_t>(launch.unfold.pieces()) * 16);  // of few channels; timed with the layer
    if (launch.unfold.pieces() > 0) use_unfolded(launch, unfolded.at);
    const auto run = [&] {
      if (launch.unfold.pieces() > 0) require(launch_unfold(launch.unfold, sizeof(T), device.multiprocessors, nullptr));
      if (launch.args.in_prefix || launch.args.out_prefix) {
        OrderArgs o;
        o.n = static_cast<int32_t>(s.n), o.c_in = launch.args.c_in, o.c_out = static_cast<int32_t>(s.c_out);
        o.in_prefix = launch.args.in_prefix, o.out_prefix = launch.args.out_prefix, o.cut = launch.args.cut;
        o.place(order.at);
        require(launch_order(o, nullptr));
        use_order(launch.args, o);
      }
      require(launch_tile(launch, device.multiprocessors, nullptr));
    };
    require(cudaMemset(y.at, 0xff, static_cast<size_t>(s.n * s.c_out * s.out_h * s.out_w) * sizeof(T)));
    require(cudaMemset(sums.at, 0, 8));
    run();
    compare<<<64, 64>>>(x.at, w.at, y.at, s, in_prefix, out_prefix, after, sums.at);
    float found[2];
    require(cudaMemcpy(found, sums.at, 8, cudaMemcpyDeviceToHost));
    if (!(std::sqrt(found[0] / found[1]) < kAllowed)) return std::nan("");
    std::vector<float> times;
    cudaEvent_t begin, end;
    require(cudaEventCreate(&begin)), require(cudaEventCreate(&end));
    for (int round = 0; round < 7; ++round) {
      require(cudaMemsetAsync(flush, round, flush_bytes));
      require(cudaEventRecord(begin));
      run();
      require(cudaEventRecord(end));
      require(cudaEventSynchronize(end));
      times.emplace_back();
      require(cudaEventElapsedTime(&times.back(), begin, end));
    }
    cudaEventDestroy(begin), cudaEventDestroy(end);
    std::sort(times.begin(), times.end());
    return times[3];
  }
};

template <typename T>
void time_layer(const Layer& layer, int64_t batch, const std::string& dtype, const std::vector<std::string>& ways,
                const std::vector<std::string>& epilogues, const Device& device, char* flush, size_t flush_bytes) {
  Problem<T> problem(layer, batch);
  for (const std::string& epilogue : epilogues) {
    std::printf("%s %-11s batch %3lld, %s, theory %.2f and %.2f:", dtype.c_str(), layer.name,
                static_cast<long long>(problem.s.n), epilogue.c_str(), problem.theory, problem.theory_in);
    for (const std::string& way : ways) {
      const auto time = [&](Mixed mixed) { return problem.time(way, epilogue, mixed, device, flush, flush_bytes); };
      const double full = time(Mixed::kNone);
      if (full < 0) continue;
      std::printf("  %s %.0f TFLOP/s %.0f us, mixed %.2f, in %.2f", way.c_str(), problem.flops / full / 1e9, full * 1e3,
                  full / time(Mixed::kBoth) / problem.theory, full / time(Mixed::kInput) / problem.theory_in);
    }
    std::printf("\n");
    std::fflush(stdout);
  }
}

}  // namespace

int main(int count, char** words) {
  const auto word = [&](int at, const char* otherwise) { return split(count > at ? words[at] : otherwise); };
  const std::vector<std::string> ways = word(1, kWays), layers = word(2, "");
  require_known("ways", ways, split(kWays));
  std::vector<std::string> names;
  for (const Layer& layer : kLayers) names.push_back(layer.name);
  require_known("layers", layers, names);
  const std::vector<std::string> batches = word(3, "256,32"), dtypes = word(4, "bf16");
  require_known("dtypes", dtypes, split(kDtypes));
  const std::vector<std::string> epilogues = word(5, "plain");
  require_known("epilogues", epilogues, split(kEpilogues));
  for (const std::string& batch : batches)
    if (std::atoll(batch.c_str()) <= 0) require(("batches must be positive numbers; got " + batch).c_str());
  Device device;
  require(current_device(&device));
  constexpr size_t kFlush = size_t{256} << 20;
  Memory<char> flush(kFlush);
  for (const std::string& dtype : dtypes)
    for (const std::string& batch : batches)
      for (const Layer& layer : kLayers) {
        if (!layers.empty() && std::find(layers.begin(), layers.end(), layer.name) == layers.end()) continue;
        const int64_t wanted = std::atoll(batch.c_str()),
                      n = layer.size >= 112 ? std::min<int64_t>(wanted, 64) : wanted;
        (dtype == "tf32" ? time_layer<float> : time_layer<uint16_t>)(layer, n, dtype, ways, epilogues, device, flush.at,
                                                                     kFlush);
      }
}
