"""Gradient of the weights. Samples are split into runs; each run's sum is written apart, then the runs are added.

So the result is the same bits at every call: no atomic operation, and the number of runs depends on shapes alone.
partial is (runs, taps, C_out, C_in / groups) in the type of the sums.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .gemm import taps_at
from .kernels import clamped, multiply


@triton.jit(do_not_specialize=["height", "width", "out_width", "positions", "batch", "each"])
def weight_grad_kernel(
    grad, input, partial, in_prefix, out_prefix, grad_n, grad_c, grad_h, grad_w, in_n, in_c, in_h, in_w, batch, each,
    channels_in, channels_out, group_in, group_out, height, width, out_width, positions,
    KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr, PAD_W: tl.constexpr, DILATION_H: tl.constexpr, DILATION_W: tl.constexpr,
    HAS_IN: tl.constexpr, HAS_OUT: tl.constexpr, PRECISION: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr, STAGES: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """Program (tile of one tap, run of `each` samples): ROWS output by COLUMNS input channels of one group.

    A sample takes part only where both its prefixes reach into the tile. Loads are masked at the tensor's end, where
    they stay whole 16-byte pieces, and what lies beyond a prefix is replaced by zero in registers.
    """
    TAPS: tl.constexpr = KERNEL_H * KERNEL_W
    row_tiles, column_tiles = tl.cdiv(group_out, ROWS), tl.cdiv(group_in, COLUMNS)
    item = tl.program_id(0)
    tap = item % TAPS
    tile = item // TAPS
    column_begin = tile % column_tiles * COLUMNS
    tile = tile // column_tiles
    group = tile // row_tiles
    row_begin = group * group_out + tile % row_tiles * ROWS
    out_channel = row_begin + tl.arange(0, ROWS)
    in_channel = column_begin + tl.arange(0, COLUMNS)  # within the group
    out_end = (group + 1) * group_out
    first_in = group * group_in
    r, s = tap // KERNEL_W, tap % KERNEL_W
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    begin = tl.program_id(1) * each
    for sample in range(begin, tl.minimum(begin + each, batch)):
        live_out = clamped(out_prefix, sample, channels_out, HAS_OUT)
        live_in = clamped(in_prefix, sample, channels_in, HAS_IN) - first_in
        steps = tl.where((live_out > row_begin) & (live_in > column_begin), tl.cdiv(positions, DEPTH), 0)
        wide = tl.cast(sample, INDEX)
        grad_base, in_base = grad + wide * grad_n, input + wide * in_n + first_in * in_c
        for step in tl.range(0, steps, num_stages=STAGES):
            position = step * DEPTH + tl.arange(0, DEPTH)
            inside = position < positions
            oy, ox = position // out_width, position % out_width
            y, x, ok = taps_at(oy * STRIDE_H - PAD_H, ox * STRIDE_W - PAD_W, r, s, height, width, STRIDE_H, STRIDE_W,
                               DILATION_H, DILATION_W, False)  # fmt: skip
            at = (oy.to(INDEX) * grad_h + ox.to(INDEX) * grad_w)[:, None] + (out_channel.to(INDEX) * grad_c)[None, :]
            g = tl.load(grad_base + at, mask=inside[:, None] & (out_channel < out_end)[None, :], other=0.0)
            at = (y.to(INDEX) * in_h + x.to(INDEX) * in_w)[:, None] + (in_channel.to(INDEX) * in_c)[None, :]
            v = tl.load(in_base + at, mask=(inside & ok)[:, None] & (in_channel < group_in)[None, :], other=0.0)
            if HAS_OUT:
                g = tl.where((out_channel < live_out)[None, :], g, 0.0).to(grad.dtype.element_ty)
            if HAS_IN:
                v = tl.where((in_channel < live_in)[None, :], v, 0.0).to(input.dtype.element_ty)
            total = multiply(tl.trans(g), v, total, PRECISION)
    run = tl.program_id(1).to(tl.int64)
    at = ((run * TAPS + tap) * channels_out + out_channel)[:, None] * group_in + in_channel[None, :]
    tl.store(partial + at, total, mask=(out_channel < out_end)[:, None] & (in_channel < group_in)[None, :])


@triton.jit(do_not_specialize=["height", "width", "out_width", "positions", "batch", "each"])
def weight_grad_direct_kernel(
    grad, input, partial, in_prefix, out_prefix, grad_n, grad_c, grad_h, grad_w, in_n, in_c, in_h, in_w, batch, each,
    channels_in, channels_out, group_in, group_out, height, width, out_width, positions,
    KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr, PAD_W: tl.constexpr, DILATION_H: tl.constexpr, DILATION_W: tl.constexpr,
    HAS_IN: tl.constexpr, HAS_OUT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDE: tl.constexpr,
    INDEX: tl.constexpr,
):  # fmt: skip
    """Without the matrix unit: program (tile of output channels, input channel of a group and tap, run of samples)."""
    TAPS: tl.constexpr = KERNEL_H * KERNEL_W
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inner, tap = tl.program_id(1) // TAPS, tl.program_id(1) % TAPS
    r, s = tap // KERNEL_W, tap % KERNEL_W
    inside = column < channels_out
    channel = column // group_out * group_in + inner
    total = tl.zeros((ROWS, COLUMNS), tl.float64 if WIDE else tl.float32)
    begin = tl.program_id(2) * each
    for sample in range(begin, tl.minimum(begin + each, batch)):
        live_out = clamped(out_prefix, sample, channels_out, HAS_OUT)
        live_in = clamped(in_prefix, sample, channels_in, HAS_IN)
        some = (live_out > tl.program_id(0) * COLUMNS) & (live_in > inner)
        steps = tl.where(some, tl.cdiv(positions, ROWS), 0)
        reads = inside & (column < live_out) & (channel < live_in)
        wide = tl.cast(sample, INDEX)
        for step in range(0, steps):
            position = step * ROWS + tl.arange(0, ROWS)
            oy, ox = position // out_width, position % out_width
            y, x, ok = taps_at(oy * STRIDE_H - PAD_H, ox * STRIDE_W - PAD_W, r, s, height, width, STRIDE_H, STRIDE_W,
                               DILATION_H, DILATION_W, False)  # fmt: skip
            mask = (ok & (position < positions))[:, None] & reads[None, :]
            at = (oy.to(INDEX) * grad_h + ox.to(INDEX) * grad_w)[:, None] + (column.to(INDEX) * grad_c)[None, :]
            g = tl.load(grad + wide * grad_n + at, mask=mask, other=0.0)
            at = (y.to(INDEX) * in_h + x.to(INDEX) * in_w)[:, None] + (channel.to(INDEX) * in_c)[None, :]
            v = tl.load(input + wide * in_n + at, mask=mask, other=0.0)
            total += g.to(total.dtype) * v.to(total.dtype)
    run = tl.program_id(2).to(tl.int64)
    at = ((run * TAPS + tap) * channels_out + column) * group_in + inner
    tl.store(partial + at, tl.sum(total, 0), mask=inside)
