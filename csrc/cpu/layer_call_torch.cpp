#include <algorithm>

#include "core/algorithm.h"
#include "cpu/layer_call.h"
#include "cpu/output_pool.h"
#include "cpu/pack_weight.h"
#include "cpu/prefix_conv2d.h"
#include "cpu/torch_common.h"
#include "cpu/winograd.h"

namespace rnp::cpu {
namespace {

bool in_range(const int32_t* prefix, int64_t n, int64_t all) {
  return !prefix || std::all_of(prefix, prefix + n, [&](int32_t v) { return v >= 0 && v <= all; });
}

}  // namespace

LayerCall::LayerCall(const ConvShape& shape, const Strides4& input, const Strides4& weight, const Strides4& output,
                     int64_t tile) {
  params_.shape = shape;
  params_.input_stride = input;
  params_.weight_stride = weight;
  params_.output_stride = output;
  params_.winograd_tile = tile;
}

bool LayerCall::pools_output() const {
  const ConvShape& s = params_.shape;
  return OutputPool::serves(static_cast<size_t>(s.n * s.c_out * s.out_h * s.out_w) * sizeof(float));
}

void* LayerCall::new_output() const {
  const ConvShape& s = params_.shape;
  const Strides4& st = params_.output_stride;
  return rnp::cpu::new_output({s.n, s.c_out, s.out_h, s.out_w}, {st.n, st.c, st.h, st.w});
}

LayerCall::Answer LayerCall::operator()(uintptr_t input, uintptr_t output, uintptr_t in_prefix, uintptr_t out_prefix,
                                        uintptr_t weight, uintptr_t bias, uintptr_t packed,
                                        uintptr_t transformed) const {
  PrefixConv2dParams p = params_;
  const ConvShape& s = p.shape;
  if (winograd_tile(s, p.dtype) != p.winograd_tile) return kChanged;
  p.input = reinterpret_cast<const void*>(input);
  p.weight = reinterpret_cast<const void*>(weight);
  p.bias = reinterpret_cast<const void*>(bias);
  p.packed = reinterpret_cast<const float*>(packed);
  p.winograd = reinterpret_cast<const float*>(transformed);
  p.output = reinterpret_cast<void*>(output);
  p.in_prefix = reinterpret_cast<const int32_t*>(in_prefix);
  p.out_prefix = reinterpret_cast<const int32_t*>(out_prefix);
  if (!in_range(p.in_prefix, s.n, s.c_in) || !in_range(p.out_prefix, s.n, s.c_out)) return kRefused;
  const bool narrow = p.in_prefix || p.out_prefix;
  for (const float* pack : {p.winograd, p.winograd && !narrow ? nullptr : p.packed}) {
    if (!pack || packed_is_fresh({p.weight, p.dtype, p.weight_stride}, PackedLayout(s), pack)) continue;
    mark_stale(pack);
    return kChanged;
  }
  prefix_conv2d(p, torch_threads());
  return kDone;
}

}  // namespace rnp::cpu
