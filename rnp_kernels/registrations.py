"""Fake kernels and autocast rules of `torch.ops.rnp.*`; the gradients are in gradients.py."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import checks

_LIBRARY = torch.library.Library("rnp", "FRAGMENT")


def output_memory_format(input: Tensor, weight: Tensor) -> torch.memory_format:
    """The layout that conv2d would give: channels_last if the input or the weight has it, but on CUDA never for float64
    (cuDNN has no such kernel)."""
    if input.dtype is torch.float64 and input.device.type == "cuda":
        return torch.contiguous_format
    suggest = torch._prims_common.suggest_memory_format
    if suggest(input) is torch.channels_last or suggest(weight) is torch.channels_last:
        return torch.channels_last
    return torch.contiguous_format


@torch.library.register_fake("rnp::prefix_conv2d")
def _prefix_conv2d_fake(
    input: Tensor, weight: Tensor, bias: Tensor | None, stride: Sequence[int], padding: Sequence[int],
    dilation: Sequence[int], groups: int, in_prefix: Tensor | None, out_prefix: Tensor | None, scale: Tensor | None,
    row: Tensor | None, residual: Tensor | None, activation: str, tail: str, pooled: bool, packed: Tensor | None,
    winograd: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    checks.check_call(
        input, weight, bias, stride, padding, dilation, groups, in_prefix, out_prefix, scale, row, residual, activation,
        tail,
    )  # fmt: skip
    height, width = checks.output_size(input, weight, stride, padding, dilation)
    batch, channels = input.shape[0], weight.shape[0]
    output = torch.empty(
        (batch, channels, height, width), dtype=input.dtype, device=input.device,
        memory_format=output_memory_format(input, weight),
    )  # fmt: skip
    return output, input.new_empty((batch, channels) if pooled else (0,), dtype=torch.float32)


@torch.library.register_fake("rnp::conv2d_weight_grad")
def _conv2d_weight_grad_fake(
    grad_output: Tensor, input: Tensor, weight: Tensor, stride: Sequence[int], padding: Sequence[int],
    dilation: Sequence[int], groups: int,
) -> Tensor:  # fmt: skip
    return torch.empty(
        weight.shape, dtype=weight.dtype, device=weight.device,
        memory_format=torch._prims_common.suggest_memory_format(weight),
    )  # fmt: skip


@torch.library.register_fake("rnp::pack_weight")
def _pack_weight_fake(weight: Tensor, groups: int) -> Tensor:
    return weight.new_empty(torch.library.get_ctx().new_dynamic_size(), dtype=torch.float32)


@torch.library.register_fake("rnp::pack_winograd")
def _pack_winograd_fake(weight: Tensor, tile: int) -> Tensor:
    c_out, c_in = weight.shape[:2]
    rest = c_out % 32
    lanes = c_out - rest + (0 if rest == 0 else 16 if rest <= 16 else 32)
    folded = weight.shape[-1] == 7
    values = 4 * c_in * (tile + 3) ** 2 if folded else c_in * (tile + 2) ** 2
    return weight.new_empty((16 + c_out + 15) // 16 * 16 + lanes * values, dtype=torch.float32)


def autocast_operands(
    device: str, input: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor | None, residual: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Input, weight, bias and residual as autocast gives them to the operator."""
    dtype = torch.get_autocast_dtype(device)
    if input.dtype is torch.float64 or weight.dtype is torch.float64:
        if input.dtype is not weight.dtype:
            return input, weight, bias, residual  # the operator refuses the mixture
        dtype = torch.float64
    elif not (input.is_floating_point() and weight.is_floating_point()):
        return input, weight, bias, residual  # as conv2d does, which then refuses it
    if bias is not None and bias.dim() == 1 and scale is None:
        bias = bias.to(dtype)  # as conv2d does; a table stays in float32
    return input.to(dtype), weight.to(dtype), bias, None if residual is None else residual.to(dtype)


def _autocast(device: str, family: str = "") -> None:
    """Under autocast the convolution runs in autocast's dtype; scale and bias keep the float32 they accumulate in.

    `family` ends the operator's name: a backend that has operators of its own registers the same rule for them.
    """
    key = {"cpu": "AutocastCPU", "cuda": "AutocastCUDA"}[device]
    name = "prefix_conv2d" + family
    excluded = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

    def prefix_conv2d(
        input: Tensor, weight: Tensor, bias: Tensor | None, stride: Sequence[int], padding: Sequence[int],
        dilation: Sequence[int], groups: int, in_prefix: Tensor | None, out_prefix: Tensor | None, scale: Tensor | None,
        row: Tensor | None, residual: Tensor | None, activation: str, tail: str, pooled: bool, packed: Tensor | None,
        winograd: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        with torch._C._ExcludeDispatchKeyGuard(excluded):
            given = weight.dtype
            input, weight, bias, residual = autocast_operands(device, input, weight, bias, scale, residual)
            packed = packed if weight.dtype is given else None
            winograd = winograd if weight.dtype is given else None
            return getattr(torch.ops.rnp, name)(
                input, weight, bias, stride, padding, dilation, groups, in_prefix, out_prefix, scale, row, residual,
                activation, tail, pooled, packed, winograd,
            )  # fmt: skip

    _LIBRARY.impl(name, prefix_conv2d, key)


_autocast("cpu")
_autocast("cuda")
