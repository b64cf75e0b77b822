"""The work list, made on the device: the batch sorted by prefixes, and the first item of every class of equal samples.

    order (N,)      samples sorted by (out-prefix, in-prefix, line of the tables), descending, equal ones in their own
                    order: the longest items come first
    size (N,)       of each sample, how many are like it
    start (N + 1,)  of each sorted position, the items before it; a class's items count at its first position.
                    start[N] is the number of items
    member (N,)     of each sorted position, how many of its class stand before it

Ranks are counts of larger keys, so the order is stable and needs no sort and no atomic operation.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .kernels import clamped, line_of

BLOCK = 64
ONE_LAUNCH = 256  # samples up to which a single program does both halves


@triton.jit
def _keys(sample, batch, in_prefix, out_prefix, row, channels_in, channels_out, lines, HAS_IN: tl.constexpr,
          HAS_OUT: tl.constexpr, TABLE: tl.constexpr):  # fmt: skip
    inside = sample < batch
    at = tl.where(inside, sample, 0)
    live_in = clamped(in_prefix, at, channels_in, HAS_IN).to(tl.int64)
    live_out = clamped(out_prefix, at, channels_out, HAS_OUT).to(tl.int64)
    key = (live_out * (channels_in + 1) + live_in) * lines + line_of(row, at, lines, TABLE)
    return tl.where(inside, key, -1)


@triton.jit(do_not_specialize=["batch", "channels_in", "channels_out", "positions", "group_out", "lines"])
def schedule_kernel(in_prefix, out_prefix, row, order, size, member, start, batch, channels_in, channels_out, group_out,
                    positions, lines, ROWS: tl.constexpr, COLUMNS: tl.constexpr, SKIP: tl.constexpr,
                    PER_SAMPLE: tl.constexpr,
                    HAS_IN: tl.constexpr, HAS_OUT: tl.constexpr, TABLE: tl.constexpr, RANK: tl.constexpr,
                    SCAN: tl.constexpr,
                    BLOCK: tl.constexpr):  # fmt: skip
    """RANK fills order, size and member, any number of programs; SCAN fills start, one program."""
    if RANK:
        for block in range(tl.program_id(0), tl.cdiv(batch, BLOCK), tl.num_programs(0)):
            mine = block * BLOCK + tl.arange(0, BLOCK)
            key = _keys(mine, batch, in_prefix, out_prefix, row, channels_in, channels_out, lines, HAS_IN, HAS_OUT,
                        TABLE)[:, None]  # fmt: skip
            before = tl.zeros((BLOCK,), tl.int32)
            ahead = tl.zeros((BLOCK,), tl.int32)
            equal = tl.zeros((BLOCK,), tl.int32)
            for other in range(0, tl.cdiv(batch, BLOCK)):
                theirs = other * BLOCK + tl.arange(0, BLOCK)
                their = _keys(theirs, batch, in_prefix, out_prefix, row, channels_in, channels_out, lines, HAS_IN,
                              HAS_OUT, TABLE)[None, :]  # fmt: skip
                same = their == key
                first = same & (theirs[None, :] < mine[:, None])
                before += tl.sum(((their > key) | first).to(tl.int32), 1)
                ahead += tl.sum(first.to(tl.int32), 1)
                equal += tl.sum(same.to(tl.int32), 1)
            inside = mine < batch
            tl.store(order + before, mine, mask=inside)
            tl.store(member + before, ahead, mask=inside)
            tl.store(size + mine, equal, mask=inside)
    if RANK and SCAN:
        tl.debug_barrier()  # the other half reads what other threads of this program wrote
    if SCAN:
        tiles_of_group = tl.cdiv(group_out, COLUMNS)
        items = tl.zeros((1,), tl.int32)
        for block in range(0, tl.cdiv(batch, BLOCK)):
            at = block * BLOCK + tl.arange(0, BLOCK)
            inside = at < batch
            sample = tl.load(order + at, mask=inside, other=0)
            head = inside & (tl.load(member + at, mask=inside, other=1) == 0)
            count = tl.load(size + sample)
            if PER_SAMPLE:
                row_tiles = count * tl.cdiv(positions, ROWS)
            else:
                row_tiles = ((count.to(tl.int64) * positions + ROWS - 1) // ROWS).to(tl.int32)
            if SKIP:
                live = clamped(out_prefix, sample, channels_out, HAS_OUT)
                column_tiles = live // group_out * tiles_of_group + tl.cdiv(live % group_out, COLUMNS)
            else:
                column_tiles = channels_out // group_out * tiles_of_group + sample * 0
            each = tl.where(head, row_tiles * column_tiles, 0)
            tl.store(start + at, items + tl.cumsum(each, 0) - each, mask=inside)
            items += tl.sum(each, 0)
        tl.store(start + batch + tl.arange(0, 1), items)
