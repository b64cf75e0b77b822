// Binding of prefix_conv2d_input_grad and prefix_conv2d_weight_grad on the CPU: check every argument, then run our
// kernel, or torch's dense one between masks where that is the faster one.
#include <torch/csrc/stable/stableivalue_conversions.h>

#include <array>

#include "core/stock.h"
#include "cpu/pack_weight.h"
#include "cpu/prefix_conv2d_grad.h"
#include "cpu/torch_common.h"

namespace rnp::cpu {
namespace {

using torch::headeronly::MemoryFormat;
using torch::stable::Tensor;
using Ints = std::vector<int64_t>;
using OptionalTensor = std::optional<Tensor>;

// Arguments that both operators have, checked. `size` is the other tensor's shape: (N, C_in, H, W) for the input's
// gradient, (C_out, C_in / groups, KH, KW) for the weight's.
struct Call {
  PrefixConv2dGradParams p;
  std::vector<int32_t> in_prefix, out_prefix;

  Call(const char* op, const Tensor& grad_output, const Tensor& other, const Ints& input, const Ints& weight,
       const Ints& stride, const Ints& padding, const Ints& dilation, int64_t groups, const OptionalTensor& in,
       const OptionalTensor& out) {
    STD_TORCH_CHECK(grad_output.dim() == 4, op, ": grad_output must be 4-D (N, C_out, OH, OW); got ",
                    text(grad_output));
    check_cpu(op, "grad_output", grad_output);
    p.dtype = dtype_of(op, "grad_output", grad_output);
    STD_TORCH_CHECK(other.scalar_type() == grad_output.scalar_type(), op,
                    ": all tensors must have grad_output's dtype ",
                    torch::headeronly::toString(grad_output.scalar_type()), "; got ",
                    torch::headeronly::toString(other.scalar_type()));
    STD_TORCH_CHECK(other.dim() == 4 && input.size() == 4 && weight.size() == 4, op, ": input and weight must be 4-D");
    STD_TORCH_CHECK(stride.size() == 2 && stride[0] > 0 && stride[1] > 0, op, ": stride must be two positive integers");
    STD_TORCH_CHECK(dilation.size() == 2 && dilation[0] > 0 && dilation[1] > 0, op,
                    ": dilation must be two positive integers");
    STD_TORCH_CHECK(padding.size() == 4, op, ": padding must be (top, bottom, left, right); got ", padding.size(),
                    " values");
    check_paddings(op, padding);
    STD_TORCH_CHECK(groups > 0 && weight[0] % groups == 0, op, ": output channels must be divisible by groups; got ",
                    weight[0], " channels, ", groups, " groups");
    STD_TORCH_CHECK(input[1] == weight[1] * groups, op, ": the weight with groups=", groups, " needs ",
                    weight[1] * groups, " input channels; got ", input[1]);
    ConvShape& s = p.shape;
    s.n = input[0], s.c_in = input[1], s.h = input[2], s.w = input[3];
    s.c_out = weight[0], s.kh = weight[2], s.kw = weight[3];
    s.stride_h = stride[0], s.stride_w = stride[1], s.dilation_h = dilation[0], s.dilation_w = dilation[1];
    s.pad_top = padding[0], s.pad_bottom = padding[1], s.pad_left = padding[2], s.pad_right = padding[3];
    s.groups = groups;
    s.out_h = conv_output_size(s.h, s.kh, s.stride_h, s.pad_top, s.pad_bottom, s.dilation_h);
    s.out_w = conv_output_size(s.w, s.kw, s.stride_w, s.pad_left, s.pad_right, s.dilation_w);
    STD_TORCH_CHECK(s.out_h > 0 && s.out_w > 0 && s.c_out > 0 && s.c_in > 0, op,
                    ": the dilated kernel must fit into the padded input, and no size but the batch's may be 0");
    STD_TORCH_CHECK(grad_output.size(0) == s.n && grad_output.size(1) == s.c_out && grad_output.size(2) == s.out_h &&
                        grad_output.size(3) == s.out_w,
                    op, ": grad_output must have the output's shape (", s.n, ", ", s.c_out, ", ", s.out_h, ", ",
                    s.out_w, "); got ", text(grad_output));
    in_prefix = checked_indices(op, "in_prefix", in, s.n, s.c_in);
    out_prefix = checked_indices(op, "out_prefix", out, s.n, s.c_out);
    p.in_prefix = in ? in_prefix.data() : nullptr;
    p.out_prefix = out ? out_prefix.data() : nullptr;
    p.grad_output = grad_output.const_data_ptr();
    p.grad_output_stride = strides_of(grad_output);
  }

  // Whether ours is the faster way; `wins`: in bfloat16 at full width. oneDNN multiplies halves with the processor's
  // own instructions and has kernels for groups of few channels; narrow widths make up for that, but for a few channels
  // a panel is nearly empty. Layers whose taps are far apart need a kernel that knows no padding.
  bool ours(bool (*wins)(const ConvShape&, bool, StockBFloat16)) const {
    const ConvShape& s = p.shape;
    const bool narrow = p.in_prefix || p.out_prefix;
    if (p.dtype == DType::kFloat64 || far_apart(s)) return false;
    if (!onednn_is_right(s, p.dtype)) return true;
    if (s.groups > 1 && (!narrow || std::min(s.group_in(), s.group_out()) < 8)) return false;
    if (p.dtype == DType::kFloat32 || narrow) return true;
    return p.dtype == DType::kBFloat16 && wins(s, p.grad_output_stride.c == 1, bfloat16_in_use(s, p.dtype));
  }
};

Ints sizes_of(const Tensor& t) {
  Ints out;
  for (int64_t d = 0; d < t.dim(); ++d) out.push_back(t.size(d));
  return out;
}

// rnp::masked_input_grad or rnp::masked_weight_grad (rnp_kernels/gradients.py).
Tensor masked(const char* name, const Tensor& grad_output, const Tensor& other, const Ints& size, const Ints& stride,
              const Ints& padding, const Ints& dilation, int64_t groups, const OptionalTensor& in_prefix,
              const OptionalTensor& out_prefix) {
  using torch::stable::detail::from;
  std::array<StableIValue, 9> stack = {from(grad_output), from(other),  from(size),      from(stride),    from(padding),
                                       from(dilation),    from(groups), from(in_prefix), from(out_prefix)};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(name, "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

Tensor input_grad_cpu(const Tensor& grad_output, const Tensor& weight, const Ints& input_size, const Ints& stride,
                      const Ints& padding, const Ints& dilation, int64_t groups, const OptionalTensor& in_prefix,
                      const OptionalTensor& out_prefix) {
  constexpr const char* kOp = "prefix_conv2d_input_grad";
  check_cpu(kOp, "weight", weight);
  Call call(kOp, grad_output, weight, input_size, sizes_of(weight), stride, padding, dilation, groups, in_prefix,
            out_prefix);
  if (!call.ours(our_input_grad_wins))
    return masked("rnp::masked_input_grad", grad_output, weight, input_size, stride, padding, dilation, groups,
                  in_prefix, out_prefix);
  PrefixConv2dGradParams& p = call.p;
  Tensor grad =
      torch::stable::empty(input_size, grad_output.scalar_type(), std::nullopt, std::nullopt, std::nullopt,
                           is_channels_last(grad_output) ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
  p.weight = weight.const_data_ptr();
  p.weight_stride = strides_of(weight);
  p.grad_input = grad.mutable_data_ptr();
  p.grad_input_stride = strides_of(grad);
  prefix_conv2d_input_grad(p, torch_threads());
  return grad;
}

void write_weight_grad(Call& call, const Tensor& input, Tensor& grad) {
  PrefixConv2dGradParams& p = call.p;
  p.input = input.const_data_ptr();
  p.input_stride = strides_of(input);
  p.grad_weight = grad.mutable_data_ptr();
  p.grad_weight_dtype = dtype_of("prefix_conv2d_weight_grad", "grad", grad);
  p.grad_weight_stride = strides_of(grad);
  prefix_conv2d_weight_grad(p, torch_threads());
}

Tensor weight_grad_cpu(const Tensor& grad_output, const Tensor& input, const Ints& weight_size, const Ints& stride,
                       const Ints& padding, const Ints& dilation, int64_t groups, const OptionalTensor& in_prefix,
                       const OptionalTensor& out_prefix) {
  constexpr const char* kOp = "prefix_conv2d_weight_grad";
  check_cpu(kOp, "input", input);
  Call call(kOp, grad_output, input, sizes_of(input), weight_size, stride, padding, dilation, groups, in_prefix,
            out_prefix);
  if (!call.ours(our_weight_grad_wins))
    return masked("rnp::masked_weight_grad", grad_output, input, weight_size, stride, padding, dilation, groups,
                  in_prefix, out_prefix);
  Tensor grad = torch::stable::empty(weight_size, grad_output.scalar_type());
  write_weight_grad(call, input, grad);
  return grad;
}

Tensor conv2d_weight_grad_cpu(const Tensor& grad_output, const Tensor& input, const Tensor& weight, const Ints& stride,
                              const Ints& padding, const Ints& dilation, int64_t groups) {
  constexpr const char* kOp = "conv2d_weight_grad";
  check_cpu(kOp, "input", input);
  check_cpu(kOp, "weight", weight);
  Call call(kOp, grad_output, input, sizes_of(input), sizes_of(weight), stride, padding, dilation, groups, std::nullopt,
            std::nullopt);
  const DType dtype = dtype_of(kOp, "weight", weight);
  STD_TORCH_CHECK(call.p.dtype != DType::kFloat64 && (dtype == call.p.dtype || dtype == DType::kFloat32), kOp,
                  ": grad_output must be float32, bfloat16 or float16, and weight the same or float32; got ",
                  torch::headeronly::toString(grad_output.scalar_type()), " and ",
                  torch::headeronly::toString(weight.scalar_type()));
  Tensor grad = torch::stable::empty(sizes_of(weight), weight.scalar_type(), std::nullopt, std::nullopt, std::nullopt,
                                     is_channels_last(weight) ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
  write_weight_grad(call, input, grad);
  return grad;
}

}  // namespace
}  // namespace rnp::cpu

STABLE_TORCH_LIBRARY_IMPL(rnp, CPU, m) {
  m.impl("prefix_conv2d_input_grad", TORCH_BOX(&rnp::cpu::input_grad_cpu));
  m.impl("prefix_conv2d_weight_grad", TORCH_BOX(&rnp::cpu::weight_grad_cpu));
  m.impl("conv2d_weight_grad", TORCH_BOX(&rnp::cpu::conv2d_weight_grad_cpu));
}
