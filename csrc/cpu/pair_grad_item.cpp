// One item of the weight's gradient in bfloat16. Unit by unit both operands are packed position by position (layout:
// pair_grad_geometry.h), then each tap multiplies a block of output channels with two panels of the input's.
#include <algorithm>
#include <cstring>
#include <vector>

#include "cpu/pair_grad_kernel.h"
#include "cpu/weight_grad_item.h"

namespace rnp::cpu {
namespace {

// Positions of one tensor in a unit. What is not set is zero.
class Positions {
 public:
  void clear(int64_t count) {
    count_ = count;
    runs_.clear();
  }

  // `count` neighbours from position `at` on, `step` values apart.
  void set(int64_t at, int64_t count, const uint16_t* from, int64_t step, int64_t channels) {
    runs_.push_back({at, std::min(count, count_ - at), from, step, channels});
  }

  // Where channels are neighbours: each position by itself. `anywhere` may be read.
  void spread(const uint16_t* anywhere) {
    pixel_.assign(static_cast<size_t>(count_), anywhere);
    live_.assign(static_cast<size_t>(count_), 0);
    for (const Run& run : runs_)
      for (int64_t i = 0; i < run.count; ++i) {
        pixel_[static_cast<size_t>(run.at + i)] = run.from + i * run.step;
        live_[static_cast<size_t>(run.at + i)] = static_cast<int32_t>(run.channels);
      }
  }
  PairPositions some(int64_t at, int64_t count) const { return {pixel_.data() + at, live_.data() + at, count}; }

  // Where they are not: planes of `count` channels from `channel` on.
  void copy_planes(int64_t channel, int64_t count, int64_t channel_stride, uint16_t* to, int64_t to_step) const {
    for (int64_t c = 0; c < count; ++c, to += to_step) {
      std::memset(to, 0, sizeof(uint16_t) * static_cast<size_t>(count_));
      for (const Run& run : runs_) {
        if (channel + c >= run.channels) continue;
        const uint16_t* from = run.from + (channel + c) * channel_stride;
        if (run.step == 1) {
          std::memcpy(to + run.at, from, sizeof(uint16_t) * static_cast<size_t>(std::max<int64_t>(0, run.count)));
        } else {
          for (int64_t i = 0; i < run.count; ++i) to[run.at + i] = from[i * run.step];
        }
      }
    }
  }

  int64_t size() const { return count_; }

 private:
  struct Run {
    int64_t at, count;
    const uint16_t* from;
    int64_t step, channels;
  };
  int64_t count_ = 0;
  std::vector<Run> runs_;
  std::vector<const uint16_t*> pixel_;
  std::vector<int32_t> live_;
};

class PairItemRun {
 public:
  PairItemRun(const PrefixConv2dGradParams& p, const WeightGradPlan& plan, const PairGradKernels& kernels,
              const GradItem& item, float* packed, float* sums)
      : p_(p),
        plan_(plan),
        geometry_(*plan.pairs),
        kernels_(kernels),
        item_(item),
        s_(p.shape),
        x_(reinterpret_cast<uint32_t*>(packed)),
        g_(reinterpret_cast<uint16_t*>(packed + plan.input_floats)),
        staged_(reinterpret_cast<uint16_t*>(packed + plan.input_floats + plan.grad_floats)),
        sums_(sums) {}

  void operator()() {
    std::memset(sums_, 0, sizeof(float) * static_cast<size_t>(pair_blocks(item_) * block_floats()));
    if (kernels_.start) kernels_.start();
    for (int64_t u = plan_.slots[item_.slot]; u < plan_.slots[item_.slot + 1]; ++u) {
      const GradUnit& unit = plan_.units[u];
      if (!look(unit)) continue;
      pack_input(unit);
      pack_grad(unit);
      for (int64_t b = 0; b < pair_blocks(item_); ++b)
        for (int64_t panel = 0; panel < pair_panels(item_); panel += 2) multiply(b, panel);
    }
    if (kernels_.stop) kernels_.stop();
  }

 private:
  int64_t block_floats() const { return pair_block_floats(item_, s_.kh * s_.kw); }

  // What is live of the item in each image of the unit, and where the output's positions of an image end; false if
  // nothing is.
  bool look(const GradUnit& unit) {
    images_.clear();
    bool any = false;
    for (int64_t i = 0; i < unit.images; ++i) {
      const int64_t n = plan_.order[unit.image0 + i];
      const auto live = [&](int64_t prefix, int64_t size, int64_t first, int64_t count) {
        return std::clamp<int64_t>(live_in_group(prefix, item_.group, size) - first, 0, count);
      };
      images_.push_back({n, live(p_.in_live(n), s_.group_in(), item_.in0, item_.in_count),
                         live(p_.out_live(n), s_.group_out(), item_.out0, item_.out_count)});
      any = any || images_.back().used();
    }
    extent_ = geometry_.extent(1, unit.row1 - unit.row0, s_.out_w);
    chunks_ = (geometry_.extent(unit.images, unit.row1 - unit.row0, s_.out_w) + kPairChunk - 1) / kPairChunk;
    return any;
  }

  void pack_input(const GradUnit& unit) {
    const Strides4& st = p_.input_stride;
    const auto* input = static_cast<const uint16_t*>(p_.input) + (item_.group * s_.group_in() + item_.in0) * st.c;
    const int64_t held = geometry_.image / geometry_.pitch();  // rows of an image
    int64_t phase = 0;
    for (const PairAxis::Phase& row : geometry_.rows.phases) {
      for (const PairAxis::Phase& col : geometry_.cols.phases) {
        positions_.clear(geometry_.phase + kPairChunk);  // an odd copy reads one position more
        const Span x = inside(col.first, s_.stride_w, s_.w, geometry_.pitch());
        for (size_t i = 0; i < images_.size() && x.count > 0; ++i) {
          if (!images_[i].used()) continue;
          const int64_t y0 = row.first + unit.row0 * s_.stride_h;
          const Span y = inside(y0, s_.stride_h, s_.h, held);
          for (int64_t r = y.first; r < y.first + y.count; ++r)
            positions_.set(static_cast<int64_t>(i) * geometry_.image + r * geometry_.pitch() + x.first, x.count,
                           input + images_[i].n * st.n + (y0 + r * s_.stride_h) * st.h +
                               (col.first + x.first * s_.stride_w) * st.w,
                           s_.stride_w * st.w, images_[i].in);
        }
        if (st.c == 1) positions_.spread(input);
        for (int64_t b = 0; b < pair_blocks(item_); ++b) {
          if (st.c != 1) positions_.copy_planes(b * kPairLanes, kPairLanes, st.c, staged_, staged_step());
          for (int64_t copy = 0; copy < geometry_.copies; ++copy) {
            uint32_t* to = x_ + (b * geometry_.copies + copy) * copy_step() + phase * geometry_.phase / 2 * kPairLanes;
            if (st.c == 1) {
              kernels_.interleave(positions_.some(copy, geometry_.phase), b * kPairLanes, to);
            } else {
              kernels_.interleave_planes(staged_ + copy, staged_step(), geometry_.phase, to);
            }
          }
        }
        ++phase;
      }
    }
  }

  void pack_grad(const GradUnit& unit) {
    const Strides4& st = p_.grad_output_stride;
    const auto* grad =
        static_cast<const uint16_t*>(p_.grad_output) + (item_.group * s_.group_out() + item_.out0) * st.c;
    positions_.clear(chunks_ * kPairChunk);
    for (size_t i = 0; i < images_.size(); ++i) {
      if (!images_[i].used()) continue;
      for (int64_t r = unit.row0; r < unit.row1; ++r)
        positions_.set(static_cast<int64_t>(i) * geometry_.image + (r - unit.row0) * geometry_.pitch(), s_.out_w,
                       grad + images_[i].n * st.n + r * st.h, st.w, images_[i].out);
    }
    if (st.c == 1) positions_.spread(grad);
    for (int64_t panel = 0; panel < pair_panels(item_); ++panel) {
      uint16_t* to = g_ + panel * kPairPanel * geometry_.plane;
      if (st.c == 1) {
        kernels_.transpose(positions_.some(0, positions_.size()), panel * kPairPanel, to, geometry_.plane);
      } else {
        positions_.copy_planes(panel * kPairPanel, kPairPanel, st.c, to, geometry_.plane);
      }
    }
  }

  // A block of the input and two panels of grad_output, or the last one: all taps, over the chunks in which some image
  // has a part of both.
  void multiply(int64_t block, int64_t panel) {
    const int64_t first_lane = block * kPairLanes, first = panel * kPairPanel;
    // How wide the tile must be does not depend on the chunk: the widest of the unit.
    int64_t lanes = 0, channels = 0, from = 0, end = 0;
    for (const Image& image : images_)
      if (image.in > first_lane && image.out > first) {
        lanes = std::max(lanes, std::min(kPairLanes, image.in - first_lane));
        channels = std::max(channels, std::min(2 * kPairPanel, image.out - first));
      }
    const auto flush = [&] {
      const int64_t all = end - from, parts = (all + kMost - 1) / kMost;
      for (int64_t i = 0; i < parts; ++i)
        add_taps(block, panel, from + all * i / parts, from + all * (i + 1) / parts, lanes, channels);
    };
    for (size_t i = 0; i < images_.size(); ++i) {
      if (images_[i].in <= first_lane || images_[i].out <= first) continue;
      const int64_t at = static_cast<int64_t>(i) * geometry_.image, begin = at / kPairChunk;
      if (begin > end) {
        flush();
        from = begin;
      }
      end = (at + extent_ - 1) / kPairChunk + 1;
    }
    flush();
  }

  void add_taps(int64_t block, int64_t panel, int64_t from, int64_t end, int64_t lanes, int64_t channels) {
    const int64_t panels = channels > kPairPanel ? 2 : 1, area = s_.kh * s_.kw;
    PairGradArgs a;
    a.g = g_ + panel * kPairPanel * geometry_.plane + from * kPairChunk;
    a.g_step = geometry_.plane;
    a.chunks = end - from;
    a.channels = channels - (panels - 1) * kPairPanel;
    a.sums_step = area * kPairPanel * kPairLanes;
    const PairGradTile tile = kernels_.tile[panels - 1][lanes > kPairLanes / 2];
    const uint32_t* x = x_ + block * geometry_.copies * copy_step() + from * (kPairChunk / 2) * kPairLanes;
    float* sums = sums_ + block * block_floats() + panel * a.sums_step;
    for (int64_t copy = 0; copy < geometry_.copies; ++copy, x += copy_step()) {
      a.sums = sums;
      for (const PairAxis::Tap& row : geometry_.rows.taps)
        for (const PairAxis::Tap& col : geometry_.cols.taps) {
          const int64_t begin = geometry_.begin(row, col);
          if (begin % 2 == copy) {
            a.x = x + begin / 2 * kPairLanes;
            tile(a);
          }
          a.sums += kPairPanel * kPairLanes;
        }
    }
  }

  int64_t copy_step() const { return geometry_.all_phases / 2 * kPairLanes; }
  int64_t staged_step() const { return geometry_.phase + kPairChunk; }

  // Positions first … first + count - 1 whose coordinates start + position * step lie in [0, size), of [0, all).
  struct Span {
    int64_t first, count;
  };
  static Span inside(int64_t start, int64_t step, int64_t size, int64_t all) {
    const int64_t first = start >= 0 ? 0 : (-start + step - 1) / step;
    const int64_t end = size - start <= 0 ? 0 : (size - start + step - 1) / step;
    return {first, std::min(end, all) - first};
  }

  struct Image {
    int64_t n, in, out;  // live channels of the item
    bool used() const { return in > 0 && out > 0; }
  };

  // Chunks after which a tap's sums are put down for the next tap's: the operands of so many stay in L1.
  static constexpr int64_t kMost = 12;

  const PrefixConv2dGradParams& p_;
  const WeightGradPlan& plan_;
  const PairGeometry& geometry_;
  const PairGradKernels& kernels_;
  const GradItem& item_;
  const ConvShape& s_;
  uint32_t* x_;       // [block][copy][phase][pair of positions][kPairLanes]
  uint16_t* g_;       // [panel][kPairPanel channels][position]
  uint16_t* staged_;  // a block of the input as planes
  float* sums_;
  std::vector<Image> images_;
  Positions positions_;
  int64_t extent_ = 0, chunks_ = 0;
};

}  // namespace

void sum_pair_item(const PrefixConv2dGradParams& p, const WeightGradPlan& plan, const PairGradKernels& kernels,
                   const GradItem& item, float* packed, float* sums) {
  PairItemRun(p, plan, kernels, item, packed, sums)();
}

}  // namespace rnp::cpu
