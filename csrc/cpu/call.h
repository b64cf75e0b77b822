// What the items of one call share.
#pragma once

#include <numeric>
#include <type_traits>

#include "core/processor.h"
#include "core/schedule.h"
#include "cpu/band.h"
#include "cpu/microkernel.h"

namespace rnp::cpu {

// Outputs that span more bytes than this are stored past the caches: they would be gone before anyone reads them, and a
// store through the caches reads its line first. Half of what eight cores of a server share; what the system reports is
// not asked, since under a hypervisor it can be ten times too large.
constexpr int64_t kStreamAbove = int64_t{16} << 20;

// Channels between the pixels of all samples together.
inline int64_t output_channels(const PrefixConv2dParams& p) {
  return p.output_pixel ? std::accumulate(p.output_pixel, p.output_pixel + p.shape.n, int64_t{0})
                        : p.shape.n * p.shape.c_out;
}

// 1x1 and depthwise: so are outputs of calls that read and write pixels of more than this, where more than kFewBytes of
// the output are live. Dead lines between live ones count: the hardware fetches many of them. Depthwise layers have
// few products to hide a line's fetching behind, and gain earlier.
constexpr int64_t kStreamPointwiseAbove = int64_t{12} << 20, kStreamDepthwiseAbove = int64_t{5} << 20;
constexpr int64_t kFewBytes = int64_t{2} << 20;

// Whether such a call's own input, `input_pixels` of each sample, would drive the output from the caches. A segment's
// compact maps are made to stay, and the means read the output again.
inline bool input_displaces_output(const PrefixConv2dParams& p, int64_t input_pixels, int64_t element,
                                   int64_t above = kStreamPointwiseAbove) {
  const ConvShape& s = p.shape;
  const int64_t pixel_bytes = s.out_h * s.out_w * element;
  if (p.pooled || p.output_pixel || s.n * (s.c_in * input_pixels * element + s.c_out * pixel_bytes) <= above)
    return false;
  int64_t live = 0;
  for (int64_t n = 0; n < s.n; ++n) live += p.out_live(n);
  return live * pixel_bytes > kFewBytes;
}

// Whether that holds for this call. The means read the output again.
inline bool streams_past_caches(const PrefixConv2dParams& p) {
  const ConvShape& s = p.shape;
  const int64_t element = p.dtype == DType::kFloat64 ? 8 : p.dtype == DType::kFloat32 ? 4 : 2;
  return !p.pooled && output_channels(p) * s.out_h * s.out_w * element > kStreamAbove;
}

// The wide tiles, if they are the ones to use where `left` output channels are left from the beginning of a block on.
// They read weights for every six pixels; a row that is one tile of the others, or shares one, reads them more rarely.
// (1x1: rows run on.)
inline const TileWidth* wide_tiles(const Kernels& kernels, const ConvShape& s, int64_t left) {
  if (s.kh * s.kw > 1 && s.out_w <= kernels.max_cols) return nullptr;
  return kernels.wide_for(left, processor().paired_multiply_adds);
}

// Rows of fewer pixels are not worth tiles of their own.
constexpr int64_t kFewestRowPixels = 7;

struct Call {
  const PrefixConv2dParams& p;
  PackedLayout layout;
  const Kernels& kernels;
  bool direct_output;  // tiles store their results; otherwise they leave sums, and finish_patch does the rest
  bool flat;           // 1x1: a band is one long row of pixels
  bool direct_input;   // tiles read the input tensor itself
  bool panels;         // 1x1: items whose weights stay in L2 copy their pixels tile by tile
  bool stream;         // tiles may store past the caches
  int64_t element;     // bytes of an element of input, residual and output

  Call(const PrefixConv2dParams& params, const Kernels& k)
      : p(params), layout(params.shape, params.pairs), kernels(k), element(p.dtype == DType::kFloat32 ? 4 : 2) {
    const ConvShape& s = p.shape;
    const bool f32 = p.dtype == DType::kFloat32, own_type = f32 || p.pairs;  // of tensors that the tiles read and write
    flat = s.kh == 1 && s.kw == 1;
    const bool flat_output = p.output_pixel || p.output_stride.h == s.out_w * p.output_stride.w;
    const bool flat_residual = !p.residual || p.residual_pixel || p.residual_stride.h == s.out_w * p.residual_stride.w;
    direct_output = own_type && p.output_stride.c == 1 && (!p.residual || p.residual_stride.c == 1) &&
                    (!flat || (flat_output && flat_residual));
    const bool padded = s.pad_top + s.pad_bottom + s.pad_left + s.pad_right > 0;
    const bool readable = own_type && (f32 || whole_words()) && flat && !padded && p.input_stride.c == 1;
    if (f32) {
      direct_input =
          readable && !pixels_share_a_set(p) && (contiguous_pixels() || (direct_output && s.out_w >= kFewestRowPixels));
    } else {  // Pixels 2 KB apart share a few sets of L1.
      direct_input = readable && contiguous_pixels() && p.input_stride.w * element % 2048 != 0;
    }
    panels = f32 && readable && !direct_input && direct_output && kernels.copy_panel;
    // Every pixel of a group begins a cache line.
    const bool aligned = reinterpret_cast<uintptr_t>(p.output) % 64 == 0 && p.output_stride.n % 16 == 0 &&
                         layout.ocg % 16 == 0 &&
                         (p.output_pixel || (p.output_stride.w % 16 == 0 && p.output_stride.h % 16 == 0));
    stream = kernels.streams && direct_output && aligned &&
             (streams_past_caches(p) || (flat && input_displaces_output(p, s.out_h * s.out_w, element)));
  }

  // Tensors are addressed by bytes: input and output may hold bfloat16, whatever the pointers' type.
  template <typename P>
  P* advance(P* pointer, int64_t elements) const {
    using Byte = std::conditional_t<std::is_const_v<P>, const char, char>;
    return reinterpret_cast<P*>(reinterpret_cast<Byte*>(pointer) + elements * element);
  }
  // Floats (or words) between neighbours that are `elements` apart in the input.
  int64_t input_step(int64_t elements) const { return p.pairs ? elements / 2 : elements; }
  // Whether every live channel of every sample is part of a word that holds nothing else.
  bool whole_words() const {
    bool odd = p.input_stride.w % 2 != 0;
    for (int64_t n = 0; n < p.shape.n; ++n) odd = odd || p.in_live(n) % 2 != 0;
    return !odd;
  }

  // One step leads from each pixel of a sample to the next.
  bool contiguous_pixels() const {
    const ConvShape& s = p.shape;
    return s.stride_h == 1 && s.stride_w == 1 && (p.input_pixel || p.input_stride.h == s.w * p.input_stride.w);
  }
  int64_t in_words(const WorkItem& item) const { return p.words(live_in_group(p.in_live(item.n), item.g, layout.icg)); }
  int64_t band_floats(const WorkItem& item) const {
    if (direct_input) return 0;
    const int64_t live = in_words(item);
    if (uses_panels(item)) return 2 * panel_floats(live);
    return (BandGeometry(p.shape, item.row0, item.row1).pixels() * live + 15) / 16 * 16;
  }
  int64_t panel_floats(int64_t in_live) const {
    return (in_live + kPanelChunk - 1) / kPanelChunk * kPanelChunk * kMaxCols;
  }
  bool weights_stay(const WorkItem& item) const {
    return rnp::weights_stay(live_in_group(p.in_live(item.n), item.g, layout.icg),
                             live_in_group(p.out_live(item.n), item.g, layout.ocg));
  }
  // Likewise of an item from `block` on: two blocks of it, whose tiles store their results.
  const TileWidth* wide_from(const WorkItem& item, int64_t block) const {
    if (!direct_output || item.block1 - block < 2) return nullptr;
    return wide_tiles(kernels, p.shape,
                      live_in_group(p.out_live(item.n), item.g, layout.ocg) - block * PackedLayout::kLanes);
  }
  bool uses_panels(const WorkItem& item) const { return panels && weights_stay(item); }
  // Whether a pass of a tile may: it must fill whole lines.
  bool streams(int64_t live) const { return stream && live >= 16 && live % 16 == 0; }
  // Sums of a block of output channels, [pixel][32], and of the next.
  int64_t block_floats(const WorkItem& item) const {
    return (item.row1 - item.row0) * p.shape.out_w * PackedLayout::kLanes;
  }
  int64_t sum_floats(const WorkItem& item) const { return (kernels.wide.lanes ? 2 : 1) * block_floats(item); }
};

}  // namespace rnp::cpu
