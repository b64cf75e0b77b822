#include "core/stock.h"

#include <algorithm>
#include <atomic>

#include "core/algorithm.h"
#include "core/packing.h"
#include "core/processor.h"

namespace rnp {
namespace {

// oneDNN widens a few NCHW channels to sixteen in a copy of its own: for larger samples that may not fit.
constexpr int64_t kMaxSample = int64_t{1} << 26;

// aten::convolution avoids oneDNN for a single sample that has no more values than this and a kernel of up to 3x3.
constexpr int64_t kFewElements = 20480;

std::atomic<bool> has_float32{false}, has_float16{false};
std::atomic<StockBFloat16> its_bfloat16{StockBFloat16::kNone};

// Contiguous NCHW, 1x1: what plane_pointwise (cpu/plane_pointwise.h) does in less time than torch's path: 0.64 to 0.97
// of it (64 -> 64 to 256 -> 1024 on 112x112 to 14x14 maps, 256 -> 512 in steps of two), where weights 2 KB
// apart or more and small maps leave it level (512 -> 512 and 1024 -> 256 at 14x14) or slower (512 -> 1024 in steps of
// two: up to 1.09). Few outputs do not repay the copy of a large map (32 -> 16 at 112x112: 1.06 at batch 1).
bool plane_products_win(const ConvShape& s) {
  const int64_t positions = s.out_h * s.out_w;
  if (!plane_products(s) || s.group_in() < 16 || s.group_out() < 8) return false;
  if (s.group_out() < 20 && positions > 56 * 56) return false;
  if (s.stride_h * s.stride_w > 1) return s.stride_w <= 2 && s.group_in() <= 256;
  return positions >= 20 * 20 || s.group_in() < 512;
}

// Groups of more than 8 channels, channels_last: ours 0.4 to 1.0 of oneDNN's time (bench/NOTES.md, "Groups of more than
// 8 channels") but where vectors are half empty (9 to 11 channels: 1.0 to 1.3), or full and a group's map is soon done
// (12 to 16 channels on 7x7 maps: 0.7 to 1.2, in steps of two to 7x7 1.0 to 1.3). In bfloat16 an item takes half of the
// time, and 1x1 kernels and narrow groups are level or slower. NCHW: narrow groups on large maps alone repay the
// transposing (10 to 24 channels at 28x28 and more, or in steps of two at 14x14 and more: 0.57 to 1.0; 16 channels at
// 14x14 0.9 to 1.3, 32 channels 0.94 to 1.16).
Stock large_groups_path(const ConvShape& s, DType dtype, bool channels_last) {
  if (!channels_last && dtype == DType::kFloat32 && plane_products_win(s)) return Stock::kNone;
  constexpr int64_t kFewest = 12;
  const int64_t fewest = std::min(s.group_in(), s.group_out()), area = s.kh * s.kw;
  const int64_t positions = s.out_h * s.out_w;
  if (!channels_last && dtype == DType::kFloat32 && area > 1) {
    const bool large = positions >= (s.stride_h * s.stride_w == 1 ? 28 * 28 : 14 * 14);
    const bool narrow = fewest > PackedLayout::kSmallGroup && std::max(s.group_in(), s.group_out()) <= 24;
    return large && narrow ? Stock::kNone : Stock::kOneDnn;
  }
  bool wins = channels_last && fewest >= kFewest;
  if (s.group_out() <= PackedLayout::kHalfLanes && area > 1) wins = wins && positions >= 14 * 14;
  // A tile of 16 channels has two reads for a pair of multiply-adds and its weights: 16 to 24 channels on 56x56 to
  // 14x14 maps of a Xeon 0.86 to 1.4 of oneDNN's time, 32 channels 0.7 to 1.0.
  if (processor().paired_multiply_adds && area > 1) wins = wins && fewest >= PackedLayout::kLanes;
  if (dtype != DType::kFloat32) wins = wins && fewest > PackedLayout::kHalfLanes && area > 1;
  return wins ? Stock::kNone : Stock::kOneDnn;
}

Stock grouped_path(const ConvShape& s, DType dtype, bool channels_last) {
  if (!PackedLayout(s).small_groups()) return large_groups_path(s, dtype, channels_last);
  if (dtype != DType::kFloat32) return Stock::kOneDnn;
  const bool depthwise = s.group_in() == 1 && s.group_out() == 1;
  if (channels_last) {
    // What the kernels whose lanes are channels can do (cpu/grouped_tile.h); the rest would be transposed twice.
    const bool groups =
        depthwise || (s.kw == 3 && (s.group_in() == s.group_out() ? (s.group_in() & (s.group_in() - 1)) == 0
                                                                  : s.group_in() == 1 && s.group_out() == 2));
    const bool lanes =
        (((s.kw == 3 || s.kw == 5) && s.stride_w <= 2) || (s.kw == 7 && s.stride_w == 1)) && s.dilation_w == 1;
    // Large maps are all traffic. Without lines asked for ahead, on a Xeon, batch 1 and 8: 32 channels at 112x112 0.95
    // and 1.07 of oneDNN's time, 64 in steps of two from there 1.09 and 1.14, 128 in steps of two from 56x56 0.72 and
    // 0.95.
    const bool large = s.out_h * s.out_w >= (s.stride_w == 1 ? 112 * 112 : 56 * 56);
    if (depthwise && large && processor().follows_rows) return Stock::kOneDnn;
    // Groups of 8 in steps of two from 56x56: 0.75 to 0.85 alone, but in a batch of 8 0.91 to 1.21, as busy as the
    // memory is.
    const bool strided_eights = s.group_in() == 8 && s.stride_w == 2 && s.out_h * s.out_w >= 28 * 28;
    if (strided_eights && processor().follows_rows) return Stock::kOneDnn;
    return groups && lanes ? Stock::kNone : Stock::kOneDnn;
  }
  // Lanes are positions: unaligned loads, and on small maps short runs (14x14 and 7x7, one thread: 1.2 to 3 times
  // oneDNN's time; 7x7 kernels and groups of 8 about 1.3; stride 2 from 56x56 0.8 to 1.15).
  if (s.stride_w > 2) return Stock::kOneDnn;
  // 112x112 on two threads: 0.8 at batch 1, but 1.6 at batch 8.
  if (depthwise)
    return s.out_w >= 28 && s.out_w <= 64 && s.kh * s.kw <= 25 && s.stride_h * s.stride_w == 1 ? Stock::kNone
                                                                                               : Stock::kOneDnn;
  return s.group_in() < 8 ? Stock::kNone : Stock::kOneDnn;
}

// Contiguous NCHW of few input channels: 0.4 to 0.9 of oneDNN's time (8 -> 8 at 56x56, 3 -> 64 at 224x224 and 32x32, 3
// -> 16 at 32x32, 1 -> 6 with 5x5 at 28x28), level for large maps in steps of two (3 -> 32 from 224x224: 0.9 to 1.0),
// slower where no input serves two outputs (2x2 in steps of two, 4 -> 96 at 64x64: 0.8 alone and 1.23 in a batch).
// On a Xeon 3 -> 64 takes 1.18 and 1.02 of it at 224x224, batch 1 and 8, and 1.06 and 0.70 at 32x32.
bool planes_win(const ConvShape& s) {
  if (!few_channels(s)) return false;
  if (processor().follows_rows && s.out_h * s.out_w >= 112 * 112 && s.c_out > 8) return false;
  return s.stride_h * s.stride_w == 1 || (s.out_h * s.out_w <= 56 * 56 && s.kh * s.kw >= 9);
}

// Contiguous NCHW that is gathered into pixels and scattered again, with more input channels than planes_win. In steps
// of two, 3x3 to 7x7, 16 to 64 channels: 0.57 to 1.0 of oneDNN's time alone, 0.73 to 1.0 in a batch of 8 (128 -> 256
// from 28x28 0.9 and 1.01, 96 -> 192 from 35x35 0.94 and 1.06). 1x1 over a few planes: 0.73 to 0.83 alone, 0.2 to 0.92
// in a batch (4 -> 8 at 64x64, 3 -> 64, 8 -> 32 and 4 -> 512 at 28x28 and 56x56, 8 -> 128 at 112x112).
bool pixels_win(const ConvShape& s) {
  const int64_t stride = std::max(s.stride_h, s.stride_w);
  if (s.kh * s.kw == 1)
    return stride == 1 && s.c_in <= PackedLayout::kSmallGroup && s.c_out >= PackedLayout::kSmallGroup;
  return stride == 2 && s.kh * s.kw >= 9 && s.c_in > PackedLayout::kSmallGroup && s.c_in <= 64;
}

// bfloat16 where both sides multiply matrix tiles (bench/NOTES.md, "AMX"). Torch's call packs its weights anew, which
// small maps do not repay: 3x3, ours over conv2d's time alone and in a batch of 8: 128 to 512 channels on 7x7 and 14x14
// maps 0.40 to 0.83 and 0.70 to 0.99, 256 and 512 on 28x28 0.77 to 0.83 and 0.90 to 1.00, but 128 on 28x28 0.90
// and 1.12, 256 on 56x56 1.04 and 1.09. 1x1 on 7x7: 0.36 to 0.49 and 0.72 to 0.84; on larger maps up to 1.7.
// 3x3 on tiny maps (64 channels at 8x8, 128 at 4x4, 256 at 2x2) 0.25 to 0.52 and 0.65 to 0.76, where a call of oneDNN's
// costs 1.5 to 2.6 of conv2d's time. Other layers were not measured.
bool tiles_win(const ConvShape& s, bool channels_last) {
  const int64_t fewest = std::min(s.c_in, s.c_out), positions = s.out_h * s.out_w;
  if (s.groups > 1 || !channels_last || s.dilation_h * s.dilation_w > 1) return false;
  if (s.kh == 1 && s.kw == 1) return fewest >= 128 && positions == 7 * 7 && s.stride_h * s.stride_w == 1;
  if (s.kh != 3 || s.kw != 3 || s.stride_h > 2 || s.stride_w > 2) return false;
  if (positions <= 8 * 8 && fewest >= 64) return true;
  return (positions <= 14 * 14 && fewest >= 128) || (positions <= 28 * 28 && fewest >= 256);
}

// Whether a step of training is faster with ours.
// Emerald Rapids, one thread, batch 8, of torch's time: through Winograd 0.47 to 0.78 (24 -> 40 at 28x28 0.94, but 16
// -> 16 1.06 to 1.33: its weight's gradient fills half of a tile). Without it 3x3 from 256 channels on 14x14 and 7x7
// 0.77 to 1.02 (channels_last), 0.85 to 1.04 (NCHW), 128 and fewer 1.15 to 1.3; in steps of two 0.92 to 1.1. 1x1 in
// channels_last 256 <-> 64 at 56x56 0.77 and 0.88, on smaller maps 1.05 to 1.8; NCHW in steps of two 0.58 to 0.90, in
// steps of one 0.8 to 1.7. Groups and depthwise 0.77 to 1.7, images of few channels 0.87 to 3.1.
bool trains_faster(const ConvShape& s, bool channels_last) {
  if (s.groups > 1) return false;
  if (transforms_in_call(s, DType::kFloat32)) return std::max(s.c_in, s.c_out) > 16;
  const int64_t fewest = std::min(s.c_in, s.c_out);
  if (s.kh == 3 && s.kw == 3) return s.stride_h * s.stride_w == 1 && fewest >= 256;
  if (s.kh * s.kw > 1 || fewest < 64) return false;
  if (s.stride_h * s.stride_w == 1) return channels_last && s.out_h * s.out_w >= 56 * 56;
  return !channels_last;
}

Stock fastest_path(const ConvShape& s, DType dtype, bool channels_last, StockBFloat16 ours);

}  // namespace

// oneDNN 3.10, found with random shapes: on AMX parts of the output are never written (128 -> 128, 3x3 in steps of two
// on 28x1). tests/test_prefix_conv2d_invariance.py holds some of each kind, these and those below.
bool onednn_is_right(const ConvShape& s, DType dtype) {
  const bool product = s.kh * s.kw * s.stride_h * s.stride_w == 1;
  return dtype == DType::kFloat32 || product || (s.out_h > 1 && s.out_w > 1);
}

// oneDNN 3.10: the weight's gradient of depthwise layers in bfloat16 and channels_last is garbage where the rows are
// dilated, be it by a kernel of one row (tests/test_prefix_conv2d_gradients.py), and far apart any may crash.
bool onednn_grads_are_right(const ConvShape& s, DType dtype) {
  const bool depthwise = s.groups > 1 && s.group_in() == 1 && s.group_out() == 1;
  return !far_apart(s) && onednn_is_right(s, dtype) && !(dtype == DType::kBFloat16 && depthwise && s.dilation_h > 1);
}

namespace {

// Whether oneDNN gives a sample the same bits in every batch and on any number of threads.
bool onednn_is_steady(const ConvShape& s, DType dtype, bool channels_last) {
  // In steps on tiny maps.
  if (dtype != DType::kFloat32 && s.stride_h * s.stride_w > 1 && s.out_h * s.out_w <= 16) return false;
  // Kernels as large as the map.
  const int64_t rows = (s.kh - 1) * s.dilation_h + 1, cols = (s.kw - 1) * s.dilation_w + 1;
  if (s.kh * s.kw > 1 && (rows >= s.h + s.pad_top || cols >= s.w + s.pad_left)) return false;
  if (s.groups == 1 || (s.group_in() == 1 && s.group_out() == 1)) return true;
  // Groups that are no whole vectors are products over unfolded inputs, which share out K or the positions by the
  // batch.
  if (channels_last) return true;
  const bool padded = 2 * s.pad_top < rows && 2 * s.pad_left < cols;
  const bool whole = (s.group_in() % 8 == 0 || (s.group_in() == 1 && padded)) && s.group_out() % 8 == 0;
  return s.out_h > 1 && s.out_w > 1 && whole;
}

}  // namespace

void set_stock_dtypes(bool float32, StockBFloat16 bfloat16, bool float16) {
  has_float32 = float32;
  its_bfloat16 = bfloat16;
  has_float16 = float16;
}

Stock stock_path(const ConvShape& s, DType dtype, bool channels_last, StockBFloat16 ours) {
  if (far_apart(s)) return Stock::kNone;
  const Stock path = fastest_path(s, dtype, channels_last, ours);
  const bool usable = onednn_is_right(s, dtype) && onednn_is_steady(s, dtype, channels_last);
  return path == Stock::kOneDnn && !usable ? Stock::kNone : path;
}

namespace {

Stock fastest_path(const ConvShape& s, DType dtype, bool channels_last, StockBFloat16 ours) {
  const bool pairs = ours >= StockBFloat16::kPairs;
  // aten has one padding per axis.
  if (s.pad_top != s.pad_bottom || s.pad_left != s.pad_right) return Stock::kNone;
  if (std::max(s.c_in * s.h * s.w, s.c_out * s.out_h * s.out_w) > kMaxSample) return Stock::kNone;
  switch (dtype) {
    case DType::kFloat64:
      return Stock::kNone;
    case DType::kBFloat16:
      switch (its_bfloat16.load()) {
        case StockBFloat16::kNone:
          return Stock::kNone;
        case StockBFloat16::kConverted:
          return s.groups > 1 && s.group_in() == 1 ? Stock::kOneDnn : Stock::kNone;
        case StockBFloat16::kTiles:
          return ours == StockBFloat16::kTiles && tiles_win(s, channels_last) ? Stock::kNone : Stock::kOneDnn;
        case StockBFloat16::kPairs:
          if (!pairs) return Stock::kOneDnn;  // ours would convert
          break;
      }
      break;
    case DType::kFloat16:  // likewise, where there is an instruction for it
      return has_float16 ? Stock::kOneDnn : Stock::kNone;
    case DType::kFloat32:
      break;
  }
  if (dtype == DType::kFloat32 && !has_float32) return Stock::kNone;
  // The same rule for bfloat16, with oneDNN in place of the matrix product.
  const Stock gemm = dtype == DType::kBFloat16 ? Stock::kOneDnn : Stock::kGemm;
  if (s.groups > 1) return grouped_path(s, dtype, channels_last);
  // Squeeze and excitation: a float32 module goes around the operator (cpu/layer_call.h), others do not.
  const bool map_of_one = s.h * s.w * s.kh * s.kw * s.stride_h * s.stride_w == 1 && s.pad_top + s.pad_left == 0;
  if (dtype != DType::kFloat32 && map_of_one) return gemm;
  // Large maps of few channels: the traffic decides, and oneDNN's is the smaller by some percent, but for vectors half
  // empty (8 out at 56x56 to 224x224: ours 0.5 to 0.9 of its time), and patches that do not overlap (4x4 in steps of
  // four, 3 -> 96 from 224x224: 0.83 to 0.89).
  const bool patches = dtype == DType::kFloat32 && s.stride_h >= s.kh && s.stride_w >= s.kw;
  const bool wide_maps = s.c_in <= 128 && s.out_h * s.out_w >= 56 * 56 && !patches;
  if (channels_last && s.kh * s.kw > 1 && wide_maps && (s.c_out > 8 || dtype != DType::kFloat32)) return Stock::kOneDnn;
  // 1x1 in bfloat16: the products take half of the time, so on large maps the same holds where one side is narrow (64
  // -> 256 at 56x56: 0.91, 512 -> 128 at 28x28: 0.95). In float32 ours is the faster one (one thread: 0.5 to 0.86 of
  // its time at 64 -> 64, 3 -> 64 and 24 -> 64, where oneDNN's own call is 1.0 to 2.3 of conv2d's on maps below 56x56).
  if (channels_last && s.kh * s.kw == 1 && dtype == DType::kBFloat16 && std::min(s.c_in, s.c_out) <= 128 &&
      s.out_h * s.out_w >= 28 * 28)
    return Stock::kOneDnn;
  // A 1x1 kernel on NCHW is that product as it stands; oneDNN would reorder both operands first. Where the map is small
  // beside its channels that is soon done, and oneDNN's product the faster one (512 channels at 14x14: by 4 to 11 %;
  // 28x28: slower by as much). Its call costs 40 us, though: more than a small sample, for which torch does not make
  // it.
  const bool small_sample = s.c_in * s.h * s.w <= kFewElements;
  const bool is_product = s.kh * s.kw == 1 && s.stride_h * s.stride_w == 1 && s.pad_top + s.pad_left == 0;
  const bool product = is_product && (s.out_h * s.out_w >= 20 * 20 || small_sample);
  // NCHW: ours gathers pixels on the way in and scatters them on the way out. On small maps the weights, which oneDNN
  // repacks at every call, outweigh that.
  const bool small = s.out_h * s.out_w <= 64 && !(pairs && s.kh * s.kw == 1);
  if (channels_last || small) return Stock::kNone;
  // Whole vectors make it the fastest of all, small maps included: 19 layers of 16 to 1024 channels on 112x112 to 14x14
  // maps of a Xeon, of its time, ours 0.45 to 2.0 (less than 1 only where an output is 25 MB), oneDNN 1.1 to 3.7.
  if (dtype == DType::kFloat32 && is_product && processor().wide_product) return gemm;
  if (dtype == DType::kFloat32 && (plane_products_win(s) || pixels_win(s))) return Stock::kNone;
  if (dtype == DType::kFloat32 && (planes_win(s) || (s.kh * s.kw == 1 && !product && small_sample)))
    return Stock::kNone;
  // For a small sample alone torch takes a slow path of its own and oneDNN's call is most of its time: ours 0.2 to 0.8
  // of conv2d's time (32 -> 32 at 16x16, 64 -> 64 at 14x14, 64 -> 128 in steps of two), 0.6 to 0.97 at batch 8. With 16
  // channels in, 0.2 to 0.7 alone and 0.97 to 1.14 at batch 8.
  if (dtype == DType::kFloat32 && small_sample && s.kh * s.kw > 1 && s.c_in >= 16) return Stock::kNone;
  return product ? gemm : Stock::kOneDnn;
}

}  // namespace

Stock training_path(const ConvShape& s, bool channels_last) {
  if (far_apart(s)) return Stock::kNone;
  if (s.pad_top != s.pad_bottom || s.pad_left != s.pad_right || trains_faster(s, channels_last)) return Stock::kNone;
  if (s.groups > 1 || s.kh * s.kw > 1)
    return onednn_is_steady(s, DType::kFloat32, channels_last) ? Stock::kOneDnn : Stock::kNone;
  // Torch chooses by the number of threads, which would show in the bits. One product a sample takes 0.8 to 1.05 of its
  // time on one thread; on two 0.4 to 0.7 where samples are small, 0.43 to 0.94 on large maps in NCHW, 1.05 to 1.24
  // elsewhere. oneDNN: 0.97 to 1.11 on either, and 1.1 to 1.7 for small ones on one.
  const bool small_sample = s.c_in * s.h * s.w <= kFewElements;
  return small_sample || !has_float32 || (!channels_last && s.h * s.w >= 14 * 14) ? Stock::kGemm : Stock::kOneDnn;
}

namespace {

// Matrices on both sides, and a layer of the kinds that were measured.
bool both_multiply_tiles(const ConvShape& s, StockBFloat16 ours) {
  return ours == StockBFloat16::kTiles && its_bfloat16 == StockBFloat16::kTiles && s.groups == 1 &&
         s.dilation_h * s.dilation_w == 1 && std::max(s.stride_h, s.stride_w) <= 2 &&
         ((s.kh == 3 && s.kw == 3) || s.kh * s.kw == 1);
}

}  // namespace

// Emerald Rapids, one thread, batch 4 and 32, time over oneDNN's: 3x3 on maps of 4x4 to 7x7 0.62 to 0.74 and 0.73 to
// 1.18 (512 channels 0.62 to 0.73), 8x8 to 16x16 0.76 to 0.99 and 0.91 to 1.18, larger 0.96 to 1.3; 1x1 1.0 to 2.5.
// In pairs both are level.
bool our_input_grad_wins(const ConvShape& s, bool channels_last, StockBFloat16 ours) {
  const int64_t fewest = std::min(s.c_in, s.c_out), most = std::max(s.c_in, s.c_out);
  return both_multiply_tiles(s, ours) && channels_last && s.kh == 3 && fewest >= 256 && most >= 512 &&
         s.out_h * s.out_w <= 14 * 14;
}

// Each gradient is then a call of its own, which costs a step of training 50 us: at batch 8, 32 -> 32 at 16x16 and
// 64 -> 64 at 8x8 (19 million multiply-adds) took 1.0 to 1.35 of nn.Conv2d's time.
constexpr int64_t kFewMacs = 64'000'000;

// Likewise, channels_last: 3x3 from 64 channels on maps of 4x4 to 16x16 0.18 to 0.91, in steps of two 0.44 to 0.72, 32
// channels at 16x16 0.78 and 0.82; on larger maps 0.8 to 1.13. 1x1 at 7x7 and 256 <-> 1024 at 14x14 0.76 to 0.96, but
// 512 -> 512 there 1.01 and 1.07 of a step. Contiguous, from 32 channels: 3x3 0.29 to 1.0, 1x1 from 28x28 0.22 to 0.81,
// but at 14x14 up to 1.06 of a step, at 7x7 1.21, and 3x3 in steps of two to 28x28 1.05 of a step. In pairs 1.0 to 1.4.
bool our_weight_grad_wins(const ConvShape& s, bool channels_last, StockBFloat16 ours) {
  if (!both_multiply_tiles(s, ours)) return false;
  const int64_t fewest = std::min(s.c_in, s.c_out), positions = s.out_h * s.out_w;
  if (s.n * positions * s.c_in * s.c_out * s.kh * s.kw < kFewMacs) return false;
  if (!channels_last && s.kh == 3) return fewest >= 32 && (s.stride_h == 1 || positions <= 14 * 14);
  if (!channels_last) return fewest >= 32 && positions >= 20 * 20;
  if (s.kh == 3) return fewest >= 32 && positions <= 16 * 16;
  return fewest >= 256 && (positions <= 7 * 7 || (positions <= 14 * 14 && std::max(s.c_in, s.c_out) >= 1024));
}

}  // namespace rnp
