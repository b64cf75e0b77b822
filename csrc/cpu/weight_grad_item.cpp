// Packs grad_output and the input into panels, unit by unit, and multiplies two panels over the positions they share,
// tap by tap. Each position that lies in the padding for a tap is left out.
#include "cpu/weight_grad_item.h"

#include <algorithm>
#include <cstring>
#include <type_traits>
#include <vector>

#include "cpu/kernels.h"
#include "cpu/prefetch.h"
#include "cpu/with_type.h"

namespace rnp::cpu {
namespace {

int64_t clamp_live(int64_t prefix, int64_t group, int64_t size, int64_t first, int64_t count) {
  return std::clamp<int64_t>(live_in_group(prefix, group, size) - first, 0, count);
}

// One row: `cols` pixels of `live` channels into panels of W channels, `panel_step` apart; the last panel is filled up
// with zeros.
template <int W, typename T>
void pack_row(CopyPixels copy, const T* from, int64_t pixel_stride, int64_t channel_stride, int64_t cols, int64_t live,
              int64_t panel_step, float* to) {
  int64_t whole = 0;  // channels of whole panels that are copied as they are
  if constexpr (std::is_same_v<T, float>)
    if (channel_stride == 1)
      for (; whole + W <= live; whole += W) copy(from + whole, pixel_stride, cols, W, W, to + whole / W * panel_step);
  constexpr int64_t kBlock = 8;  // pixels: the lines of a pixel are still in L1 when its next panel is read
  for (int64_t x0 = 0; x0 < cols && whole < live; x0 += kBlock) {
    const int64_t x1 = std::min(cols, x0 + kBlock);
    for (int64_t c = whole; c < live; c += W) {
      float* panel = to + c / W * panel_step;
      const T* pixels = from + c * channel_stride;
      if (live - c < W) {
        for (int64_t x = x0; x < x1; ++x)
          for (int64_t i = 0; i < W; ++i)
            panel[x * W + i] = c + i < live ? to_float(pixels[x * pixel_stride + i * channel_stride]) : 0.0f;
      } else if (channel_stride != 1) {
        for (int64_t i = 0; i < W; ++i)
          for (int64_t x = x0; x < x1; ++x) panel[x * W + i] = to_float(pixels[x * pixel_stride + i * channel_stride]);
      } else {
        for (int64_t x = x0; x < x1; ++x)
          for (int64_t i = 0; i < W; ++i) panel[x * W + i] = to_float(pixels[x * pixel_stride + i]);
      }
    }
  }
}

// The same where pixels, not channels, are neighbours.
template <int W>
void pack_planes(Transpose transpose, const float* from, int64_t channel_stride, int64_t cols, int64_t live,
                 int64_t panel_step, float* to) {
  constexpr int64_t kAtOnce = 8;
  for (int64_t c = 0; c < (live + W - 1) / W * W; c += kAtOnce) {
    float* panel = to + c / W * panel_step + c % W;
    if (live - c >= kAtOnce) {
      transpose(from + c * channel_stride, channel_stride, kAtOnce, cols, panel, W);
      continue;
    }
    for (int64_t i = 0; i < kAtOnce; ++i)
      for (int64_t x = 0; x < cols; ++x) panel[x * W + i] = c + i < live ? from[(c + i) * channel_stride + x] : 0.0f;
  }
}

// One item at work: its memory, and what is live of it in each image of the unit.
class ItemRun {
 public:
  ItemRun(const PrefixConv2dGradParams& p, const WeightGradPlan& plan, const WeightGradKernels& kernels,
          const GradItem& item, float* packed, float* sums)
      : p_(p),
        plan_(plan),
        kernels_(kernels),
        copy_(kernels_of(current_isa()).copy_pixels),
        item_(item),
        s_(p.shape),
        x_(packed),
        g_(packed + plan.input_floats),
        sums_(sums) {}

  void operator()() {
    std::memset(sums_, 0, sizeof(float) * static_cast<size_t>(grad_blocks(item_) * block_floats()));
    const int64_t last = plan_.slots[item_.slot + 1] - 1;
    for (int64_t u = plan_.slots[item_.slot]; u <= last; ++u) {
      const GradUnit& unit = plan_.units[u];
      if (!look(unit)) continue;
      with_type(p_.dtype, [&](auto tag) { pack<decltype(tag)>(unit); });
      next_.clear();
      if (u < last) prefetch(plan_.units[u + 1], unit);
      for (int64_t i = 0; i < unit.images; i += plan_.chunk_images)
        for (int64_t r = unit.row0; r < unit.row1; r += plan_.chunk_rows)
          add_chunk(unit, i, std::min(unit.images, i + plan_.chunk_images), r,
                    std::min(unit.row1, r + plan_.chunk_rows));
    }
  }

 private:
  int64_t block_floats() const { return grad_block_floats(item_, s_.kh * s_.kw); }
  int64_t out_live(int64_t image) const {
    return clamp_live(p_.out_live(image), item_.group, s_.group_out(), item_.out0, item_.out_count);
  }
  int64_t in_live(int64_t image) const {
    return clamp_live(p_.in_live(image), item_.group, s_.group_in(), item_.in0, item_.in_count);
  }

  // Has the tiles of `now` fetch what will be packed of `unit`: packing from memory took a third of a 1x1 layer's time.
  // On every processor: none prefetches past what is packed while tiles compute.
  void prefetch(const GradUnit& unit, const GradUnit& now) {
    const Strides4 &x = p_.input_stride, &g = p_.grad_output_stride;
    const bool pixels = x.c == 1 && g.c == 1, planes = x.w == 1 && g.w == 1;
    if (!pixels && !planes) return;
    const int64_t element = p_.dtype == DType::kFloat32 ? 4 : 2, rows = unit.row1 - unit.row0;
    const auto chunks = [](int64_t size, int64_t chunk) { return (size + chunk - 1) / chunk; };
    const int64_t calls = chunks(now.images, plan_.chunk_images) * chunks(now.row1 - now.row0, plan_.chunk_rows) *
                          grad_blocks(item_) * grad_panels(item_);
    const int64_t y_step = s_.stride_h, y0 = std::max<int64_t>(0, unit.row0 * y_step - s_.pad_top);
    const int64_t y1 = std::min(s_.h, (unit.row1 - 1) * y_step - s_.pad_top + (s_.kh - 1) * s_.dilation_h + 1);
    const int64_t row_step = plan_.rows.step, col_step = plan_.cols.step;
    for (int64_t i = 0; i < unit.images; ++i) {
      const int64_t n = plan_.order[unit.image0 + i], ins = in_live(n), outs = out_live(n);
      if (ins == 0 || outs == 0) continue;
      const char* input = static_cast<const char*>(p_.input) +
                          (n * x.n + (item_.group * s_.group_in() + item_.in0) * x.c + y0 * x.h) * element;
      const char* grad = static_cast<const char*>(p_.grad_output) +
                         (n * g.n + (item_.group * s_.group_out() + item_.out0) * g.c + unit.row0 * g.h) * element;
      if (pixels) {
        next_.emplace_back(input, chunks(y1 - y0, row_step), row_step * x.h * element, chunks(s_.w, col_step),
                           col_step * x.w * element, ins * element, calls);
        next_.emplace_back(grad, rows, g.h * element, s_.out_w, g.w * element, outs * element, calls);
      } else {
        next_.emplace_back(input, ins, x.c * element, chunks(y1 - y0, row_step), row_step * x.h * element,
                           s_.w * element, calls);
        next_.emplace_back(grad, outs, g.c * element, rows, g.h * element, s_.out_w * element, calls);
      }
    }
  }

  // The input rows that the unit's output rows read; false if nothing of the item is live in it.
  bool look(const GradUnit& unit) {
    y0_ = s_.h, y1_ = 0;
    for (int64_t k = 0; k < s_.kh; ++k) {
      const int64_t first = std::max(unit.row0, plan_.rows.taps[k].first);
      const int64_t last = std::min(unit.row1, plan_.rows.taps[k].end) - 1;
      if (first > last) continue;
      const int64_t offset = k * s_.dilation_h - s_.pad_top;
      y0_ = std::min(y0_, first * s_.stride_h + offset);
      y1_ = std::max(y1_, last * s_.stride_h + offset + 1);
    }
    x0_ = s_.kw == 1 ? plan_.cols.taps[0].first * s_.stride_w - s_.pad_left : 0;
    cols_ = s_.kw == 1 ? plan_.cols.taps[0].end - plan_.cols.taps[0].first : s_.w;
    rows_ = y1_ <= y0_ ? 0 : (y1_ - y0_ - 1) / plan_.rows.step + 1;
    bool any = false;
    for (int64_t i = 0; i < unit.images; ++i) {
      const int64_t n = plan_.order[unit.image0 + i];
      any = any || (out_live(n) > 0 && in_live(n) > 0);
    }
    return any && rows_ > 0 && cols_ > 0;
  }

  template <int W, typename T>
  void pack(const T* from, int64_t pixel_stride, int64_t channel_stride, int64_t cols, int64_t live, int64_t panel_step,
            float* to) const {
    if constexpr (std::is_same_v<T, float>)
      if (pixel_stride == 1 && channel_stride != 1 && kernels_.transpose)
        return pack_planes<W>(kernels_.transpose, from, channel_stride, cols, live, panel_step, to);
    pack_row<W>(copy_, from, pixel_stride, channel_stride, cols, live, panel_step, to);
  }

  template <typename T>
  void pack(const GradUnit& unit) {
    const Strides4 &from = p_.input_stride, &grad = p_.grad_output_stride;
    const int64_t out_rows = unit.row1 - unit.row0;
    x_image_ = rows_ * cols_ * kGradPanel;
    x_panel_ = unit.images * x_image_;
    g_image_ = out_rows * s_.out_w * kGradLanes;
    g_block_ = unit.images * g_image_;
    // Rows that follow each other in memory are one.
    const bool whole = cols_ * plan_.cols.step * from.w == plan_.rows.step * from.h;
    const bool whole_grad = s_.out_w * grad.w == grad.h;
    for (int64_t i = 0; i < unit.images; ++i) {
      const int64_t n = plan_.order[unit.image0 + i], ins = in_live(n), outs = out_live(n);
      if (ins == 0 || outs == 0) continue;
      const T* x = static_cast<const T*>(p_.input) + n * from.n + (item_.group * s_.group_in() + item_.in0) * from.c;
      for (int64_t r = 0; r < (whole ? 1 : rows_); ++r)
        pack<kGradPanel>(x + (y0_ + r * plan_.rows.step) * from.h + x0_ * from.w, plan_.cols.step * from.w, from.c,
                         whole ? rows_ * cols_ : cols_, ins, x_panel_, x_ + i * x_image_ + r * cols_ * kGradPanel);
      const T* g =
          static_cast<const T*>(p_.grad_output) + n * grad.n + (item_.group * s_.group_out() + item_.out0) * grad.c;
      for (int64_t r = 0; r < (whole_grad ? 1 : out_rows); ++r)
        pack<kGradLanes>(g + (unit.row0 + r) * grad.h, grad.w, grad.c, whole_grad ? out_rows * s_.out_w : s_.out_w,
                         outs, g_block_, g_ + i * g_image_ + r * s_.out_w * kGradLanes);
    }
  }

  // Images of a unit of which some part of the item is live, one behind the other.
  struct Run {
    int64_t image0, image1;
    int64_t lanes, channels;  // the most that any of them has of the part

    bool of_the_images_of(const Run& other) const { return image0 == other.image0 && image1 == other.image1; }
  };

  // The first run of one panel of the input and one of grad_output in [image0, image1); empty where nothing is live.
  Run run_from(const GradUnit& unit, int64_t block, int64_t panel, int64_t image0, int64_t image1) const {
    Run run = {image0, image0, 0, 0};
    for (int64_t i = image0; i < image1; ++i) {
      const int64_t n = plan_.order[unit.image0 + i];
      const int64_t lanes = std::min(kGradLanes, out_live(n) - block * kGradLanes);
      const int64_t channels = std::min(kGradPanel, in_live(n) - panel * kGradPanel);
      if (lanes > 0 && channels > 0) {
        run.lanes = std::max(run.lanes, lanes), run.channels = std::max(run.channels, channels);
        run.image1 = i + 1;
      } else if (run.image1 > run.image0) {
        break;
      } else {
        run.image0 = run.image1 = i + 1;
      }
    }
    return run;
  }

  // Images [image0, image1) of the unit, output rows [row0, row1).
  void add_chunk(const GradUnit& unit, int64_t image0, int64_t image1, int64_t row0, int64_t row1) {
    const int64_t blocks = grad_blocks(item_), at_once = kernels_.pair.lanes ? 2 : 1;
    for (int64_t b = 0; b < blocks; b += at_once) {
      const int64_t count = std::min(at_once, blocks - b);
      for (int64_t panel = 0; panel < grad_panels(item_); ++panel) {
        for (int64_t k = 0; k < count; ++k)
          for (Prefetcher& prefetcher : next_) prefetcher.step();
        // Two blocks share a run of images: one chain of additions is the same as two.
        int64_t from[2] = {image0, image0};
        while (from[0] < image1 || from[1] < image1) {
          Run run[2];
          for (int64_t k = 0; k < count; ++k) run[k] = run_from(unit, b + k, panel, from[k], image1);
          if (count == 2 && run[0].of_the_images_of(run[1]) && run[1].lanes > kernels_.narrow.lanes) {
            add_taps(unit, kernels_.pair, b, 0, panel, run[0], row0, row1);
          } else {
            for (int64_t k = 0; k < count; ++k)
              for (int64_t lane = 0; lane < run[k].lanes; lane += kernels_.broad.lanes)
                add_taps(unit, kernels_.for_lanes(run[k].lanes - lane), b + k, lane, panel, run[k], row0, row1);
          }
          from[0] = run[0].image1, from[1] = count == 2 ? run[1].image1 : image1;
        }
      }
    }
  }

  // The lanes of `tiles` from `lane` of a block on, all taps.
  void add_taps(const GradUnit& unit, const WeightGradTiles& tiles, int64_t block, int64_t lane, int64_t panel,
                const Run& run, int64_t row0, int64_t row1) {
    WeightGradArgs a;
    a.images = run.image1 - run.image0;
    a.x_image_step = x_image_;
    a.x_row_step = plan_.rows.out_step * cols_ * kGradPanel;
    a.x_col_step = plan_.cols.out_step * kGradPanel;
    a.g_image_step = g_image_;
    a.g_row_step = s_.out_w * kGradLanes;
    a.g_panel_step = g_block_;
    a.sums_panel_step = block_floats();
    const float* x = x_ + panel * x_panel_ + run.image0 * x_image_;
    const float* g = g_ + block * g_block_ + run.image0 * g_image_ + lane;
    float* sums = sums_ + block * block_floats() + panel * s_.kh * s_.kw * kGradPanel * kGradLanes + lane;
    for (int64_t i = 0; i < s_.kh; ++i) {
      const int64_t first = std::max(row0, plan_.rows.taps[i].first);
      a.rows = std::min(row1, plan_.rows.taps[i].end) - first;
      const int64_t y = (first * s_.stride_h + i * s_.dilation_h - s_.pad_top - y0_) / plan_.rows.step;
      for (int64_t j = 0; j < s_.kw; ++j, sums += kGradPanel * kGradLanes) {
        const TapRange& range = plan_.cols.taps[j];
        a.cols = range.end - range.first;
        if (a.rows <= 0 || a.cols <= 0) continue;
        const int64_t from = (range.first * s_.stride_w + j * s_.dilation_w - s_.pad_left - x0_) / plan_.cols.step;
        a.g = g + ((first - unit.row0) * s_.out_w + range.first) * kGradLanes;
        for (int64_t c = 0; c < run.channels; c += tiles.max_channels) {
          a.x = x + (y * cols_ + from) * kGradPanel + c;
          a.sums = sums + c * kGradLanes;
          tiles.tile[std::min<int64_t>(run.channels - c, tiles.max_channels) - 1](a);
        }
      }
    }
  }

  const PrefixConv2dGradParams& p_;
  const WeightGradPlan& plan_;
  const WeightGradKernels& kernels_;
  const CopyPixels copy_;
  const GradItem& item_;
  const ConvShape& s_;
  float *x_, *g_, *sums_;
  std::vector<Prefetcher> next_;                            // of the unit behind the one at work
  int64_t y0_ = 0, y1_ = 0, x0_ = 0, rows_ = 0, cols_ = 0;  // the packed part of the input
  int64_t x_image_ = 0, x_panel_ = 0, g_image_ = 0, g_block_ = 0;
};

}  // namespace

void sum_item(const PrefixConv2dGradParams& p, const WeightGradPlan& plan, const WeightGradKernels& kernels,
              const GradItem& item, float* packed, float* sums) {
  ItemRun(p, plan, kernels, item, packed, sums)();
}

}  // namespace rnp::cpu
