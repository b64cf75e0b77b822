// Gradients of prefix_conv2d on the CPU, of the bare convolution: no scale, bias, residual or activation. Torch-free:
// arguments are checked by the binding (prefix_conv2d_grad_torch.cpp).
#pragma once

#include "core/parallel.h"
#include "core/prefix_conv2d.h"

namespace rnp::cpu {

// One call. Tensors hold `dtype`, float32, bfloat16 or float16, but for the weight's gradient; sums are float32.
// Channels beyond a prefix are never read, neither of grad_output nor of the input. Both gradients are written whole,
// with zeros where nothing is live.
struct PrefixConv2dGradParams {
  ConvShape shape;  // of the forward call
  DType dtype = DType::kFloat32;

  const void* grad_output = nullptr;  // (n, c_out, out_h, out_w)
  Strides4 grad_output_stride;
  const int32_t* in_prefix = nullptr;   // (n,), null: full width
  const int32_t* out_prefix = nullptr;  // (n,)

  const void* weight = nullptr;  // for the input's gradient
  Strides4 weight_stride;
  void* grad_input = nullptr;  // (n, c_in, h, w), without gaps
  Strides4 grad_input_stride;

  const void* input = nullptr;  // for the weight's gradient
  Strides4 input_stride;
  void* grad_weight = nullptr;                // (c_out, c_in / groups, kh, kw)
  DType grad_weight_dtype = DType::kFloat32;  // `dtype` or float32
  Strides4 grad_weight_stride;

  int64_t in_live(int64_t i) const { return in_prefix ? in_prefix[i] : shape.c_in; }
  int64_t out_live(int64_t i) const { return out_prefix ? out_prefix[i] : shape.c_out; }
};

// A forward convolution of grad_output with the weights turned round, one for each residue of the stride; a sample's
// gradient is the same bits alone and in any batch. Throws std::bad_alloc, nothing else.
void prefix_conv2d_input_grad(const PrefixConv2dGradParams& params, const Threads& threads);

// A product of grad_output and the input over all positions, for each tap. The order of additions depends on the shapes
// and the prefixes alone, never on the threads. Throws std::bad_alloc, nothing else.
void prefix_conv2d_weight_grad(const PrefixConv2dGradParams& params, const Threads& threads);

}  // namespace rnp::cpu
