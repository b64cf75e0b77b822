// Binding of prefix_conv2d, its input gradient and pack_weight on CUDA. Each operator: check, device guard, allocate,
// parameters, current stream, dispatch, launch, launch check. No step waits for the device.
#include <atomic>
#include <limits>
#include <tuple>

#include "cuda/launch.h"
#include "cuda/tensors.h"
#include "torch_text.h"

namespace rnp::cuda {
namespace {

constexpr const char* kOp = "prefix_conv2d";

// Whether float32 convolutions may round their operands to TF32; set by rnp_cuda_allow_tf32 below.
std::atomic<bool> allow_tf32{false};

// (C_out,) or (T, C_out) of scale or bias as the kernels read it: float32, or float64 beside float64; dense channels.
struct Table {
  OptionalTensor data;
  int64_t row_stride = 0, rows = 0;  // rows 0: a plain vector or absent
};

Table read_table(const char* name, const OptionalTensor& t, DType dtype, int64_t channels, bool have_row,
                 const Tensor& like) {
  Table out;
  if (!t) return out;
  check_device(kOp, name, *t, like);
  const DType own = dtype_of(kOp, name, *t);
  STD_TORCH_CHECK(own == dtype || (own == DType::kFloat32 && dtype != DType::kFloat64), kOp, ": ", name,
                  " must have the input's dtype (or float32 beside a half input); got ",
                  torch::headeronly::toString(t->scalar_type()));
  STD_TORCH_CHECK((t->dim() == 1 || t->dim() == 2) && t->size(t->dim() - 1) == channels, kOp, ": ", name,
                  " must have shape (C_out,) or (T, C_out) with C_out=", channels, "; got ", text(*t));
  STD_TORCH_CHECK(t->dim() == 1 || have_row, kOp, ": a table of ", name,
                  " needs `row`, which names each sample's line; got ", text(*t));
  const ScalarType wanted = dtype == DType::kFloat64 ? ScalarType::Double : ScalarType::Float;
  out.data = torch::stable::contiguous(t->scalar_type() == wanted ? *t : torch::stable::to(*t, wanted));
  if (t->dim() == 2) out.rows = t->size(0), out.row_stride = channels;
  return out;
}

Tensor pack(const ConvShape& s, DType dtype, Role role, const Tensor& weight) {
  const torch::stable::accelerator::DeviceGuard guard(weight.get_device_index());
  PackArgs a = pack_args(s, dtype, role, weight.const_data_ptr(), strides_of(weight), nullptr);
  const int64_t floats = (a.layout.elements() * a.layout.element + 3) / 4;
  Tensor packed = empty_on(weight, {floats}, ScalarType::Float);
  a.packed = packed.mutable_data_ptr();
  check_launch("pack_weight", launch_pack(a, current_stream(weight)));
  return packed;
}

Tensor pack_weight_cuda(const Tensor& weight, int64_t groups) {
  STD_TORCH_CHECK(weight.dim() == 4 && weight.numel() > 0,
                  "pack_weight: weight must be 4-D (C_out, C_in / groups, kH, kW) and "
                  "not empty; got ",
                  text(weight));
  STD_TORCH_CHECK(groups > 0 && weight.size(0) % groups == 0, "pack_weight: groups must be positive and divide the ",
                  weight.size(0), " output channels; got ", groups);
  const DType dtype = dtype_of("pack_weight", "weight", weight);
  ConvShape s;
  s.groups = groups, s.c_out = weight.size(0), s.c_in = weight.size(1) * groups;
  s.kh = weight.size(2), s.kw = weight.size(3);
  if (!has_tile(s, dtype, Role::kForward)) return empty_on(weight, {0}, ScalarType::Float);  // read as it is
  return pack(s, dtype, Role::kForward, weight);
}

std::tuple<Tensor, Tensor> prefix_conv2d_cuda(const Tensor& input, const Tensor& weight, const OptionalTensor& bias,
                                              const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                                              const std::vector<int64_t>& dilation, int64_t groups,
                                              const OptionalTensor& in_prefix, const OptionalTensor& out_prefix,
                                              const OptionalTensor& scale, const OptionalTensor& row,
                                              const OptionalTensor& residual, const Text& activation_text,
                                              const Text& tail_text, bool pooled, const OptionalTensor& packed,
                                              const OptionalTensor& winograd) {
  STD_TORCH_CHECK(!winograd, kOp, ": winograd must be None on CUDA; got ", winograd ? text(*winograd) : "");
  check_device(kOp, "weight", weight, input);
  PrefixConv2dParams p;
  p.dtype = dtype_of(kOp, "input", input);
  STD_TORCH_CHECK(weight.scalar_type() == input.scalar_type(), kOp, ": weight must have the input's dtype ",
                  torch::headeronly::toString(input.scalar_type()), "; got ",
                  torch::headeronly::toString(weight.scalar_type()));
  p.shape = checked_shape(kOp, sizes_of(input), sizes_of(weight), stride, padding, dilation, groups);
  const ConvShape& s = p.shape;
  const std::string &activation = activation_text.value, &tail = tail_text.value;
  STD_TORCH_CHECK(activation == "none" || activation == "relu", kOp,
                  ": activation must be \"none\" or \"relu\"; got \"", activation, "\"");
  STD_TORCH_CHECK(tail == "zero" || tail == "skip", kOp, ": tail must be \"zero\" or \"skip\"; got \"", tail, "\"");
  STD_TORCH_CHECK(!(residual && tail == "skip"), kOp, ": tail=\"skip\" cannot be combined with a residual");
  p.activation = activation == "relu" ? Activation::kRelu : Activation::kNone;
  p.tail = tail == "skip" ? Tail::kSkip : Tail::kZero;
  const torch::stable::accelerator::DeviceGuard guard(input.get_device_index());
  const OptionalTensor in = checked_indices(kOp, "in_prefix", in_prefix, s.n, input);
  const OptionalTensor out = checked_indices(kOp, "out_prefix", out_prefix, s.n, input);
  const OptionalTensor line = checked_indices(kOp, "row", row, s.n, input);
  const Table scales = read_table("scale", scale, p.dtype, s.c_out, row.has_value(), input);
  const Table biases = read_table("bias", bias, p.dtype, s.c_out, row.has_value(), input);
  STD_TORCH_CHECK(!(scales.rows && biases.rows) || scales.rows == biases.rows, kOp,
                  ": tables of scale and bias must have the same number of lines; got ", scales.rows, " and ",
                  biases.rows);
  if (residual) {
    check_device(kOp, "residual", *residual, input);
    STD_TORCH_CHECK(residual->scalar_type() == input.scalar_type(), kOp, ": residual must have the input's dtype; got ",
                    torch::headeronly::toString(residual->scalar_type()));
    check_size(kOp, "residual", *residual, {s.n, s.c_out, s.out_h, s.out_w});
    p.residual = residual->const_data_ptr();
    p.residual_stride = strides_of(*residual);
  }
  const bool last = p.dtype != DType::kFloat64 && (is_channels_last(input) || is_channels_last(weight));
  Tensor output = empty_on(input, {s.n, s.c_out, s.out_h, s.out_w}, input.scalar_type(), last);
  Tensor means =
      empty_on(input, pooled ? std::vector<int64_t>{s.n, s.c_out} : std::vector<int64_t>{0}, ScalarType::Float);
  p.input = input.const_data_ptr(), p.input_stride = strides_of(input);
  p.weight = weight.const_data_ptr(), p.weight_stride = strides_of(weight);
  p.in_prefix = indices(in), p.out_prefix = indices(out), p.row = indices(line);
  p.scale = scales.data ? scales.data->const_data_ptr() : nullptr, p.scale_row_stride = scales.row_stride;
  p.bias = biases.data ? biases.data->const_data_ptr() : nullptr, p.bias_row_stride = biases.row_stride;
  p.output = output.mutable_data_ptr(), p.output_stride = strides_of(output);
  if (s.n == 0) return {output, means};

  OptionalTensor weights;
  if (has_tile(s, p.dtype, Role::kForward)) {
    if (packed) {
      check_device(kOp, "packed", *packed, input);
      const int64_t floats =
          (pack_args(s, p.dtype, Role::kForward, nullptr, {}, nullptr).layout.elements() * element_size(p.dtype) + 3) /
          4;
      STD_TORCH_CHECK(packed->scalar_type() == ScalarType::Float && packed->dim() == 1 && packed->is_contiguous() &&
                          packed->numel() == floats,
                      kOp, ": packed must be pack_weight(weight, groups) of ", floats, " floats; got shape ",
                      text(*packed));
      STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(packed->const_data_ptr()) % 16 == 0, kOp,
                      ": packed must be aligned to 16 bytes, as pack_weight returns it");
      weights = packed;
    } else {
      weights = pack(s, p.dtype, Role::kForward, weight);
    }
  }
  run_convolution(kOp, p, false, std::max({int64_t{1}, scales.rows, biases.rows}), input, weights);
  if (pooled) {
    MeanArgs m;
    m.n = s.n, m.positions = s.out_h * s.out_w, m.channels = static_cast<int32_t>(s.c_out);
    m.out_w = static_cast<int32_t>(s.out_w);
    m.output = p.output, m.output_stride = p.output_stride;
    m.out_prefix = p.tail == Tail::kSkip ? p.out_prefix : nullptr;
    m.mean = static_cast<float*>(means.mutable_data_ptr());
    check_launch(kOp, launch_mean(m, p.dtype, current_stream(input)));
  }
  return {output, means};
}

Tensor input_grad_cuda(const Tensor& grad, const Tensor& weight, const std::vector<int64_t>& input_size,
                       const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                       const std::vector<int64_t>& dilation, int64_t groups, const OptionalTensor& in_prefix,
                       const OptionalTensor& out_prefix) {
  constexpr const char* op = "prefix_conv2d_input_grad";
  check_device(op, "weight", weight, grad);
  PrefixConv2dParams p;
  p.dtype = dtype_of(op, "grad_output", grad);
  STD_TORCH_CHECK(weight.scalar_type() == grad.scalar_type(), op, ": weight must have grad_output's dtype");
  p.shape = checked_shape(op, input_size, sizes_of(weight), stride, padding, dilation, groups);
  const ConvShape& s = p.shape;
  check_size(op, "grad_output", grad, {s.n, s.c_out, s.out_h, s.out_w});
  const torch::stable::accelerator::DeviceGuard guard(grad.get_device_index());
  const OptionalTensor in = checked_indices(op, "in_prefix", in_prefix, s.n, grad);
  const OptionalTensor out = checked_indices(op, "out_prefix", out_prefix, s.n, grad);
  Tensor result = empty_on(grad, input_size, grad.scalar_type(), is_channels_last(grad));
  p.input = grad.const_data_ptr(), p.input_stride = strides_of(grad);
  p.weight = weight.const_data_ptr(), p.weight_stride = strides_of(weight);
  p.in_prefix = indices(in), p.out_prefix = indices(out);
  p.output = result.mutable_data_ptr(), p.output_stride = strides_of(result);
  if (result.numel() == 0) return result;
  OptionalTensor weights;
  if (has_tile(s, p.dtype, Role::kInputGrad)) weights = pack(s, p.dtype, Role::kInputGrad, weight);
  run_convolution(op, p, true, 1, grad, weights);
  return result;
}

}  // namespace

std::vector<int64_t> sizes_of(const Tensor& t) {
  std::vector<int64_t> sizes;
  for (int64_t d = 0; d < t.dim(); ++d) sizes.push_back(t.size(d));
  return sizes;
}

ConvShape checked_shape(const char* op, const std::vector<int64_t>& input, const std::vector<int64_t>& weight,
                        const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                        const std::vector<int64_t>& dilation, int64_t groups) {
  STD_TORCH_CHECK(input.size() == 4, op, ": input must be 4-D (N, C, H, W); got ", text(input));
  STD_TORCH_CHECK(weight.size() == 4, op, ": weight must be 4-D (C_out, C_in / groups, kH, kW); got ", text(weight));
  for (int64_t size : weight) STD_TORCH_CHECK(size > 0, op, ": weight must not be empty; got ", text(weight));
  STD_TORCH_CHECK(groups > 0, op, ": groups must be positive; got ", groups);
  STD_TORCH_CHECK(weight[0] % groups == 0, op, ": output channels must be divisible by groups; got ", weight[0],
                  " channels, ", groups, " groups");
  STD_TORCH_CHECK(weight[1] * groups == input[1], op, ": weight ", text(weight), " with groups=", groups, " needs ",
                  weight[1] * groups, " input channels; got ", input[1]);
  STD_TORCH_CHECK(stride.size() == 2 && stride[0] > 0 && stride[1] > 0, op, ": stride must be two positive integers");
  STD_TORCH_CHECK(dilation.size() == 2 && dilation[0] > 0 && dilation[1] > 0, op,
                  ": dilation must be two positive integers");
  STD_TORCH_CHECK(padding.size() == 4, op, ": padding must be (top, bottom, left, right); got ", padding.size(),
                  " values");
  for (int64_t pad : padding) STD_TORCH_CHECK(pad >= 0, op, ": padding must not be negative; got ", pad);
  ConvShape s;
  s.n = input[0], s.c_in = input[1], s.h = input[2], s.w = input[3];
  s.c_out = weight[0], s.kh = weight[2], s.kw = weight[3];
  s.stride_h = stride[0], s.stride_w = stride[1];
  s.pad_top = padding[0], s.pad_bottom = padding[1], s.pad_left = padding[2], s.pad_right = padding[3];
  s.dilation_h = dilation[0], s.dilation_w = dilation[1];
  s.groups = groups;
  s.out_h = conv_output_size(s.h, s.kh, s.stride_h, s.pad_top, s.pad_bottom, s.dilation_h);
  s.out_w = conv_output_size(s.w, s.kw, s.stride_w, s.pad_left, s.pad_right, s.dilation_w);
  STD_TORCH_CHECK(s.out_h > 0 && s.out_w > 0, op, ": the dilated kernel must fit into the padded input; got input ",
                  text(input), ", weight ", text(weight));
  // Offsets are 64-bit; coordinates and the number of a pixel of one map are not.
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max() / 4;
  for (int64_t size : {s.n, (s.h + s.pad_top + s.pad_bottom) * (s.w + s.pad_left + s.pad_right), s.out_h * s.out_w,
                       s.kh * s.dilation_h, s.kw * s.dilation_w, s.stride_h, s.stride_w, s.c_in, s.c_out})
    STD_TORCH_CHECK(size <= kMost, op, ": batch, channels, padded map and kernel may have at most ", kMost,
                    " elements each; got ", size);
  return s;
}

void run_convolution(const char* op, PrefixConv2dParams p, bool input_grad, int64_t lines, const Tensor& like,
                     const OptionalTensor& packed) {
  const Role role = input_grad ? Role::kInputGrad : Role::kForward;
  Device device;
  check_launch(op, current_device(&device));
  void* stream = current_stream(like);
  if (!packed) {
    check_launch(
        op, launch_plain(plain_args(p, role, static_cast<int32_t>(lines)), p.dtype, device.multiprocessors, stream));
    return;
  }
  p.packed = static_cast<const float*>(packed->const_data_ptr());
  OptionalTensor workspace;
  for (TileLaunch& launch : tile_launches(p, role, static_cast<int32_t>(lines), allow_tf32, device)) {
    ConvArgs& a = launch.args;
    if (a.in_prefix || a.out_prefix) {
      OrderArgs o;
      o.n = static_cast<int32_t>(a.cut.n), o.c_in = a.c_in, o.c_out = a.c_out, o.cut = a.cut;
      o.in_prefix = a.in_prefix, o.out_prefix = a.out_prefix;
      // Launches follow each other on the stream and may share the order's memory.
      if (!workspace || workspace->numel() < o.workspace())
        workspace = empty_on(like, {o.workspace()}, ScalarType::Int);
      o.place(static_cast<int32_t*>(workspace->mutable_data_ptr()));
      check_launch(op, launch_order(o, stream));
      use_order(a, o);
    }
    OptionalTensor unfolded, partial;  // freed at once, for what follows on the stream
    if (const int64_t pieces = launch.unfold.pieces(); pieces > 0) {
      unfolded = empty_on(like, {pieces * 4}, ScalarType::Float);
      use_unfolded(launch, unfolded->mutable_data_ptr());
      check_launch(op, launch_unfold(launch.unfold, element_size(p.dtype), device.multiprocessors, stream));
    }
    if (launch.partial_elements > 0) {
      partial = empty_on(like, {launch.partial_elements}, ScalarType::Float);
      a.partial = static_cast<float*>(partial->mutable_data_ptr());
    }
    check_launch(op, launch_tile(launch, device.multiprocessors, stream));
  }
}

}  // namespace rnp::cuda

// Python hands torch.backends.cudnn.allow_tf32 over: the stable ABI has no way to ask for it.
extern "C" __attribute__((visibility("default"))) void rnp_cuda_allow_tf32(int allow) {
  rnp::cuda::allow_tf32 = allow != 0;
}

STABLE_TORCH_LIBRARY_IMPL(rnp, CUDA, m) {
  m.impl("pack_weight", TORCH_BOX(&rnp::cuda::pack_weight_cuda));
  m.impl("prefix_conv2d", TORCH_BOX(&rnp::cuda::prefix_conv2d_cuda));
  m.impl("prefix_conv2d_input_grad", TORCH_BOX(&rnp::cuda::input_grad_cuda));
}
