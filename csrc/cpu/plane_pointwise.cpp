#include "cpu/plane_pointwise.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "core/packing.h"
#include "cpu/call.h"
#include "cpu/epilogue.h"
#include "cpu/prefetch.h"
#include "cpu/work_queue.h"

namespace rnp::cpu {
namespace {

// Floats of an item's panels, of an L2 of 1 MB: 160 KB where its weights stay there, the next item's input arriving
// beside them; otherwise more, since each item reads all weights from farther away.
constexpr int64_t kChunkFloats = 40960, kLargeChunkFloats = 98304;
constexpr int64_t kMostPixels = 1024;    // of an item
constexpr double kItemsPerThread = 4;    // enough for "longest first" to balance mixed prefixes
constexpr int64_t kFewestChannels = 28;  // output channels of an item: each copies all of its pixels

// Weights 2 KB apart share two sets of L1: those of a tile are copied side by side, a line more than a block apart.
constexpr int64_t kAliased = 512;
constexpr int64_t kCopiedStep = PackedLayout::choose_ic_block(1) + 16;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct Item {
  int64_t n, g;
  int64_t pixel0, pixel1;      // output positions
  int64_t channel0, channel1;  // live output channels of the group
  bool tail;                   // also writes the group's channels beyond the prefix, in all positions
  double cost;                 // about cycles of a vector unit
};

class PlaneCall {
 public:
  PlaneCall(const PrefixConv2dParams& p, const Kernels& kernels)
      : p_(p),
        s_(p.shape),
        k_(kernels),
        panel_(2 * kernels.plane_lanes),
        positions_(s_.out_h * s_.out_w),
        strided_(s_.stride_h * s_.stride_w > 1) {
    stream_ = k_.streams && reinterpret_cast<uintptr_t>(p.output) % 64 == 0 && p.output_stride.n % 16 == 0 &&
              p.output_stride.c % 16 == 0 && input_displaces_output(p, positions_, sizeof(float));
  }

  void run(const Threads& threads, const std::function<float*(size_t)>& scratch) {
    list_items(threads.count);
    int64_t need = 0;
    double cost = 0;
    for (const Item& item : items_) {
      need = std::max(need, panel_floats(item) + sum_floats(item) + kMaxCols * kCopiedStep);
      cost += item.cost;
    }
    const int workers = useful_workers(cost, items_.size(), threads);
    float* memory = scratch(static_cast<size_t>(need * workers));
    hand_out(items_.size(), workers, threads, [&](int worker) {
      return [this, own = memory + worker * need](size_t i, size_t following) {
        run_item(items_[i], following < items_.size() ? &items_[following] : nullptr, own);
      };
    });
  }

  // The sums of all rows. An item's pixels begin and end within rows, so they are read again.
  void sum(const Threads& threads, float* row_sums) const {
    hand_out(static_cast<size_t>(s_.n),
             useful_workers(static_cast<double>(s_.n * positions_ * s_.c_out), s_.n, threads), threads, [&](int) {
               return [&](size_t n, size_t) {
                 if (p_.elsewhere && p_.elsewhere[n]) return;
                 const int64_t written = p_.tail == Tail::kSkip ? p_.out_live(static_cast<int64_t>(n)) : s_.c_out;
                 if (written > 0) sum_rows(p_, static_cast<int64_t>(n), 0, s_.out_h, 0, written, row_sums);
               };
             });
  }

 private:
  int64_t in_live(const Item& item) const { return live_in_group(p_.in_live(item.n), item.g, s_.group_in()); }
  int64_t whole_panels(int64_t pixels) const { return ceil_div(pixels, panel_) * panel_; }
  int64_t panel_floats(const Item& item) const { return in_live(item) * whole_panels(item.pixel1 - item.pixel0); }
  int64_t sum_floats(const Item& item) const {  // sums of one tile's channels, of every panel
    return in_live(item) > kBlock ? k_.max_cols * whole_panels(item.pixel1 - item.pixel0) : 0;
  }

  void list_items(int threads) {
    const auto cost_of = [&](double pixels, int64_t in, int64_t out) {
      return pixels * static_cast<double>(in) * (static_cast<double>(out) / 16 + 0.5);
    };
    double whole = 0;
    const auto each_group = [&](const auto& f) {
      for (int64_t n = 0; n < s_.n; ++n)
        if (!p_.elsewhere || !p_.elsewhere[n])
          for (int64_t g = 0; g < s_.groups; ++g)
            f(n, g, live_in_group(p_.in_live(n), g, s_.group_in()), live_in_group(p_.out_live(n), g, s_.group_out()));
    };
    each_group(
        [&](int64_t, int64_t, int64_t in, int64_t out) { whole += cost_of(static_cast<double>(positions_), in, out); });
    each_group([&](int64_t n, int64_t g, int64_t in, int64_t out) {
      const int64_t panels = ceil_div(positions_, panel_),
                    floats = weights_stay(in, out) ? kChunkFloats : kLargeChunkFloats;
      const int64_t fitting = std::clamp<int64_t>(floats / std::max<int64_t>(1, in), panel_, kMostPixels) / panel_;
      const double share = whole > 0 ? cost_of(static_cast<double>(positions_), in, out) / whole : 0;
      const int64_t wanted = threads > 1 ? static_cast<int64_t>(std::ceil(share * threads * kItemsPerThread - 0.3)) : 1;
      const int64_t chunks = std::clamp<int64_t>(std::max(ceil_div(panels, fitting), wanted), 1, panels);
      const int64_t ranges = std::clamp<int64_t>(wanted / chunks, 1, std::max<int64_t>(1, out / kFewestChannels));
      for (int64_t c = 0; c < chunks; ++c) {
        for (int64_t r = 0; r < ranges; ++r) {
          Item item{n,
                    g,
                    panels * c / chunks * panel_,
                    std::min(positions_, panels * (c + 1) / chunks * panel_),
                    out * r / ranges,
                    out * (r + 1) / ranges,
                    c == 0 && r == 0,
                    0};
          item.cost = cost_of(static_cast<double>(item.pixel1 - item.pixel0), in, item.channel1 - item.channel0) +
                      (item.tail ? static_cast<double>(positions_ * (s_.group_out() - out)) / 8 : 0);
          items_.push_back(item);
        }
      }
    });
    std::stable_sort(items_.begin(), items_.end(), [](const Item& a, const Item& b) { return a.cost > b.cost; });
  }

  const float* input_of(const Item& item) const {
    return static_cast<const float*>(p_.input) + item.n * p_.input_stride.n +
           item.g * s_.group_in() * p_.input_stride.c;
  }

  // Every stride-th pixel of the item, from the planes of the first `live` channels: as Kernels::copy_planes.
  void copy_strided(const Item& item, int64_t live, float* to) const {
    const int64_t pixels = item.pixel1 - item.pixel0;
    for (int64_t c = 0; c < live; ++c) {
      const float* plane = input_of(item) + c * p_.input_stride.c;
      int64_t y = item.pixel0 / s_.out_w, x = item.pixel0 % s_.out_w;
      for (int64_t first = 0; first < pixels; first += panel_) {
        const int64_t left = pixels - first, width = left > panel_ / 2 ? panel_ : panel_ / 2;
        float* panel = to + first * live + c * width;
        for (int64_t i = 0; i < width;) {
          const int64_t run = std::min({left - i, s_.out_w - x, width - i});
          if (run <= 0) {
            std::fill(panel + i, panel + width, 0.0f);
            break;
          }
          const float* from = plane + y * s_.stride_h * p_.input_stride.h + x * s_.stride_w;
          if (s_.stride_w == 2)
            k_.copy_every_second(from, run, panel + i);
          else
            for (int64_t j = 0; j < run; ++j) panel[i + j] = from[j * s_.stride_w];
          i += run;
          if ((x += run) == s_.out_w) x = 0, ++y;
        }
      }
    }
  }

  // Asks for an item's input, spread over so many calls.
  Prefetcher fetch(const Item* item, int64_t calls) const {
    if (!item) return {};
    constexpr int64_t kFloat = sizeof(float);
    const float* from = input_of(*item);
    const int64_t plane = p_.input_stride.c * kFloat;
    const auto at = [](const float* p) { return reinterpret_cast<const char*>(p); };
    if (!strided_)
      return {at(from + item->pixel0), in_live(*item), plane, 1, 0, (item->pixel1 - item->pixel0) * kFloat, calls};
    const int64_t row0 = item->pixel0 / s_.out_w, row1 = ceil_div(item->pixel1, s_.out_w);
    const int64_t step = s_.stride_h * p_.input_stride.h;
    return {at(from + row0 * step), in_live(*item), plane, row1 - row0, step * kFloat, s_.w * kFloat, calls};
  }

  void run_item(const Item& item, const Item* following, float* scratch) const {
    const int64_t live = in_live(item), pixels = item.pixel1 - item.pixel0;
    const int64_t channels = item.channel1 - item.channel0, channel = item.g * s_.group_out() + item.channel0;
    if (channels > 0) {
      if (strided_)
        copy_strided(item, live, scratch);
      else
        k_.copy_planes(input_of(item) + item.pixel0, p_.input_stride.c, live, pixels, scratch);
      const int64_t blocks = std::max<int64_t>(1, ceil_div(live, kBlock));
      const int64_t tiles = ceil_div(channels, k_.max_cols), panels = ceil_div(pixels, panel_);
      Prefetcher next = fetch(following, tiles * blocks * panels);
      for (int64_t t = 0; t < tiles; ++t) {  // of nearly equal numbers of channels
        const int64_t first = channels * t / tiles, count = channels * (t + 1) / tiles - first;
        multiply(item, channel + first, count, live, scratch, scratch + panel_floats(item), next);
      }
    }
    if (item.tail) {
      const int64_t group0 = item.g * s_.group_out();
      fill_tail(p_, item.n, 0, s_.out_h, group0 + live_in_group(p_.out_live(item.n), item.g, s_.group_out()),
                group0 + s_.group_out());
    }
  }

  // Output channels [channel, channel + count) of all the item's pixels.
  void multiply(const Item& item, int64_t channel, int64_t count, int64_t live, const float* panels, float* sums,
                Prefetcher& next) const {
    const int64_t line = p_.row ? p_.row[item.n] : 0;
    const auto table = [&](const void* data, int64_t row_stride) {
      return data ? static_cast<const float*>(data) + line * row_stride + channel : nullptr;
    };
    const bool aliased = p_.weight_stride.n % kAliased == 0;
    float* copied = sums + sum_floats(item);
    PlaneTileArgs a = {};
    a.w_step = aliased ? kCopiedStep : p_.weight_stride.n;
    a.out_step = p_.output_stride.c;
    a.residual_step = p_.residual_stride.c;
    a.scale = table(p_.scale, p_.scale_row_stride);
    a.bias = table(p_.bias, p_.bias_row_stride);
    a.relu = p_.activation == Activation::kRelu;
    float* out = static_cast<float*>(p_.output) + item.n * p_.output_stride.n + channel * a.out_step + item.pixel0;
    const float* residual = p_.residual ? static_cast<const float*>(p_.residual) + item.n * p_.residual_stride.n +
                                              channel * a.residual_step + item.pixel0
                                        : nullptr;
    const float* weight = static_cast<const float*>(p_.weight) + channel * p_.weight_stride.n;
    const int64_t pixels = item.pixel1 - item.pixel0, blocks = std::max<int64_t>(1, ceil_div(live, kBlock));
    for (int64_t b = 0; b < blocks; ++b) {  // a block's weights stay in L1 while all panels pass
      a.w = weight + b * kBlock;
      a.count = std::min(live - b * kBlock, kBlock);
      if (aliased) {
        for (int64_t c = 0; c < count; ++c)
          std::copy_n(a.w + c * p_.weight_stride.n, a.count, copied + c * kCopiedStep);
        a.w = copied;
      }
      a.first = b == 0;
      a.last = b == blocks - 1;
      for (int64_t first = 0; first < pixels; first += panel_) {
        const int64_t left = pixels - first, vectors = left > panel_ / 2 ? 2 : 1;
        a.x = panels + first * live + b * kBlock * vectors * k_.plane_lanes;
        a.partial = sums + first * k_.max_cols;
        a.pixels = static_cast<int>(std::min(left, panel_));
        a.out = out + first;
        a.residual = residual ? residual + first : nullptr;
        a.stream = stream_;
        next.step();
        k_.plane[vectors - 1][count - 1](a);
      }
    }
  }

  static constexpr int64_t kBlock =
      PackedLayout::choose_ic_block(1);  // of input channels that are summed by themselves

  const PrefixConv2dParams& p_;
  const ConvShape& s_;
  const Kernels& k_;
  const int64_t panel_, positions_;  // pixels of a panel, and of a map
  const bool strided_;
  bool stream_;
  std::vector<Item> items_;
};

}  // namespace

bool multiplies_planes(const PrefixConv2dParams& p) {
  const ConvShape& s = p.shape;
  const auto planes = [&](const Strides4& st, int64_t width) { return st.w == 1 && st.c != 1 && st.h == width; };
  return plane_products(s) && p.dtype == DType::kFloat32 && p.weight && p.weight_stride.c == 1 &&
         planes(p.input_stride, s.w) && planes(p.output_stride, s.out_w) &&
         (!p.residual || planes(p.residual_stride, s.out_w)) && !p.input_pixel && !p.output_pixel && !p.residual_pixel;
}

void plane_pointwise(const PrefixConv2dParams& p, const Kernels& kernels, const Threads& threads,
                     const std::function<float*(size_t)>& scratch, float* row_sums) {
  PlaneCall call(p, kernels);
  call.run(threads, scratch);
  if (row_sums) call.sum(threads, row_sums);
}

}  // namespace rnp::cpu
