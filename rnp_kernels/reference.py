"""The specification of `prefix_conv2d` in plain torch: slow, differentiable, in any floating dtype."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def live(channels: int, prefix: Tensor | None, like: Tensor) -> Tensor:
    """Which channels are live: bool, (N, C, 1, 1), or (1, C, 1, 1) where `prefix` is None (all of them)."""
    index = torch.arange(channels, device=like.device).view(1, channels, 1, 1)
    return index < (channels if prefix is None else prefix.view(-1, 1, 1, 1))


def per_channel(table: Tensor, row: Tensor | None) -> Tensor:
    """(C,) → (1, C, 1, 1); a table (T, C) with `row` (N,) → (N, C, 1, 1)."""
    return table.view(1, -1, 1, 1) if table.dim() == 1 else table[row.long()][:, :, None, None]


def prefix_conv2d(
    input: Tensor,  # (N, C_in, H, W)
    weight: Tensor,  # (C_out, C_in / groups, KH, KW)
    bias: Tensor | None = None,  # (C_out,) or (T, C_out)
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int, int, int] = (0, 0, 0, 0),  # top, bottom, left, right
    dilation: tuple[int, int] = (1, 1),
    groups: int = 1,
    *,
    in_prefix: Tensor | None = None,  # (N,) int32
    out_prefix: Tensor | None = None,  # (N,) int32
    scale: Tensor | None = None,  # (C_out,) or (T, C_out)
    row: Tensor | None = None,  # (N,) int32
    residual: Tensor | None = None,  # (N, C_out, OH, OW)
    activation: str = "none",
    tail: str = "zero",  # "skip" leaves the tail undefined: zero is one of the values it may have
    pooled: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Return the output (N, C_out, OH, OW) and its mean over positions (N, C_out) float32, or None unless `pooled`."""
    top, bottom, left, right = padding
    x = torch.where(live(input.shape[1], in_prefix, input), input, 0)
    even = top == bottom and left == right
    x = x if even else F.pad(x, (left, right, top, bottom))
    y = F.conv2d(x, weight, None, stride, (top, left) if even else 0, dilation, groups)
    y = y if scale is None else y * per_channel(scale, row)
    y = y if bias is None else y + per_channel(bias, row)
    y = torch.where(live(y.shape[1], out_prefix, y), y, 0)
    y = y if residual is None else y + residual
    y = (F.relu(y) if activation == "relu" else y).to(input.dtype)
    return y, y.to(torch.promote_types(y.dtype, torch.float32)).mean((2, 3)).float() if pooled else None
