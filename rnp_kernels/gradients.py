"""Gradients of `prefix_conv2d`, all of them made of registered operators, so that they have gradients themselves.

`rnp::prefix_conv2d_input_grad` and `rnp::prefix_conv2d_weight_grad` have one implementation here for every device:
masking, then `aten.convolution_backward`. A kernel registered for one device takes its place there. The CPU's skips
what is not live, and comes back here, through `rnp::masked_input_grad` and `rnp::masked_weight_grad`, where torch's
dense kernel is the faster one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _C
from .reference import live, per_channel

_LIBRARY = torch.library.Library("rnp", "FRAGMENT")


def _mask(tensor: Tensor, prefix: Tensor | None) -> Tensor:
    """`tensor` (N, C, H, W) with its tail at zero, whatever stood there."""
    return tensor if prefix is None else torch.where(live(tensor.shape[1], prefix, tensor), tensor, 0)


def right_dtype(
    input: Tensor, weight: Tensor, stride: Any, padding: Any, dilation: Any, groups: int
) -> torch.dtype:  # fmt: skip
    """In which torch computes this layer and its gradients right: the layer's own where that is possible.

    Far apart, oneDNN breaks down; it has no float64.
    """
    dtype = input.dtype
    if not input.is_cpu or dtype is torch.float64 or 0 in input.shape:
        return dtype
    layer = (input.shape[1:], weight.shape, stride, padding, dilation, groups)
    if _C.far_apart(*layer):
        return torch.float64
    return dtype if _C.onednn_grads_are_right(*layer, str(dtype).removeprefix("torch.")) else torch.float32


def _convolution_backward(
    grad_output: Tensor, input: Tensor, weight: Tensor, stride: Sequence[int], padding: Sequence[int],
    dilation: Sequence[int], groups: int, output_mask: list[bool],
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """Gradients of the plain convolution. aten has one padding per axis, so an uneven one is padded beforehand."""
    top, bottom, left, right = padding
    dtype, safe = grad_output.dtype, right_dtype(input, weight, stride, padding, dilation, groups)
    grad_output, input, weight = grad_output.to(safe), input.to(safe), weight.to(safe)
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
    return tuple(None if grad is None else grad.to(dtype) for grad in (grad_input, grad_weight))


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


_GEOMETRY = "int[] stride, int[] padding, int[] dilation, int groups, Tensor? in_prefix, Tensor? out_prefix) -> Tensor"
_LIBRARY.define(f"masked_input_grad(Tensor grad_output, Tensor weight, int[] input_size, {_GEOMETRY}")
_LIBRARY.define(f"masked_weight_grad(Tensor grad_output, Tensor input, int[] weight_size, {_GEOMETRY}")
for _prefix in ("masked", "prefix_conv2d"):
    _LIBRARY.impl(f"{_prefix}_input_grad", _input_grad, "CompositeExplicitAutograd")
    _LIBRARY.impl(f"{_prefix}_weight_grad", _weight_grad, "CompositeExplicitAutograd")


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


def _operator(ctx: Any, name: str) -> Any:
    """The operator of the family that the forward belonged to: a backend that has names of its own sets `family`."""
    return getattr(torch.ops.rnp, name + getattr(ctx, "family", ""))


def _convolve(
    ctx: Any, input: Tensor, weight: Tensor, in_prefix: Tensor | None, out_prefix: Tensor | None
) -> Tensor:  # fmt: skip
    """The bare operator: no scale, bias, residual or activation."""
    geometry = ctx.geometry
    return _operator(ctx, "prefix_conv2d")(
        input, weight, None, *geometry, in_prefix, out_prefix, None, None, None, "none", "zero", False, None
    )[0]


def _setup(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    (input, weight, bias, stride, padding, dilation, groups, in_prefix, out_prefix, scale, row, _residual, activation,
     _tail, pooled, _packed, _winograd) = inputs  # fmt: skip
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
    ctx.input_size, ctx.weight_size = input.shape, weight.shape
    ctx.output_size, ctx.dtype = output[0].shape, input.dtype
    ctx.memory_format = torch._prims_common.suggest_memory_format(output[0])
    ctx.bias_like = None if bias is None else (bias.shape, bias.dtype)


def _channel_sums(values: Tensor, prefix: Tensor | None) -> Tensor:
    """Sums over positions (N, C), in float32 at least; 0 beyond the prefix, whatever stood there."""
    sums = values.sum((2, 3), dtype=torch.promote_types(values.dtype, torch.float32))
    return sums if prefix is None else torch.where(live(sums.shape[1], prefix, sums)[:, :, 0, 0], sums, 0)


def _table_grad(per_sample: Tensor, shape: Sequence[int], dtype: torch.dtype, row: Tensor | None) -> Tensor:
    """Sum (N, C_out) over the samples of each line: the gradient of a (C_out,) vector or a (T, C_out) table."""
    if len(shape) == 1:
        return per_sample.sum(0).to(dtype)
    return per_sample.new_zeros(shape).index_add(0, row, per_sample).to(dtype)


def _backward(ctx: Any, grad: Tensor | None, grad_pooled: Tensor | None) -> tuple[Tensor | None, ...]:
    """Nothing here masks a whole tensor: the operators read no channel beyond a prefix, so only sums are masked."""
    input, weight, in_prefix, out_prefix, scale, row, output = ctx.saved_tensors
    needs = ctx.needs_input_grad
    grads: list[Tensor | None] = [None] * 17
    if grad_pooled is not None:
        positions = ctx.output_size[2] * ctx.output_size[3]
        precise = grad_pooled.to(torch.promote_types(ctx.dtype, grad_pooled.dtype))
        spread = (precise / positions)[:, :, None, None]
        grad = (spread.expand(ctx.output_size) if grad is None else grad + spread).to(ctx.dtype)
    if grad is None:
        return tuple(grads)
    if output is not None:
        grad = torch.ops.aten.threshold_backward(grad, output, 0)  # NaN passes, as in relu
    if needs[11]:
        grads[11] = grad
    if needs[2]:
        grads[2] = _table_grad(_channel_sums(grad, out_prefix), *ctx.bias_like, row)
    if needs[9]:
        plain = _convolve(ctx, input, weight, in_prefix, out_prefix)
        grads[9] = _table_grad(_channel_sums(grad * plain, out_prefix), scale.shape, scale.dtype, row)
    if not needs[0] and not needs[1]:
        return tuple(grads)
    if scale is not None:
        grad = (grad * per_channel(scale, row)).to(grad.dtype)
    grad = grad.contiguous(memory_format=ctx.memory_format)  # expanded or in another layout, it would be slow to read
    if needs[0]:
        grads[0] = _operator(ctx, "prefix_conv2d_input_grad")(
            grad, weight, ctx.input_size, *ctx.geometry, in_prefix, out_prefix
        )
    if needs[1]:
        grads[1] = _operator(ctx, "prefix_conv2d_weight_grad")(
            grad, input, ctx.weight_size, *ctx.geometry, in_prefix, out_prefix
        )
    return tuple(grads)


def _part_setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    """Of both gradients' operators: grad_output, the weight or the input, the size of what is returned, the rest."""
    grad_output, other, _size, stride, padding, dilation, groups, in_prefix, out_prefix = inputs
    ctx.save_for_backward(grad_output, other, in_prefix, out_prefix)
    ctx.geometry = (stride, padding, dilation, groups)


def _input_grad_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    grad_output, weight, *prefixes = ctx.saved_tensors
    first = second = None
    if ctx.needs_input_grad[0]:
        first = _convolve(ctx, grad, weight, *prefixes)
    if ctx.needs_input_grad[1]:
        second = _operator(ctx, "prefix_conv2d_weight_grad")(grad_output, grad, weight.shape, *ctx.geometry, *prefixes)
    return first, second, *[None] * 7


def _weight_grad_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    grad_output, input, *prefixes = ctx.saved_tensors
    first = second = None
    if ctx.needs_input_grad[0]:
        first = _convolve(ctx, input, grad, *prefixes)
    if ctx.needs_input_grad[1]:
        second = _operator(ctx, "prefix_conv2d_input_grad")(grad_output, grad, input.shape, *ctx.geometry, *prefixes)
    return first, second, *[None] * 7


torch.library.register_autograd("rnp::prefix_conv2d", _backward, setup_context=_setup)
torch.library.register_autograd("rnp::prefix_conv2d_input_grad", _input_grad_backward, setup_context=_part_setup)
torch.library.register_autograd("rnp::prefix_conv2d_weight_grad", _weight_grad_backward, setup_context=_part_setup)
