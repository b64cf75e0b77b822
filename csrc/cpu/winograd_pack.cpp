#include <algorithm>
#include <atomic>
#include <cstring>

#include "cpu/kernels.h"
#include "cpu/scratch.h"
#include "cpu/winograd.h"

namespace rnp::cpu {
namespace {

struct Header {
  int32_t words[PackedLayout::kHeaderWords];

  explicit Header(const WinogradLayout& l) : words{} {
    const int64_t fields[] = {WinogradLayout::kMagic, WinogradLayout::kVersion, l.tile, l.c_out, l.c_in, l.kernel};
    for (size_t i = 0; i < std::size(fields); ++i) words[i] = static_cast<int32_t>(fields[i]);
  }
};

constexpr int64_t kMaxEdge = 7, kMaxTaps = WinogradFilterArgs::kMaxTaps;
using FilterMatrix = double[kMaxEdge][kMaxTaps];

// The row of G that belongs to a finite point x, where n is the product of its distances to the others.
void point_row(double x, double n, int64_t taps, double* row) {
  for (int64_t k = 0; k < taps; ++k, n /= x) row[k] = 1 / n;
}

// G[point][tap]; see winograd.h.
void filter_matrix(const WinogradLayout& l, FilterMatrix& g) {
  const auto with_points = [&](auto points, double c) {  // 0, +-a, +-b, then c unless it is 0, infinity
    using P = decltype(points);
    const int64_t taps = l.taps();
    g[0][0] = c != 0 ? -1 / c : 1;
    for (int i = 0; i < 2; ++i) {
      const double other = i ? P::p : P::q;
      for (int sign = 0; sign < 2; ++sign) {
        const double x = (i ? P::b : P::a) * (sign ? -1 : 1);
        point_row(x, 2 * x * x * (x * x - other) * (c != 0 ? x - c : 1), taps, g[1 + 2 * i + sign]);
      }
    }
    if (c != 0) point_row(c, c * (c * c - P::p) * (c * c - P::q), taps, g[5]);
    g[l.edge() - 1][taps - 1] = 1;
  };
  if (l.folded()) return with_points(WinogradPoints<4>{}, 1);
  if (l.tile == 4) return with_points(WinogradPoints<3>{}, 0);
  g[0][0] = g[3][2] = 1;
  point_row(1, 2, 3, g[1]);
  point_row(-1, 2, 3, g[2]);
}

// The filters of one channel, of what is summed over, and the first `live` output channels from `w` on.
void gather(const WinogradLayout& l, const float* w, const Strides4& st, int64_t channel, int64_t live,
            WinogradFilterArgs& a) {
  const int64_t ic = channel % l.c_in, phase = channel / l.c_in, step = l.folded() ? 2 : 1;
  for (int64_t oc = 0; oc < live; ++oc)
    for (int64_t j = 0; j < l.taps(); ++j)
      for (int64_t k = 0; k < l.taps(); ++k) {
        const int64_t y = j * step + phase / 2, x = k * step + phase % 2;
        a.tap[j][k][oc] =
            y < l.kernel && x < l.kernel ? static_cast<double>(w[oc * st.n + ic * st.c + y * st.h + x * st.w]) : 0;
      }
}

void transform_block(const float* w, const Strides4& st, const WinogradLayout& l, const FilterMatrix& g, int64_t block,
                     int64_t channels, float* packed) {
  const int64_t lanes = l.lanes(block), first = block * PackedLayout::kLanes;
  const auto transform = kernels_of(current_isa()).winograd.filter[l.folded() ? 2 : l.tile == 4 ? 1 : 0];
  WinogradFilterArgs a = {};
  a.g = g[0];
  a.lanes = lanes;
  a.point_step = l.panel_at(block, 1) - l.panel_at(block, 0);
  for (int64_t c = 0; c < channels; ++c) {
    gather(l, w + first * st.n, st, c, std::min(lanes, l.c_out - first), a);
    a.to = packed + l.panel_at(block, 0) + c * lanes;
    transform(a);
  }
}

}  // namespace

void pack_winograd(const WeightView& weight, const WinogradLayout& l, float* packed, const Threads& threads,
                   int64_t in_live, int64_t out_live) {
  const Header header(l);
  std::memcpy(packed, &header, sizeof(header));
  std::fill(packed + PackedLayout::kHeaderWords, packed + l.data_at(), 0.0f);
  ConvShape s;
  s.c_in = l.c_in, s.c_out = l.c_out, s.kh = s.kw = l.kernel;
  write_fingerprint(weight, PackedLayout(s), packed);
  FilterMatrix g = {};
  filter_matrix(l, g);
  const int64_t channels = l.folded() ? l.channels() : std::min(in_live, l.c_in);
  const int64_t blocks = (std::min(out_live, l.c_out) + PackedLayout::kLanes - 1) / PackedLayout::kLanes;
  std::atomic<int64_t> next{0};
  threads(static_cast<int>(std::min<int64_t>(blocks, threads.count)), [&](int) {
    for (int64_t b = next++; b < blocks; b = next++)
      transform_block(static_cast<const float*>(weight.data), weight.stride, l, g, b, channels, packed);
  });
}

const float* transform_for_call(const WeightView& weight, const WinogradLayout& layout, const Threads& threads,
                                int64_t in_live, int64_t out_live) {
  static thread_local ScratchMemory memory;
  float* transformed = memory.get(static_cast<size_t>(layout.total_floats()));
  pack_winograd(weight, layout, transformed, threads, in_live, out_live);
  return transformed;
}

const char* winograd_mismatch(const float* packed, int64_t floats, int64_t c_out, int64_t c_in, int64_t kernel,
                              int64_t* tile) {
  if (floats < PackedLayout::kHeaderWords) return "it is too small to be the result of pack_winograd";
  Header found(WinogradLayout{});
  std::memcpy(static_cast<void*>(&found), packed, sizeof(found));
  if (found.words[0] != WinogradLayout::kMagic) return "it is not the result of pack_winograd";
  if (found.words[1] != WinogradLayout::kVersion) return "it was made by another version of this library";
  const WinogradLayout expected{found.words[2], c_in, c_out, kernel};
  if (found.words[3] != c_out || found.words[4] != c_in || found.words[5] != kernel)
    return "it was made for another weight shape";
  if ((expected.tile != 2 && expected.tile != 4) || (expected.folded() && (expected.tile != 4 || c_in > 4)) ||
      (kernel != 3 && kernel != 7) || floats != expected.total_floats())
    return "its size does not belong to this weight";
  *tile = expected.tile;
  return nullptr;
}

}  // namespace rnp::cpu
