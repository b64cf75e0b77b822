"""`prefix_conv2d`: the public function in front of the registered operators `torch.ops.rnp.*`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import backends, reference
from .errors import message

_NAME = "prefix_conv2d"
_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def _pair(value: int | Sequence[int], what: str) -> tuple[int, int]:
    if isinstance(value, (int, torch.SymInt)):
        return (value, value)
    pair = tuple(value)
    if len(pair) == 1:
        return (pair[0], pair[0])
    if len(pair) != 2:
        raise ValueError(message(_NAME, f"{what} must be an int or two of them", value))
    return pair


def _padding(padding, kernel_size, stride, dilation) -> tuple[int, int, int, int]:
    """conv2d's padding, strings included, as (top, bottom, left, right)."""
    if isinstance(padding, str):
        if padding == "valid":
            return (0, 0, 0, 0)
        if padding != "same":
            raise ValueError(message(_NAME, 'padding must be "same", "valid", an int or two of them', repr(padding)))
        if any(s != 1 for s in stride):
            raise ValueError(message(_NAME, 'padding="same" needs stride 1', stride))
        top, left = (d * (k - 1) // 2 for d, k in zip(dilation, kernel_size))
        bottom, right = (d * (k - 1) - before for d, k, before in zip(dilation, kernel_size, (top, left)))
        return (top, bottom, left, right)
    if not isinstance(padding, int) and len(padding) == 4:
        return tuple(padding)
    vertical, horizontal = _pair(padding, "padding")
    return (vertical, vertical, horizontal, horizontal)


def prefix_conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    *,
    in_prefix: Tensor | None = None,
    out_prefix: Tensor | None = None,
    scale: Tensor | None = None,
    row: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str = "none",
    tail: str = "zero",
    pooled: bool = False,
    packed: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Convolution over only the live channel prefix of each sample (see DESIGN.md; full docstring follows)."""
    stride, dilation = _pair(stride, "stride"), _pair(dilation, "dilation")
    padding = _padding(padding, weight.shape[2:], stride, dilation)
    batched = input.dim() == 4
    if not batched:
        input = input.unsqueeze(0)
        residual = None if residual is None else residual.unsqueeze(0)
    if backends.resolve(input) == "reference":
        output, mean = reference.prefix_conv2d(
            input, weight, bias, stride, padding, dilation, groups, in_prefix=in_prefix, out_prefix=out_prefix, scale=scale,
            row=row, residual=residual, activation=activation, tail=tail, pooled=pooled,
        )  # fmt: skip
    else:
        output, mean = torch.ops.rnp.prefix_conv2d(
            input, weight, bias, stride, padding, dilation, groups, in_prefix, out_prefix, scale, row, residual, activation,
            tail, pooled, packed,
        )  # fmt: skip
    if not batched:
        output, mean = output.squeeze(0), mean.squeeze(0) if pooled else mean
    return (output, mean) if pooled else output


def pack_weight(weight: Tensor, groups: int = 1) -> Tensor | None:
    """The weights in the kernels' own layout, to be given to `prefix_conv2d(packed=...)`; None where nothing packs."""
    if not backends._has_kernel("CPU"):
        return None
    return torch.ops.rnp.pack_weight(weight, groups)
