"""The shortest way through a `PrefixConv2d` in eager mode: what was checked for an input shape is not checked again.

A module keeps one call for each of the last input shapes it saw. It holds what every rule depends on, compares that
with what it is given, and answers None where anything differs: then the module goes the long way, which checks
everything and prepares the next call.

A `LayerCall` runs our kernel on the tensors' addresses, without a dispatcher, whose boxing costs more than a small
layer; so nothing may be in force that must see operators (tracing, transforms, autocast, a profiler, gradients). An
output of 256 KB to 32 MB lies on memory kept from call to call (csrc/cpu/output_pool.h), and `resize_` cannot enlarge
it. A `StockCall` calls torch's own convolution, where the rule names that: all of them see it, and little is left to
compare; or, for a step of training in bfloat16, what rnp_kernels/training.py puts around it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from . import _C, backends, stock
from .packing import PackCache, PackedWeight, identity_of

# Setting one of them makes a module forget its calls.
SETTINGS = frozenset(("stride", "padding", "dilation", "groups", "padding_mode"))
_DONE = 0  # of _C.LayerCall

# Bound here, since a look-up through modules costs as much as some of them.
_dispatch_modes = torch._C._len_torch_dispatch_stack
_function_modes = torch._C._is_torch_function_mode_enabled
_is_tracing = torch._C._is_tracing
_transform = torch._C._functorch.peek_interpreter_stack
_profiling = torch.autograd._profiler_enabled
_is_autocast_enabled = torch.is_autocast_enabled
_autocast_dtype = torch.get_autocast_dtype
_is_grad_enabled = torch.is_grad_enabled
_float32 = torch.float32
_from_dlpack = torch.utils.dlpack.from_dlpack


_algorithm = _C.algorithm


def _metadata(tensor: Tensor | None) -> tuple[Any, ...] | None:
    if tensor is None:
        return None
    return (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride(), tensor.is_neg())


def _requires_grad(input: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    return weight.requires_grad or input.requires_grad or (bias is not None and bias.requires_grad)


ANY_MODE, WITHOUT_GRADIENTS, WITH_GRADIENTS = range(3)


class StockCall:
    """One module's call at one input shape that torch's own convolution answers, or one around it; immutable."""

    __slots__ = (
        "_algorithm", "_arguments", "_autocast", "_bias", "_bias_dtype", "_bias_shape", "_dtype", "_function",
        "_input_strides", "_mode", "_weight", "_weight_dtype", "_weight_strides", "_with_gradients",
    )  # fmt: skip

    def __init__(
        self, input: Tensor, weight: Tensor, bias: Tensor | None, function: Callable[..., Tensor],
        arguments: tuple[Any, ...], mode: int, algorithm: str | None = None, with_gradients: StockCall | None = None,
    ) -> None:  # fmt: skip
        """For calls with tensors like these, under autocast if it is in force now, then in bfloat16.

        `mode` says which calls it answers; `with_gradients` answers those that need gradients in its place. `algorithm`
        must be in force; None: any will do.
        """
        self._weight, self._bias, self._weight_strides = weight, bias, weight.stride()
        self._input_strides, self._algorithm = input.stride(), algorithm
        self._dtype, self._weight_dtype = input.dtype, weight.dtype
        self._bias_dtype, self._bias_shape = (None, None) if bias is None else (bias.dtype, bias.shape)
        self._autocast = _is_autocast_enabled("cpu")
        self._mode, self._with_gradients = mode, with_gradients
        self._function, self._arguments = function, arguments

    def __call__(
        self, state: dict[str, Any], input: Tensor, in_prefix: Tensor | None, out_prefix: Tensor | None
    ) -> Tensor | None:
        """The output, or None where the long way must be gone; `state` is the module's __dict__."""
        weight, bias = self._weight, self._bias
        parameters = state["_parameters"]
        if (
            in_prefix is not None
            or out_prefix is not None
            or parameters.get("weight") is not weight
            or parameters.get("bias", self) is not bias
            or input.stride() != self._input_strides
            or weight.stride() != self._weight_strides
            or input.dtype is not self._dtype
            or weight.dtype is not self._weight_dtype
            or (bias is not None and (bias.dtype is not self._bias_dtype or bias.shape != self._bias_shape))
            or not input.is_cpu
            or (backends._current != "auto" and backends._current != "cpu")
            or _is_autocast_enabled("cpu") is not self._autocast
            or (self._autocast and _autocast_dtype("cpu") is not torch.bfloat16)
            or (self._algorithm is not None and _algorithm() != self._algorithm)
        ):
            return None
        if self._mode != ANY_MODE:
            if _is_grad_enabled() and _requires_grad(input, weight, bias):
                if self._mode == WITHOUT_GRADIENTS:
                    other = self._with_gradients
                    return None if other is None else other(state, input, in_prefix, out_prefix)
            elif self._mode == WITH_GRADIENTS:
                return None
            if _dispatch_modes() or _is_tracing() or _transform() is not None or forward_ad._current_level >= 0:
                return None  # somebody must see the operator itself
        return self._function(input, weight, bias, *self._arguments)

    def run(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The output for tensors that are known to be like those."""
        return self._function(input, weight, bias, *self._arguments)


class LayerCall:
    """One module's call at one input shape that our kernel answers; immutable, so that threads may share it."""

    __slots__ = (
        "_addresses", "_bias", "_bias_metadata", "_held", "_identity", "_input_strides", "_kernel", "_output_size",
        "_output_strides", "_pooled", "_weight", "_with_gradients",
    )  # fmt: skip

    def __init__(
        self, module: nn.Conv2d, input: Tensor, weight: Tensor, bias: Tensor | None, route: stock.Route,
        held: tuple[PackedWeight | None, PackedWeight | None], output: Tensor, with_gradients: StockCall | None,
    ) -> None:  # fmt: skip
        """For a call with these arguments, which gave `output`.

        `held` are the pack and the transform, and with them the storage they were made of: as long as the call is kept,
        no other weight can have its address.
        """
        self._weight, self._bias = weight, bias
        self._identity, self._bias_metadata = identity_of(weight), _metadata(bias)
        self._input_strides = input.stride()
        self._output_size, self._output_strides = output.shape, output.stride()
        self._held = held
        # What the identities vouch for; of the weight, the bias, the pack and the transform.
        packs = (None if pack is None else pack.data for pack in held)
        self._addresses = tuple(0 if t is None else t.data_ptr() for t in (weight, bias, *packs))
        self._kernel = _C.LayerCall(
            tuple(input.shape), tuple(weight.shape), route.stride, route.padding, route.dilation, module.groups,
            input.stride(), weight.stride(), output.stride(), route.tile,
        )  # fmt: skip
        self._pooled = self._kernel.pools_output
        self._with_gradients = with_gradients

    def __call__(
        self, state: dict[str, Any], input: Tensor, in_prefix: Tensor | None, out_prefix: Tensor | None
    ) -> Tensor | None:
        """The output, or None where the long way must be gone; `state` is the module's __dict__."""
        weight, bias = self._weight, self._bias
        if _is_grad_enabled() and _requires_grad(input, weight, bias):
            other = self._with_gradients
            return None if other is None else other(state, input, in_prefix, out_prefix)
        parameters = state["_parameters"]
        if (
            parameters.get("weight") is not weight
            or parameters.get("bias", self) is not bias
            or backends._current not in ("auto", "cpu")
            or not input.is_cpu
            or input.dtype is not _float32
            or input.stride() != self._input_strides
            or input.is_neg()
            or _dispatch_modes()
            or _function_modes()
            or _is_tracing()
            or _transform() is not None
            or _profiling()
            or forward_ad._current_level >= 0
            or _is_autocast_enabled("cpu")
            or identity_of(weight) != self._identity
            or (bias is not None and _metadata(bias) != self._bias_metadata)
        ):
            return None
        address = input.data_ptr()
        if not address:
            return None  # zeros without memory
        narrow_in = narrow_out = 0
        if in_prefix is not None:
            narrow_in = self._address_of_prefix(in_prefix, input)
            if not narrow_in:
                return None
        if out_prefix is not None:
            narrow_out = self._address_of_prefix(out_prefix, input)
            if not narrow_out:
                return None
        if self._pooled:
            output = _from_dlpack(self._kernel.new_output())
        else:
            output = input.new_empty_strided(self._output_size, self._output_strides)
        done = self._kernel(address, output.data_ptr(), narrow_in, narrow_out, *self._addresses)
        return output if done == _DONE else None

    def _address_of_prefix(self, prefix: Tensor, input: Tensor) -> int:
        """0 where the kernel cannot take it from here."""
        if (
            self._held[0] is None  # a narrower sample may need the pack
            or type(prefix) is not Tensor
            or prefix.dtype is not torch.int32
            or not prefix.is_cpu
            or prefix.shape != input.shape[:1]
            or not prefix.is_contiguous()
        ):
            return 0
        return prefix.data_ptr()


def may_keep(module: nn.Conv2d, input: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether a later call can tell that nothing has changed."""
    if type(input) is not Tensor or type(weight) is not nn.Parameter or type(bias) not in (nn.Parameter, type(None)):
        return False
    if not all(isinstance(module.__dict__[name], (int, str, tuple)) for name in SETTINGS):
        return False  # a list could be edited in place
    return module.padding_mode == "zeros" and not backends.LOG and 0 not in input.shape


def prepare(
    module: nn.Conv2d, input: Tensor, weight: Tensor, bias: Tensor | None, route: stock.Route, cache: PackCache,
    output: Tensor,
) -> LayerCall | StockCall | None:  # fmt: skip
    """For a call with these arguments, which gave `output`; None where the long way has to be gone each time."""
    if not may_keep(module, input, weight, bias) or type(output) is not Tensor or input.dtype is not _float32:
        return None
    if weight.is_neg() or not (bias is None or (bias.dtype is _float32 and bias.is_contiguous() and not bias.is_neg())):
        return None
    if not weight.data_ptr() or not (bias is None or bias.data_ptr()):
        return None  # zeros without memory
    held = pack, transformed = cache.kept(weight, module.groups, route.tile)
    winograd_can = _C.winograd_can(tuple(weight.shape), route.stride, route.dilation, module.groups)
    algorithm = _algorithm() if winograd_can else None
    # torch.conv2d is right in every mode, with gradients or without; what is below it only in some.
    mode = ANY_MODE if route.path == route.training == stock.CONV2D and not route.tile else WITH_GRADIENTS
    trained = None
    if route.training != stock.OURS:
        trained = StockCall(
            input, weight, bias, *stock.stock_function(route, route.training, module.groups), mode, algorithm
        )
    if transformed is not None or (route.path == stock.OURS and pack is not None and not route.tile):
        return LayerCall(module, input, weight, bias, route, held, output, trained)
    if mode == ANY_MODE or route.path == stock.OURS or route.tile:
        return trained
    function = stock.stock_function(route, route.path, module.groups)
    return StockCall(input, weight, bias, *function, WITHOUT_GRADIENTS, algorithm, trained)
