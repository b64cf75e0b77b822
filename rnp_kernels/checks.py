"""What `prefix_conv2d` accepts. Every rule raises before any work is done, with operator, rule and value."""

from __future__ import annotations

import math
import operator
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import transforms
from .errors import message

_NAME = "prefix_conv2d"
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
_CHECK = os.environ.get("RNP_CHECK") == "1"
ACTIVATIONS = ("none", "relu")
TAILS = ("zero", "skip")
_END_OF_INT64 = 2**63
_END_OF_PADDING = 2**61  # as in csrc/core/prefix_conv2d.h


def integer(value: Any, what: str, rule: str = "an int") -> int:
    """A whole number as conv2d takes it: an int, NumPy's, or a tensor of one; neither a bool nor a float."""
    if type(value) is int or isinstance(value, torch.SymInt):
        return value
    try:
        if not isinstance(value, bool):
            return operator.index(value)
    except TypeError:
        pass
    raise TypeError(message(_NAME, f"{what} must be {rule}", f"{value!r} ({type(value).__name__})"))


def pair(value: Any, what: str) -> tuple[int, int]:
    """An int or one or two ints, as conv2d takes them, as (vertical, horizontal)."""
    if type(value) is tuple and len(value) == 2 and type(value[0]) is int and type(value[1]) is int:
        return value
    rule = "an int or two of them"
    if not isinstance(value, (tuple, list)):
        value = integer(value, what, rule)
        return (value, value)
    if len(value) not in (1, 2):
        raise ValueError(message(_NAME, f"{what} must be {rule}", value))
    return (integer(value[0], what, rule), integer(value[-1], what, rule))


def four_paddings(
    padding: int | Sequence[int] | str, kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int]
) -> tuple[int, int, int, int]:
    """conv2d's padding, strings included, as (top, bottom, left, right); four numbers are taken as they are."""
    if isinstance(padding, str):
        if padding == "valid":
            return (0, 0, 0, 0)
        if padding != "same":
            raise ValueError(message(_NAME, 'a padding string must be "same" or "valid"', repr(padding)))
        if stride[0] != 1 or stride[1] != 1:
            raise ValueError(message(_NAME, 'padding="same" needs a stride of 1', stride))
        vertical, horizontal = dilation[0] * (kernel[0] - 1), dilation[1] * (kernel[1] - 1)
        return (vertical // 2, vertical - vertical // 2, horizontal // 2, horizontal - horizontal // 2)
    if isinstance(padding, (tuple, list)) and len(padding) == 4:
        return tuple(integer(side, "padding", "an int, two or four of them") for side in padding)
    vertical, horizontal = pair(padding, "padding")
    return (vertical, vertical, horizontal, horizontal)


def output_size(
    input: Tensor, weight: Tensor, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> tuple[int, int]:
    """Height and width of the output of a (N, C, H, W) input."""
    _, _, height, width = input.shape
    _, _, kernel_h, kernel_w = weight.shape
    return (
        (height + padding[0] + padding[1] - dilation[0] * (kernel_h - 1) - 1) // stride[0] + 1,
        (width + padding[2] + padding[3] - dilation[1] * (kernel_w - 1) - 1) // stride[1] + 1,
    )


def _check_index(index: Tensor, name: str, batch: int, device: torch.device) -> None:
    if not isinstance(index, Tensor):
        raise TypeError(message(_NAME, f"{name} must be an int32 tensor", type(index).__name__))
    if index.dtype is not torch.int32:
        raise TypeError(message(_NAME, f"{name} must be int32", index.dtype))
    if index.dim() != 1 or index.shape[0] != batch:
        raise ValueError(message(_NAME, f"{name} must have shape (N,) = ({batch},)", tuple(index.shape)))
    if index.device != device:
        raise ValueError(message(_NAME, f"{name} must be on the input's device {device}", index.device))


def _check_table(table: Tensor, name: str, channels: int, input: Tensor) -> None:
    if not isinstance(table, Tensor):
        raise TypeError(message(_NAME, f"{name} must be a tensor", type(table).__name__))
    if table.dim() not in (1, 2) or table.shape[-1] != channels:
        rule = f"{name} must have shape (C_out,) or (T, C_out) with C_out = {channels}"
        raise ValueError(message(_NAME, rule, tuple(table.shape)))
    if table.dtype is not input.dtype and (table.dtype is not torch.float32 or input.dtype is torch.float64):
        raise TypeError(message(_NAME, f"{name} must be {input.dtype} like the input, or float32", table.dtype))
    if table.device != input.device:
        raise ValueError(message(_NAME, f"{name} must be on the input's device {input.device}", table.device))


def check_types(input: Tensor, weight: Tensor, autocast: bool) -> None:
    """Ranks, dtypes and devices of the two tensors every other rule refers to."""
    for tensor, name in ((input, "input"), (weight, "weight")):
        if not isinstance(tensor, Tensor):
            raise TypeError(message(_NAME, f"{name} must be a tensor", type(tensor).__name__))
    if input.dim() not in (3, 4):
        raise ValueError(message(_NAME, "input must be (N, C, H, W) or (C, H, W)", tuple(input.shape)))
    if weight.dim() != 4:
        raise ValueError(message(_NAME, "weight must be (C_out, C_in / groups, KH, KW)", tuple(weight.shape)))
    if input.dtype not in DTYPES:
        raise TypeError(message(_NAME, "input must be float32, float64, float16 or bfloat16", input.dtype))
    if weight.dtype is not input.dtype and not autocast:
        raise TypeError(message(_NAME, f"weight must be {input.dtype} like the input", weight.dtype))
    if weight.device != input.device:
        raise ValueError(message(_NAME, f"weight must be on the input's device {input.device}", weight.device))


def check_convolution(
    input: Tensor, weight: Tensor, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int
) -> None:
    """The geometry: groups, channels, strides, paddings, dilations, a weight and an output that are not empty."""
    if groups < 1:
        raise ValueError(message(_NAME, "groups must be positive", groups))
    if 0 in weight.shape:
        raise ValueError(message(_NAME, "weight must not be empty", tuple(weight.shape)))
    if weight.shape[1] * groups != input.shape[1]:
        rule = f"input must have weight.shape[1] x groups = {weight.shape[1]} x {groups} channels"
        raise ValueError(message(_NAME, rule, input.shape[1]))
    if weight.shape[0] % groups:
        raise ValueError(message(_NAME, f"output channels must be a multiple of groups = {groups}", weight.shape[0]))
    for value, name in ((stride, "stride"), (dilation, "dilation")):
        if value[0] < 1 or value[1] < 1:
            raise ValueError(message(_NAME, f"{name} must be positive", value))
        if value[0] >= _END_OF_INT64 or value[1] >= _END_OF_INT64:
            raise ValueError(message(_NAME, f"{name} must be less than 2^63", value))
    if min(padding) < 0:
        raise ValueError(message(_NAME, "padding must not be negative", padding))
    if max(padding) >= _END_OF_PADDING:
        raise ValueError(message(_NAME, "padding must be less than 2^61", padding))
    size = output_size(input, weight, stride, padding, dilation)
    if size[0] < 1 or size[1] < 1:
        raise ValueError(message(_NAME, "the kernel must fit into the padded input (output at least 1 x 1)", size))
    shape = (input.shape[0], weight.shape[0], *size)
    if all(type(n) is int for n in shape) and math.prod(shape) * input.element_size() >= _END_OF_INT64:
        raise ValueError(message(_NAME, f"the output must have less than 2^63 bytes, with padding {padding}", shape))


def check_lines(scale: Tensor | None, bias: Tensor | None, batch: int) -> None:
    """A table without a line has none for a sample; the operator would take it for no table."""
    for table, name in ((scale, "scale"), (bias, "bias")):
        if isinstance(table, Tensor) and table.dim() == 2 and table.shape[0] == 0 and batch > 0:
            rule = f"{name} of shape (T, C_out) must have a line for row to name, T at least 1"
            raise ValueError(message(_NAME, rule, tuple(table.shape)))


def check_options(
    input: Tensor, weight: Tensor, bias: Tensor | None, in_prefix: Tensor | None, out_prefix: Tensor | None,
    scale: Tensor | None, row: Tensor | None, residual: Tensor | None, activation: str, tail: str,
    size: tuple[int, int], autocast: bool,
) -> None:  # fmt: skip
    """Everything that conv2d does not have; `size` is the output's height and width."""
    batch, channels, device = input.shape[0], weight.shape[0], input.device
    for index, name in ((in_prefix, "in_prefix"), (out_prefix, "out_prefix"), (row, "row")):
        if index is not None:
            _check_index(index, name, batch, device)
    lines = []
    for table, name in ((scale, "scale"), (bias, "bias")):
        if table is not None:
            _check_table(table, name, channels, input)
            if table.dim() == 2:
                lines.append(table.shape[0])
    if lines and row is None:
        raise ValueError(message(_NAME, "scale or bias of shape (T, C_out) needs row, each sample's line", "row=None"))
    check_lines(scale, bias, batch)
    if len(lines) == 2 and lines[0] != lines[1]:
        raise ValueError(message(_NAME, "scale and bias must have as many lines as each other", lines))
    if activation not in ACTIVATIONS:
        raise ValueError(message(_NAME, f"activation must be one of {ACTIVATIONS}", repr(activation)))
    if tail not in TAILS:
        raise ValueError(message(_NAME, f"tail must be one of {TAILS}", repr(tail)))
    if residual is None:
        return
    if tail == "skip":
        raise ValueError(message(_NAME, 'tail="skip" does not go with a residual', tuple(residual.shape)))
    if tuple(residual.shape) != (batch, channels, *size):
        rule = f"residual must have the output's shape {(batch, channels, *size)}"
        raise ValueError(message(_NAME, rule, tuple(residual.shape)))
    if residual.dtype is not input.dtype and not autocast:
        raise TypeError(message(_NAME, f"residual must be {input.dtype} like the input", residual.dtype))
    if residual.device != device:
        raise ValueError(message(_NAME, f"residual must be on the input's device {device}", residual.device))


def check_call(
    input: Tensor, weight: Tensor, bias: Tensor | None, stride: int | Sequence[int],
    padding: int | Sequence[int] | str, dilation: int | Sequence[int], groups: int, in_prefix: Tensor | None,
    out_prefix: Tensor | None, scale: Tensor | None, row: Tensor | None, residual: Tensor | None, activation: str,
    tail: str,
) -> None:  # fmt: skip
    """Every rule on the arguments as the caller gave them; an unbatched input counts as a batch of one."""
    kind = input.device.type if isinstance(input, Tensor) else None
    autocast = kind in ("cpu", "cuda") and torch.is_autocast_enabled(kind)
    check_types(input, weight, autocast)
    stride, dilation = pair(stride, "stride"), pair(dilation, "dilation")
    padding = four_paddings(padding, weight.shape[2:], stride, dilation)
    groups = integer(groups, "groups")
    if not isinstance(residual, (Tensor, type(None))):
        raise TypeError(message(_NAME, "residual must be a tensor", type(residual).__name__))
    if input.dim() == 3:
        input = input.unsqueeze(0)
        residual = residual if residual is None else residual.unsqueeze(0)
    check_convolution(input, weight, stride, padding, dilation, groups)
    size = output_size(input, weight, stride, padding, dilation)
    check_options(input, weight, bias, in_prefix, out_prefix, scale, row, residual, activation, tail, size, autocast)


def may_read(values: Tensor) -> bool:
    """Whether values may be looked at: on the CPU; elsewhere, where that stalls the device, only under RNP_CHECK=1."""
    return not torch.compiler.is_compiling() and (values.is_cpu or _CHECK)


def check_values(index: Tensor | None, name: str, limit: int) -> None:
    """A prefix or row out of 0...limit, where it may be looked at."""
    if index is None or index.numel() == 0 or not may_read(index):
        return
    values = transforms.values_of(index)
    if values is None:
        return
    low, high = torch.aminmax(values)
    if low < 0 or high > limit:
        raise RuntimeError(message(_NAME, f"{name} must lie in 0...{limit}", values.tolist()))
