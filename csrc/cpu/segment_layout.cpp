#include "cpu/segment_layout.h"

#include <algorithm>
#include <cstring>
#include <set>

namespace rnp::cpu {
namespace {

// Where a prefix comes from: the largest of some indices, as channels of so many in so many groups. Equal origins are
// equal values.
struct Origin {
  std::set<int64_t> slots;
  int64_t channels = 0, actions = 0;

  bool operator==(const Origin&) const = default;
};

Origin larger(Origin a, const Origin& b) {
  a.slots.insert(b.slots.begin(), b.slots.end());
  return a;
}

constexpr int64_t kUnknown = -2;  // no index has this slot: a prefix that no reader names

class Finder {
 public:
  Finder(const SegmentProgram& program, const SegmentMemory& memory)
      : p_(program),
        memory_(memory),
        origins_(size(program.indices)),
        live_(size(program.maps)),
        compact_(size(program.maps), false) {}

  std::vector<bool> find() {
    for (int64_t i = 0; i < p_.indices; ++i) origins_[size(i)].slots = {i};
    for (const SegmentStep& s : p_.steps) write(s);
    // One that cannot takes along the sums it is a side of.
    while (refuse_some()) {
    }
    return compact_;
  }

 private:
  static size_t size(int64_t number) { return static_cast<size_t>(number); }

  Origin origin(int64_t index) const { return index < 0 ? Origin{} : origins_[size(index)]; }  // empty: full width

  void write(const SegmentStep& s) {
    switch (s.op) {
      case SegmentOp::kPrefix:
        if (origin(s.a).actions == 0) origins_[size(s.result)] = {origin(s.a).slots, s.channels, s.actions};
        break;
      case SegmentOp::kLargest: {
        const Origin a = origin(s.a), b = origin(s.b);
        if (a.channels == b.channels && a.actions == b.actions) origins_[size(s.result)] = larger(a, b);
        break;
      }
      case SegmentOp::kDecide:
        origins_[size(s.result)] = {{s.action}, s.channels, s.actions};
        break;
      case SegmentOp::kConv:
        live_[size(s.y)] = s.residual < 0 ? origin(s.out) : of_sum(origin(s.out), live_[size(s.residual)]);
        compact_[size(s.y)] = inside(s.y) && s.groups == 1;
        break;
      case SegmentOp::kMaxPool:
        live_[size(s.y)] = origin(s.in);
        compact_[size(s.y)] = inside(s.y);
        break;
      case SegmentOp::kAdd:
        break;
    }
  }

  static Origin of_sum(const Origin& a, const Origin& b) {
    if (a.slots.empty() || b.slots.empty()) return {};
    if (a.channels == b.channels && a.actions == b.actions) return larger(a, b);
    return {{kUnknown}};
  }

  bool inside(int64_t map) const { return memory_.offset[size(map)] >= 0; }

  bool refuse(int64_t map) {
    const bool before = compact_[size(map)];
    compact_[size(map)] = false;
    return before;
  }

  bool refuse_some() {
    bool any = false;
    for (const SegmentStep& s : p_.steps) {
      if (s.op == SegmentOp::kAdd) {
        any |= refuse(s.x);
        any |= refuse(s.residual);
      } else if (s.op == SegmentOp::kConv || s.op == SegmentOp::kMaxPool) {
        if (s.groups != 1 || origin(s.in) != live_[size(s.x)]) any |= refuse(s.x);
        if (s.residual >= 0 && !sum_can(s)) {
          any |= refuse(s.residual);
          any |= refuse(s.y);
        }
      }
    }
    return any;
  }

  bool sum_can(const SegmentStep& s) const {
    return compact_[size(s.residual)] && compact_[size(s.y)] && residual_stays(p_, s) && s.residual != s.x;
  }

  const SegmentProgram& p_;
  const SegmentMemory& memory_;
  std::vector<Origin> origins_, live_;
  std::vector<bool> compact_;
};

}  // namespace

std::vector<bool> compact_maps(const SegmentProgram& program, const SegmentMemory& memory) {
  return Finder(program, memory).find();
}

bool residual_stays(const SegmentProgram& program, const SegmentStep& sum) {
  const int64_t maker = program.first_use[static_cast<size_t>(sum.residual)];
  if (sum.relu <= 0) return true;
  if (maker < 0) return false;
  const SegmentStep& s = program.steps[static_cast<size_t>(maker)];
  return s.op == SegmentOp::kConv && s.relu > 0;
}

void widen_pixels(const float* from, int64_t from_pixel, float* to, int64_t to_pixel, int64_t pixels, int64_t live,
                  int64_t end) {
  // From the last one: a pixel's new place lies behind all that is still to be moved.
  for (int64_t p = pixels; p-- > 0;) {
    std::memmove(to + p * to_pixel, from + p * from_pixel, static_cast<size_t>(live) * sizeof(float));
    std::fill(to + p * to_pixel + live, to + p * to_pixel + end, 0.0f);
  }
}

}  // namespace rnp::cpu
