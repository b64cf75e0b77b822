#include "cpu/grouped.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <vector>

#include "core/packing.h"
#include "core/processor.h"
#include "cpu/call.h"
#include "cpu/epilogue.h"
#include "cpu/grouped_half.h"
#include "cpu/grouped_kernels.h"
#include "cpu/isa.h"
#include "cpu/plane_geometry.h"
#include "cpu/work_queue.h"

namespace rnp::cpu {
namespace {

constexpr int64_t kBandBytes = 128 * 1024;         // of input that lanes of channels read again for the next vector
constexpr int64_t kLargeBytes = int64_t{8} << 20;  // of a call's input and output: more comes from memory
constexpr int64_t kPlaneBytes = 64 * 1024;         // of planes and sums
constexpr int64_t kTransposed = 16;                // channels copied at once where they, not columns, are contiguous
constexpr double kCostOfItem = 2e4;                // about cycles: less is not worth an item of its own

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

bool columns_touch(const PrefixConv2dParams& p) {
  return p.dtype == DType::kFloat32 && p.input_stride.w == 1 && p.output_stride.w == 1 &&
         (!p.residual || p.residual_stride.w == 1);
}

// One call, and what its items share.
class GroupedCall {
 public:
  GroupedCall(const PrefixConv2dParams& params, const GroupedKernels& kernels, float* row_sums)
      : p_(params),
        s_(params.shape),
        layout_(s_),
        kernels_(kernels),
        row_sums_(row_sums),
        lane_row_(lane_kernel()),
        stream_(streams()) {}

  void run(const Threads& threads, const std::function<float*(size_t)>& scratch) {
    // Cycles of one output row of all channels, about.
    const double row_cost = static_cast<double>(s_.out_w * s_.c_out * s_.kh * s_.kw * s_.group_in()) / kernels_.lanes +
                            static_cast<double>(s_.out_w * s_.c_out) / 4;
    const double cost = row_cost * static_cast<double>(s_.n * s_.out_h);
    workers_ = static_cast<int>(std::min<double>(threads.count, cost / kCostOfThread + 1));
    rows_ = lane_row_ ? lane_band() : plane_band();
    if (workers_ > 1 && s_.n * ceil_div(s_.out_h, rows_) < 2 * workers_)
      rows_ = std::max<int64_t>(1, ceil_div(s_.out_h, ceil_div(2 * workers_, s_.n)));
    bands_ = ceil_div(s_.out_h, rows_);
    rows_ = ceil_div(s_.out_h, bands_);
    bundle_ = layout_.groups;
    int64_t ranges = 1;
    if (!lane_row_) {
      bundle_ = fast_planes() ? 1 : std::max<int64_t>(1, kTransposed / layout_.icg);
      const double items = static_cast<double>(s_.n * bands_);
      ranges =
          std::clamp<int64_t>(static_cast<int64_t>(cost / items / kCostOfItem), 1, ceil_div(layout_.groups, bundle_));
    }
    const int64_t need = lane_row_ ? 0 : plane_floats(), items = s_.n * bands_ * ranges;
    float* memory = need ? scratch(static_cast<size_t>(need * workers_)) : nullptr;
    std::atomic<int64_t> next{0};
    threads(workers_, [&](int worker) {
      for (int64_t i = next++; i < items; i = next++) {
        const int64_t n = i / (bands_ * ranges), band = i / ranges % bands_, range = i % ranges;
        const int64_t row0 = band * rows_, row1 = std::min(s_.out_h, row0 + rows_);
        const int64_t bundles = ceil_div(layout_.groups, bundle_);
        const int64_t g0 = range * bundles / ranges * bundle_;
        const int64_t g1 = std::min(layout_.groups, (range + 1) * bundles / ranges * bundle_);
        if (row0 >= row1 || (p_.elsewhere && p_.elsewhere[n])) continue;
        if (lane_row_) {
          lanes(n, row0, row1);
        } else {
          float* own = memory + worker * need;
          fast_planes() ? plane_bands(n, row0, row1, g0, g1, own) : planes(n, row0, row1, g0, g1, own);
        }
        const int64_t first = g0 * layout_.ocg, end = g1 * layout_.ocg;
        const int64_t live = std::clamp(p_.out_live(n), first, end);
        fill_tail(p_, n, row0, row1, live, end);
        const int64_t written = p_.tail == Tail::kSkip ? live : end;
        if (row_sums_ && first < written) sum_rows(p_, n, row0, row1, first, written, row_sums_);
      }
#if defined(__x86_64__)
      if (stream_) __builtin_ia32_sfence();  // before anyone reads what this thread has stored
#endif
    });
  }

 private:
  LaneRowKernel lane_kernel() const {
    const bool contiguous =
        p_.input_stride.c == 1 && p_.output_stride.c == 1 && (!p_.residual || p_.residual_stride.c == 1);
    const int64_t width = s_.kw == 3 ? 0 : s_.kw == 5 ? 1 : s_.kw == 7 ? 2 : -1;
    if (!contiguous || width < 0 || s_.stride_w > 2 || s_.dilation_w != 1) return nullptr;
    constexpr int64_t kGroups[kLaneGroups][2] = {{1, 1}, {2, 2}, {4, 4}, {8, 8}, {1, 2}};
    for (int i = 0; i < kLaneGroups; ++i)
      if (kGroups[i][0] == layout_.icg && kGroups[i][1] == layout_.ocg)
        return kernels_.lane_row[width][s_.stride_w - 1][i];
    return nullptr;
  }

  int64_t lane_band() const {
    const int64_t row_bytes = std::max<int64_t>(1, s_.w * s_.c_in * s_.stride_h * static_cast<int64_t>(sizeof(float)));
    return std::clamp<int64_t>(kBandBytes / row_bytes, std::min<int64_t>(4, s_.out_h), s_.out_h);
  }

  int64_t bytes() const {
    return s_.n * (s_.h * s_.w * s_.c_in + s_.out_h * s_.out_w * s_.c_out) * static_cast<int64_t>(sizeof(float));
  }

  bool streams() const {
    const bool aligned = reinterpret_cast<uintptr_t>(p_.output) % 64 == 0 && p_.output_stride.n % 16 == 0 &&
                         p_.output_stride.h % 16 == 0 && p_.output_stride.w % 16 == 0;
    return lane_row_ && kernels_.streams && aligned &&
           input_displaces_output(p_, s_.h * s_.w, sizeof(float), kStreamDepthwiseAbove);
  }

  // Rows [row0, row1) of sample n, all channels.
  void lanes(int64_t n, int64_t row0, int64_t row1) const {
    const int64_t live = p_.out_live(n), in_live = p_.in_live(n), line = p_.row ? p_.row[n] : 0;
    const float* input = static_cast<const float*>(p_.input) + n * p_.input_stride.n;
    const float* scale = p_.scale ? static_cast<const float*>(p_.scale) + line * p_.scale_row_stride : nullptr;
    const float* bias = p_.bias ? static_cast<const float*>(p_.bias) + line * p_.bias_row_stride : nullptr;
    LaneRowArgs a = {};
    a.x_row_step = s_.dilation_h * p_.input_stride.h;
    a.x_col_step = p_.input_stride.w;
    a.width = s_.w;
    a.pad_left = s_.pad_left;
    a.w_block = layout_.lane_block();
    a.cols = s_.out_w;
    a.out_col_step = p_.output_stride.w;
    a.residual_col_step = p_.residual_stride.w;
    a.relu = p_.activation == Activation::kRelu;
    a.stream = stream_;
    // Pixels a multiple of 1 KB apart share a few sets of L1. Then a row's channels are taken in turn, so that what
    // comes next lies in the next line; otherwise the rows, so that two of three input rows are still there. Depthwise
    // layers that come from memory take the channels in turn too: so they read and write whole pixels.
    const bool aliased = p_.input_stride.w % 256 == 0, large = bytes() > kLargeBytes;
    const bool in_turn = aliased || (large && layout_.icg * layout_.ocg == 1);
    const int64_t step = in_turn ? std::max<int64_t>(1, live) : kernels_.lanes;
    a.ahead_row_step = p_.input_stride.h;
    for (int64_t c = 0; c < live; c += step) {
      const int64_t first = c / layout_.ocg * layout_.icg;  // the first input channel
      a.channel = c;
      a.channels = std::min(step, live - c);
      a.in_live = static_cast<int>(std::max<int64_t>(in_live - first, 0));
      a.out_live = static_cast<int>(a.channels);
      a.scale = scale ? scale + c : nullptr;
      a.bias = bias ? bias + c : nullptr;
      for (int64_t r = row0; r < row1; ++r) {
        const int64_t y = r * s_.stride_h - s_.pad_top;
        // Kernel rows that meet the input.
        const int64_t i0 = y >= 0 ? 0 : std::min(s_.kh, ceil_div(-y, s_.dilation_h));
        const int64_t i1 = y >= s_.h ? i0 : std::clamp(ceil_div(s_.h - y, s_.dilation_h), i0, s_.kh);
        a.rows = i1 - i0;
        a.x = input + (y + i0 * s_.dilation_h) * p_.input_stride.h + first;
        a.w = p_.packed + layout_.lane_at(c) + i0 * s_.kw * layout_.icg * PackedLayout::kHalfLanes;
        a.out = static_cast<float*>(p_.output) + n * p_.output_stride.n + r * p_.output_stride.h + c;
        if (p_.residual)
          a.residual = static_cast<const float*>(p_.residual) + n * p_.residual_stride.n + r * p_.residual_stride.h + c;
        if (large && in_turn && !processor().follows_rows) {
          const int64_t next = std::max<int64_t>(0, y + (s_.kh - 1) * s_.dilation_h + 1);
          a.ahead = input + next * p_.input_stride.h + first;
          a.ahead_rows = std::clamp<int64_t>(s_.h - next, 0, s_.stride_h);
        }
        lane_row_(a);
      }
    }
  }

  int64_t plane_band() const {
    const PlaneGeometry whole(s_, s_.out_h);
    const int64_t bytes = whole.channel_floats() * layout_.icg * static_cast<int64_t>(sizeof(float));
    return std::clamp<int64_t>(s_.out_h * kPlaneBytes / std::max<int64_t>(1, bytes), std::min<int64_t>(4, s_.out_h),
                               s_.out_h);
  }

  static constexpr int64_t kSlack = 16 * 8;  // floats that a tile may touch behind its last position
  static int64_t lines(int64_t floats) { return ceil_div(floats, 16) * 16; }
  int64_t input_floats() const {
    return lines(bundle_ * layout_.icg * PlaneGeometry(s_, rows_).channel_floats() + kSlack);
  }
  int64_t sum_floats() const { return lines(PlaneGeometry(s_, rows_).length(rows_, s_.out_w) + kSlack); }
  int64_t plane_floats() const { return input_floats() + 4 * sum_floats() + lines(4 * s_.kh * s_.kw * layout_.icg); }

  bool fast_planes() const { return columns_touch(p_) && s_.stride_w <= 2; }

  // [tap][input channel of a group]: the first `inputs` of them.
  std::vector<int64_t> tap_offsets(const PlaneGeometry& g, int64_t inputs) const {
    std::vector<int64_t> offsets;
    for (int64_t i = 0; i < s_.kh; ++i)
      for (int64_t j = 0; j < s_.kw; ++j)
        for (int64_t ic = 0; ic < inputs; ++ic) offsets.push_back(g.tap_offset(i, j) + ic * g.channel_floats());
    return offsets;
  }

  // Rows [row0, row1) of sample n, groups [g0, g1), where columns are contiguous.
  void plane_bands(int64_t n, int64_t row0, int64_t row1, int64_t g0, int64_t g1, float* memory) const {
    const Strides4 &in = p_.input_stride, &out = p_.output_stride, &residual = p_.residual_stride;
    const PlaneGeometry g(s_, row1 - row0);
    const int64_t c0 = g0 * layout_.icg, o0 = g0 * layout_.ocg, line = p_.row ? p_.row[n] : 0;
    const std::vector<int64_t> offsets = tap_offsets(g, layout_.icg);
    const std::vector<int64_t> partial = tap_offsets(g, std::max<int64_t>(0, p_.in_live(n)) % layout_.icg);
    PlaneBandArgs a = {};
    a.x = static_cast<const float*>(p_.input) + n * in.n + c0 * in.c;
    a.x_channel_step = in.c, a.x_row_step = in.h, a.height = s_.h, a.width = s_.w;
    a.first_row = row0 * s_.stride_h - s_.pad_top;
    a.stride_h = s_.stride_h, a.stride_w = s_.stride_w, a.pad_left = s_.pad_left;
    a.row_phases = static_cast<int64_t>(g.vertical.phases.size()), a.row_phase = g.vertical.phases.data();
    a.col_phases = static_cast<int64_t>(g.horizontal.phases.size()), a.col_phase = g.horizontal.phases.data();
    a.plane_rows = g.rows + g.vertical.reach, a.pitch = g.pitch, a.channel_floats = g.channel_floats();
    a.offset = offsets.data(), a.partial_offset = partial.data();
    a.area = layout_.area(), a.icg = layout_.icg, a.ocg = layout_.ocg, a.groups = g1 - g0;
    a.in_live = p_.in_live(n) - c0, a.out_live = p_.out_live(n) - o0;
    a.w = p_.packed + layout_.data_at(), a.w_first = o0;
    if (layout_.small_groups()) {
      a.w_lanes = a.w_narrow = PackedLayout::kHalfLanes, a.w_block = layout_.lane_block();
    } else {  // one group, one block of input channels
      const int64_t last = layout_.oc_blocks() - 1;
      a.w_lanes = PackedLayout::kLanes, a.w_block = a.w_lanes * layout_.icg * layout_.area();
      a.w_narrow = layout_.lanes(last) < a.w_lanes ? last * a.w_lanes : layout_.ocg;
    }
    a.out = static_cast<float*>(p_.output) + n * out.n + o0 * out.c + row0 * out.h;
    a.out_channel_step = out.c, a.out_row_step = out.h;
    if (p_.scale) a.scale = static_cast<const float*>(p_.scale) + line * p_.scale_row_stride + o0;
    if (p_.bias) a.bias = static_cast<const float*>(p_.bias) + line * p_.bias_row_stride + o0;
    if (p_.residual)
      a.residual = static_cast<const float*>(p_.residual) + n * residual.n + o0 * residual.c + row0 * residual.h;
    a.residual_channel_step = residual.c, a.residual_row_step = residual.h;
    a.relu = p_.activation == Activation::kRelu;
    a.rows = row1 - row0, a.cols = s_.out_w, a.length = g.length(a.rows, a.cols);
    a.planes = memory, a.sums = memory + input_floats(), a.sums_step = sum_floats();
    a.weights = a.sums + 4 * a.sums_step;
    // Tiles may read behind the last plane: no denormal or old NaN shall slow them down.
    std::fill(memory + layout_.icg * g.channel_floats(), memory + layout_.icg * g.channel_floats() + kSlack, 0.0f);
    kernels_.plane_band(a);
  }

  // The live input channels [c0, c1) of the band that begins at output row `row0`, as planes.
  void copy(const PlaneGeometry& g, int64_t n, int64_t row0, int64_t c0, int64_t c1, float* to) const {
    const Strides4& st = p_.input_stride;
    const float* input = static_cast<const float*>(p_.input) + n * st.n;
    std::fill(to, to + (c1 - c0) * g.channel_floats(), 0.0f);
    for (size_t v = 0; v < g.vertical.phases.size(); ++v) {
      for (size_t h = 0; h < g.horizontal.phases.size(); ++h) {
        const int64_t x0 = g.horizontal.phases[h] - s_.pad_left;
        // Positions [left, right) lie inside the image.
        const int64_t left = std::clamp<int64_t>(x0 >= 0 ? 0 : ceil_div(-x0, s_.stride_w), 0, g.pitch);
        const int64_t right = std::clamp<int64_t>(x0 >= s_.w ? 0 : ceil_div(s_.w - x0, s_.stride_w), left, g.pitch);
        for (int64_t r = 0; r < g.rows + g.vertical.reach; ++r) {
          const int64_t y = (row0 + r) * s_.stride_h + g.vertical.phases[v] - s_.pad_top;
          if (y < 0 || y >= s_.h || left == right) continue;
          const float* from = input + y * st.h + (x0 + left * s_.stride_w) * st.w;
          float* row = to + g.plane_at(v, h) + r * g.pitch;
          for (int64_t x = left; x < right; ++x, from += s_.stride_w * st.w)
            for (int64_t c = c0; c < c1; ++c) row[(c - c0) * g.channel_floats() + x] = from[c * st.c];
        }
      }
    }
  }

  // Rows [row0, row1) of sample n, groups [g0, g1): any strides.
  void planes(int64_t n, int64_t row0, int64_t row1, int64_t g0, int64_t g1, float* memory) const {
    const int64_t in_live = p_.in_live(n), live = p_.out_live(n);
    const PlaneGeometry geometry(s_, row1 - row0);
    float* sums = memory + input_floats();
    float* weights = sums + 4 * sum_floats();
    for (int64_t first = g0; first < g1 && first * layout_.ocg < live; first += bundle_) {
      const int64_t end = std::min(g1, first + bundle_);
      const int64_t c0 = first * layout_.icg, c1 = std::clamp(in_live, c0, end * layout_.icg);
      if (c0 < c1) copy(geometry, n, row0, c0, c1, memory);
      const int64_t behind = (c1 - c0) * geometry.channel_floats();
      std::fill(memory + behind, memory + behind + kSlack, 0.0f);
      for (int64_t g = first; g < end && g * layout_.ocg < live; ++g) {
        const int64_t inputs = live_in_group(in_live, g, layout_.icg), outputs = live_in_group(live, g, layout_.ocg);
        const std::vector<int64_t> offsets = tap_offsets(geometry, inputs);
        PlaneArgs a = {};
        a.x = memory + (g - first) * layout_.icg * geometry.channel_floats();
        a.offset = offsets.data();
        a.taps = static_cast<int64_t>(offsets.size());
        a.w = weights;
        a.length = geometry.length(row1 - row0, s_.out_w);
        a.sums = sums;
        a.sums_step = sum_floats();
        for (int64_t o = 0; o < outputs; o += a.outputs) {
          const int64_t left = outputs - o;
          a.outputs = left >= 4 ? 4 : left >= 2 ? 2 : 1;
          gather_weights(g * layout_.ocg + o, a.outputs, inputs, weights);
          kernels_.planes(a);
          for (int64_t i = 0; i < a.outputs; ++i)
            finish_patch(p_, {n, row0, row1 - row0, 0, s_.out_w}, g * layout_.ocg + o + i, 1,
                         {sums + i * a.sums_step, geometry.pitch, 1}, nullptr);
        }
      }
    }
  }

  // [tap][input channel][output channel] of `outputs` filters from `channel` on.
  void gather_weights(int64_t channel, int64_t outputs, int64_t inputs, float* to) const {
    for (int64_t t = 0; t < layout_.area(); ++t)
      for (int64_t ic = 0; ic < inputs; ++ic)
        for (int64_t o = 0; o < outputs; ++o)
          *to++ = p_.packed[layout_.lane_at(channel + o) + (t * layout_.icg + ic) * PackedLayout::kHalfLanes];
  }

  const PrefixConv2dParams& p_;
  const ConvShape& s_;
  const PackedLayout layout_;
  const GroupedKernels& kernels_;
  float* row_sums_;
  LaneRowKernel lane_row_;  // null: planes
  bool stream_;             // lanes of channels: outputs are stored past the caches
  int workers_ = 1;
  int64_t rows_ = 1, bands_ = 1, bundle_ = 1;  // output rows of a band; groups copied at once
};

}  // namespace

const GroupedKernels& grouped_kernels_in_use() {
  const Isa isa = current_isa();
#if defined(__x86_64__)
  if (isa >= Isa::kAvx512) return avx512_grouped_kernels();
  if (isa == Isa::kAvx2) return avx2_grouped_kernels();
#endif
  return portable_grouped_kernels();
}

bool runs_in_planes(const PrefixConv2dParams& p) {
  return few_channels(p.shape) && columns_touch(p) && p.output_stride.c != 1 && !p.sum_kernel_rows;
}

void grouped_conv2d(const PrefixConv2dParams& p, const Threads& threads, const std::function<float*(size_t)>& scratch,
                    float* row_sums) {
  if (p.dtype != DType::kFloat32) return grouped_half(p, threads, row_sums);
  GroupedCall(p, grouped_kernels_in_use(), row_sums).run(threads, scratch);
}

}  // namespace rnp::cpu
