"""The implicit matrix product: forward of ordinary and grouped convolutions, and their input gradient."""

from __future__ import annotations

import triton
import triton.language as tl

from .kernels import epilogue, locate, multiply, tile_rows


@triton.jit
def taps_at(y0, x0, r, s, height, width, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, DILATION_H: tl.constexpr,
            DILATION_W: tl.constexpr, TRANSPOSED: tl.constexpr):  # fmt: skip
    """Where kernel row r and column s read for rows at (y0, x0), and whether that lies in the map."""
    if TRANSPOSED:
        y, x = y0 - r * DILATION_H, x0 - s * DILATION_W
        ok = (y >= 0) & (x >= 0)
        if STRIDE_H > 1:
            ok = ok & (y % STRIDE_H == 0)
            y = y // STRIDE_H
        if STRIDE_W > 1:
            ok = ok & (x % STRIDE_W == 0)
            x = x // STRIDE_W
        return y, x, ok & (y < height) & (x < width)
    else:
        y, x = y0 + r * DILATION_H, x0 + s * DILATION_W
        return y, x, (y >= 0) & (y < height) & (x >= 0) & (x < width)


@triton.jit
def _sums(input, weight, base, y0, x0, valid, column, group_end, limit, height, width, in_c, in_h, in_w, weight_outer,
          weight_inner, weight_h, weight_w, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
          KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
          DILATION_H: tl.constexpr, DILATION_W: tl.constexpr, TRANSPOSED: tl.constexpr, REMAINDER: tl.constexpr,
          PRECISION: tl.constexpr, STAGES: tl.constexpr, INDEX: tl.constexpr):  # fmt: skip
    """Sums over `limit` channels and all taps. Every output adds in the same order: blocks of channels, in them taps.

    Whole eights of channels come first, in loads that are known to be whole 16-byte pieces; the up to seven left over
    (an odd prefix, a stem of three channels) are gathered together with their taps, so that no lane of K is idle.
    """
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    TAPS: tl.constexpr = KERNEL_H * KERNEL_W
    whole = limit // 8 * 8
    inside = (column < group_end)[None, :]
    outer = (column.to(INDEX) * weight_outer)[None, :]
    for step in tl.range(0, tl.cdiv(whole, DEPTH) * TAPS, num_stages=STAGES):
        channel = step // TAPS * DEPTH + tl.arange(0, DEPTH)
        r, s = step % TAPS // KERNEL_W, step % KERNEL_W
        y, x, ok = taps_at(y0, x0, r, s, height, width, STRIDE_H, STRIDE_W, DILATION_H, DILATION_W, TRANSPOSED)
        at = base + y.to(INDEX) * in_h + x.to(INDEX) * in_w
        live = channel < whole
        wide = channel.to(INDEX)
        a = tl.load(input + at[:, None] + (wide * in_c)[None, :], mask=(valid & ok)[:, None] & live[None, :], other=0.0)
        place = weight + (wide * weight_inner)[:, None] + outer + (r * weight_h + s * weight_w)
        b = tl.load(place, mask=live[:, None] & inside, other=0.0)
        total = multiply(a, b, total, PRECISION)
    if REMAINDER:
        rest = limit - whole
        some = tl.maximum(rest, 1)
        for step in tl.range(0, tl.cdiv(rest * TAPS, 32), num_stages=1):
            k = step * 32 + tl.arange(0, 32)
            live = k < rest * TAPS
            tap = k // some
            channel = (whole + k % some).to(INDEX)
            r, s = tap // KERNEL_W, tap % KERNEL_W
            y, x, ok = taps_at(y0[:, None], x0[:, None], r[None, :], s[None, :], height, width, STRIDE_H, STRIDE_W,
                               DILATION_H, DILATION_W, TRANSPOSED)  # fmt: skip
            at = base[:, None] + y.to(INDEX) * in_h + x.to(INDEX) * in_w + (channel * in_c)[None, :]
            a = tl.load(input + at, mask=valid[:, None] & ok & live[None, :], other=0.0)
            place = weight + (channel * weight_inner + r * weight_h + s * weight_w)[:, None] + outer
            b = tl.load(place, mask=live[:, None] & inside, other=0.0)
            total = multiply(a, b, total, PRECISION)
    return total


@triton.jit
def _tile(input, weight, base, y0, x0, limit, height, width, in_c, in_h, in_w, weight_outer, weight_inner, weight_h,
          weight_w, sample, position, valid, begin, live_end, group_end, out_width, tile, output, out_n, out_c, out_h,
          out_w, residual, res_n, res_c, res_h, res_w, scale, bias, scale_step, bias_step, line, partial,
          channels_out, positions,
          ROWS: tl.constexpr, COLUMNS: tl.constexpr, WRITTEN: tl.constexpr, DEPTH: tl.constexpr, KERNEL_H: tl.constexpr,
          KERNEL_W: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, DILATION_H: tl.constexpr,
          DILATION_W: tl.constexpr, TRANSPOSED: tl.constexpr, REMAINDER: tl.constexpr, PRECISION: tl.constexpr,
          STAGES: tl.constexpr, INDEX: tl.constexpr, SCALE: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr,
          RELU: tl.constexpr, SKIP: tl.constexpr, POOLED: tl.constexpr, ALIGNED: tl.constexpr):  # fmt: skip
    """Computes COLUMNS columns from `begin` and writes WRITTEN, of which those beyond COLUMNS are tail."""
    column = begin + tl.arange(0, COLUMNS)
    total = _sums(
        input, weight, base, y0, x0, valid, column, group_end, limit, height, width, in_c, in_h, in_w, weight_outer,
        weight_inner, weight_h, weight_w, ROWS, COLUMNS, DEPTH, KERNEL_H, KERNEL_W, STRIDE_H, STRIDE_W, DILATION_H,
        DILATION_W, TRANSPOSED, REMAINDER, PRECISION, STAGES, INDEX,
    )  # fmt: skip
    epilogue(
        total, sample, position, valid, column, live_end, group_end, out_width, tile, output, out_n, out_c, out_h,
        out_w, residual, res_n, res_c, res_h, res_w, scale, bias, scale_step, bias_step, line, partial, channels_out,
        SCALE, BIAS,
        RESIDUAL, RELU, SKIP, POOLED, ALIGNED, ROWS, INDEX, positions,
    )  # fmt: skip
    if COLUMNS < WRITTEN and not SKIP:
        epilogue(
            tl.zeros((ROWS, WRITTEN - COLUMNS), tl.float32), sample, position, valid,
            begin + COLUMNS + tl.arange(0, WRITTEN - COLUMNS), live_end, group_end, out_width, tile, output, out_n,
            out_c, out_h, out_w, residual, res_n, res_c, res_h, res_w, scale, bias, scale_step, bias_step, line,
            partial, channels_out,
            False, False, RESIDUAL, RELU, SKIP, POOLED, ALIGNED, ROWS, INDEX, positions,
        )  # fmt: skip


# channels_in: were a 1 a constant, a sum of one step would be known as such where no prefix can shorten it, and the
# compiler would let it begin with the bias: other bits than with an explicit full prefix.
@triton.jit(do_not_specialize=["height", "width", "out_width", "positions", "batch", "items", "lines", "channels_in"])
def gemm_kernel(
    input, weight, output, residual, scale, bias, row, partial, in_prefix, out_prefix, order, size, start,
    in_n, in_c, in_h, in_w, weight_outer, weight_inner, weight_h, weight_w, out_n, out_c, out_h, out_w,
    res_n, res_c, res_h, res_w, batch, items, channels_in, channels_out, group_in, group_out, height, width, out_width,
    positions, lines, scale_step, bias_step,
    KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr, PAD_W: tl.constexpr, DILATION_H: tl.constexpr, DILATION_W: tl.constexpr,
    GROUPED: tl.constexpr, TRANSPOSED: tl.constexpr, SORTED: tl.constexpr, HAS_IN: tl.constexpr, HAS_OUT: tl.constexpr,
    TABLE: tl.constexpr, REMAINDER: tl.constexpr, NARROW: tl.constexpr, SCALE: tl.constexpr, BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    RELU: tl.constexpr, SKIP: tl.constexpr, POOLED: tl.constexpr, ALIGNED: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, STAGES: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """A persistent program takes every num_programs-th item of the work list until none is left.

    `input` is what is summed over (with TRANSPOSED the gradient of the output), `output` what is written.
    `weight_outer` is the weight's step from one written channel to the next, `weight_inner` that of the summed ones.
    """
    if SORTED:
        items = tl.load(start + batch)
    tiles_of_group = tl.cdiv(group_out, COLUMNS)
    for item in range(tl.program_id(0), items, tl.num_programs(0)):
        first, samples, live_in, live_out, line, local = locate(
            item, order, start, size, in_prefix, out_prefix, row, batch, channels_in, channels_out, lines, SORTED,
            HAS_IN, HAS_OUT, TABLE,
        )  # fmt: skip
        if GROUPED:
            full_groups = (live_out if SKIP else channels_out) // group_out
            column_tiles = full_groups * tiles_of_group
            if SKIP:
                column_tiles += tl.cdiv(live_out % group_out, COLUMNS)
            tile, of_columns = local // column_tiles, local % column_tiles
            group = of_columns // tiles_of_group
            begin = group * group_out + of_columns % tiles_of_group * COLUMNS
            group_end = (group + 1) * group_out
            limit = tl.minimum(tl.maximum(live_in - group * group_in, 0), group_in)
            first_in = group * group_in
            # step of a group in the weight, beyond what the columns' own numbers say
            if TRANSPOSED:
                shift = group.to(INDEX) * (group_in * weight_inner) - group.to(INDEX) * (group_out * weight_outer)
            else:
                shift = group.to(INDEX) * 0
        else:
            column_tiles = tl.cdiv(live_out if SKIP else channels_out, COLUMNS)
            tile, begin = local // column_tiles, local % column_tiles * COLUMNS
            group_end = channels_out
            limit = live_in
            first_in = 0
            shift = 0
        live_end = tl.minimum(live_out, group_end)
        limit = tl.where(begin < live_end, limit, 0)  # a tile of the tail alone: nothing to sum
        sample, position, valid = tile_rows(tile, first, samples, positions, order, SORTED, POOLED, ROWS, INDEX)
        y, x = position // out_width, position % out_width
        if TRANSPOSED:
            y0, x0 = y + PAD_H, x + PAD_W
        else:
            y0, x0 = y * STRIDE_H - PAD_H, x * STRIDE_W - PAD_W
        base = sample.to(INDEX) * in_n
        if GROUPED:
            base += first_in * in_c
        if NARROW:  # at most half of the columns are live: half the work
            if live_end - begin <= COLUMNS // 2:
                _tile(
                    input, weight + shift, base, y0, x0, limit, height, width, in_c, in_h, in_w, weight_outer,
                    weight_inner, weight_h, weight_w, sample, position, valid, begin, live_end, group_end, out_width,
                    tile, output, out_n, out_c, out_h, out_w, residual, res_n, res_c, res_h, res_w, scale, bias,
                    scale_step,
                    bias_step, line, partial, channels_out, positions, ROWS, COLUMNS // 2, COLUMNS, DEPTH, KERNEL_H,
                    KERNEL_W,
                    STRIDE_H, STRIDE_W, DILATION_H, DILATION_W, TRANSPOSED, REMAINDER, PRECISION, STAGES, INDEX, SCALE,
                    BIAS, RESIDUAL, RELU, SKIP, POOLED, ALIGNED,
                )  # fmt: skip
            else:
                _tile(
                    input, weight + shift, base, y0, x0, limit, height, width, in_c, in_h, in_w, weight_outer,
                    weight_inner, weight_h, weight_w, sample, position, valid, begin, live_end, group_end, out_width,
                    tile, output, out_n, out_c, out_h, out_w, residual, res_n, res_c, res_h, res_w, scale, bias,
                    scale_step,
                    bias_step, line, partial, channels_out, positions, ROWS, COLUMNS, COLUMNS, DEPTH, KERNEL_H,
                    KERNEL_W,
                    STRIDE_H, STRIDE_W, DILATION_H, DILATION_W, TRANSPOSED, REMAINDER, PRECISION, STAGES, INDEX, SCALE,
                    BIAS, RESIDUAL, RELU, SKIP, POOLED, ALIGNED,
                )  # fmt: skip
        else:
            _tile(
                input, weight + shift, base, y0, x0, limit, height, width, in_c, in_h, in_w, weight_outer, weight_inner,
                weight_h, weight_w, sample, position, valid, begin, live_end, group_end, out_width, tile, output, out_n,
                out_c, out_h, out_w, residual, res_n, res_c, res_h, res_w, scale, bias, scale_step, bias_step, line,
                partial,
                channels_out, positions, ROWS, COLUMNS, COLUMNS, DEPTH, KERNEL_H, KERNEL_W, STRIDE_H, STRIDE_W,
                DILATION_H, DILATION_W, TRANSPOSED, REMAINDER, PRECISION, STAGES, INDEX, SCALE, BIAS, RESIDUAL, RELU,
                SKIP, POOLED, ALIGNED,
            )  # fmt: skip
