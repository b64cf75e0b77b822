"""Convolution without the matrix unit: depthwise, groups of a few channels, and float64; also the input gradient.

Every output channel of a tile reads the input channels of its own group, so a tile may span groups. Same items and same
epilogue as gemm.py, with the whole output as one group.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .gemm import taps_at
from .kernels import epilogue, locate, tile_rows


# channels_in: as in gemm.py, a 1 must not be a constant, or the one product of a sum and the bias become one operation.
@triton.jit(do_not_specialize=["height", "width", "out_width", "positions", "batch", "items", "lines", "channels_in"])
def direct_kernel(
    input, weight, output, residual, scale, bias, row, partial, in_prefix, out_prefix, order, size, start,
    in_n, in_c, in_h, in_w, weight_outer, weight_inner, weight_h, weight_w, out_n, out_c, out_h, out_w,
    res_n, res_c, res_h, res_w, batch, items, channels_in, channels_out, group_in, group_out, height, width, out_width,
    positions, lines, scale_step, bias_step,
    KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr, PAD_W: tl.constexpr, DILATION_H: tl.constexpr, DILATION_W: tl.constexpr,
    GROUPED: tl.constexpr, TRANSPOSED: tl.constexpr, SORTED: tl.constexpr, HAS_IN: tl.constexpr, HAS_OUT: tl.constexpr,
    TABLE: tl.constexpr, SCALE: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr, RELU: tl.constexpr,
    SKIP: tl.constexpr,
    POOLED: tl.constexpr, ALIGNED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDE: tl.constexpr,
    INDEX: tl.constexpr,
):  # fmt: skip
    """A persistent program takes every num_programs-th item. Sums are float32, or float64 with WIDE."""
    if SORTED:
        items = tl.load(start + batch)
    for item in range(tl.program_id(0), items, tl.num_programs(0)):
        first, samples, live_in, live_out, line, local = locate(
            item, order, start, size, in_prefix, out_prefix, row, batch, channels_in, channels_out, lines, SORTED,
            HAS_IN, HAS_OUT, TABLE,
        )  # fmt: skip
        column_tiles = tl.cdiv(live_out if SKIP else channels_out, COLUMNS)
        tile, begin = local // column_tiles, local % column_tiles * COLUMNS
        sample, position, valid = tile_rows(tile, first, samples, positions, order, SORTED, POOLED, ROWS, INDEX)
        y, x = position // out_width, position % out_width
        if TRANSPOSED:
            y0, x0 = y + PAD_H, x + PAD_W
        else:
            y0, x0 = y * STRIDE_H - PAD_H, x * STRIDE_W - PAD_W
        base = sample.to(INDEX) * in_n
        column = begin + tl.arange(0, COLUMNS)
        live = column < tl.minimum(live_out, channels_out)
        group = column // group_out
        # Channel i of a group is live in no group where it is dead in the first.
        channels = tl.where(begin < live_out, tl.minimum(group_in, live_in), 0)
        total = tl.zeros((ROWS, COLUMNS), tl.float64 if WIDE else tl.float32)
        TAPS: tl.constexpr = KERNEL_H * KERNEL_W
        for step in range(0, channels * TAPS):
            inner, tap = step // TAPS, step % TAPS
            r, s = tap // KERNEL_W, tap % KERNEL_W
            yy, xx, ok = taps_at(y0, x0, r, s, height, width, STRIDE_H, STRIDE_W, DILATION_H, DILATION_W, TRANSPOSED)
            channel = group * group_in + inner
            reads = live & (channel < live_in)
            at = (base + yy.to(INDEX) * in_h + xx.to(INDEX) * in_w)[:, None] + (channel.to(INDEX) * in_c)[None, :]
            a = tl.load(input + at, mask=(valid & ok)[:, None] & reads[None, :], other=0.0)
            if TRANSPOSED:
                place = channel.to(INDEX) * weight_inner + (column % group_out).to(INDEX) * weight_outer
            else:
                place = column.to(INDEX) * weight_outer + inner * weight_inner
            b = tl.load(weight + place + (r * weight_h + s * weight_w), mask=reads, other=0.0)
            total += a.to(total.dtype) * b.to(total.dtype)[None, :]
        epilogue(
            total, sample, position, valid, column, live_out, channels_out, out_width, tile, output, out_n, out_c,
            out_h, out_w, residual, res_n, res_c, res_h, res_w, scale, bias, scale_step, bias_step, line, partial,
            channels_out,
            SCALE, BIAS, RESIDUAL, RELU, SKIP, POOLED, ALIGNED, ROWS, INDEX, positions,
        )  # fmt: skip
