#include "cpu/segment_memory.h"

#include <algorithm>

#include "core/winograd.h"

namespace rnp::cpu {
namespace {

// Bytes of weights that a step reads.
int64_t weight_bytes(const SegmentStep& s) {
  if (s.op != SegmentOp::kConv) return 0;
  const int64_t points = s.winograd >= 0 ? WinogradLayout{4, s.c_in, s.c_out, s.kh}.points() : s.kh * s.kw;
  return s.c_in / s.groups * s.c_out * points * int64_t{sizeof(float)};
}

// Maps of a whole batch that are not worth groups: so many times those of a group.
constexpr int64_t kTogether = 4;

// Groups for each thread at least where every thread takes its own: fewer would leave some idle at the end.
constexpr int64_t kGroupsPerThread = 2;

// Samples that should pass through a step together: as many as keep its maps in the caches, yet enough to make the
// weights, read once for each group, cost less than the maps.
int64_t wanted_samples(const SegmentStep& s, const std::vector<MapShape>& shapes, int64_t n, int64_t group_bytes) {
  if (s.y < 0) return n;
  int64_t maps = 0;
  for (int64_t slot : {s.x, s.y, s.residual})
    if (slot >= 0) maps += shapes[static_cast<size_t>(slot)].floats() * int64_t{sizeof(float)};
  if (maps * n <= kTogether * group_bytes) return n;
  return std::clamp<int64_t>(std::max(group_bytes, weight_bytes(s)) / std::max<int64_t>(1, maps), 1, n);
}

// First fit among the blocks in use, which are kept in order.
class Room {
 public:
  int64_t take(int64_t floats) {
    floats = (floats + 15) / 16 * 16;
    int64_t at = 0;
    auto where = used_.begin();
    for (; where != used_.end() && where->first - at < floats; ++where) at = where->end;
    used_.insert(where, {at, at + floats});
    most_ = std::max(most_, at + floats);
    return at;
  }
  void give(int64_t offset) {
    used_.erase(std::find_if(used_.begin(), used_.end(), [&](const Block& b) { return b.first == offset; }));
  }
  int64_t most() const { return most_; }

 private:
  struct Block {
    int64_t first, end;
  };
  std::vector<Block> used_;
  int64_t most_ = 0;
};

}  // namespace

bool pooling_follows(const SegmentProgram& program, const std::vector<MapShape>& shapes, size_t i) {
  if (i + 1 >= program.steps.size()) return false;
  const SegmentStep &s = program.steps[i], &next = program.steps[i + 1];
  if (s.op != SegmentOp::kConv || next.op != SegmentOp::kMaxPool || next.x != s.y || s.winograd < 0) return false;
  if (s.dilation_h * s.dilation_w > 1) return false;  // the outputs of a tile are no neighbours
  const auto has = [&](const std::vector<int64_t>& slots) {
    return std::find(slots.begin(), slots.end(), s.y) != slots.end();
  };
  const MapShape& y = shapes[static_cast<size_t>(s.y)];
  const bool halves = next.kh == 2 && next.kw == 2 && next.stride_h == 2 && next.stride_w == 2 && next.pad_top == 0 &&
                      next.pad_left == 0 && y.h % 2 == 0 && y.w % 2 == 0;
  return halves && program.last_use[static_cast<size_t>(s.y)] == static_cast<int64_t>(i) + 1 && !has(program.map_out) &&
         s.residual < 0 && next.in == s.out;
}

SegmentMemory::SegmentMemory(const SegmentProgram& program, const std::vector<MapShape>& shapes, int64_t n,
                             int64_t group_bytes, int threads)
    : offset(shapes.size(), -1), whole_batch(shapes.size(), true) {
  cut(program, shapes, n, group_bytes, threads);
  place(program, shapes, n);
}

void SegmentMemory::cut(const SegmentProgram& program, const std::vector<MapShape>& shapes, int64_t n,
                        int64_t group_bytes, int threads) {
  // Later layers have smaller maps: groups only grow on the way, so few phases come out.
  const size_t count = program.steps.size();
  std::vector<int64_t> samples(count, n);
  const auto groups = [n](int64_t of) { return n > 0 ? (n + of - 1) / of : 0; };
  int64_t least = n;
  for (size_t i = count; i-- > 0;) {
    least = std::min(least, wanted_samples(program.steps[i], shapes, n, group_bytes));
    // Too few groups to share among the threads: these share each layer instead.
    samples[i] = threads > 1 && groups(least) < kGroupsPerThread * threads ? n : least;
  }
  for (size_t i = 0; i < count; ++i) {
    if (phases.empty() || phases.back().samples != samples[i])
      phases.push_back({i, i, samples[i], samples[i] < n ? threads : 1, 0});
    phases.back().end = i + 1;
  }
}

void SegmentMemory::place(const SegmentProgram& program, const std::vector<MapShape>& shapes, int64_t n) {
  std::vector<bool> outside(shapes.size(), false);
  for (int64_t slot : program.map_in) outside[static_cast<size_t>(slot)] = true;
  for (int64_t slot : program.map_out) outside[static_cast<size_t>(slot)] = true;
  std::vector<int64_t> last(shapes.size());
  for (size_t i = 0; i < last.size(); ++i) last[i] = std::max(program.last_use[i], program.first_use[i]);
  // Both steps may be one: what the first reads must outlive what the second writes.
  std::vector<bool> joined(program.steps.size(), false);
  for (size_t i = 0; i < program.steps.size(); ++i)
    if (pooling_follows(program, shapes, i)) {
      joined[i + 1] = true;
      int64_t& end_of_x = last[static_cast<size_t>(program.steps[i].x)];
      end_of_x = std::max(end_of_x, static_cast<int64_t>(i) + 1);
    }
  Room room;
  for (SegmentPhase& phase : phases) {
    const bool grouped = phase.samples < n;
    const int64_t end = static_cast<int64_t>(phase.end);
    const auto inside = [&](int64_t slot) { return slot >= 0 && !outside[static_cast<size_t>(slot)]; };
    // What outlives a phase of groups must not share memory with anything that a later group writes in it.
    std::vector<int64_t> at_end;
    for (size_t i = phase.first; i < phase.end; ++i) {
      const int64_t y = program.steps[i].y;
      if (!inside(y)) continue;
      whole_batch[static_cast<size_t>(y)] = !grouped || last[static_cast<size_t>(y)] >= end;
      if (grouped && whole_batch[static_cast<size_t>(y)])
        offset[static_cast<size_t>(y)] = room.take(n * sample_room(shapes[static_cast<size_t>(y)]));
    }
    Room group;  // of a group's own maps: each thread has such a room
    for (size_t i = phase.first; i < phase.end; ++i) {
      const SegmentStep& s = program.steps[i];
      const size_t y = static_cast<size_t>(s.y), r = static_cast<size_t>(s.residual);
      const int64_t step = static_cast<int64_t>(i);
      int64_t kept = -1;
      if (inside(s.y) && offset[y] < 0) {
        // A sum is written over its residual, element by element, where nobody reads that again.
        if (inside(s.residual) && s.residual != s.x && last[r] == step && whole_batch[r] == whole_batch[y]) {
          offset[y] = offset[r];
          kept = s.residual;
        } else {
          offset[y] = whole_batch[y] ? room.take(n * sample_room(shapes[y]))
                                     : group.take(phase.samples * sample_room(shapes[y]));
        }
      }
      const int64_t residual = s.residual == s.x ? -1 : s.residual, before = joined[i] ? program.steps[i - 1].x : -1;
      for (int64_t slot : {s.x, residual, s.y, before}) {
        const size_t m = static_cast<size_t>(slot);
        if (!inside(slot) || slot == kept || last[m] != step) continue;
        if (!whole_batch[m]) {
          group.give(offset[m]);
        } else if (grouped) {
          at_end.push_back(offset[m]);
        } else {
          room.give(offset[m]);
        }
      }
    }
    phase.group_floats = group.most();
    if (phase.group_floats > 0) {
      const int64_t at = room.take(phase.places * phase.group_floats);
      for (size_t i = phase.first; i < phase.end; ++i)
        if (inside(program.steps[i].y) && !whole_batch[static_cast<size_t>(program.steps[i].y)])
          offset[static_cast<size_t>(program.steps[i].y)] += at;
      at_end.push_back(at);
    }
    for (int64_t at : at_end) room.give(at);
  }
  floats = room.most();
}

}  // namespace rnp::cpu
