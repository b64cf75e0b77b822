#include "cpu/pack_weight.h"

#include <algorithm>
#include <atomic>
#include <bit>
#include <cstring>
#include <vector>

#include "core/half.h"
#include "cpu/isa.h"

namespace rnp::cpu {
namespace {

// One filter's input channels [first, first + count), all taps, as [ic][tap] floats.
template <typename T>
void read_filter(const T* w, const Strides4& st, const PackedLayout& l, int64_t first, int64_t count, float* to) {
  const int64_t area = l.area();
  w += first * st.c;
  if (st.w == 1 && st.h == l.kw && st.c == area) {
    for (int64_t i = 0; i < count * area; ++i) to[i] = static_cast<float>(to_float(w[i]));
    return;
  }
  for (int64_t i = 0; i < l.kh; ++i)
    for (int64_t j = 0; j < l.kw; ++j)
      for (int64_t ic = 0; ic < count; ++ic)
        to[ic * area + i * l.kw + j] = static_cast<float>(to_float(w[ic * st.c + i * st.h + j * st.w]));
}

// One lane of a word: two weights that are bfloat16 values, hence without rounding.
float pair_of(float first, float second) {
  return std::bit_cast<float>(std::bit_cast<uint32_t>(first) >> 16 | (std::bit_cast<uint32_t>(second) & 0xffff0000u));
}

// The first `in_live` input channels of a block of lanes. A few channels of all its filters are staged side by side:
// read where they lie, they would share a few sets of L1, and so would the panel's taps if they were written in turn.
template <typename T>
void pack_block(const T* w, const Strides4& st, const PackedLayout& l, int64_t g, int64_t ob, int64_t in_live,
                float* packed) {
  constexpr int64_t kStaged = 144;  // values of a filter
  const int64_t lanes = l.lanes(ob), first = g * l.ocg + ob * PackedLayout::kLanes, area = l.area();
  const int64_t live = std::min(lanes, l.ocg - ob * PackedLayout::kLanes);
  const int64_t step = l.pairs ? 2 : 1;  // channels of a word
  in_live = std::min(l.icg, (in_live + step - 1) / step * step);
  const int64_t chunk = std::max<int64_t>(1, kStaged / area / step) * step, pitch = chunk * area + 4;
  std::vector<float> staged(static_cast<size_t>(PackedLayout::kLanes * pitch));  // lanes without a filter stay 0
  for (int64_t ib = 0; ib * l.ic_block * step < in_live; ++ib) {
    float* panel = packed + l.panel_at(g, ob, ib);
    const int64_t panel_words = l.ic_count(ib), ic_first = ib * l.ic_block * step;
    const int64_t used = std::min({panel_words * step, in_live - ic_first, l.icg - ic_first});
    for (int64_t ic0 = 0; ic0 < used; ic0 += chunk) {
      const int64_t count = std::min(chunk, used - ic0);
      for (int64_t oc = 0; oc < live; ++oc)
        read_filter(w + (first + oc) * st.n, st, l, ic_first + ic0, count, staged.data() + oc * pitch);
      for (int64_t t = 0; t < area; ++t)
        for (int64_t ic = 0; ic < count; ic += step) {
          const float* from = staged.data() + ic * area + t;
          float* to = panel + (t * panel_words + (ic0 + ic) / step) * lanes;
          if (!l.pairs) {
            for (int64_t oc = 0; oc < lanes; ++oc) to[oc] = from[oc * pitch];
          } else {
            const bool both = ic + 1 < count;
            for (int64_t oc = 0; oc < lanes; ++oc)
              to[oc] = pair_of(from[oc * pitch], both ? from[oc * pitch + area] : 0.0f);
          }
        }
    }
  }
}

// Calls f(filter, value) with one element of every filter. The position steps through input channels and taps at once,
// without divisions: this runs at every call.
template <typename T, typename F>
void for_samples(const T* w, const Strides4& st, const PackedLayout& l, F&& f) {
  int64_t ic = 0, i = 0, j = 0;
  for (int64_t oc = 0; oc < l.groups * l.ocg; ++oc) {
    f(oc, static_cast<float>(to_float(w[oc * st.n + ic * st.c + i * st.h + j * st.w])));
    if (++ic == l.icg) ic = 0;
    if (++i == l.kh) {
      i = 0;
      if (++j == l.kw) j = 0;
    }
  }
}

template <typename T>
void pack_typed(const T* w, const Strides4& st, const PackedLayout& l, float* packed, const Threads& threads,
                int64_t in_live, int64_t out_live) {
  const int64_t c_out = l.groups * l.ocg;
  float* samples = packed + l.fingerprint_at();
  for_samples(w, st, l, [&](int64_t oc, float value) { samples[oc] = value; });
  if (l.small_groups()) {
    std::fill(packed + l.data_at(), packed + l.total_floats(), 0.0f);
    for (int64_t c = 0; c < c_out; ++c) {
      float* to = packed + l.lane_at(c);
      for (int64_t i = 0; i < l.kh; ++i)
        for (int64_t j = 0; j < l.kw; ++j)
          for (int64_t ic = 0; ic < l.icg; ++ic, to += PackedLayout::kHalfLanes)
            *to = static_cast<float>(to_float(w[c * st.n + ic * st.c + i * st.h + j * st.w]));
    }
    return;
  }
  const int64_t blocks = l.groups * l.oc_blocks();
  std::atomic<int64_t> next{0};
  threads(static_cast<int>(std::min<int64_t>(blocks, threads.count)), [&](int) {
    for (int64_t b = next++; b < blocks; b = next++) {
      const int64_t g = b / l.oc_blocks(), ob = b % l.oc_blocks();
      if (live_in_group(out_live, g, l.ocg) > ob * PackedLayout::kLanes)
        pack_block(w, st, l, g, ob, live_in_group(in_live, g, l.icg), packed);
    }
  });
}

template <typename T>
bool same_samples(const T* w, const Strides4& st, const PackedLayout& l, const float* packed) {
  const float* samples = packed + l.fingerprint_at();
  uint32_t differs = 0;
  for_samples(w, st, l, [&](int64_t oc, float value) {
    differs |= std::bit_cast<uint32_t>(value) ^ std::bit_cast<uint32_t>(samples[oc]);
  });
  return differs == 0;
}

struct Header {
  int32_t words[PackedLayout::kHeaderWords];

  explicit Header(const PackedLayout& l) : words{} {
    const int64_t fields[] = {
        PackedLayout::kMagic, PackedLayout::kVersion, l.groups, l.ocg, l.icg, l.kh, l.kw, l.ic_block, l.pairs};
    for (size_t i = 0; i < std::size(fields); ++i) words[i] = static_cast<int32_t>(fields[i]);
  }
};
static_assert(sizeof(Header) == sizeof(float) * PackedLayout::kHeaderWords);

template <typename F>
auto with_type(const WeightView& weight, F&& f) {
  switch (weight.dtype) {
    case DType::kFloat64:
      return f(static_cast<const double*>(weight.data));
    case DType::kBFloat16:
      return f(static_cast<const BFloat16*>(weight.data));
    case DType::kFloat16:
      return f(static_cast<const Float16*>(weight.data));
    case DType::kFloat32:
      break;
  }
  return f(static_cast<const float*>(weight.data));
}

}  // namespace

PackedLayout layout_in_use(const ConvShape& s, DType dtype) {
  const PackedLayout words(s, true);
  const bool whole = s.groups == 1 || words.icg % 2 == 0;
  const bool pairs = dtype == DType::kBFloat16 && current_isa() >= Isa::kAvx512Bf16 && whole && !words.small_groups();
  return pairs ? words : PackedLayout(s);
}

StockBFloat16 bfloat16_in_use(const ConvShape& s, DType dtype) {
  if (!layout_in_use(s, dtype).pairs) return StockBFloat16::kConverted;
  return current_isa() == Isa::kAvx512Amx ? StockBFloat16::kTiles : StockBFloat16::kPairs;
}

void pack_weight(const WeightView& weight, const PackedLayout& layout, float* packed, const Threads& threads,
                 int64_t in_live, int64_t out_live) {
  const Header header(layout);
  std::memcpy(packed, &header, sizeof(header));
  // Equal weights give equal packs: no word stays undefined.
  std::fill(packed + layout.fingerprint_at() + layout.groups * layout.ocg, packed + layout.data_at(), 0.0f);
  if (layout.icg == 0 || layout.ocg == 0) return;
  with_type(weight, [&](const auto* w) { pack_typed(w, weight.stride, layout, packed, threads, in_live, out_live); });
}

void write_fingerprint(const WeightView& weight, const PackedLayout& l, float* packed) {
  float* samples = packed + l.fingerprint_at();
  with_type(weight, [&](const auto* w) {
    for_samples(w, weight.stride, l, [&](int64_t oc, float value) { samples[oc] = value; });
  });
}

const char* packed_mismatch(const float* packed, int64_t floats, const PackedLayout& layout) {
  if (floats < PackedLayout::kHeaderWords) return "it is too small to be the result of pack_weight";
  Header found(layout);
  const Header expected(layout);
  std::memcpy(static_cast<void*>(&found), packed, sizeof(found));
  found.words[PackedLayout::kStaleWord] = 0;
  if (found.words[0] != expected.words[0]) return "it is not the result of pack_weight";
  if (found.words[1] != expected.words[1]) return "it was packed by another version of this library";
  if (std::memcmp(&found, &expected, sizeof(found)) != 0)
    return "it was packed for another weight shape or number of groups";
  if (floats != layout.total_floats()) return "its size does not belong to this weight";
  return nullptr;
}

bool packed_is_fresh(const WeightView& weight, const PackedLayout& layout, const float* packed) {
  if (layout.icg == 0 || layout.ocg == 0) return true;
  return with_type(weight, [&](const auto* w) { return same_samples(w, weight.stride, layout, packed); });
}

void mark_stale(const float* packed) {
  int32_t* words = reinterpret_cast<int32_t*>(const_cast<float*>(packed));
  std::atomic_ref<int32_t>(words[PackedLayout::kStaleWord]).store(1, std::memory_order_relaxed);
}

}  // namespace rnp::cpu
