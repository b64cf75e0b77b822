// What every backend of prefix_conv2d shares: shapes, pointers and options, in plain types. No torch header is needed.
#pragma once

#include <algorithm>
#include <cstdint>
#include <functional>

namespace rnp {

enum class DType : int32_t { kFloat32, kFloat64, kBFloat16, kFloat16 };
enum class Activation : int32_t { kNone, kRelu };
// kKeep (segments only): the channels beyond the prefix hold already what they would receive.
enum class Tail : int32_t { kZero, kSkip, kKeep };

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

// A padding is less (the bindings check it), so that positions of a padded input fit into 64 bits.
constexpr int64_t kEndOfPadding = int64_t{1} << 61;

// Output length of one axis; zero where the kernel does not fit, or the padded input into 64 bits.
inline int64_t conv_output_size(int64_t in, int64_t kernel, int64_t stride, int64_t pad_a, int64_t pad_b,
                                int64_t dilation) {
  if (in < 0 || in >= 2 * kEndOfPadding || std::max(pad_a, pad_b) >= kEndOfPadding || kernel < 1) return 0;
  const int64_t last = in + pad_a + pad_b - 1;  // position of the padded input
  if (last < 0 || (kernel > 1 && dilation > last / (kernel - 1))) return 0;
  return (last - dilation * (kernel - 1)) / stride + 1;
}

// Whether stride or dilation are so large, and with them the padding, that few of the positions which the outputs span
// lie in the image. Kernels that copy bands of a padded input would copy little but zeros, of any amount. Products of
// two strides or dilations that are not so large fit into 64 bits.
inline bool far_apart(const ConvShape& s) {
  const auto far = [](int64_t in, int64_t out, int64_t kernel, int64_t stride, int64_t dilation) {
    if (std::max(stride, dilation) >= int64_t{1} << 31) return true;
    return kernel > 1 && (out - 1) * stride + (kernel - 1) * dilation > 8 * (in + out) + 64;
  };
  return far(s.h, s.out_h, s.kh, s.stride_h, s.dilation_h) || far(s.w, s.out_w, s.kw, s.stride_w, s.dilation_w);
}

// Channels of group g that a prefix over all channels (in their order across groups) leaves alive.
inline int64_t live_in_group(int64_t prefix, int64_t g, int64_t group_size) {
  const int64_t rest = prefix - g * group_size;
  return rest < 0 ? 0 : (rest > group_size ? group_size : rest);
}

struct Strides4 {  // in elements, of the axes (N, C, H, W)
  int64_t n = 0, c = 0, h = 0, w = 0;
};

// Of the output only the last rows are kept, for a reader close behind: row y lies where row y % rows would.
struct RowRing {
  int64_t rows;
  std::function<void(int64_t)> done;  // called with r, in order, when the rows before r are written
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
  bool max_pool = false;    // segments, Winograd: `output` is that of 2x2 max-pooling after the activation
  // Segments, Winograd: a single sample that goes through it, without residual and tail, on one thread.
  const RowRing* ring = nullptr;

  // Maps of a segment whose samples keep their live channels only (cpu/segment_layout.h): (n,) elements from one pixel
  // of a sample to the next, instead of the strides' w and h; a multiple of 16 and not of 512. Null: all as the strides
  // say.
  const int32_t* input_pixel = nullptr;
  const int32_t* residual_pixel = nullptr;
  const int32_t* output_pixel = nullptr;
  const int32_t* output_live = nullptr;  // (n,) where a kept tail ends; null: at c_out

  int64_t in_live(int64_t i) const { return in_prefix ? in_prefix[i] : shape.c_in; }
  int64_t out_live(int64_t i) const { return out_prefix ? out_prefix[i] : shape.c_out; }
  int64_t tail_end(int64_t i) const { return output_live ? output_live[i] : shape.c_out; }
  Strides4 input_at(int64_t i) const { return of_sample(input_stride, input_pixel, i, shape.w); }
  Strides4 residual_at(int64_t i) const { return of_sample(residual_stride, residual_pixel, i, shape.out_w); }
  Strides4 output_at(int64_t i) const { return of_sample(output_stride, output_pixel, i, output_w()); }
  int64_t output_w() const { return max_pool ? shape.out_w / 2 : shape.out_w; }
  // What the kernels step through: input channels of a group, or pairs of them.
  int64_t words(int64_t channels) const { return pairs ? (channels + 1) / 2 : channels; }

 private:
  static Strides4 of_sample(Strides4 all, const int32_t* pixel, int64_t i, int64_t w) {
    return pixel ? Strides4{all.n, all.c, w * pixel[i], pixel[i]} : all;
  }
};

}  // namespace rnp
