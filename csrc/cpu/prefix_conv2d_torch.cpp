// Binding of prefix_conv2d and pack_weight on the CPU: check every argument, allocate, fill the plain structs, run.
#include <algorithm>
#include <new>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "core/algorithm.h"
#include "core/half.h"
#include "core/stock.h"
#include "cpu/pack_weight.h"
#include "cpu/prefix_conv2d.h"
#include "cpu/stock_torch.h"
#include "cpu/torch_common.h"
#include "cpu/winograd.h"
#include "torch_text.h"

namespace rnp::cpu {
namespace {

using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

ConvShape checked_weight(const char* op, const Tensor& weight, int64_t groups) {
  STD_TORCH_CHECK(weight.dim() == 4, op, ": weight must be 4-D (C_out, C_in / groups, kH, kW); got ", text(weight));
  STD_TORCH_CHECK(weight.numel() > 0, op, ": weight must not be empty; got ", text(weight));
  STD_TORCH_CHECK(groups > 0, op, ": groups must be positive; got ", groups);
  STD_TORCH_CHECK(weight.size(0) % groups == 0, op, ": output channels must be divisible by groups; got ",
                  weight.size(0), " channels, ", groups, " groups");
  ConvShape s;
  s.groups = groups;
  s.c_out = weight.size(0);
  s.c_in = weight.size(1) * groups;
  s.kh = weight.size(2);
  s.kw = weight.size(3);
  return s;
}

WeightView view_of(const char* op, const Tensor& weight) {
  return {weight.const_data_ptr(), dtype_of(op, "weight", weight), strides_of(weight)};
}

Tensor pack_weight_cpu(const Tensor& weight, int64_t groups) {
  const ConvShape shape = checked_weight("pack_weight", weight, groups);
  const WeightView view = view_of("pack_weight", weight);
  const PackedLayout layout = layout_in_use(shape, view.dtype);
  Tensor packed = torch::stable::empty({layout.total_floats()}, ScalarType::Float);
  pack_weight(view, layout, static_cast<float*>(packed.mutable_data_ptr()), torch_threads());
  return packed;
}

Tensor pack_winograd_cpu(const Tensor& weight, int64_t tile) {
  constexpr const char* kPack = "pack_winograd";
  checked_weight(kPack, weight, 1);
  STD_TORCH_CHECK(weight.scalar_type() == ScalarType::Float, kPack, ": weight must be float32; got ",
                  torch::headeronly::toString(weight.scalar_type()));
  const WinogradLayout layout{tile, weight.size(1), weight.size(0), weight.size(2)};
  STD_TORCH_CHECK(weight.size(2) == weight.size(3) && (layout.kernel == 3 || (layout.folded() && weight.size(1) <= 4)),
                  kPack, ": the kernel must be 3x3, or 7x7 over at most 4 channels; got ", text(weight));
  STD_TORCH_CHECK(tile == 4 || (tile == 2 && !layout.folded()), kPack, ": tile must be ",
                  layout.folded() ? "4 for a 7x7 kernel" : "2 or 4", "; got ", tile);
  Tensor packed = torch::stable::empty({layout.total_floats()}, ScalarType::Float);
  pack_winograd(view_of(kPack, weight), layout, static_cast<float*>(packed.mutable_data_ptr()), torch_threads());
  return packed;
}

constexpr const char* kOp = "prefix_conv2d";

ConvShape checked_shape(const Tensor& input, const Tensor& weight, const std::vector<int64_t>& stride,
                        const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation, int64_t groups) {
  STD_TORCH_CHECK(input.dim() == 4, kOp, ": input must be 4-D (N, C, H, W); got ", text(input));
  checked_weight(kOp, weight, groups);
  STD_TORCH_CHECK(weight.scalar_type() == input.scalar_type(), kOp, ": weight must have the input's dtype ",
                  torch::headeronly::toString(input.scalar_type()), "; got ",
                  torch::headeronly::toString(weight.scalar_type()));
  STD_TORCH_CHECK(weight.size(1) * groups == input.size(1), kOp, ": weight ", text(weight), " with groups=", groups,
                  " needs ", weight.size(1) * groups, " input channels; got ", input.size(1));
  STD_TORCH_CHECK(stride.size() == 2 && stride[0] > 0 && stride[1] > 0, kOp, ": stride must be two positive integers");
  STD_TORCH_CHECK(dilation.size() == 2 && dilation[0] > 0 && dilation[1] > 0, kOp,
                  ": dilation must be two positive integers");
  STD_TORCH_CHECK(padding.size() == 4, kOp, ": padding must be (top, bottom, left, right); got ", padding.size(),
                  " values");
  check_paddings(kOp, padding);
  ConvShape s;
  s.n = input.size(0);
  s.c_in = input.size(1);
  s.h = input.size(2);
  s.w = input.size(3);
  s.c_out = weight.size(0);
  s.kh = weight.size(2);
  s.kw = weight.size(3);
  s.stride_h = stride[0];
  s.stride_w = stride[1];
  s.pad_top = padding[0];
  s.pad_bottom = padding[1];
  s.pad_left = padding[2];
  s.pad_right = padding[3];
  s.dilation_h = dilation[0];
  s.dilation_w = dilation[1];
  s.groups = groups;
  s.out_h = conv_output_size(s.h, s.kh, s.stride_h, s.pad_top, s.pad_bottom, s.dilation_h);
  s.out_w = conv_output_size(s.w, s.kw, s.stride_w, s.pad_left, s.pad_right, s.dilation_w);
  STD_TORCH_CHECK(s.out_h > 0 && s.out_w > 0, kOp, ": the dilated kernel must fit into the padded input; got input ",
                  text(input), ", weight ", text(weight));
  int64_t bytes = static_cast<int64_t>(input.element_size());
  for (int64_t size : {s.n, s.c_out, s.out_h, s.out_w})
    STD_TORCH_CHECK(!__builtin_mul_overflow(bytes, size, &bytes), kOp,
                    ": the output must have less than 2^63 bytes; got (", s.n, ", ", s.c_out, ", ", s.out_h, ", ",
                    s.out_w, ")");
  return s;
}

// A (C_out,) vector or (T, C_out) table of scale or bias, as the kernel reads it: float32 or float64, channels
// contiguous.
struct Table {
  const void* data = nullptr;
  int64_t row_stride = 0, rows = 0;  // rows 0: a plain vector or absent
  std::vector<float> floats;
  std::vector<double> doubles;
};

template <typename From, typename To>
void copy_table(const Tensor& t, int64_t rows, int64_t channels, std::vector<To>& out) {
  const From* from = static_cast<const From*>(t.const_data_ptr());
  const int64_t row_step = t.dim() == 2 ? t.stride(0) : 0, step = t.stride(t.dim() - 1);
  out.resize(static_cast<size_t>(rows * channels));
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < channels; ++c)
      out[static_cast<size_t>(r * channels + c)] = static_cast<To>(to_float(from[r * row_step + c * step]));
}

void read_table(const char* name, const OptionalTensor& t, DType dtype, int64_t channels, bool have_row, Table& out) {
  if (!t) return;
  check_cpu(kOp, name, *t);
  const DType own = dtype_of(kOp, name, *t);
  STD_TORCH_CHECK(own == dtype || (own == DType::kFloat32 && dtype != DType::kFloat64), kOp, ": ", name,
                  " must have the input's dtype (or float32 beside a half input); got ",
                  torch::headeronly::toString(t->scalar_type()));
  STD_TORCH_CHECK((t->dim() == 1 || t->dim() == 2) && t->size(t->dim() - 1) == channels, kOp, ": ", name,
                  " must have shape (C_out,) or (T, C_out) with C_out=", channels, "; got ", text(*t));
  const int64_t rows = t->dim() == 2 ? t->size(0) : 1;
  if (t->dim() == 2) {
    STD_TORCH_CHECK(have_row, kOp, ": a table of ", name, " needs `row`, which names each sample's line; got ",
                    text(*t));
    out.rows = rows;
    out.row_stride = channels;
  }
  if (own == DType::kFloat32 && t->stride(t->dim() - 1) == 1) {
    out.data = t->const_data_ptr();
    if (t->dim() == 2) out.row_stride = t->stride(0);
  } else if (own == DType::kFloat64) {
    copy_table<double>(*t, rows, channels, out.doubles);
    out.data = out.doubles.data();
  } else {
    if (own == DType::kFloat32) copy_table<float>(*t, rows, channels, out.floats);
    if (own == DType::kBFloat16) copy_table<BFloat16>(*t, rows, channels, out.floats);
    if (own == DType::kFloat16) copy_table<Float16>(*t, rows, channels, out.floats);
    out.data = out.floats.data();
  }
}

int64_t largest(const int32_t* prefix, int64_t n, int64_t all) {
  return prefix && n > 0 ? *std::max_element(prefix, prefix + n) : all;
}

// The packed weights to use: the caller's if they belong to the weight and are fresh, else a copy made for this call.
Tensor usable_packed(const Tensor& weight, const PackedLayout& layout, const OptionalTensor& packed, int64_t in_live,
                     int64_t out_live) {
  const WeightView view = view_of(kOp, weight);
  if (packed) {
    check_cpu(kOp, "packed", *packed);
    STD_TORCH_CHECK(packed->scalar_type() == ScalarType::Float && packed->dim() == 1 && packed->is_contiguous(), kOp,
                    ": packed must be the 1-D float32 result of pack_weight; got shape ", text(*packed));
    const float* data = static_cast<const float*>(packed->const_data_ptr());
    const char* mismatch = packed_mismatch(data, packed->numel(), layout);
    if (mismatch && !packed_mismatch(data, packed->numel(), layout.other())) {  // made under another instruction set
      mark_stale(data);
      return usable_packed(weight, layout, std::nullopt, in_live, out_live);
    }
    STD_TORCH_CHECK(!mismatch, kOp, ": packed does not belong to weight ", text(weight), " with groups=", layout.groups,
                    ": ", mismatch ? mismatch : "");
    if (packed_is_fresh(view, layout, data)) return *packed;
    mark_stale(data);
  }
  Tensor fresh = torch::stable::empty({layout.total_floats()}, ScalarType::Float);
  pack_weight(view, layout, static_cast<float*>(fresh.mutable_data_ptr()), torch_threads(), in_live, out_live);
  return fresh;
}

// The transformed weights to use: the caller's, or a copy made for this call where they are stale, so that the bits do
// not depend on what was cached. `tile` receives their tile.
Tensor usable_winograd(const Tensor& weight, const PackedLayout& layout, const Tensor& packed, int64_t* tile) {
  check_cpu(kOp, "winograd", packed);
  STD_TORCH_CHECK(packed.scalar_type() == ScalarType::Float && packed.dim() == 1 && packed.is_contiguous(), kOp,
                  ": winograd must be the 1-D float32 result of pack_winograd; got shape ", text(packed));
  const float* data = static_cast<const float*>(packed.const_data_ptr());
  const char* mismatch = winograd_mismatch(data, packed.numel(), weight.size(0), weight.size(1), weight.size(2), tile);
  STD_TORCH_CHECK(!mismatch, kOp, ": winograd does not belong to weight ", text(weight), ": ",
                  mismatch ? mismatch : "");
  if (packed_is_fresh(view_of(kOp, weight), layout, data)) return packed;
  mark_stale(data);
  return pack_winograd_cpu(weight, *tile);
}

std::tuple<Tensor, Tensor> prefix_conv2d_cpu(const Tensor& input, const Tensor& weight, const OptionalTensor& bias,
                                             const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                                             const std::vector<int64_t>& dilation, int64_t groups,
                                             const OptionalTensor& in_prefix, const OptionalTensor& out_prefix,
                                             const OptionalTensor& scale, const OptionalTensor& row,
                                             const OptionalTensor& residual, const Text& activation_text,
                                             const Text& tail_text, bool pooled, const OptionalTensor& packed,
                                             const OptionalTensor& winograd) {
  PrefixConv2dParams p;
  check_cpu(kOp, "weight", weight);
  p.dtype = dtype_of(kOp, "input", input);
  p.shape = checked_shape(input, weight, stride, padding, dilation, groups);
  const ConvShape& s = p.shape;
  const std::string &activation = activation_text.value, &tail = tail_text.value;
  STD_TORCH_CHECK(activation == "none" || activation == "relu", kOp,
                  ": activation must be \"none\" or \"relu\"; got \"", activation, "\"");
  STD_TORCH_CHECK(tail == "zero" || tail == "skip", kOp, ": tail must be \"zero\" or \"skip\"; got \"", tail, "\"");
  STD_TORCH_CHECK(!(residual && tail == "skip"), kOp, ": tail=\"skip\" cannot be combined with a residual");
  p.activation = activation == "relu" ? Activation::kRelu : Activation::kNone;
  p.tail = tail == "skip" ? Tail::kSkip : Tail::kZero;

  std::vector<int32_t> in_values = checked_indices(kOp, "in_prefix", in_prefix, s.n, s.c_in);
  std::vector<int32_t> out_values = checked_indices(kOp, "out_prefix", out_prefix, s.n, s.c_out);
  Table scale_table, bias_table;
  read_table("scale", scale, p.dtype, s.c_out, row.has_value(), scale_table);
  read_table("bias", bias, p.dtype, s.c_out, row.has_value(), bias_table);
  STD_TORCH_CHECK(!(scale_table.rows && bias_table.rows) || scale_table.rows == bias_table.rows, kOp,
                  ": tables of scale and bias must have the same number of lines; got ", scale_table.rows, " and ",
                  bias_table.rows);
  const int64_t lines = std::max(scale_table.rows, bias_table.rows);
  for (const OptionalTensor* t : {&scale, &bias})
    STD_TORCH_CHECK(s.n == 0 || !*t || (*t)->dim() == 1 || (*t)->size(0) > 0, kOp,
                    ": tables of scale and bias must have a line at least; got ", text(**t));
  const std::vector<int32_t> rows = checked_indices(kOp, "row", row, s.n, lines > 0 ? lines - 1 : INT32_MAX);

  const bool last = is_channels_last(input) || is_channels_last(weight);
  if (residual) {
    check_cpu(kOp, "residual", *residual);
    STD_TORCH_CHECK(residual->scalar_type() == input.scalar_type(), kOp, ": residual must have the input's dtype; got ",
                    torch::headeronly::toString(residual->scalar_type()));
    STD_TORCH_CHECK(residual->dim() == 4 && residual->size(0) == s.n && residual->size(1) == s.c_out &&
                        residual->size(2) == s.out_h && residual->size(3) == s.out_w,
                    kOp, ": residual must have the output's shape (", s.n, ", ", s.c_out, ", ", s.out_h, ", ", s.out_w,
                    "); got ", text(*residual));
    p.residual = residual->const_data_ptr();
    p.residual_stride = strides_of(*residual);
  }
  const bool far = far_apart(s);
  std::optional<Tensor> transformed;
  if (far) {
    // Only the plain kernel, which knows no padding, computes this layer.
  } else if (winograd && winograd_can(s, p.dtype)) {
    transformed = usable_winograd(weight, PackedLayout(s), *winograd, &p.winograd_tile);
    p.winograd = static_cast<const float*>(transformed->const_data_ptr());
  } else if (transforms_in_call(s, p.dtype)) {
    p.winograd_tile = winograd_tile(s, p.dtype);
  }
  // Samples of full width take the stock path where that is the faster one, whatever the company they are in.
  const bool plain = !scale && !row && !residual && !pooled && p.activation == Activation::kNone &&
                     (!bias || (bias->dim() == 1 && bias->scalar_type() == input.scalar_type()));
  std::vector<int64_t> stock;
  const bool wide_by_winograd =
      p.winograd_tile != 0 && static_cast<int64_t>(choose_algorithm(s, p.dtype, s.c_in, s.c_out)) == p.winograd_tile;
  const Stock path =
      plain && s.n > 0 && !wide_by_winograd ? stock_path(s, p.dtype, last, bfloat16_in_use(s, p.dtype)) : Stock::kNone;
  if (path != Stock::kNone) {
    for (int64_t i = 0; i < s.n; ++i) {
      const size_t at = static_cast<size_t>(i);
      if ((in_values.empty() || in_values[at] == s.c_in) && (out_values.empty() || out_values[at] == s.c_out))
        stock.push_back(i);
    }
    if (static_cast<int64_t>(stock.size()) == s.n)
      return {stock_conv2d(input, weight, bias, s, path), torch::stable::empty({int64_t{0}}, ScalarType::Float)};
    for (int64_t i : stock) (out_values.empty() ? in_values : out_values)[static_cast<size_t>(i)] = 0;
  }
  p.in_prefix = in_values.empty() ? nullptr : in_values.data();
  p.out_prefix = out_values.empty() ? nullptr : out_values.data();
  const int64_t in_live = largest(p.in_prefix, s.n, s.c_in), out_live = largest(p.out_prefix, s.n, s.c_out);
  if (p.winograd_tile != 0 && !p.winograd && s.n > 0 && in_live > 0 && out_live > 0)
    p.winograd = transform_for_call(view_of(kOp, weight), {p.winograd_tile, s.c_in, s.c_out, s.kh}, torch_threads(),
                                    in_live, out_live);
  std::optional<Tensor> weights;
  if (p.dtype != DType::kFloat64 && !far && (!p.winograd || !WinogradSamples(p).all())) {
    const PackedLayout layout = layout_in_use(s, p.dtype);
    p.pairs = layout.pairs;
    weights = usable_packed(weight, layout, packed, in_live, out_live);
    p.packed = static_cast<const float*>(weights->const_data_ptr());
  }

  Tensor output =
      torch::stable::empty({s.n, s.c_out, s.out_h, s.out_w}, input.scalar_type(), std::nullopt, std::nullopt,
                           std::nullopt, last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
  Tensor means = pooled ? torch::stable::empty({s.n, s.c_out}, ScalarType::Float)
                        : torch::stable::empty({int64_t{0}}, ScalarType::Float);
  p.input = input.const_data_ptr();
  p.input_stride = strides_of(input);
  p.weight = weight.const_data_ptr();
  p.weight_stride = strides_of(weight);
  p.row = rows.empty() ? nullptr : rows.data();
  p.scale = scale_table.data;
  p.scale_row_stride = scale_table.row_stride;
  if (scale_table.rows == 0) p.scale_row_stride = 0;
  p.bias = bias_table.data;
  p.bias_row_stride = bias_table.rows == 0 ? 0 : bias_table.row_stride;
  p.output = output.mutable_data_ptr();
  p.output_stride = strides_of(output);
  p.pooled = pooled ? static_cast<float*>(means.mutable_data_ptr()) : nullptr;
  try {
    if (s.n > 0) (far ? prefix_conv2d_plain : prefix_conv2d)(p, torch_threads());
  } catch (const std::bad_alloc&) {
    STD_TORCH_CHECK(false, kOp, ": not enough memory beside the output; got input ", text(input), ", weight ",
                    text(weight));
  }
  for (int64_t i : stock) {
    Tensor samples = input;  // narrow takes no const tensor
    Tensor to = torch::stable::narrow(output, 0, i, 1);
    torch::stable::copy_(to, stock_conv2d(torch::stable::narrow(samples, 0, i, 1), weight, bias, s, path));
  }
  return {output, means};
}

}  // namespace
}  // namespace rnp::cpu

STABLE_TORCH_LIBRARY_IMPL(rnp, CPU, m) {
  m.impl("pack_weight", TORCH_BOX(&rnp::cpu::pack_weight_cpu));
  m.impl("pack_winograd", TORCH_BOX(&rnp::cpu::pack_winograd_cpu));
  m.impl("prefix_conv2d", TORCH_BOX(&rnp::cpu::prefix_conv2d_cpu));
}
