#include <algorithm>
#include <atomic>
#include <cstring>

#include "cpu/winograd.h"

namespace rnp::cpu {
namespace {

struct Header {
  int32_t words[PackedLayout::kHeaderWords];

  explicit Header(const WinogradLayout& l) : words{} {
    const int64_t fields[] = {WinogradLayout::kMagic, WinogradLayout::kVersion, l.tile, l.c_out, l.c_in};
    for (size_t i = 0; i < std::size(fields); ++i) words[i] = static_cast<int32_t>(fields[i]);
  }
};

// G[point][3]; see winograd.h.
void filter_matrix(int64_t tile, double (&g)[6][3]) {
  using P = WinogradPoints;
  const auto row = [&](int i, double c0, double c1, double c2) { g[i][0] = c0, g[i][1] = c1, g[i][2] = c2; };
  if (tile == 2) {
    row(0, 1, 0, 0);
    row(1, 0.5, 0.5, 0.5);
    row(2, 0.5, -0.5, 0.5);
    row(3, 0, 0, 1);
    return;
  }
  row(0, 1 / (P::p * P::q), 0, 0);
  for (int i = 0; i < 2; ++i) {
    const double x = i ? P::b : P::a, other = i ? P::p : P::q, n = 2 * x * x * (x * x - other);
    row(1 + 2 * i, 1 / n, x / n, x * x / n);
    row(2 + 2 * i, 1 / n, -x / n, x * x / n);
  }
  row(5, 0, 0, 1);
}

void transform_block(const float* w, const Strides4& st, const WinogradLayout& l, const double (&g)[6][3],
                     int64_t block, float* packed) {
  const int64_t lanes = l.lanes(block), first = block * PackedLayout::kLanes;
  const int64_t live = std::min(lanes, l.c_out - first), edge = l.edge(),
                panel = l.panel_at(block, 1) - l.panel_at(block, 0);
  float* base = packed + l.panel_at(block, 0);
  std::memset(base, 0, sizeof(float) * static_cast<size_t>(panel * l.points()));
  for (int64_t ic = 0; ic < l.c_in; ++ic)
    for (int64_t oc = 0; oc < live; ++oc) {
      const float* from = w + (first + oc) * st.n + ic * st.c;
      double half[6][3];
      for (int64_t i = 0; i < edge; ++i)
        for (int64_t j = 0; j < 3; ++j) {
          half[i][j] = 0;
          for (int64_t k = 0; k < 3; ++k) half[i][j] += g[i][k] * static_cast<double>(from[k * st.h + j * st.w]);
        }
      float* to = base + ic * lanes + oc;
      for (int64_t i = 0; i < edge; ++i)
        for (int64_t j = 0; j < edge; ++j, to += panel)
          *to = static_cast<float>(half[i][0] * g[j][0] + half[i][1] * g[j][1] + half[i][2] * g[j][2]);
    }
}

}  // namespace

void pack_winograd(const WeightView& weight, const WinogradLayout& l, float* packed, const Threads& threads) {
  const Header header(l);
  std::memcpy(packed, &header, sizeof(header));
  std::fill(packed + PackedLayout::kHeaderWords, packed + l.data_at(), 0.0f);
  ConvShape s;
  s.c_in = l.c_in, s.c_out = l.c_out, s.kh = s.kw = 3;
  write_fingerprint(weight, PackedLayout(s), packed);
  double g[6][3] = {};
  filter_matrix(l.tile, g);
  std::atomic<int64_t> next{0};
  threads(static_cast<int>(std::min<int64_t>(l.oc_blocks(), threads.count)), [&](int) {
    for (int64_t b = next++; b < l.oc_blocks(); b = next++)
      transform_block(static_cast<const float*>(weight.data), weight.stride, l, g, b, packed);
  });
}

const char* winograd_mismatch(const float* packed, int64_t floats, int64_t c_out, int64_t c_in, int64_t* tile) {
  if (floats < PackedLayout::kHeaderWords) return "it is too small to be the result of pack_winograd";
  Header found(WinogradLayout{});
  std::memcpy(static_cast<void*>(&found), packed, sizeof(found));
  if (found.words[0] != WinogradLayout::kMagic) return "it is not the result of pack_winograd";
  if (found.words[1] != WinogradLayout::kVersion) return "it was made by another version of this library";
  const WinogradLayout expected{found.words[2], c_in, c_out};
  if (found.words[3] != c_out || found.words[4] != c_in) return "it was made for another weight shape";
  if ((expected.tile != 2 && expected.tile != 4) || floats != expected.total_floats())
    return "its size does not belong to this weight";
  *tile = expected.tile;
  return nullptr;
}

}  // namespace rnp::cpu
