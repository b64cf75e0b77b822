"""Gradients of `prefix_conv2d`, all of them made of registered operators, so that they have gradients themselves.

`rnp::prefix_conv2d_input_grad` and `rnp::prefix_conv2d_weight_grad` have one implementation here for every device:
masking, then `aten.convolution_backward`. A kernel registered for one device takes its place there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .reference import live, per_channel

_LIBRARY = torch.library.Library("rnp", "FRAGMENT")


def _mask(tensor: Tensor, prefix: Tensor | None) -> Tensor:
    """`tensor` (N, C, H, W) with its tail at zero, whatever stood there."""
    return tensor if prefix is None else torch.where(live(tensor.shape[1], prefix, tensor), tensor, 0)


def _convolution_backward(
    grad_output: Tensor, input: Tensor, weight: Tensor, stride: Sequence[int], padding: Sequence[int],
    dilation: Sequence[int], groups: int, output_mask: list[bool],
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """Gradients of the plain convolution. aten has one padding per axis, so an uneven one is padded beforehand."""
    top, bottom, left, right = padding
    even = top == bottom and left == right
    if not even:
        input = F.pad(input, (left, right, top, bottom))
    grad_input, grad_weight, _ = torch.ops.aten.convolution_backward(
        grad_output, input, weight, None, stride, (top, left) if even else (0, 0), dilation, False, (0, 0), groups,
        [*output_mask, False],
    )  # fmt: skip
    if grad_input is not None and not even:
        height, width = input.shape[2], input.shape[3]
        grad_input = grad_input[:, :, top : height - bottom, left : width - right]
    return grad_input, grad_weight


def _input_grad(
    grad_output: Tensor, weight: Tensor, input_size: Sequence[int], stride: Sequence[int], padding: Sequence[int],
    dilation: Sequence[int], groups: int, in_prefix: Tensor | None, out_prefix: Tensor | None,
) -> Tensor:  # fmt: skip
    memory_format = torch._prims_common.suggest_memory_format(grad_output)
    input = torch.empty(  # only its shape and strides are read
        input_size, dtype=grad_output.dtype, device=grad_output.device, memory_format=memory_format
    )
    grad, _ = _convolution_backward(
        _mask(grad_output, out_prefix), input, weight, stride, padding, dilation, groups, [True, False]
    )
    return _mask(grad, in_prefix).contiguous(memory_format=memory_format)


def _weight_grad(
    grad_output: Tensor, input: Tensor, weight_size: Sequence[int], stride: Sequence[int], padding: Sequence[int],
    dilation: Sequence[int], groups: int, in_prefix: Tensor | None, out_prefix: Tensor | None,
) -> Tensor:  # fmt: skip
    weight = grad_output.new_empty(weight_size)  # only its shape and strides are read
    grad_output, input = _mask(grad_output, out_prefix), _mask(input, in_prefix)
    _, grad = _convolution_backward(grad_output, input, weight, stride, padding, dilation, groups, [False, True])
    return grad.contiguous()


_LIBRARY.impl("prefix_conv2d_input_grad", _input_grad, "CompositeExplicitAutograd")
_LIBRARY.impl("prefix_conv2d_weight_grad", _weight_grad, "CompositeExplicitAutograd")


@torch.library.register_fake("rnp::prefix_conv2d_input_grad")
def _input_grad_fake(
    grad_output: Tensor, weight: Tensor, input_size: Sequence[int], stride: Sequence[int], padding: Sequence[int],
    dilation: Sequence[int], groups: int, in_prefix: Tensor | None, out_prefix: Tensor | None,
) -> Tensor:  # fmt: skip
    memory_format = torch._prims_common.suggest_memory_format(grad_output)
    return torch.empty(input_size, dtype=grad_output.dtype, device=grad_output.device, memory_format=memory_format)


@torch.library.register_fake("rnp::prefix_conv2d_weight_grad")
def _weight_grad_fake(
    grad_output: Tensor, input: Tensor, weight_size: Sequence[int], stride: Sequence[int], padding: Sequence[int],
    dilation: Sequence[int], groups: int, in_prefix: Tensor | None, out_prefix: Tensor | None,
) -> Tensor:  # fmt: skip
    return grad_output.new_empty(weight_size)


def _convolve(
    input: Tensor, weight: Tensor, geometry: tuple[Any, ...], in_prefix: Tensor | None, out_prefix: Tensor | None
) -> Tensor:
    """The bare operator: no scale, bias, residual or activation."""
    return torch.ops.rnp.prefix_conv2d(
        input, weight, None, *geometry, in_prefix, out_prefix, None, None, None, "none", "zero", False, None
    )[0]


def _setup(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    (input, weight, bias, stride, padding, dilation, groups, in_prefix, out_prefix, scale, row, _residual, activation,
     tail, pooled, _packed, _winograd) = inputs  # fmt: skip
    ctx.set_materialize_grads(False)
    if not pooled:
        ctx.mark_non_differentiable(output[1])
    needs = ctx.needs_input_grad
    keep_input = needs[1] or needs[9]
    keep_weight = needs[0] or needs[9]
    ctx.save_for_backward(
        input if keep_input else None, weight if keep_weight else None, in_prefix, out_prefix, scale, row,
        output[0] if activation == "relu" else None,
    )  # fmt: skip
    ctx.geometry = (stride, padding, dilation, groups)
    ctx.input_size, ctx.weight_size, ctx.tail = input.shape, weight.shape, tail
    ctx.output_size, ctx.dtype = output[0].shape, input.dtype
    ctx.memory_format = torch._prims_common.suggest_memory_format(output[0])
    ctx.bias_like = None if bias is None else (bias.shape, bias.dtype)


def _table_grad(per_sample: Tensor, shape: Sequence[int], dtype: torch.dtype, row: Tensor | None) -> Tensor:
    """Sum (N, C_out) over the samples of each line: the gradient of a (C_out,) vector or a (T, C_out) table."""
    if len(shape) == 1:
        return per_sample.sum(0).to(dtype)
    return per_sample.new_zeros(shape).index_add(0, row, per_sample).to(dtype)


def _backward(ctx: Any, grad: Tensor | None, grad_pooled: Tensor | None) -> tuple[Tensor | None, ...]:
    input, weight, in_prefix, out_prefix, scale, row, output = ctx.saved_tensors
    needs = ctx.needs_input_grad
    grads: list[Tensor | None] = [None] * 17
    if grad_pooled is not None:
        positions = ctx.output_size[2] * ctx.output_size[3]
        spread = (grad_pooled / positions)[:, :, None, None]
        grad = (spread.expand(ctx.output_size) if grad is None else grad + spread).to(ctx.dtype)
    if grad is None:
        return tuple(grads)
    if ctx.tail == "skip":  # nothing defined stands there, so nothing flows back
        grad = _mask(grad, out_prefix)
    if output is not None:
        grad = torch.where(output <= 0, 0, grad)  # NaN passes, as in relu
    if needs[11]:
        grads[11] = grad
    live_grad = _mask(grad, out_prefix)
    wide = torch.promote_types(grad.dtype, torch.float32)
    if needs[2]:
        shape, dtype = ctx.bias_like
        grads[2] = _table_grad(live_grad.sum((2, 3), dtype=wide), shape, dtype, row)
    if needs[9]:
        plain = _convolve(input, weight, ctx.geometry, in_prefix, out_prefix)
        grads[9] = _table_grad((live_grad * plain).sum((2, 3), dtype=wide), scale.shape, scale.dtype, row)
    if scale is not None:
        live_grad = (live_grad * per_channel(scale, row)).to(grad.dtype)
    if needs[0] or needs[1]:  # expanded or in another layout, it would be converted once for each
        live_grad = live_grad.contiguous(memory_format=ctx.memory_format)
    if needs[0]:
        grads[0] = torch.ops.rnp.prefix_conv2d_input_grad(
            live_grad, weight, ctx.input_size, *ctx.geometry, in_prefix, out_prefix
        )
    if needs[1]:
        grads[1] = torch.ops.rnp.prefix_conv2d_weight_grad(
            live_grad, input, ctx.weight_size, *ctx.geometry, in_prefix, out_prefix
        )
    return tuple(grads)


def _input_grad_setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    grad_output, weight, _size, stride, padding, dilation, groups, in_prefix, out_prefix = inputs
    ctx.save_for_backward(grad_output, weight, in_prefix, out_prefix)
    ctx.geometry = (stride, padding, dilation, groups)


def _input_grad_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    grad_output, weight, in_prefix, out_prefix = ctx.saved_tensors
    first = second = None
    if ctx.needs_input_grad[0]:
        first = _convolve(grad, weight, ctx.geometry, in_prefix, out_prefix)
    if ctx.needs_input_grad[1]:
        second = torch.ops.rnp.prefix_conv2d_weight_grad(
            grad_output, grad, weight.shape, *ctx.geometry, in_prefix, out_prefix
        )
    return first, second, *[None] * 7


def _weight_grad_setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    grad_output, input, _size, stride, padding, dilation, groups, in_prefix, out_prefix = inputs
    ctx.save_for_backward(grad_output, input, in_prefix, out_prefix)
    ctx.geometry = (stride, padding, dilation, groups)


def _weight_grad_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    grad_output, input, in_prefix, out_prefix = ctx.saved_tensors
    first = second = None
    if ctx.needs_input_grad[0]:
        first = _convolve(input, grad, ctx.geometry, in_prefix, out_prefix)
    if ctx.needs_input_grad[1]:
        second = torch.ops.rnp.prefix_conv2d_input_grad(
            grad_output, grad, input.shape, *ctx.geometry, in_prefix, out_prefix
        )
    return first, second, *[None] * 7


torch.library.register_autograd("rnp::prefix_conv2d", _backward, setup_context=_setup)
for _name, _formula, _context in (
    ("input_grad", _input_grad_backward, _input_grad_setup),
    ("weight_grad", _weight_grad_backward, _weight_grad_setup),
):
    torch.library.register_autograd(f"rnp::prefix_conv2d_{_name}", _formula, setup_context=_context)
