// The packed weights: one copy, in which every input and output prefix is contiguous runs.
//
//   header (kHeaderWords int32) | fingerprint (c_out floats) | padding to a cache line | data
//   data: [group][oc block of 32][ic block][kh][kw][ic][lanes]
//
// Lanes are 32 output channels; the last block of a group has 16 where 16 or fewer channels are left. Unused lanes hold
// 0. An ic block is sized so that a panel (ic block x kh x kw x 32 floats, about 73 KB at 3x3) stays in L2 while the
// output pixels of a band pass over it. Where groups are small (small_groups) lanes are the channels of neighbouring
// groups instead: [16 output channels][kh][kw][ic of the group][16]. All ISAs read this one layout.
//
// For kernels that multiply bfloat16 in pairs (kernels_avx512bf16.cpp) a float of the data is a *word* instead: the
// bfloat16 weights of input channels 2i and 2i + 1, the first in the low half; the second of an odd last channel is 0.
// Whatever is said of ic above is then said of words.
#pragma once

#include <algorithm>
#include <cstdint>

#include "core/prefix_conv2d.h"

namespace rnp {

struct PackedLayout {
  static constexpr int64_t kLanes = 32, kHalfLanes = 16;
  static constexpr int64_t kHeaderWords = 16;
  static constexpr int64_t kStaleWord = 15;  // of the header: not 0 once a call found the pack older than its weight
  static constexpr int32_t kMagic = 0x524e5057, kVersion = 2;

  bool pairs;  // words of two bfloat16 channels
  int64_t groups, icg, ocg, kh, kw;
  int64_t icw;  // input words of a group: icg, or half of it
  int64_t ic_block;

  explicit PackedLayout(const ConvShape& s, bool pairs_ = false)
      : pairs(pairs_),
        groups(s.groups),
        icg(s.group_in()),
        ocg(s.group_out()),
        kh(s.kh),
        kw(s.kw),
        icw(pairs ? (icg + 1) / 2 : icg),
        ic_block(choose_ic_block(kh * kw)) {}

  PackedLayout other() const {  // of the same weights for the other kind of kernels
    PackedLayout out = *this;
    out.pairs = !pairs;
    out.icw = pairs ? icg : (icg + 1) / 2;
    return out;
  }

  static constexpr int64_t choose_ic_block(int64_t area) {
    return area == 1 ? 256 : area <= 9 ? 64 : area <= 25 ? 32 : 16;
  }

  static constexpr int64_t kSmallGroup = 8;  // channels; tiles of 16 lanes would leave half of themselves empty
  bool small_groups() const { return !pairs && groups > 1 && icg <= kSmallGroup && ocg <= kSmallGroup; }
  // Of small groups: floats of 16 output channels, and the place of tap 0 of the first input channel of output channel
  // c.
  int64_t lane_block() const { return area() * icg * kHalfLanes; }
  int64_t lane_at(int64_t c) const { return data_at() + c / kHalfLanes * lane_block() + c % kHalfLanes; }
  int64_t area() const { return kh * kw; }
  int64_t oc_blocks() const { return (ocg + kLanes - 1) / kLanes; }
  int64_t ic_blocks() const { return (icw + ic_block - 1) / ic_block; }
  // Blocks that so many live input words reach; one, of none, where there are none: its sums are the 0 to be stored.
  int64_t live_ic_blocks(int64_t live) const { return std::max<int64_t>(1, (live + ic_block - 1) / ic_block); }
  int64_t lanes(int64_t oc_block) const { return ocg - oc_block * kLanes <= kHalfLanes ? kHalfLanes : kLanes; }
  int64_t ic_count(int64_t ib) const { return std::min(ic_block, icw - ib * ic_block); }

  int64_t fingerprint_at() const { return kHeaderWords; }
  int64_t data_at() const { return (kHeaderWords + groups * ocg + 15) / 16 * 16; }
  int64_t group_floats() const {
    const int64_t full = (oc_blocks() - 1) * kLanes + lanes(oc_blocks() - 1);
    return full * icw * area();
  }
  int64_t total_floats() const {
    return data_at() + (ocg == 0 || icg == 0 ? 0
                        : small_groups()     ? (groups * ocg + 15) / 16 * lane_block()
                                             : groups * group_floats());
  }

  // First float of a panel: [kh][kw][ic][lanes] of one (group, oc block, ic block).
  int64_t panel_at(int64_t g, int64_t ob, int64_t ib) const {
    return data_at() + g * group_floats() + (ob * kLanes * icw + ib * ic_block * lanes(ob)) * area();
  }

  bool operator==(const PackedLayout&) const = default;
};

// Layers of so few input channels that contiguous NCHW is better convolved plane by plane (cpu/grouped.h) than gathered
// into pixels and scattered again. Longer sums would be less accurate in one chain.
inline bool few_channels(const ConvShape& s) {
  return s.groups == 1 && s.c_in <= PackedLayout::kSmallGroup && s.c_in * s.kh * s.kw <= 72 && s.kh * s.kw > 1 &&
         s.stride_w <= 2;
}

// 1x1 layers that contiguous NCHW in float32 computes as products of planes (cpu/plane_pointwise.h). On maps of fewer
// pixels half of the lanes would be empty (7x7).
inline bool plane_products(const ConvShape& s) {
  return s.kh * s.kw == 1 && s.pad_top + s.pad_bottom + s.pad_left + s.pad_right == 0 && s.out_h * s.out_w > 64;
}

}  // namespace rnp
