#include "core/stock.h"

#include <atomic>

namespace rnp {
namespace {

std::atomic<bool> has_float32{false}, has_bfloat16{false}, has_float16{false};

}  // namespace

void set_stock_dtypes(bool float32, bool bfloat16, bool float16) {
  has_float32 = float32;
  has_bfloat16 = bfloat16;
  has_float16 = float16;
}

bool prefers_stock(const ConvShape& s, DType dtype, bool channels_last) {
  // aten has one padding per axis.
  if (s.pad_top != s.pad_bottom || s.pad_left != s.pad_right) return false;
  switch (dtype) {
    case DType::kFloat64:
      return false;
    case DType::kBFloat16:  // oneDNN multiplies halves with the processor's own instructions, ours in float32
      return has_bfloat16;
    case DType::kFloat16:
      return has_float16;
    case DType::kFloat32:
      break;
  }
  if (!has_float32) return false;
  if (s.groups > 1) return true;  // depthwise, and groups of a few channels, leave most lanes of a tile empty
  // NCHW: ours gathers pixels on the way in and scatters them on the way out. On small maps the weights, which oneDNN
  // repacks at every call, outweigh that.
  return !channels_last && s.out_h * s.out_w > 64;
}

}  // namespace rnp
