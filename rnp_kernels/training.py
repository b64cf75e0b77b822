"""`conv2d` for a step of training at full width: what `torch.conv2d` computes, each part by whoever is faster.

The rules are `training_path`, `our_input_grad_wins` and `our_weight_grad_wins` in csrc/core/stock.cpp.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _C, backends, stock
from .checks import four_paddings, pair
from .layer_call import WITH_GRADIENTS, StockCall
from .ops import all_plain, needs_autograd, prefix_conv2d
from .registrations import output_memory_format
from .stock import OURS, float32_training_path

_INPUT_GRAD = torch.ops.rnp.prefix_conv2d_input_grad.default
_PREFIX_WEIGHT_GRAD = torch.ops.rnp.prefix_conv2d_weight_grad.default
_WEIGHT_GRAD = torch.ops.rnp.conv2d_weight_grad.default
_NOTHING_OURS = (False, False)


class _Conv2d(torch.autograd.Function):
    """torch.conv2d in bfloat16 whose gradients, of the input and of the weight, are ours where `ours` says so.

    A weight in float32 is cast here, as autocast would do, and its gradient is not: it stays what was summed. A
    function of its own, not the operator's autograd: that costs 0.3 to 0.4 ms a step in Python.
    """

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None, stride: tuple[int, int],
        padding: tuple[int, int, int, int], dilation: tuple[int, int], groups: int, ours: tuple[bool, bool],
    ) -> Tensor:  # fmt: skip
        cast = weight.to(input.dtype)
        ctx.save_for_backward(input, cast)
        # As under autocast, which keeps the cast weight alone, an optimizer may step before the backward pass.
        ctx.weight, ctx.version = weight, weight._version
        ctx.geometry, ctx.ours = (stride, padding, dilation, groups), ours
        ctx.bias_sizes = None if bias is None else bias.shape
        output = torch.conv2d(input, cast, bias, stride, padding[::2], dilation, groups)
        ctx.memory_format = torch._prims_common.suggest_memory_format(output)
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        input, cast = ctx.saved_tensors
        weight = ctx.weight
        stride, padding, dilation, groups = ctx.geometry
        again = torch.is_grad_enabled()  # somebody differentiates again: through operators that have gradients
        if again and cast is not weight:
            if weight._version != ctx.version:
                raise RuntimeError(
                    "conv2d: the weight must not change in place before its gradient is differentiated again; it is at "
                    f"version {weight._version}, expected {ctx.version}"
                )
            cast = weight.to(input.dtype)
        grad = grad.contiguous(memory_format=ctx.memory_format)  # expanded or in another layout, it is slow to read
        needs = ctx.needs_input_grad[:3]
        # oneDNN's gradient of the bias comes out of the weight's, which it would compute as well.
        ours = (needs[0] and ctx.ours[0], needs[1] and ctx.ours[1], needs[2] and ctx.ours[1])
        theirs = [need and not own for need, own in zip(needs, ours, strict=True)]
        grads: list[Tensor | None] = [None] * 8
        if any(theirs):
            grads[:3] = torch.ops.aten.convolution_backward(
                grad, input, cast, ctx.bias_sizes, stride, padding[::2], dilation, False, (0, 0), groups, theirs
            )
        if ours[2]:
            grads[2] = grad.sum((0, 2, 3))
        if again:
            if ours[0]:
                grads[0] = _INPUT_GRAD(grad, cast, input.shape, *ctx.geometry, None, None)
            if ours[1]:
                grads[1] = _PREFIX_WEIGHT_GRAD(grad, input, weight.shape, *ctx.geometry, None, None)
        elif any(ours):
            with torch._C._AutoDispatchBelowAutograd():
                if ours[0]:
                    grads[0] = _INPUT_GRAD(grad, cast, input.shape, *ctx.geometry, None, None)
                if ours[1]:
                    grads[1] = _WEIGHT_GRAD(grad, input, weight, *ctx.geometry)
        return tuple(grads)


def _dtype(*tensors: Tensor | None) -> torch.dtype | None:
    """The dtype that torch.conv2d would compute in; None where the tensors differ, or autocast would not cast them."""
    dtypes = {t.dtype for t in tensors if t is not None}
    if torch.is_autocast_enabled("cpu") and torch.float64 not in dtypes and all(d.is_floating_point for d in dtypes):
        return torch.get_autocast_dtype("cpu")
    return dtypes.pop() if len(dtypes) == 1 else None


def our_gradients(
    input: Tensor, weight: Tensor, stride: Any, padding: Any, dilation: Any, groups: int
) -> tuple[bool, bool]:
    """Which of the gradients in bfloat16, of the input and of the weight, are faster by our kernels."""
    if padding[0] != padding[1] or padding[2] != padding[3] or 0 in input.shape:
        return _NOTHING_OURS
    last = output_memory_format(input, weight) is torch.channels_last
    return _rule(_C.isa(), input.shape, weight.shape, stride, padding, dilation, groups, last)


@functools.lru_cache(1024)
def _rule(_isa: str, *layer: Any) -> tuple[bool, bool]:
    return _C.our_gradients(*layer)


@functools.lru_cache(1024)
def _right(*layer: Any) -> bool:
    return _C.onednn_grads_are_right(*layer, "bfloat16")


def _bfloat16(
    input: Tensor, weight: Tensor, stride: int | Sequence[int], padding: int | Sequence[int] | str,
    dilation: int | Sequence[int], groups: int,
) -> Callable[[Tensor, Tensor, Tensor | None], Tensor] | None:  # fmt: skip
    """torch.conv2d of tensors like these, with the gradients that are faster by our kernels; None where none is.

    Where oneDNN would leave parts of the output unwritten or compute a wrong gradient, `prefix_conv2d`.
    """
    strides, dilations = pair(stride, "stride"), pair(dilation, "dilation")
    paddings = four_paddings(padding, tuple(weight.shape[2:]), strides, dilations)
    if not _right(tuple(input.shape[1:]), tuple(weight.shape), strides, paddings, dilations, groups):
        return lambda input, weight, bias: prefix_conv2d(input, weight, bias, strides, paddings, dilations, groups)
    ours = our_gradients(input, weight, strides, paddings, dilations, groups)
    if not any(ours):
        return None

    def conv2d(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if bias is not None:
            bias = bias.to(torch.bfloat16)
        return _Conv2d.apply(input.to(torch.bfloat16), weight, bias, strides, paddings, dilations, groups, ours)

    return conv2d


def _out_of_sight(input: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether a call on the CPU may go around the operator: nobody traces, compiles or transforms it, and no tensor is
    of a class that looks at operators."""
    return not (
        torch.compiler.is_compiling()
        or not all_plain(input, weight, bias)
        or not input.is_cpu
        or input.dim() != 4
        or 0 in input.shape
        or backends.get_backend() not in ("auto", "cpu")
        or torch._C._len_torch_dispatch_stack()
        or torch._C._is_tracing()
        or torch._C._functorch.peek_interpreter_stack() is not None
    )


def module_call(
    input: Tensor, weight: Tensor, bias: Tensor | None, stride: Any, padding: Any, dilation: Any, groups: int
) -> StockCall | None:
    """For a call of a module with these arguments, to be differentiated; None where the operator should see it."""
    if _dtype(input, weight, bias) is not torch.bfloat16 or not _out_of_sight(input, weight, bias):
        return None
    function = _bfloat16(input, weight, stride, padding, dilation, groups)
    if function is None:
        if not stock.native_bfloat16:
            return None
        # Without a detour: the operator's gradients would be torch's. oneDNN, whatever the batch.
        return StockCall(input, weight, bias, torch.conv2d, (stride, padding, dilation, groups), WITH_GRADIENTS)
    return StockCall(input, weight, bias, function, (), WITH_GRADIENTS)


def conv2d(
    input: Tensor, weight: Tensor, bias: Tensor | None = None, stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0, dilation: int | Sequence[int] = 1, groups: int = 1,
) -> Tensor:  # fmt: skip
    """`torch.nn.functional.conv2d` with its arguments, by the fastest way to the output and the gradients together.

    On a CPU in float32 that is `prefix_conv2d` or torch's; in bfloat16, of the tensors or under autocast, torch's with
    gradients of ours. Anything else (no gradient needed, other devices and dtypes, no batch, a graph being traced or
    compiled, whose shapes may move on, a backend chosen by name) is torch's call.
    """
    arguments = (input, weight, bias, stride, padding, dilation, groups)
    output = None
    if _out_of_sight(input, weight, bias) and needs_autograd(input, weight, bias):
        dtype = _dtype(input, weight, bias)
        if dtype is torch.bfloat16:
            function = _bfloat16(input, weight, stride, padding, dilation, groups)
            output = None if function is None else function(input, weight, bias)
        elif dtype is torch.float32 and not torch.is_autocast_enabled("cpu"):
            strides, dilations = pair(stride, "stride"), pair(dilation, "dilation")
            paddings = four_paddings(padding, tuple(weight.shape[2:]), strides, dilations)
            if float32_training_path(input, weight, strides, paddings, dilations, groups) == OURS:
                output = prefix_conv2d(*arguments)
    return F.conv2d(*arguments) if output is None else output
