"""One decision of the agent, a program for each sample: the formula stands in csrc/cpu/agent_step.h."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def _tanh(x):
    # 1 - 2 / (e^2|x| + 1), of the sign of x; a Taylor polynomial where that would cancel
    size = tl.abs(x)
    square = x * x
    series = x * (1.0 + square * (-0.333333333 + square * (0.133333333 - 0.0539682540 * square)))
    large = 1.0 - 2.0 / (tl.exp(2.0 * size) + 1.0)
    return tl.where(square < 0.015625, series, tl.where(x < 0, -large, large))


@triton.jit
def _product(weight, rows, row_limit, row_step, columns, column_limit, x):
    """Of each row of a block of the weight, its product with x."""
    inside = (rows < row_limit)[:, None] & (columns < column_limit)[None, :]
    block = tl.load(weight + rows[:, None] * row_step + columns[None, :], mask=inside, other=0.0)
    return tl.sum(block * x[None, :], 1)


@triton.jit(do_not_specialize=["shift"])
def agent_step_kernel(
    pooled, hidden_in, previous, mean, inv_std, encoder_weight, encoder_bias, weight_ih, weight_hh, bias_ih, bias_hh,
    decoder_weight, decoder_bias, hidden_out, q_out, action_out, prefix_out, pooled_step, hidden_step, shift, channels,
    features, code, hidden, actions, inputs,
    HAS_HIDDEN: tl.constexpr, HAS_PREVIOUS: tl.constexpr, HIDDEN: tl.constexpr, ACTIONS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """HIDDEN and ACTIONS are the sizes rounded up to powers of two; BLOCK channels of a sum are taken at a time."""
    sample = tl.program_id(0).to(tl.int64)
    unit = tl.arange(0, HIDDEN)
    live = unit < hidden
    reset = tl.load(bias_ih + unit, mask=live, other=0.0) + tl.load(bias_hh + unit, mask=live, other=0.0)
    update = tl.load(bias_ih + hidden + unit, mask=live, other=0.0)
    update += tl.load(bias_hh + hidden + unit, mask=live, other=0.0)
    fresh_in = tl.load(bias_ih + 2 * hidden + unit, mask=live, other=0.0)
    fresh_hidden = tl.load(bias_hh + 2 * hidden + unit, mask=live, other=0.0)
    for first in range(0, code, BLOCK):
        row = first + tl.arange(0, BLOCK)
        value = tl.load(encoder_bias + row, mask=row < code, other=0.0)
        for begin in range(0, features, BLOCK):
            column = begin + tl.arange(0, BLOCK)
            inside = column < features
            x = tl.load(pooled + sample * pooled_step + column, mask=inside, other=0.0)
            x = (x - tl.load(mean + column, mask=inside, other=0.0)) * tl.load(inv_std + column, mask=inside, other=0.0)
            value += _product(encoder_weight, row, code, features, column, features, x)
        value = tl.where(value < 0, 0.0, value)
        reset += _product(weight_ih, unit, hidden, inputs, row, code, value)
        update += _product(weight_ih + hidden * inputs, unit, hidden, inputs, row, code, value)
        fresh_in += _product(weight_ih + 2 * hidden * inputs, unit, hidden, inputs, row, code, value)
    if HAS_PREVIOUS:
        taken = tl.minimum(tl.maximum(tl.load(previous + sample), 1), actions)
        at = weight_ih + code + taken - 1 + unit * inputs
        reset += tl.load(at, mask=live, other=0.0)
        update += tl.load(at + hidden * inputs, mask=live, other=0.0)
        fresh_in += tl.load(at + 2 * hidden * inputs, mask=live, other=0.0)
    old = tl.zeros((HIDDEN,), tl.float32)
    if HAS_HIDDEN:
        old = tl.load(hidden_in + sample * hidden_step + unit, mask=live, other=0.0)
        for first in range(0, hidden, BLOCK):
            row = first + tl.arange(0, BLOCK)
            value = tl.load(hidden_in + sample * hidden_step + row, mask=row < hidden, other=0.0)
            reset += _product(weight_hh, unit, hidden, hidden, row, hidden, value)
            update += _product(weight_hh + hidden * hidden, unit, hidden, hidden, row, hidden, value)
            fresh_hidden += _product(weight_hh + 2 * hidden * hidden, unit, hidden, hidden, row, hidden, value)
    fresh = _tanh(fresh_in + _sigmoid(reset) * fresh_hidden)
    new = fresh + _sigmoid(update) * (old - fresh)
    new = tl.where(live, new, 0.0)
    tl.store(hidden_out + sample * hidden + unit, new, mask=live)
    choice = tl.arange(0, ACTIONS)
    q = tl.load(decoder_bias + choice, mask=choice < actions, other=0.0)
    q += _product(decoder_weight, choice, actions, hidden, unit, hidden, new)
    tl.store(q_out + sample * actions + choice, q, mask=choice < actions)
    biased = tl.where(choice < actions, q + choice.to(tl.float32) * shift, float("-inf"))
    # The first of the largest, by hand: what a library's argmax does with NaN differs from device to device.
    best = tl.max(biased, 0)
    action = tl.min(tl.where(biased == best, choice, ACTIONS), 0)
    action = tl.where(action < actions, action, 0) + 1
    tl.store(action_out + sample, action)
    tl.store(prefix_out + sample, (action * channels + actions - 1) // actions)
