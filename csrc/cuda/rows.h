// The rows of a tile, (sample, pixel) pairs, and the order in which its K is walked: what every tile kernel shares.
#pragma once

#include "cuda/conv_args.h"
#include "cuda/device.h"

namespace rnp::cuda {

// A row of the tile: where it reads and writes. Offsets count elements.
struct alignas(16) Row {
  int64_t input;    // of the sample's pixel under tap delta 0, channel 0 of the group (may lie outside the map)
  uint32_t taps;    // valid taps: low half along y, high half along x
  int32_t in_live;  // live input channels of the group; 0 in a dead row
  int64_t output;   // channel 0 of the tensor
  int64_t residual;
  int32_t out_live;  // live output channels of the tile
  int32_t line;      // of the scale and bias tables
};
static_assert(sizeof(Row) == 48);

RNP_DEVICE uint32_t valid_taps(const Axis& axis, int32_t at, int32_t size) {
  uint32_t mask = 0;
  RNP_ROLL
  for (int i = 0; i < axis.count; ++i)
    mask |= static_cast<uint32_t>(static_cast<uint32_t>(at + axis.delta + i * axis.delta_step) <
                                  static_cast<uint32_t>(size))
            << i;
  return mask;
}

RNP_DEVICE gpu::Order order_of(const ConvArgs& p) {
  return {p.order_sample, p.order_in, p.order_out, p.c_in, p.c_out, p.order_live};
}

// Row r of the tile; a row without a live channel in the tile's block is dead, and so are those behind it.
RNP_DEVICE Row describe_row(const ConvArgs& p, const gpu::Cursor& at, const gpu::RowPlace& place) {
  Row row = {};
  if (!place.live) return row;
  const gpu::Order order = order_of(p);
  const int32_t first = at.block * p.cut.bn;
  const int32_t width = gpu::live_of_group(order.out_at(place.place), at.group, p.cut.group_out) - first;
  if (width <= 0) return row;
  const int64_t n = order.sample_at(place.place);
  const int32_t oy = static_cast<int32_t>(place.pixel / static_cast<uint32_t>(p.out_w));
  const int32_t ox = static_cast<int32_t>(place.pixel - static_cast<uint32_t>(oy) * static_cast<uint32_t>(p.out_w));
  const int32_t y = oy * p.y.step, x = ox * p.x.step;
  row.input = n * p.input_stride.n + y * p.input_stride.h + x * p.input_stride.w +
              int64_t{at.group} * p.cut.group_in * p.input_stride.c;
  row.output = n * p.output_stride.n + oy * p.output_stride.h + ox * p.output_stride.w;
  if (p.residual) row.residual = n * p.residual_stride.n + oy * p.residual_stride.h + ox * p.residual_stride.w;
  row.taps = valid_taps(p.y, y, p.h) | valid_taps(p.x, x, p.w) << 16;
  row.in_live = gpu::live_of_group(order.in_at(place.place), at.group, p.cut.group_in);
  row.out_live = width < p.cut.bn ? width : p.cut.bn;
  row.line = p.row ? gpu::clamp_prefix(p.row[n], p.lines - 1) : 0;
  return row;
}

// Walks (chunk, tap y, tap x) of the stages that are being fetched. A chunk is kChannels channels, 2^kShift of them
// make one of the packed weights.
template <int kChannels, int kShift>
struct StageCursor {
  int32_t chunk, iy, ix;
  int64_t input;  // elements from Row::input to the tap's pixel and the chunk's first channel
  int64_t line;   // of the packed weights: (group, chunk, tap)

  RNP_DEVICE void begin(const ConvArgs& p, int32_t group, int32_t first_chunk) {
    chunk = first_chunk;
    iy = 0;
    begin_row(p, group);
  }

  RNP_DEVICE void next(const ConvArgs& p, int32_t group) {
    if (!p.flat && ++ix < p.x.count) {
      input += p.x.delta_step * p.input_stride.w;
      line += p.x.tap_step;
      return;
    }
    if (p.flat || ++iy == p.y.count) {
      iy = 0;
      ++chunk;
    }
    begin_row(p, group);
  }

 private:
  RNP_DEVICE void begin_row(const ConvArgs& p, int32_t group) {
    ix = 0;
    input = (p.y.delta + iy * p.y.delta_step) * p.input_stride.h + p.x.delta * p.input_stride.w +
            int64_t{chunk} * kChannels * p.input_stride.c;
    line = (int64_t{group} * p.chunks + (chunk >> kShift)) * p.taps;
    if (!p.flat) line += (p.y.tap + iy * p.y.tap_step) * p.kernel_w + p.x.tap;
  }
};

}  // namespace rnp::cuda
