// The gradient of the input: for each residue of the stride a convolution of grad_output with the taps that hit it, run
// by the forward's driver with the prefixes exchanged.
//
//   y[o] = sum over k of x[o * stride - pad + k * dilation] * w[k], so with i + pad = q * stride + r
//   dx[i] = sum over the k with k * dilation = r (mod stride) of dy[q - (k * dilation - r) / stride] * w[k]
//
// Those k are tap, tap + stride / d, … with d = gcd(stride, dilation): a convolution of stride 1 and dilation
// dilation / d.
#include <algorithm>
#include <atomic>
#include <cstring>
#include <numeric>
#include <vector>

#include "core/algorithm.h"
#include "core/half.h"
#include "core/packing.h"
#include "core/winograd.h"
#include "cpu/pack_weight.h"
#include "cpu/plane_pointwise.h"
#include "cpu/prefix_conv2d.h"
#include "cpu/prefix_conv2d_grad.h"
#include "cpu/scratch.h"
#include "cpu/winograd.h"

namespace rnp::cpu {
namespace {

// One residue of the stride along one axis.
struct Phase {
  int64_t first, count;         // its positions of the input: first, first + stride, …
  int64_t tap, tap_step, taps;  // its taps of the kernel; none: its positions get no gradient
  int64_t dilation, pad;        // of the convolution over grad_output
  int64_t skip, size;           // which positions of grad_output that one reads
};

std::vector<Phase> phases(int64_t size, int64_t out, int64_t kernel, int64_t stride, int64_t pad, int64_t dilation) {
  const int64_t common = std::gcd(stride, dilation);
  std::vector<Phase> all;
  for (int64_t first = 0; first < std::min(stride, size); ++first) {
    const int64_t r = (first + pad) % stride;
    Phase p = {};
    p.first = first;
    p.count = (size - p.first + stride - 1) / stride;
    p.tap_step = stride / common;
    p.dilation = dilation / common;
    while (p.tap < std::min(kernel, p.tap_step) && p.tap * dilation % stride != r) ++p.tap;
    if (p.tap < std::min(kernel, p.tap_step)) p.taps = (kernel - p.tap + p.tap_step - 1) / p.tap_step;
    const int64_t span = (p.taps - 1) * p.dilation;
    p.pad = span - (p.first + pad - r) / stride + (p.tap * dilation - r) / stride;
    // A negative padding is a part of grad_output that no position of the phase sees.
    p.skip = std::max<int64_t>(0, -p.pad);
    p.size = std::min(out, p.count + span - p.pad) - p.skip;
    p.pad = std::max<int64_t>(0, p.pad);
    if (p.size <= 0) p.taps = 0;
    all.push_back(p);
  }
  return all;
}

int64_t largest(const int32_t* prefix, int64_t n, int64_t all) {
  return prefix && n > 0 ? *std::max_element(prefix, prefix + n) : all;
}

// Where each tap of the phase's weights lies, in the order in which the driver reads them.
std::vector<int64_t> turned_taps(const Phase& rows, const Phase& cols, const Strides4& st, const PackedLayout& l) {
  std::vector<int64_t> offset;
  for (int64_t i = l.kh - 1; i >= 0; --i)
    for (int64_t j = l.kw - 1; j >= 0; --j)
      offset.push_back((rows.tap + i * rows.tap_step) * st.h + (cols.tap + j * cols.tap_step) * st.w);
  return offset;
}

// The phase's weights as the driver reads them, input and output channels exchanged and the taps in reverse; no more of
// them than the widest sample needs.
template <typename T>
void pack_turned(const PrefixConv2dGradParams& p, const Phase& rows, const Phase& cols, const PackedLayout& l,
                 const Threads& threads, float* packed) {
  const Strides4& st = p.weight_stride;
  const int64_t in_live = largest(p.in_prefix, p.shape.n, p.shape.c_in);
  const int64_t out_live = largest(p.out_prefix, p.shape.n, p.shape.c_out);
  const std::vector<int64_t> offset = turned_taps(rows, cols, st, l);
  const T* w = static_cast<const T*>(p.weight);
  if (l.small_groups()) {
    std::fill(packed + l.data_at(), packed + l.total_floats(), 0.0f);
    for (int64_t c = 0; c < l.groups * l.ocg; ++c) {
      float* to = packed + l.lane_at(c);
      for (const int64_t tap : offset)
        for (int64_t ic = 0; ic < l.icg; ++ic, to += PackedLayout::kHalfLanes)
          *to = to_float(w[(c / l.ocg * l.icg + ic) * st.n + c % l.ocg * st.c + tap]);
    }
    return;
  }
  // l's inputs are the forward's outputs, and the lanes its inputs.
  const int64_t blocks = l.groups * l.oc_blocks() * l.ic_blocks();
  std::atomic<int64_t> next{0};
  threads(static_cast<int>(std::min<int64_t>(blocks, threads.count)), [&](int) {
    for (int64_t b = next++; b < blocks; b = next++) {
      const int64_t g = b / (l.oc_blocks() * l.ic_blocks());
      const int64_t lane_block = b / l.ic_blocks() % l.oc_blocks(), block = b % l.ic_blocks();
      const int64_t lane0 = lane_block * PackedLayout::kLanes, channel0 = block * l.ic_block;
      if (live_in_group(in_live, g, l.ocg) <= lane0) continue;
      const int64_t rest = live_in_group(out_live, g, l.icg) - channel0, count = l.ic_count(block);
      const int64_t lanes = l.lanes(lane_block), used = std::min(lanes, l.ocg - lane0);
      float* panel = packed + l.panel_at(g, lane_block, block);
      for (int64_t c = 0; c < std::min(rest, count); ++c) {
        const T* from = w + (g * l.icg + channel0 + c) * st.n + lane0 * st.c;
        for (size_t t = 0; t < offset.size(); ++t) {
          float* to = panel + (static_cast<int64_t>(t) * count + c) * lanes;
          const T* tap = from + offset[t];
          if (st.c == 1) {
            for (int64_t i = 0; i < used; ++i) to[i] = to_float(tap[i]);
          } else {
            for (int64_t i = 0; i < used; ++i) to[i] = to_float(tap[i * st.c]);
          }
          std::fill(to + used, to + lanes, 0.0f);
        }
      }
    }
  });
}

// Words of two of the forward's outputs each (core/packing.h), for kernels that multiply them at once.
void pack_turned_pairs(const PrefixConv2dGradParams& p, const Phase& rows, const Phase& cols, const PackedLayout& l,
                       const Threads& threads, float* packed) {
  const Strides4& st = p.weight_stride;
  const int64_t in_live = largest(p.in_prefix, p.shape.n, p.shape.c_in);
  const int64_t out_live = largest(p.out_prefix, p.shape.n, p.shape.c_out);
  const uint16_t* w = static_cast<const uint16_t*>(p.weight);
  const std::vector<int64_t> offset = turned_taps(rows, cols, st, l);
  const int64_t blocks = l.oc_blocks() * l.ic_blocks();
  std::atomic<int64_t> next{0};
  threads(static_cast<int>(std::min<int64_t>(blocks, threads.count)), [&](int) {
    for (int64_t b = next++; b < blocks; b = next++) {
      const int64_t lane_block = b / l.ic_blocks(), block = b % l.ic_blocks();
      const int64_t lane0 = lane_block * PackedLayout::kLanes, channel0 = 2 * block * l.ic_block;
      if (in_live <= lane0) continue;
      const int64_t count = l.ic_count(block), used = std::min(count, (out_live - channel0 + 1) / 2);
      const int64_t lanes = l.lanes(lane_block), whole = std::min(lanes, l.ocg - lane0);
      uint32_t* panel = reinterpret_cast<uint32_t*>(packed + l.panel_at(0, lane_block, block));
      for (int64_t c = 0; c < used; ++c) {
        const uint16_t* first = w + (channel0 + 2 * c) * st.n + lane0 * st.c;
        const bool both = channel0 + 2 * c + 1 < l.icg;
        for (size_t t = 0; t < offset.size(); ++t) {
          uint32_t* to = panel + (static_cast<int64_t>(t) * count + c) * lanes;
          const uint16_t *low = first + offset[t], *high = both ? low + st.n : nullptr;
          if (st.c == 1 && both) {
            for (int64_t i = 0; i < whole; ++i) to[i] = low[i] | static_cast<uint32_t>(high[i]) << 16;
          } else {
            for (int64_t i = 0; i < whole; ++i)
              to[i] = low[i * st.c] | (both ? static_cast<uint32_t>(high[i * st.c]) << 16 : 0);
          }
          std::fill(to + whole, to + lanes, 0u);
        }
      }
    }
  });
}

void pack(const PrefixConv2dGradParams& p, const Phase& rows, const Phase& cols, const PackedLayout& l,
          const Threads& threads, float* packed) {
  if (l.pairs) return pack_turned_pairs(p, rows, cols, l, threads, packed);
  switch (p.dtype) {
    case DType::kBFloat16:
      return pack_turned<BFloat16>(p, rows, cols, l, threads, packed);
    case DType::kFloat16:
      return pack_turned<Float16>(p, rows, cols, l, threads, packed);
    case DType::kFloat32:
    case DType::kFloat64:  // refused by the binding
      return pack_turned<float>(p, rows, cols, l, threads, packed);
  }
}

// Of a 1x1 kernel in float32, for the kernels that read weights as they are: [input channel of the forward][output
// channels of its group], as far as any sample needs them. In blocks, or each line would be fetched 16 times.
void transpose(const PrefixConv2dGradParams& p, int64_t tap, float* to) {
  const ConvShape& s = p.shape;
  const Strides4& st = p.weight_stride;
  constexpr int64_t kBlock = 16;
  const float* w = static_cast<const float*>(p.weight) + tap;
  for (int64_t g = 0; g < s.groups; ++g) {
    const int64_t in = live_in_group(largest(p.in_prefix, s.n, s.c_in), g, s.group_in());
    const int64_t out = live_in_group(largest(p.out_prefix, s.n, s.c_out), g, s.group_out());
    float* group = to + g * s.group_in() * s.group_out();
    for (int64_t i0 = 0; i0 < in; i0 += kBlock)
      for (int64_t o0 = 0; o0 < out; o0 += kBlock)
        for (int64_t i = i0; i < std::min(in, i0 + kBlock); ++i)
          for (int64_t o = o0; o < std::min(out, o0 + kBlock); ++o)
            group[i * s.group_out() + o] = w[(g * s.group_out() + o) * st.n + i * st.c];
  }
}

// The convolution that one pair of phases is.
PrefixConv2dParams convolution(const PrefixConv2dGradParams& p, const Phase& rows, const Phase& cols, int64_t element) {
  const ConvShape& s = p.shape;
  PrefixConv2dParams c;
  c.dtype = p.dtype;
  c.shape.n = s.n;
  c.shape.c_in = s.c_out;
  c.shape.c_out = s.c_in;
  c.shape.groups = s.groups;
  c.shape.h = rows.size;
  c.shape.w = cols.size;
  c.shape.kh = rows.taps;
  c.shape.kw = cols.taps;
  c.shape.out_h = rows.count;
  c.shape.out_w = cols.count;
  c.shape.dilation_h = rows.dilation;
  c.shape.dilation_w = cols.dilation;
  c.shape.pad_top = rows.pad;
  c.shape.pad_left = cols.pad;
  c.shape.pad_bottom = rows.count + (rows.taps - 1) * rows.dilation - rows.size - rows.pad;
  c.shape.pad_right = cols.count + (cols.taps - 1) * cols.dilation - cols.size - cols.pad;
  const Strides4 &from = p.grad_output_stride, &to = p.grad_input_stride;
  c.input = static_cast<const char*>(p.grad_output) + (rows.skip * from.h + cols.skip * from.w) * element;
  c.input_stride = from;
  c.output = static_cast<char*>(p.grad_input) + (rows.first * to.h + cols.first * to.w) * element;
  c.output_stride = {to.n, to.c, to.h * s.stride_h, to.w * s.stride_w};
  c.in_prefix = p.out_prefix;
  c.out_prefix = p.in_prefix;
  return c;
}

// The weights of a convolution of stride 1, turned as in pack_turned and transformed; none where Winograd is not to be
// used.
const float* transform_turned(const PrefixConv2dGradParams& p, PrefixConv2dParams& c, const Threads& threads) {
  const ConvShape& s = c.shape;
  if (!transforms_in_call(s, c.dtype)) return nullptr;
  const int64_t in_live = largest(c.in_prefix, s.n, s.c_in), out_live = largest(c.out_prefix, s.n, s.c_out);
  c.winograd_tile = winograd_tile(s, c.dtype);
  if (in_live == 0 || out_live == 0) return nullptr;
  const Strides4& st = p.weight_stride;
  const float* last_tap = static_cast<const float*>(p.weight) + (s.kh - 1) * st.h + (s.kw - 1) * st.w;
  return transform_for_call({last_tap, c.dtype, {st.c, st.n, -st.h, -st.w}}, {c.winograd_tile, s.c_in, s.c_out, s.kh},
                            threads, in_live, out_live);
}

// Groups: packed one after the other, which pairs have not been taught.
PackedLayout layout_of(const PrefixConv2dParams& c, const PrefixConv2dGradParams& p) {
  return c.shape.groups == 1 ? layout_in_use(c.shape, p.dtype) : PackedLayout(c.shape);
}

// The weights of one pair of phases, at `weights` unless Winograd takes all samples.
void give_weights(const PrefixConv2dGradParams& p, const Phase& row, const Phase& col, const Threads& threads,
                  float* weights, PrefixConv2dParams& c) {
  if (p.shape.stride_h * p.shape.stride_w == 1) c.winograd = transform_turned(p, c, threads);
  const PackedLayout layout = layout_of(c, p);
  c.pairs = layout.pairs;
  c.weight = weights;
  c.weight_stride = {p.shape.group_out(), 1, 1, 1};
  if (multiplies_planes(c) && !layout.small_groups()) {
    transpose(p, row.tap * p.weight_stride.h + col.tap * p.weight_stride.w, weights);
  } else {
    c.weight = nullptr;
    c.packed = weights;
    if (!c.winograd || !WinogradSamples(c).all()) pack(p, row, col, layout, threads, weights);
  }
}

// Samples n … n + count - 1 of a call.
PrefixConv2dParams part_of(PrefixConv2dParams c, int64_t n, int64_t count, int64_t element) {
  c.shape.n = count;
  c.input = static_cast<const char*>(c.input) + n * c.input_stride.n * element;
  c.output = static_cast<char*>(c.output) + n * c.output_stride.n * element;
  if (c.in_prefix) c.in_prefix += n;
  if (c.out_prefix) c.out_prefix += n;
  return c;
}

// The convolutions of all pairs of phases; with `clear` grad_input, which no phase covers then, becomes zero before.
// Each of several convolutions reads all of grad_output and writes some pixels of every line of grad_input, so they
// take turns on as many samples as lie in a core's cache, each thread on samples of its own.
void run(const PrefixConv2dGradParams& p, const std::vector<PrefixConv2dParams>& calls, bool clear, int64_t element,
         const Threads& threads) {
  constexpr int64_t kBytes = 512 << 10;  // half of the smallest L2 in use; 1 MB is level where L2 has 2
  const ConvShape& s = p.shape;
  const int64_t grad_input = s.c_in * s.h * s.w * element, sample = grad_input + s.c_out * s.out_h * s.out_w * element;
  const auto clear_samples = [&](int64_t n, int64_t count) {
    if (clear)
      std::memset(static_cast<char*>(p.grad_input) + n * grad_input, 0, static_cast<size_t>(count * grad_input));
  };
  const int64_t together = std::max<int64_t>(kBytes / sample, 1), groups = (s.n + together - 1) / together;
  if ((calls.size() <= 1 && !clear) || groups < 2 * threads.count) {
    clear_samples(0, s.n);
    for (const PrefixConv2dParams& c : calls) prefix_conv2d(c, threads);
    return;
  }
  const Threads alone;
  std::atomic<int64_t> next{0};
  threads(threads.count, [&](int) {
    for (int64_t n = together * next++; n < s.n; n = together * next++) {
      const int64_t count = std::min(together, s.n - n);
      clear_samples(n, count);
      for (const PrefixConv2dParams& c : calls) prefix_conv2d(part_of(c, n, count, element), alone);
    }
  });
}

}  // namespace

void prefix_conv2d_input_grad(const PrefixConv2dGradParams& p, const Threads& threads) {
  const ConvShape& s = p.shape;
  const int64_t element = p.dtype == DType::kFloat32 ? 4 : 2;
  if (s.n * s.c_in * s.h * s.w == 0) return;
  bool clear = false;
  std::vector<std::pair<Phase, Phase>> pairs;
  for (const Phase& row : phases(s.h, s.out_h, s.kh, s.stride_h, s.pad_top, s.dilation_h))
    for (const Phase& col : phases(s.w, s.out_w, s.kw, s.stride_w, s.pad_left, s.dilation_w)) {
      if (row.taps > 0 && col.taps > 0)
        pairs.emplace_back(row, col);
      else
        clear = true;
    }

  std::vector<PrefixConv2dParams> calls;
  std::vector<int64_t> places{0};
  for (const auto& [row, col] : pairs) {
    calls.push_back(convolution(p, row, col, element));
    places.push_back(places.back() + (layout_of(calls.back(), p).total_floats() + 15) / 16 * 16);
  }
  static thread_local ScratchMemory scratch;
  float* const weights = scratch.get(static_cast<size_t>(places.back()));
  for (size_t i = 0; i < calls.size(); ++i) {
    give_weights(p, pairs[i].first, pairs[i].second, threads, weights + places[i], calls[i]);
    calls[i].tail = clear ? Tail::kSkip : Tail::kZero;
    calls[i].sum_kernel_rows = true;  // torch's sums are short here, on some shapes one chain for each tap
  }
  run(p, calls, clear, element, threads);
}

}  // namespace rnp::cpu
