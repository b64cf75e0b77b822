#include "cpu/segment_check.h"

#include <algorithm>
#include <sstream>
#include <stdexcept>

#include "core/algorithm.h"
#include "cpu/pack_weight.h"
#include "cpu/winograd.h"

namespace rnp::cpu {
namespace {

size_t slot(int64_t number) { return static_cast<size_t>(number); }

// The message is put together only where it is needed: hundreds of them a call cost 0.1 ms.
template <typename... Parts>
void require(bool holds, const Parts&... parts) {
  if (holds) return;
  std::ostringstream what;
  (what << ... << parts);
  throw std::invalid_argument(what.str());
}

const Constant& constant(const SegmentCall& call, int64_t index) {
  require(index >= 0 && slot(index) < call.constants.size(), "a constant is missing");
  return call.constants[slot(index)];
}

void check_conv(const SegmentCall& call, const SegmentStep& s, const MapShape& in) {
  ConvShape shape = step_shape(s, in);
  const Constant& weight = constant(call, s.weight);
  const char* mismatch = packed_mismatch(weight.data, weight.floats, PackedLayout(shape));
  require(!mismatch, "packed weights do not belong to a convolution: ", mismatch ? mismatch : "");
  if (s.winograd >= 0) {
    const Constant& transformed = constant(call, s.winograd);
    int64_t tile = 0;
    const char* other = winograd_mismatch(transformed.data, transformed.floats, s.c_out, s.c_in, s.kh, &tile);
    require(winograd_can(shape, DType::kFloat32) && !other,
            "transformed weights do not belong to a convolution: ", other ? other : "it cannot use them");
  }
  for (int64_t table : {s.scale, s.bias})
    if (table >= 0)
      require(table + std::max<int64_t>(1, s.lines) * s.c_out <= constant(call, 0).floats,
              "a table must lie within constant 0");
}

void check_agent(const SegmentCall& call, const SegmentStep& s) {
  const int64_t gates = 3 * s.hidden;
  const int64_t sizes[kAgentConstants] = {
      s.feature_size, s.feature_size, s.code * s.feature_size, s.code,   gates * s.input, gates * s.hidden,
      gates,          gates,          s.actions * s.hidden,    s.actions};
  for (int64_t i = 0; i < kAgentConstants; ++i)
    require(constant(call, s.agent + i).floats == sizes[i], "the agent's constant ", i, " must have ", sizes[i],
            " elements; got ", constant(call, s.agent + i).floats);
}

}  // namespace

ConvShape step_shape(const SegmentStep& s, const MapShape& in) {
  ConvShape c;
  c.c_in = s.c_in, c.h = in.h, c.w = in.w;
  c.c_out = s.c_out, c.kh = s.kh, c.kw = s.kw;
  c.stride_h = s.stride_h, c.stride_w = s.stride_w;
  c.pad_top = s.pad_top, c.pad_bottom = s.pad_bottom, c.pad_left = s.pad_left, c.pad_right = s.pad_right;
  c.dilation_h = s.dilation_h, c.dilation_w = s.dilation_w;
  c.groups = s.groups;
  c.out_h = conv_output_size(c.h, c.kh, c.stride_h, c.pad_top, c.pad_bottom, c.dilation_h);
  c.out_w = conv_output_size(c.w, c.kw, c.stride_w, c.pad_left, c.pad_right, c.dilation_w);
  return c;
}

void check_segment(const SegmentProgram& program, const std::vector<MapShape>& shapes, const SegmentCall& call) {
  for (size_t i = 0; i < program.index_in.size(); ++i) {
    const int64_t limit = program.index_limit[slot(program.index_in[i])];
    for (int64_t n = 0; n < call.n; ++n) {
      const int32_t v = call.index_in[i][n];
      require(v >= 0 && v <= limit, "index input ", i, " must lie in 0…", limit, "; got ", v, " for sample ", n);
    }
  }
  for (const SegmentStep& s : program.steps) {
    if (s.op == SegmentOp::kConv) check_conv(call, s, shapes[slot(s.x)]);
    if (s.op == SegmentOp::kDecide) check_agent(call, s);
  }
}

std::vector<MapShape> segment_shapes(const SegmentProgram& program, const std::vector<MapShape>& map_in) {
  std::vector<MapShape> shapes(static_cast<size_t>(program.maps));
  for (size_t i = 0; i < program.map_in.size(); ++i) shapes[static_cast<size_t>(program.map_in[i])] = map_in[i];
  for (const SegmentStep& s : program.steps) {
    if (s.y < 0) continue;
    const MapShape& x = shapes[static_cast<size_t>(s.x)];
    MapShape& y = shapes[static_cast<size_t>(s.y)];
    if (s.op == SegmentOp::kConv) {
      require(x.c == s.c_in, "a convolution needs ", s.c_in, " input channels; got ", x.c);
      const ConvShape c = step_shape(s, x);
      y = {c.c_out, c.out_h, c.out_w};
    } else if (s.op == SegmentOp::kMaxPool) {
      if (s.in >= 0) require(program.index_limit[static_cast<size_t>(s.in)] <= x.c, "a prefix exceeds its map");
      y = {x.c, conv_output_size(x.h, s.kh, s.stride_h, s.pad_top, s.pad_top, 1),
           conv_output_size(x.w, s.kw, s.stride_w, s.pad_left, s.pad_left, 1)};
    } else {
      y = x;
    }
    require(y.h > 0 && y.w > 0, "the window must fit into the padded input");
    if (s.residual >= 0) {
      const MapShape& r = shapes[static_cast<size_t>(s.residual)];
      require(r.c == y.c && r.h == y.h && r.w == y.w, "the two sides of a sum must have one shape");
    }
  }
  return shapes;
}

}  // namespace rnp::cpu
