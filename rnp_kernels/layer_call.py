"""The shortest way through a `PrefixConv2d` in eager mode: what was checked for an input shape is not checked again.

A module keeps one `LayerCall` for each of the last input shapes it saw. It holds what every rule depends on, and a call
compares: the same tensors with the same metadata, nothing in force that must see operators (tracing, transforms,
autocast, a profiler, gradients). Then the kernel runs on the tensors' addresses, without a
dispatcher, whose boxing costs more than a small layer; or torch's own convolution is called at once. Where anything
differs it answers None, and the module goes the long way, which checks everything and prepares the next call.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from . import _C, algorithms, backends, stock
from .packing import PackCache, identity_of

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
_is_grad_enabled = torch.is_grad_enabled


def _metadata(tensor: Tensor | None) -> tuple[Any, ...] | None:
    return None if tensor is None else (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())


class LayerCall:
    """One module's call at one input shape; immutable, so that threads may share it."""

    __slots__ = (
        "_addresses", "_algorithm", "_arguments", "_bias", "_bias_metadata", "_held", "_identity", "_input_strides",
        "_kernel", "_output_size", "_output_strides", "_path", "_weight", "_weight_strides",
    )  # fmt: skip

    def __init__(
        self, module: nn.Conv2d, input: Tensor, weight: Tensor, bias: Tensor | None, route: stock.Route,
        cache: PackCache, output: Tensor,
    ) -> None:  # fmt: skip
        """For a call with these arguments, which gave `output`."""
        self._weight, self._bias, self._weight_strides = weight, bias, weight.stride()
        self._identity, self._bias_metadata = identity_of(weight), _metadata(bias)
        self._algorithm = algorithms.get_algorithm()
        self._input_strides = input.stride()
        self._output_size, self._output_strides = output.shape, output.stride()
        self._path = route.path
        self._arguments = (route.stride, route.padding[::2], route.dilation, module.groups)
        self._held = pack, transformed = cache.kept(weight, module.groups, route.tile)
        # What the identities vouch for; of the weight, the bias, the pack and the transform.
        self._addresses = tuple(0 if t is None else t.data_ptr() for t in (weight, bias, pack, transformed))
        self._kernel = None
        if transformed is not None or (route.path == stock.OURS and pack is not None and not route.tile):
            self._kernel = _C.LayerCall(
                tuple(input.shape), tuple(weight.shape), route.stride, route.padding, route.dilation, module.groups,
                input.stride(), weight.stride(), output.stride(), route.tile,
            )  # fmt: skip

    @classmethod
    def prepare(
        cls, module: nn.Conv2d, input: Tensor, weight: Tensor, bias: Tensor | None, route: stock.Route,
        cache: PackCache, output: Tensor,
    ) -> LayerCall | None:  # fmt: skip
        """None where the long way has to be gone each time."""
        if type(input) is not Tensor or type(weight) is not nn.Parameter or type(output) is not Tensor:
            return None
        if bias is not None and type(bias) is not nn.Parameter:
            return None
        if not all(isinstance(module.__dict__[name], (int, str, tuple)) for name in SETTINGS):
            return None  # a list could be edited in place
        if module.padding_mode != "zeros" or input.dtype is not torch.float32 or backends.LOG or 0 in input.shape:
            return None
        if weight.is_neg() or not (bias is None or (bias.dtype is torch.float32 and bias.is_contiguous())):
            return None
        call = cls(module, input, weight, bias, route, cache, output)
        return call if call._kernel is not None or route.path != stock.OURS else None

    def __call__(
        self, state: dict[str, Any], input: Tensor, in_prefix: Tensor | None, out_prefix: Tensor | None
    ) -> Tensor | None:
        """The output, or None where the long way must be gone; `state` is the module's __dict__."""
        weight, bias = self._weight, self._bias
        parameters = state["_parameters"]
        if (
            parameters.get("weight") is not weight
            or parameters.get("bias", self) is not bias
            or backends._current not in ("auto", "cpu")
            or not input.is_cpu
            or input.dtype is not torch.float32
            or input.stride() != self._input_strides
            or input.is_neg()
            or _dispatch_modes()
            or _function_modes()
            or _is_tracing()
            or _transform() is not None
            or _profiling()
            or forward_ad._current_level >= 0
            or _is_autocast_enabled("cpu")
        ):
            return None
        gradients = _is_grad_enabled() and (
            weight.requires_grad or input.requires_grad or (bias is not None and bias.requires_grad)
        )
        kernel = self._kernel
        if kernel is None or gradients:
            if (
                in_prefix is not None
                or out_prefix is not None
                or (gradients and self._path != stock.CONV2D)
                or weight.stride() != self._weight_strides
                or weight.dtype is not torch.float32
                or (kernel is None and algorithms.get_algorithm() != self._algorithm)
            ):
                return None
            return self._stock(input, weight, bias)
        if identity_of(weight) != self._identity or (bias is not None and _metadata(bias) != self._bias_metadata):
            return None
        narrow_in = narrow_out = 0
        if in_prefix is not None:
            narrow_in = self._address_of_prefix(in_prefix, input)
            if not narrow_in:
                return None
        if out_prefix is not None:
            narrow_out = self._address_of_prefix(out_prefix, input)
            if not narrow_out:
                return None
        output = input.new_empty_strided(self._output_size, self._output_strides)
        done = kernel(input.data_ptr(), output.data_ptr(), narrow_in, narrow_out, *self._addresses)
        return output if done == _DONE else None

    def _stock(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
        """Torch's own convolution, which checks the tensors itself."""
        stride, padding, dilation, groups = self._arguments
        if self._path == stock.CONV2D:
            return torch.conv2d(input, weight, bias, stride, padding, dilation, groups)
        if self._path == stock.ONEDNN:
            return torch.mkldnn_convolution(input, weight, bias, padding, stride, dilation, groups)
        if self._path == stock.GEMM:
            return torch._C._nn.thnn_conv2d(input, weight, weight.shape[2:], bias, stride, padding)
        return None

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
