// What every backend of prefix_conv2d shares: shapes, pointers and options, in plain types. No torch header is needed.
#pragma once

#include <cstdint>

namespace rnp {

enum class DType : int32_t { kFloat32, kFloat64, kBFloat16, kFloat16 };
enum class Activation : int32_t { kNone, kRelu };
enum class Tail : int32_t { kZero, kSkip };

// Sizes of one convolution. With groups, c_in and c_out count all groups' channels.
struct ConvShape {
  int64_t n = 0, c_in = 0, h = 0, w = 0;
  int64_t c_out = 0, kh = 0, kw = 0, out_h = 0, out_w = 0;
  int64_t stride_h = 1, stride_w = 1;
  int64_t pad_top = 0, pad_bottom = 0, pad_left = 0, pad_right = 0;
  int64_t dilation_h = 1, dilation_w = 1;
  int64_t groups = 1;

  int64_t group_in() const { return c_in / groups; }
  int64_t group_out() const { return c_out / groups; }
};

// Output length of one axis; negative or zero where the kernel does not fit.
inline int64_t conv_output_size(int64_t in, int64_t kernel, int64_t stride, int64_t pad_a, int64_t pad_b,
                                int64_t dilation) {
  const int64_t span = in + pad_a + pad_b - dilation * (kernel - 1) - 1;
  return span < 0 ? 0 : span / stride + 1;
}

// Channels of group g that a prefix over all channels (in their order across groups) leaves alive.
inline int64_t live_in_group(int64_t prefix, int64_t g, int64_t group_size) {
  const int64_t rest = prefix - g * group_size;
  return rest < 0 ? 0 : (rest > group_size ? group_size : rest);
}

struct Strides4 {  // in elements, of the axes (N, C, H, W)
  int64_t n = 0, c = 0, h = 0, w = 0;
};

// One call. Null pointers mean "absent". `scale` and `bias` hold float32, or float64 where dtype is float64; a row
// stride of 0 says that every sample reads the same line. Prefix pointers may be null (full width); their values lie in
// 0…C (checked).
struct PrefixConv2dParams {
  ConvShape shape;
  DType dtype = DType::kFloat32;

  const void* input = nullptr;
  Strides4 input_stride;
  const void* weight = nullptr;  // (c_out, c_in / groups, kh, kw)
  Strides4 weight_stride;
  const float* packed = nullptr;    // what pack_weight wrote (packing.h); unused for float64
  bool pairs = false;               // bfloat16: `packed` holds pairs of channels, which the kernels multiply at once
  const float* winograd = nullptr;  // what pack_winograd wrote for tiles of winograd_tile (winograd.h), or null
  int64_t winograd_tile = 0;
  const uint8_t* elsewhere = nullptr;  // (n,) 1: another algorithm computes this sample, the direct one leaves it alone

  const int32_t* in_prefix = nullptr;   // (n,)
  const int32_t* out_prefix = nullptr;  // (n,)
  const int32_t* row = nullptr;         // (n,) line of the scale and bias tables
  const void* scale = nullptr;
  int64_t scale_row_stride = 0;
  const void* bias = nullptr;
  int64_t bias_row_stride = 0;

  const void* residual = nullptr;
  Strides4 residual_stride;
  Activation activation = Activation::kNone;
  Tail tail = Tail::kZero;
  bool sum_kernel_rows = false;  // each kernel row by itself: shorter chains of additions, for little time

  void* output = nullptr;
  Strides4 output_stride;
  float* pooled = nullptr;  // (n, c_out)

  int64_t in_live(int64_t i) const { return in_prefix ? in_prefix[i] : shape.c_in; }
  int64_t out_live(int64_t i) const { return out_prefix ? out_prefix[i] : shape.c_out; }
  // What the kernels step through: input channels of a group, or pairs of them.
  int64_t words(int64_t channels) const { return pairs ? (channels + 1) / 2 : channels; }
};

}  // namespace rnp
