#include "core/stock.h"

#include <algorithm>
#include <atomic>

#include "core/packing.h"

namespace rnp {
namespace {

// oneDNN widens a few NCHW channels to sixteen in a copy of its own: for larger samples that may not fit.
constexpr int64_t kMaxSample = int64_t{1} << 26;

std::atomic<bool> has_float32{false}, has_float16{false};
std::atomic<StockBFloat16> its_bfloat16{StockBFloat16::kNone};

// Larger groups are many small convolutions for ours.
Stock grouped_path(const ConvShape& s, bool channels_last) {
  if (!PackedLayout(s).small_groups()) return Stock::kOneDnn;
  const bool depthwise = s.group_in() == 1 && s.group_out() == 1;
  if (channels_last) {
    // What the kernels whose lanes are channels can do (cpu/grouped_tile.h); the rest would be transposed twice.
    const bool groups =
        depthwise || (s.kw == 3 && (s.group_in() == s.group_out() ? (s.group_in() & (s.group_in() - 1)) == 0
                                                                  : s.group_in() == 1 && s.group_out() == 2));
    const bool lanes =
        (((s.kw == 3 || s.kw == 5) && s.stride_w <= 2) || (s.kw == 7 && s.stride_w == 1)) && s.dilation_w == 1;
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

}  // namespace

void set_stock_dtypes(bool float32, StockBFloat16 bfloat16, bool float16) {
  has_float32 = float32;
  its_bfloat16 = bfloat16;
  has_float16 = float16;
}

Stock stock_path(const ConvShape& s, DType dtype, bool channels_last, bool pairs) {
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
          return Stock::kOneDnn;
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
  if (s.groups > 1) return dtype == DType::kFloat32 ? grouped_path(s, channels_last) : Stock::kOneDnn;
  // Squeeze and excitation: a float32 module goes around the operator (cpu/layer_call.h), others do not.
  const bool map_of_one = s.h * s.w * s.kh * s.kw * s.stride_h * s.stride_w == 1 && s.pad_top + s.pad_left == 0;
  if (dtype != DType::kFloat32 && map_of_one) return gemm;
  // Large maps of few channels: the traffic decides, and oneDNN's is the smaller by some percent.
  if (channels_last && s.kh * s.kw > 1 && s.c_in <= 128 && s.out_h * s.out_w >= 56 * 56) return Stock::kOneDnn;
  // 1x1 on large maps of few channels: so few products per value moved that the same holds (64 -> 64 at 56x56: ours at
  // 0.95). With more on either side ours is the faster one (64 -> 256: 1.05 to 1.12; 256 -> 64: 1.1).
  // In bfloat16 the products take half of the time: one narrow side is enough (64 -> 256 at 56x56: 0.91, 512 -> 128 at
  // 28x28: 0.95).
  const bool few = dtype == DType::kBFloat16 ? std::min(s.c_in, s.c_out) <= 128 : std::max(s.c_in, s.c_out) <= 64;
  if (channels_last && s.kh * s.kw == 1 && few && s.out_h * s.out_w >= 28 * 28) return Stock::kOneDnn;
  // A 1x1 kernel on NCHW is that product as it stands; oneDNN would reorder both operands first. Where the map is small
  // beside its channels that is soon done, and oneDNN's product the faster one (14x14: by 4 to 11 %; 28x28: slower by
  // as much).
  const bool product =
      s.out_h * s.out_w >= 20 * 20 && s.kh * s.kw == 1 && s.stride_h * s.stride_w == 1 && s.pad_top + s.pad_left == 0;
  // NCHW: ours gathers pixels on the way in and scatters them on the way out. On small maps the weights, which oneDNN
  // repacks at every call, outweigh that.
  const bool small = s.out_h * s.out_w <= 64 && !(pairs && s.kh * s.kw == 1);
  if (channels_last || small) return Stock::kNone;
  return product ? gemm : Stock::kOneDnn;
}

}  // namespace rnp
