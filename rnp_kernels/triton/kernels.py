"""Device code that the kernels share: finding an item of the work list, the rows of a tile, the epilogue.

An *item* is one tile of the output: rows are (sample, position) pairs of samples of one class (the same live input and
output channels, the same line of the tables), columns are output channels of one group. A class is a run of the sorted
batch (schedule.py), so an item has one in-prefix, one out-prefix and one scale and bias for each column, and what a
sample's sums look like depends on nothing else.
"""

from __future__ import annotations

import os

import triton
import triton.language as tl

# The interpreter multiplies the bits of a bfloat16 and cuts a float32 down to one instead of rounding it. What the code
# does about it (`multiply`, `rounded`) gives the device's numbers there, and is not compiled for a device.
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@triton.jit
def multiply(a, b, total, PRECISION: tl.constexpr):
    """total + a b, in float32."""
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), total, input_precision="ieee")
    else:
        return tl.dot(a, b, total, input_precision=PRECISION)


@triton.jit
def rounded(value, DTYPE: tl.constexpr):
    """`value` in another floating dtype, to nearest even."""
    if INTERPRETED and DTYPE == tl.bfloat16:  # noqa: SIM300
        bits = value.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        value = tl.where(value == value, bits.to(tl.float32, bitcast=True), value)  # NaN stays
    return value.to(DTYPE)


@triton.jit
def clamped(pointer, index, limit, PRESENT: tl.constexpr):
    """min(max(pointer[index], 0), limit); `limit` where there is no prefix."""
    if PRESENT:
        return tl.minimum(tl.maximum(tl.load(pointer + index), 0), limit)
    else:
        return limit + index * 0


@triton.jit
def line_of(row, sample, lines, TABLE: tl.constexpr):
    """The sample's line of the tables, 0 where there are none."""
    if TABLE:
        return tl.minimum(tl.maximum(tl.load(row + sample), 0), lines - 1)
    else:
        return sample * 0


@triton.jit
def locate(item, order, start, size, in_prefix, out_prefix, row, batch, channels_in, channels_out, lines,
           SORTED: tl.constexpr, HAS_IN: tl.constexpr, HAS_OUT: tl.constexpr, TABLE: tl.constexpr):  # fmt: skip
    """(first sorted position of the item's class, samples in it, live inputs, live outputs, line of the tables, the
    item's index in the class)."""
    if SORTED:
        low = item * 0  # the last position whose first item is not beyond ours
        high = batch + low
        while high - low > 1:
            middle = (low + high) // 2
            before = tl.load(start + middle) <= item
            low = tl.where(before, middle, low)
            high = tl.where(before, high, middle)
        sample = tl.load(order + low)
        live_in = clamped(in_prefix, sample, channels_in, HAS_IN)
        live_out = clamped(out_prefix, sample, channels_out, HAS_OUT)
        line = line_of(row, sample, lines, TABLE)
        return low, tl.load(size + sample), live_in, live_out, line, item - tl.load(start + low)
    else:
        return item * 0, batch + item * 0, channels_in + item * 0, channels_out + item * 0, item * 0, item


@triton.jit
def tile_rows(tile, first, samples, positions, order, SORTED: tl.constexpr, PER_SAMPLE: tl.constexpr,
              ROWS: tl.constexpr, INDEX: tl.constexpr):  # fmt: skip
    """Of each row of a row tile: its sample, its position in the map, and whether there is such a row."""
    lane = tl.arange(0, ROWS)
    if PER_SAMPLE:  # a tile stays inside one sample
        each = tl.cdiv(positions, ROWS)
        local = tile // each + lane * 0
        position = (tile % each) * ROWS + lane
        valid = position < positions
    else:
        row = tile.to(INDEX) * ROWS + lane
        local = (row // positions).to(tl.int32)
        position = (row - local.to(INDEX) * positions).to(tl.int32)
        valid = local < samples
    sample = tl.load(order + first + local, mask=valid, other=0) if SORTED else local
    return sample, position, valid


@triton.jit
def epilogue(total, sample, position, valid, column, live_end, group_end, width, tile,
             output, out_n, out_c, out_h, out_w, residual, res_n, res_c, res_h, res_w, scale, bias, scale_step,
             bias_step, line,
             partial, channels, SCALE: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr, RELU: tl.constexpr,
             SKIP: tl.constexpr, POOLED: tl.constexpr, ALIGNED: tl.constexpr, ROWS: tl.constexpr,
             INDEX: tl.constexpr, positions):  # fmt: skip
    """scale, bias, prefix, residual, activation, store. `scale_step` is 0 for a vector,
    for a table the line's length."""
    inside = column < group_end
    if SCALE:
        total = total * tl.load(scale + line * scale_step + column, mask=inside, other=0).to(total.dtype)[None, :]
    if BIAS:
        total = total + tl.load(bias + line * bias_step + column, mask=inside, other=0).to(total.dtype)[None, :]
    total = tl.where((column < live_end)[None, :], total, 0.0)
    y, x = position // width, position % width
    # The end is written as a multiple of 8 where it is one: stores are then known to be whole 16-byte pieces. With SKIP
    # the few channels that rounding up adds are undefined for the reader anyway.
    end = group_end
    if SKIP:
        end = live_end
        if ALIGNED:
            end = (live_end + 7) // 8 * 8
    elif ALIGNED:
        end = group_end // 8 * 8
    mask = valid[:, None] & (column < end)[None, :]
    wide = sample.to(INDEX)
    if RESIDUAL:
        at = (wide * res_n + y.to(INDEX) * res_h + x.to(INDEX) * res_w)[:, None] + (column.to(INDEX) * res_c)[None, :]
        total = total + tl.load(residual + at, mask=mask, other=0).to(total.dtype)
    if RELU:
        total = tl.where(total < 0, 0.0, total)  # NaN passes
    result = rounded(total, output.dtype.element_ty)
    at = (wide * out_n + y.to(INDEX) * out_h + x.to(INDEX) * out_w)[:, None] + (column.to(INDEX) * out_c)[None, :]
    tl.store(output + at, result, mask=mask)
    if POOLED:  # PER_SAMPLE: all rows are of one sample, and the sum's order is that of the tile
        rows = tl.cdiv(positions, ROWS)
        first = tl.max(tl.where(valid, sample, 0), 0)
        part = tl.sum(tl.where(valid[:, None], result.to(total.dtype), 0.0), 0)
        at = (first.to(INDEX) * rows + tile % rows) * channels + column
        tl.store(partial + at, part.to(tl.float32), mask=inside)


@triton.jit
def mean_kernel(partial, out_prefix, mean, channels, parts, positions, SKIP: tl.constexpr, HAS_OUT: tl.constexpr,
                BLOCK: tl.constexpr):  # fmt: skip
    """The mean over positions from the sums of each row tile (N, parts, C), added in order."""
    sample = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < channels
    total = tl.zeros((BLOCK,), tl.float32)
    for part in range(parts):
        at = (sample.to(tl.int64) * parts + part) * channels + column
        total += tl.load(partial + at, mask=inside, other=0)
    if SKIP:  # tiles beyond the prefix were never visited
        total = tl.where(column < clamped(out_prefix, sample, channels, HAS_OUT), total, 0.0)
    tl.store(mean + sample.to(tl.int64) * channels + column, total / positions, mask=inside)
