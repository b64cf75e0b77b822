#include "cuda/plan.h"

#include <algorithm>
#include <cstdlib>

namespace rnp::cuda {
namespace {

int32_t small(int64_t v) { return static_cast<int32_t>(v); }

// Channels of one group on either side, as the role sees them.
int64_t role_in(const ConvShape& s, Role role) { return role == Role::kForward ? s.group_in() : s.group_out(); }
int64_t role_out(const ConvShape& s, Role role) { return role == Role::kForward ? s.group_out() : s.group_in(); }

PackedTiles layout(const ConvShape& s, DType dtype, Role role) {
  PackedTiles t;
  t.groups = small(s.groups), t.group_in = small(role_in(s, role)), t.group_out = small(role_out(s, role));
  t.kh = small(s.kh), t.kw = small(s.kw), t.element = element_size(dtype);
  t.may_run = role == Role::kForward;  // a residue of the stride has only some of the taps
  return t;
}

// Taps of the outputs o ≡ residue (mod stride): all of them, where the layer itself runs. Those of an input gradient
// are equally far apart too.
Axis axis_of(Role role, int64_t residue, int64_t kernel, int64_t stride, int64_t pad, int64_t dilation) {
  Axis a = {};
  a.step = role == Role::kForward ? small(stride) : 1;
  for (int64_t k = 0; k < kernel; ++k) {
    int64_t delta = k * dilation - pad;
    if (role == Role::kInputGrad) {
      const int64_t t = residue + pad - k * dilation;
      if (t % stride != 0) continue;
      delta = t / stride;
    }
    if (a.count == 0) a.delta = small(delta), a.tap = small(k);
    if (a.count == 1) a.delta_step = small(delta) - a.delta, a.tap_step = small(k) - a.tap;
    ++a.count;
  }
  return a;
}

bool aligned(const ConvArgs& a, int32_t element) {
  const int64_t piece = 16 / element;
  const Strides4& st = a.input_stride;
  return st.c == 1 && st.n % piece == 0 && st.h % piece == 0 && st.w % piece == 0 &&
         reinterpret_cast<uintptr_t>(a.input) % 16 == 0 && (a.cut.groups == 1 || a.cut.group_in % piece == 0);
}

TileName tile_name(DType dtype, bool tf32, const TileSize& size) {
  const int at = size.bm == 64 ? 2 : (size.bn == 128 ? 0 : 1);
  const auto of = [&](TileName first) { return static_cast<TileName>(static_cast<int>(first) + at); };
  if (dtype == DType::kBFloat16) return of(TileName::bf16_128x128);
  if (dtype == DType::kFloat16) return of(TileName::fp16_128x128);
  return tf32 ? of(TileName::tf32_128x128) : TileName::fp32_128x64;
}

// The copy of the input that an unfolded layer reads, and the launch's view of it, but for the memory.
UnfoldArgs unfold_args(const PrefixConv2dParams& p, const PackedTiles& packed) {
  const ConvShape& s = p.shape;
  UnfoldArgs u;
  u.n = s.n, u.rows = (s.out_h - 1) * s.stride_h + (s.kh - 1) * s.dilation_h + 1;
  u.pixel_pieces = packed.pixel() * packed.element / 16;
  if (s.dilation_w > 1 || s.stride_w > s.kw) {
    u.window = small(s.kw), u.step = small(s.stride_w), u.dilation = small(s.dilation_w);
    u.columns = s.out_w * s.kw;
  } else {  // whole steps, so that a row is a multiple of the distance of outputs: so tensor maps are described
    u.columns = ((s.out_w - 1) * s.stride_w + s.kw + s.stride_w - 1) / s.stride_w * s.stride_w;
  }
  u.top = small(s.pad_top), u.left = small(s.pad_left);
  u.c_in = small(s.c_in), u.h = small(s.h), u.w = small(s.w);
  u.input = p.input, u.input_stride = p.input_stride, u.in_prefix = p.in_prefix;
  return u;
}

void view_unfolded(ConvArgs& a, const UnfoldArgs& u, const ConvShape& s, const PackedTiles& packed) {
  const int64_t pixel = packed.pixel();
  a.h = small(u.rows), a.w = small(s.out_w);
  a.c_in = a.cut.group_in = packed.run() * packed.pixel();
  a.y.delta = 0;
  a.x = {.count = 1};
  a.kernel_w = 1;
  a.input = nullptr;
  a.input_stride = {u.rows * u.columns * pixel, 1, u.columns * pixel, (u.window > 1 ? u.window : s.stride_w) * pixel};
  a.in_prefix = nullptr;  // dead channels are zeros: K is the layer's
}

// The limits of cuTensorMapEncodeIm2col for four dimensions, and a reading of its rules on strides that no driver
// refuses: the map may be padded, but dimensions must not overlap. Pixels of an unfolded input do; a driver that
// refuses them leaves the launch to cp.async.
Im2colBox im2col_box(const ConvArgs& a, int32_t element, bool unfolded) {
  Im2colBox b;
  if (a.x.count == 0 || a.y.count == 0) return b;
  b.base = a.input;
  b.c = a.c_in, b.w = a.w, b.h = a.h, b.n = a.cut.n;
  b.w_stride = a.input_stride.w * element, b.h_stride = a.input_stride.h * element;
  b.n_stride = a.input_stride.n * element;
  b.possible = (unfolded || b.w_stride >= b.c * element) && b.h_stride >= b.w_stride * b.w &&
               b.n_stride >= b.h_stride * b.h && b.n_stride < int64_t{1} << 40;
  const Axis* const axes[] = {&a.x, &a.y};
  const int64_t sizes[] = {b.w, b.h}, outs[] = {a.out_w, a.out_h};
  for (int i = 0; i < 2; ++i) {
    const int64_t reach = int64_t{axes[i]->count - 1} * axes[i]->delta_step;  // from the first tap to the last
    const int64_t lower = axes[i]->delta + std::min<int64_t>(reach, 0);
    const int64_t upper = lower + (outs[i] - 1) * axes[i]->step - (sizes[i] - 1);
    b.possible = b.possible && lower >= -128 && lower <= 127 && upper >= -128 && upper <= 127 &&
                 std::abs(reach) <= 255 && axes[i]->step <= 8;
    b.lower[i] = small(lower), b.upper[i] = small(upper), b.step[i] = axes[i]->step;
  }
  return b;
}

// The stream of the layer's maps; none where outputs do not step by one, where one tap is all, or where tiles would
// have more runs or boxes than their descriptions have room for.
Stream stream_of(const ConvArgs& a) {
  Stream none, s;
  if (a.y.step != 1 || a.x.step != 1 || a.y.count * a.x.count < 2) return none;
  const auto reach = [](const Axis& axis) { return (axis.count - 1) * std::abs(axis.delta_step); };
  // Along one axis, from the first pixel that a tap reads: places that outputs read, and real pixels. Where zeros stand
  // before the first pixel, as many behind the last one may be those of the next row.
  const auto length = [&](const Axis& axis, int32_t size, int32_t outputs) {
    const int32_t lower = axis.delta + std::min(0, (axis.count - 1) * axis.delta_step);
    const int32_t read = outputs + reach(axis), real = size - lower, shared = std::max(0, -lower);
    return std::min(read, std::max(real, read - shared));
  };
  s.pitch = length(a.x, a.w, a.out_w), s.rows = length(a.y, a.h, a.out_h);
  s.halo = reach(a.y) * s.pitch + reach(a.x);
  if (s.pitch < 1 || s.rows < 1) return none;
  const int64_t rows = kTallRows + s.halo + 7, runs = kTallRows / s.positions() + 2;
  // A run takes two boxes at most, and one more for each 128 rows.
  return runs <= 32 && 2 * runs + rows / 128 <= kMostBoxes ? s : none;
}

// The box of all pixels of the stream.
Im2colBox stream_box(const ConvArgs& a, const Stream& s, Im2colBox b) {
  const int32_t sizes[] = {a.w, a.h}, lengths[] = {s.pitch, s.rows};
  for (int i = 0; i < 2; ++i) {
    b.upper[i] = b.lower[i] + lengths[i] - sizes[i];
    b.possible = b.possible && b.upper[i] >= -128 && b.upper[i] <= 127;
  }
  return b;
}

// On a Hopper GPU: whether the layer runs on wgmma. A rule of layer, dtype and layout, never of the batch. Below 64
// output channels a warpgroup's 64 rows read more of shared memory than they multiply.
bool wants_wgmma(const ConvArgs& a, bool matrix) { return matrix && !a.gather && a.cut.group_out >= 64; }

// Whether the sm_90a epilogue can store, and read the residual, 16 bytes of channels at a time, and the tables by
// pairs.
bool vectors(const ConvArgs& a, int32_t element) {
  const int64_t piece = 16 / element;
  const auto at = [](const void* p, uintptr_t bytes) { return reinterpret_cast<uintptr_t>(p) % bytes == 0; };
  const auto whole = [&](const void* p, const Strides4& st) {
    return at(p, 16) && st.c == 1 && st.n % piece == 0 && st.h % piece == 0 && st.w % piece == 0;
  };
  const auto pairs = [&](const float* p, int64_t stride) {
    return !p || (at(p, 8) && stride % 2 == 0 && stride * a.lines < int64_t{1} << 31);
  };
  const Strides4 &out = a.output_stride, &in = a.residual_stride;
  const bool alike = out.n == in.n && out.c == in.c && out.h == in.h && out.w == in.w;
  return whole(a.output, out) && (!a.residual || (at(a.residual, 16) && alike)) && a.cut.group_out % piece == 0 &&
         pairs(a.scale, a.scale_row_stride) && pairs(a.bias, a.bias_row_stride) &&
         (!a.scale || !a.bias || a.scale_row_stride == a.bias_row_stride);
}

TileName first_hopper_tile(DType dtype) {
  if (dtype == DType::kBFloat16) return TileName::sm90_bf16_128x128;
  return dtype == DType::kFloat16 ? TileName::sm90_fp16_128x128 : TileName::sm90_tf32_128x128;
}

}  // namespace

bool set_hopper_tile(TileLaunch& launch, const TileSize& tile, bool window) {
  ConvArgs& a = launch.args;
  const int32_t element = is_float(launch.tile) ? 4 : 2;
  Im2colBox box = im2col_box(a, element, launch.unfold.pieces() > 0);
  a.window_rows = a.window_stages = a.pitch = 0;
  a.cut.positions = int64_t{a.out_h} * a.out_w;
  if (window) {
    const Stream stream = stream_of(a);
    if (stream.pitch == 0 || a.segment_chunks < a.chunks) return false;
    box = stream_box(a, stream, box);
    a.window_rows = StreamShape{stream.positions(), stream.halo}.window_rows(tile.bm);
    a.window_stages = window_stages(tile, a.window_rows);
    if (!box.possible || a.window_stages < 2) return false;
    a.cut.positions = stream.positions(), a.pitch = stream.pitch;
  }
  launch.box = box, launch.tile = hopper_tile(launch.tile, tile.bn);
  a.cut.bm = tile.bm, a.cut.bn = tile.bn;
  a.use_tma = box.possible;
  a.box_lower_w = box.lower[0], a.box_lower_h = box.lower[1];
  return true;
}

namespace {

void plan_hopper(TileLaunch& launch, DType dtype, const Device& device) {
  ConvArgs& a = launch.args;
  const int32_t element = element_size(dtype);
  const int64_t rows = a.cut.n * a.cut.positions;
  const int32_t taps = a.y.count * a.x.count;
  a.segment_chunks = std::max(1, segment_chunks(a.cut.positions, a.chunks, taps, a.cut.groups));
  const int32_t segments = (a.chunks + a.segment_chunks - 1) / a.segment_chunks;
  const Stream stream = stream_of(a);
  const bool kept =
      stream.pitch > 0 && stream_box(a, stream, im2col_box(a, element, launch.unfold.pieces() > 0)).possible;
  const HopperChoice choice = choose_tile_sm90(
      {a.cut.n, a.cut.positions, a.cut.group_out, a.cut.groups, std::max(1, a.chunks), std::max(1, taps), segments,
       element, a.in_prefix || a.out_prefix, kept ? StreamShape{stream.positions(), stream.halo} : StreamShape{}},
      device.multiprocessors);
  if (choice.split) {
    a.splits = segments;
    launch.partial_elements = int64_t{segments} * rows * a.c_out;
  }
  launch.tile = first_hopper_tile(dtype);
  set_hopper_tile(launch, choice.tile, choice.window);
}

}  // namespace

int32_t element_size(DType dtype) {
  switch (dtype) {
    case DType::kFloat64:
      return 8;
    case DType::kFloat32:
      return 4;
    case DType::kBFloat16:
    case DType::kFloat16:
      break;
  }
  return 2;
}

bool has_tile(const ConvShape& s, DType dtype, Role role) {
  constexpr int64_t kFar = 32767;  // deltas are 16 bits
  const int64_t reach = std::max({s.kh * s.dilation_h, s.kw * s.dilation_w, s.pad_top, s.pad_bottom, s.pad_left,
                                  s.pad_right, s.stride_h, s.stride_w});
  // Few channels in many groups (depthwise) would leave nearly all of a tile empty.
  const bool narrow = s.groups > 1 && std::min(role_in(s, role), role_out(s, role)) < 4;
  return dtype != DType::kFloat64 && !narrow && s.kh <= kMaxTaps && s.kw <= kMaxTaps && 2 * reach <= kFar &&
         s.c_in <= INT32_MAX / 2 && s.c_out <= INT32_MAX / 2;
}

PackArgs pack_args(const ConvShape& s, DType dtype, Role role, const void* weight, const Strides4& st, void* packed) {
  PackArgs a;
  a.layout = layout(s, dtype, role);
  a.weight = weight, a.packed = packed;
  a.group_stride = s.group_out() * st.n;
  a.out_stride = role == Role::kForward ? st.n : st.c;
  a.in_stride = role == Role::kForward ? st.c : st.n;
  a.y_stride = st.h, a.x_stride = st.w;
  return a;
}

std::vector<TileLaunch> tile_launches(const PrefixConv2dParams& p, Role role, int32_t lines, bool tf32,
                                      const Device& device) {
  const ConvShape& s = p.shape;
  const bool forward = role == Role::kForward;
  const PackedTiles packed = layout(s, p.dtype, role);
  const int64_t step_h = forward ? 1 : s.stride_h, step_w = forward ? 1 : s.stride_w;
  const int64_t rows = forward ? s.out_h : s.h, columns = forward ? s.out_w : s.w;
  std::vector<TileLaunch> launches;
  for (int64_t ry = 0; ry < std::min(step_h, rows); ++ry) {
    for (int64_t rx = 0; rx < std::min(step_w, columns); ++rx) {
      ConvArgs a;
      a.y = axis_of(role, ry, s.kh, s.stride_h, s.pad_top, s.dilation_h);
      a.x = axis_of(role, rx, s.kw, s.stride_w, s.pad_left, s.dilation_w);
      const int64_t out_h = (rows - ry + step_h - 1) / step_h, out_w = (columns - rx + step_w - 1) / step_w;
      a.h = small(forward ? s.h : s.out_h), a.w = small(forward ? s.w : s.out_w);
      a.out_h = small(out_h), a.out_w = small(out_w);
      a.c_in = small(forward ? s.c_in : s.c_out), a.c_out = small(forward ? s.c_out : s.c_in);
      a.input = p.input, a.input_stride = p.input_stride;
      a.packed = p.packed;
      a.chunks = packed.chunks(), a.taps = packed.taps(), a.kernel_w = small(s.kw);
      a.flat = packed.flat();
      a.in_prefix = forward ? p.in_prefix : p.out_prefix, a.out_prefix = forward ? p.out_prefix : p.in_prefix;
      a.row = p.row, a.lines = lines;
      a.scale = static_cast<const float*>(p.scale), a.scale_row_stride = p.scale_row_stride;
      a.bias = static_cast<const float*>(p.bias), a.bias_row_stride = p.bias_row_stride;
      a.residual = p.residual, a.residual_stride = p.residual_stride;
      a.relu = p.activation == Activation::kRelu, a.zero_tail = p.tail == Tail::kZero;
      const int64_t first = ry * p.output_stride.h + rx * p.output_stride.w;
      a.output = static_cast<char*>(p.output) + first * element_size(p.dtype);
      a.output_stride = p.output_stride;
      a.output_stride.h *= step_h, a.output_stride.w *= step_w;
      a.cut = {s.n, out_h * out_w, packed.groups, packed.group_in, packed.group_out, 0, 0};
      UnfoldArgs unfold;
      if (packed.unfolded()) {
        unfold = unfold_args(p, packed);
        view_unfolded(a, unfold, s, packed);
      }
      a.gather = a.flat || !(packed.unfolded() || aligned(a, packed.element));
      a.vectors = vectors(a, packed.element);
      const auto dense = [&](const Strides4& st) { return st.h == a.out_w * st.w; };
      a.dense = dense(a.output_stride) && (!a.residual || dense(a.residual_stride));
      const bool matrix = p.dtype != DType::kFloat32 || tf32;
      if (device.hopper && wants_wgmma(a, matrix)) {
        launches.push_back({TileName::kCount, a, {}, 0, unfold});
        plan_hopper(launches.back(), p.dtype, device);
        continue;
      }
      TileSize size{128, 64};
      if (!a.gather && matrix)
        size = choose_tile_sm80(s.n * out_h * out_w, packed.group_out, packed.groups, device.multiprocessors);
      a.cut.bm = size.bm, a.cut.bn = size.bn;
      launches.push_back({tile_name(p.dtype, tf32, size), a, {}, 0, unfold});
    }
  }
  return launches;
}

void use_unfolded(TileLaunch& launch, void* memory) {
  launch.unfold.unfolded = memory;
  launch.args.input = launch.box.base = memory;
}

PlainArgs plain_args(const PrefixConv2dParams& p, Role role, int32_t lines) {
  const ConvShape& s = p.shape;
  const bool forward = role == Role::kForward;
  PlainArgs a;
  a.n = s.n, a.groups = small(s.groups), a.group_in = small(role_in(s, role)), a.group_out = small(role_out(s, role));
  a.kh = small(s.kh), a.kw = small(s.kw);
  a.h = small(forward ? s.h : s.out_h), a.w = small(forward ? s.w : s.out_w);
  a.out_h = small(forward ? s.out_h : s.h), a.out_w = small(forward ? s.out_w : s.w);
  const auto axis = [&](int64_t stride, int64_t pad, int64_t dilation) {
    return forward ? PlainAxis{small(stride), small(-pad), small(dilation), 1}
                   : PlainAxis{1, small(pad), small(-dilation), small(stride)};
  };
  a.y = axis(s.stride_h, s.pad_top, s.dilation_h);
  a.x = axis(s.stride_w, s.pad_left, s.dilation_w);
  a.input = p.input, a.input_stride = p.input_stride;
  const PackArgs w = pack_args(s, p.dtype, role, p.weight, p.weight_stride, nullptr);
  a.weight = w.weight, a.group_stride = w.group_stride, a.out_stride = w.out_stride, a.in_stride = w.in_stride;
  a.y_stride = w.y_stride, a.x_stride = w.x_stride;
  a.in_prefix = forward ? p.in_prefix : p.out_prefix, a.out_prefix = forward ? p.out_prefix : p.in_prefix;
  a.row = p.row, a.lines = lines;
  a.scale = p.scale, a.scale_row_stride = p.scale_row_stride;
  a.bias = p.bias, a.bias_row_stride = p.bias_row_stride;
  a.residual = p.residual, a.residual_stride = p.residual_stride;
  a.relu = p.activation == Activation::kRelu, a.zero_tail = p.tail == Tail::kZero;
  a.output = p.output, a.output_stride = p.output_stride;
  return a;
}

int64_t weight_grad_tiles(const WeightGradArgs& a) {
  return int64_t{a.groups} * ((a.group_out + 63) / 64) * ((a.group_in + 63) / 64) * a.kh * a.kw;
}

WeightGradArgs weight_grad_args(const ConvShape& s, int multiprocessors) {
  WeightGradArgs a;
  a.n = s.n, a.groups = small(s.groups), a.group_in = small(s.group_in()), a.group_out = small(s.group_out());
  a.kh = small(s.kh), a.kw = small(s.kw), a.h = small(s.h), a.w = small(s.w);
  a.out_h = small(s.out_h), a.out_w = small(s.out_w);
  a.stride_h = small(s.stride_h), a.stride_w = small(s.stride_w);
  a.pad_top = small(s.pad_top), a.pad_left = small(s.pad_left);
  a.dilation_h = small(s.dilation_h), a.dilation_w = small(s.dilation_w);
  // Runs of samples until each multiprocessor has about eight blocks; more would only cost memory and additions.
  const int64_t wanted = (int64_t{8} * multiprocessors + weight_grad_tiles(a) - 1) / weight_grad_tiles(a);
  a.splits = small(std::max<int64_t>(1, std::min({wanted, s.n, int64_t{64}})));
  return a;
}

std::string describe_kernel(const ConvShape& s, DType dtype, bool channels_last, bool tf32, const Device& device) {
  static const char* const names[] = {
#define RNP_TEXT(name, ...) #name,
      RNP_CUDA_TILES(RNP_TEXT) RNP_HOPPER_TILES(RNP_TEXT)
#undef RNP_TEXT
  };
  if (!has_tile(s, dtype, Role::kForward)) return "plain kernel, one output element a thread";
  PrefixConv2dParams p;
  p.shape = s, p.dtype = dtype;
  const int64_t map = s.h * s.w;
  p.input_stride =
      channels_last ? Strides4{s.c_in * map, 1, s.w * s.c_in, s.c_in} : Strides4{s.c_in * map, map, s.w, 1};
  const TileLaunch launch = tile_launches(p, Role::kForward, 1, tf32, device).front();
  const ConvArgs& a = launch.args;
  std::string text = std::string("tile ") + names[static_cast<int>(launch.tile)] + ", " + std::to_string(a.cut.bm) +
                     " rows x " + std::to_string(a.cut.bn) + " channels";
  if (launch.unfold.pieces() > 0) text += ", rows of taps as channels of an unfolded copy";
  if (a.flat) text += ", taps and channels in one K";
  if (a.gather) text += ", gathered";
  if (a.window_rows > 0) text += ", input kept for all taps";
  if (is_hopper(launch.tile) && a.segment_chunks < a.chunks)
    text += ", K in segments of " + std::to_string(a.segment_chunks * kPackBytes / element_size(dtype)) + " channels";
  if (a.splits > 1) text += ", split over blocks";
  return text;
}

}  // namespace rnp::cuda
