// The rows of a tile, (sample, pixel) pairs, and the order in which its K is walked: what every tile kernel shares.
#pragma once

#include "cuda/conv_args.h"
#include "cuda/device.h"

namespace rnp::cuda {

// A row of the tile: where it reads and writes. Offsets count elements.
struct alignas(16) Row {
  int64_t input;   // of the sample's pixel under tap delta 0, channel 0 of the group (may lie outside the map)
  int64_t output;  // channel 0 of the tensor
  int64_t residual;
  uint32_t taps;     // valid taps: low half along y, high half along x
  int32_t in_live;   // live input channels of the group; 0 in a dead row
  int32_t out_live;  // live output channels of the tile
  int32_t line;      // of the scale and bias tables
};
static_assert(sizeof(Row) == 48);

RNP_DEVICE uint32_t valid_taps(const Axis& axis, int32_t at, int32_t size) {
  uint32_t mask = 0;
  for (int i = 0; i < axis.count; ++i)
    mask |= static_cast<uint32_t>(static_cast<uint32_t>(at + axis.delta[i]) < static_cast<uint32_t>(size)) << i;
  return mask;
}

RNP_DEVICE gpu::Order order_of(const ConvArgs& p) { return {p.order_sample, p.order_in, p.order_out, p.c_in, p.c_out}; }

// Fills row r of the tile and notes the longest K and the widest row.
RNP_DEVICE gpu::RowPlace describe_row(const ConvArgs& p, const gpu::Cursor& at, int64_t first_row, int r, Row* rows,
                                      int32_t* longest) {
  const gpu::RowPlace place = gpu::place_row(p.cut, at, first_row, r);
  Row row = {};
  if (place.live) {
    const gpu::Order order = order_of(p);
    const int64_t n = order.sample_at(place.place);
    const int32_t oy = static_cast<int32_t>(place.pixel / static_cast<uint32_t>(p.out_w));
    const int32_t ox = static_cast<int32_t>(place.pixel - static_cast<uint32_t>(oy) * static_cast<uint32_t>(p.out_w));
    const int32_t y = oy * p.y.step, x = ox * p.x.step;
    const int32_t first = at.block * p.cut.bn;
    row.input = n * p.input_stride.n + y * p.input_stride.h + x * p.input_stride.w +
                int64_t{at.group} * p.cut.group_in * p.input_stride.c;
    row.output = p.partial ? (n * p.cut.positions + place.pixel) * p.c_out
                           : n * p.output_stride.n + oy * p.output_stride.h + ox * p.output_stride.w;
    row.residual = n * p.residual_stride.n + oy * p.residual_stride.h + ox * p.residual_stride.w;
    row.taps = valid_taps(p.y, y, p.h) | valid_taps(p.x, x, p.w) << 16;
    row.in_live = gpu::live_of_group(order.in_at(place.place), at.group, p.cut.group_in);
    row.out_live = gpu::live_of_group(order.out_at(place.place), at.group, p.cut.group_out) - first;
    row.out_live = row.out_live < p.cut.bn ? row.out_live : p.cut.bn;
    row.line = p.row ? gpu::clamp_prefix(p.row[n], p.lines - 1) : 0;
    max_in_block(longest, row.in_live);
    max_in_block(longest + 1, row.out_live);
  }
  rows[r] = row;
  return place;
}

// Walks (chunk, tap y, tap x) of the stages that are being fetched.
struct StageCursor {
  int32_t chunk = 0, iy = 0, ix = 0;
  RNP_DEVICE void next(const ConvArgs& p) {
    if (p.flat || ++ix == p.x.count) {
      ix = 0;
      if (p.flat || ++iy == p.y.count) iy = 0, ++chunk;
    }
  }
};

}  // namespace rnp::cuda
