"""`PrefixConv2d`, a drop-in for `torch.nn.Conv2d`, and `replace_conv2d`."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import has_torch_function, has_torch_function_unary

from . import backends, stock, training, transforms
from .algorithms import get_algorithm
from .checks import DTYPES
from .errors import message
from .layer_call import SETTINGS, may_keep
from .layer_call import prepare as prepare_call
from .ops import all_plain, needs_autograd, prefix_conv2d, run_below_autograd
from .packing import PackCache

_CACHES = ("_packs", "_routes", "_calls")
_LEFT_OUT = (*_CACHES, "_compiled_call_impl")  # the last belongs to the module that was compiled
_FORWARDS = ("forward", "_conv_forward")  # what an instance may have of its own, to convolve in another way
_COMPUTED = object()
_MOST_ROUTES = 64  # kept by a module that sees many input shapes
_is_compiling = torch.compiler.is_compiling
_HOOKS = tuple(name for name in vars(nn.Module()) if "_hooks" in name)


class _Cache(dict):
    """What a module keeps for its next calls. A copy, pickled or deep, is empty: it would belong to the copied module.

    `__getstate__` leaves the caches out already, but a parametrized module copies its whole __dict__.
    """

    def __reduce__(self) -> tuple[type[_Cache], tuple[()]]:
        return (_Cache, ())


class PrefixConv2d(nn.Conv2d):
    """An `nn.Conv2d` whose `forward` also takes the live input and output channels of each sample.

    Constructor, parameters, `state_dict`, repr, pickling, deepcopy and padding modes are those of `nn.Conv2d`, and
    without prefixes so is the result, to rounding. On a CPU the weights are packed for the kernels at the second call
    that sees them unchanged. Where Winograd is the faster algorithm and no gradient is needed
    (`rnp_kernels.set_algorithm`), they are transformed for it at the first call: calls without gradients give the same
    bits. Calls with gradients transform 3x3 weights for maps of 400 positions or more, and keep nothing; others of full
    width go to torch's own convolution where a step of training is faster that way (csrc/core/stock.cpp), and then have
    its bits; in bfloat16 either gradient may be ours there too (rnp_kernels/training.py). The pack takes about as much
    memory as the weights, the transform 4 or 16/9 times as much. Both are never saved or copied, and are made again
    when the weights change: in place, by assignment, by conversion. A write through `weight.data` that spares all the
    elements which the operator compares (one in each filter) is not seen: write under `torch.no_grad()` instead, or
    call `forget_packed_weight()` after it.

    The CUDA backend keeps a pack likewise, for the stream that made it; a CUDA graph under capture packs inside the
    graph. It cannot compare elements without waiting for the device: no write through `weight.data` in place is seen.
    """

    @classmethod
    def from_conv2d(cls, conv: nn.Conv2d) -> PrefixConv2d:
        """A PrefixConv2d with the parameters, settings, hooks and mode of `conv`; parameters are shared, not copied.

        Raises TypeError for anything but a plain `nn.Conv2d` (or a PrefixConv2d), since the forward of a subclass may
        mean something else; likewise where the module has a forward of its own, or parameters of a tensor class with a
        `__torch_function__` of its own. Raises ValueError for a dtype that prefix_conv2d does not have. What
        `conv.compile()` made stays with `conv`: compile the new module, or the model around it, afterwards.
        """
        reason = _why_not(conv)
        if reason is not None:
            raise reason
        new = _adopt(cls, conv)
        for name in _HOOKS:
            new.__dict__[name] = conv.__dict__[name].copy()
        return new

    def forward(self, input: Tensor, in_prefix: Tensor | None = None, out_prefix: Tensor | None = None) -> Tensor:
        """input (N, C_in, H, W) or (C_in, H, W); prefixes int32 (N,) or None for full width. See `prefix_conv2d`."""
        if not _is_compiling() and type(input) is Tensor:
            state = self.__dict__
            calls = state.get("_calls")
            if calls is not None:
                call = calls.get(input.shape)
                if call is not None:
                    output = call(state, input, in_prefix, out_prefix)
                    if output is not None:
                        return output
        return self._checked_forward(input, in_prefix, out_prefix)

    def _checked_forward(self, input: Tensor, in_prefix: Tensor | None, out_prefix: Tensor | None) -> Tensor:
        """The long way: every rule is looked at."""
        if not isinstance(input, Tensor) and not has_torch_function_unary(input):
            raise TypeError(message(type(self).__name__, "input must be a tensor", type(input).__name__))
        parameters = self._parameters
        weight = parameters.get("weight")
        if weight is None:
            weight = self.weight  # computed by a parametrization or a hook
        bias = parameters.get("bias", _COMPUTED)
        if bias is _COMPUTED:
            bias = self.bias
        padding: Any = self.padding
        if self.padding_mode != "zeros":
            input = F.pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode)
            padding = 0
        # A traced or compiled graph would keep the route or the pack as a constant while shapes and weights move on;
        # torch.fx brings a Proxy. What transforms of torch.func wrap must reach the function that knows of them, and
        # tensors of other classes (fake ones, outside of their mode) the operator that they know.
        if (
            torch.compiler.is_compiling()
            or transforms.in_force()
            or torch._C._len_torch_dispatch_stack()
            or torch._C._is_tracing()
            or not all_plain(input, weight, bias)
            or input.layout is not torch.strided  # the operator says so
        ):
            packed = None
        elif not input.is_cpu:
            packed = self._pack_cache().get(weight, self.groups) if backends.resolve(input) == "cuda" else None
        elif backends.get_backend() not in ("auto", "cpu"):
            packed = self._pack_cache().get(weight, self.groups)
        elif input.dim() == 3 and weight.dim() == 4 and input.shape[0] == weight.shape[1] * self.groups:
            return self._run(input.unsqueeze(0), weight, bias, padding, in_prefix, out_prefix).squeeze(0)
        else:
            return self._run(input, weight, bias, padding, in_prefix, out_prefix)
        return prefix_conv2d(
            input, weight, bias, self.stride, padding, self.dilation, self.groups, in_prefix=in_prefix,
            out_prefix=out_prefix, packed=packed,
        )  # fmt: skip

    def _run(
        self, input: Tensor, weight: Tensor, bias: Tensor | None, padding: Any, in_prefix: Tensor | None,
        out_prefix: Tensor | None,
    ) -> Tensor:  # fmt: skip
        """An eager call on the CPU, with what this module keeps for it."""
        if in_prefix is None and out_prefix is None and needs_autograd(input, weight, bias):
            call = training.module_call(input, weight, bias, self.stride, padding, self.dilation, self.groups)
            if call is not None:
                self._keep_call(input, call if may_keep(self, input, weight, bias) else None)
                return call.run(input, weight, bias)
        route, winograd = self._route(input, weight, bias, padding), None
        if route is not None and torch.is_autocast_enabled("cpu"):
            route = None
        if route is not None and route.tile and not needs_autograd(input, weight, bias):
            winograd = self._pack_cache().transformed(weight, route.tile)
        output = None
        if in_prefix is None and out_prefix is None and route is not None:
            output = self._run_full_width(input, weight, bias, route, winograd)
        if output is None:
            output = prefix_conv2d(
                input, weight, bias, self.stride, padding, self.dilation, self.groups, in_prefix=in_prefix,
                out_prefix=out_prefix, packed=self._pack_cache().get(weight, self.groups), winograd=winograd,
            )  # fmt: skip
        if route is not None:
            self._keep_call(input, prepare_call(self, input, weight, bias, route, self._pack_cache(), output))
        return output

    def _keep_call(self, input: Tensor, call: Any) -> None:
        """For inputs of this shape; None: nothing can be kept."""
        calls = self.__dict__.setdefault("_calls", _Cache())
        cache = self.__dict__.get("_packs")
        if cache is not None and cache.dropped:
            cache.dropped = False
            calls.clear()  # they hold what was dropped, and the old weights
        if call is None:
            calls.pop(input.shape, None)
            return
        if len(calls) >= _MOST_ROUTES:
            calls.clear()
        calls[input.shape] = call.__call__  # bound: Python calls a method without a detour through C

    def _route(self, input: Tensor, weight: Tensor, bias: Tensor | None, padding: Any) -> stock.Route | None:
        state = self.__dict__
        routes = state.get("_routes")
        if routes is None:
            routes = state["_routes"] = _Cache()
        key = (input.shape, input.stride(), input.dtype, weight.shape, weight.stride(), weight.dtype,
               None if bias is None else (bias.shape, bias.dtype), padding, state["stride"], state["dilation"],
               state["groups"], get_algorithm())  # fmt: skip
        route = routes.get(key)
        if route is None:
            if len(routes) >= _MOST_ROUTES:
                routes.clear()
            route = routes[key] = stock.route(self, input, weight, bias, padding)
        return route

    def _run_full_width(
        self, input: Tensor, weight: Tensor, bias: Tensor | None, route: stock.Route, winograd: Tensor | None
    ) -> Tensor | None:
        """The shortest way to the operator's own result where every sample has full width; None where there is none."""
        groups, packed = self.__dict__["groups"], None
        path, training, stride, paddings, dilation, *_ = route
        if winograd is None:  # else no sample is computed directly
            if route.transforms or not path == training == stock.CONV2D:  # else one and the same with gradients
                if needs_autograd(input, weight, bias):
                    path = training
                    if path == stock.OURS:
                        return None
                elif route.transforms:
                    return None
            if path != stock.OURS:
                function, arguments = stock.stock_function(route, path, groups)
                return function(input, weight, bias, *arguments)
            packed = self._pack_cache().get(weight, groups)
        try:
            return run_below_autograd(
                input, weight, bias, stride, paddings, dilation, groups, None, None, None, None, None, "none", "zero",
                False, packed, winograd,
            )[0]  # fmt: skip
        except RuntimeError:
            return None  # prefix_conv2d refuses it too, in the words and with the exception that callers expect

    def packed_weight(self) -> Tensor | None:
        """The packed weights for `prefix_conv2d(packed=...)`, made now if need be; None where nothing can be packed."""
        return self._pack_cache().get(self.weight, self.groups, now=True)

    def forget_packed_weight(self) -> None:
        """Drop the packed and the transformed weights; the next calls make them anew."""
        for name in ("_packs", "_calls"):
            self.__dict__.pop(name, None)

    def forget_transformed_weight(self) -> None:
        """Drop the weights transformed for Winograd; the next call that needs them makes them anew."""
        self.__dict__.pop("_calls", None)
        cache = self.__dict__.get("_packs")
        if cache is not None:
            cache.forget_transformed()

    def _pack_cache(self) -> PackCache:
        cache = self.__dict__.get("_packs")
        if cache is None:
            cache = self.__dict__["_packs"] = PackCache()
        return cache

    def __setattr__(self, name: str, value: Any) -> None:
        if name in SETTINGS:
            self.__dict__.pop("_calls", None)
        super().__setattr__(name, value)

    def _apply(self, fn: Any, recurse: bool = True) -> PrefixConv2d:
        self.forget_packed_weight()
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()  # without what compile() made
        return {name: value for name, value in state.items() if name not in _CACHES}


def _why_not(conv: nn.Module) -> Exception | None:
    """Why `conv` cannot become a PrefixConv2d, or None where it can."""
    if type(conv) is not nn.Conv2d and not isinstance(conv, PrefixConv2d):
        return TypeError(f"PrefixConv2d.from_conv2d: the module must be a plain nn.Conv2d, got {type(conv).__name__}")
    for name in _FORWARDS:
        if name in conv.__dict__:
            return TypeError(f"PrefixConv2d.from_conv2d: the module must have no {name} of its own, got one")
    weight, bias = conv.weight, conv.bias
    if has_torch_function((weight, bias)):
        rule = "the parameters' class must have no __torch_function__ of its own"
        names = [type(t).__name__ for t in (weight, bias) if t is not None]
        return TypeError(f"PrefixConv2d.from_conv2d: {rule}, got {' and '.join(names)}")
    dtype = weight.dtype
    if dtype not in DTYPES:
        return ValueError(f"PrefixConv2d.from_conv2d: the dtype must be one of {DTYPES}, got {dtype}")
    return None


def _adopt(cls: type[PrefixConv2d], conv: nn.Conv2d) -> PrefixConv2d:
    """A new module with everything that `conv` holds: the same parameters and the same hooks' registries."""
    new = cls.__new__(cls)
    state = {name: value for name, value in conv.__dict__.items() if name not in _LEFT_OUT}
    for registry in ("_parameters", "_buffers", "_modules"):
        state[registry] = state[registry].copy()
    new.__dict__.update(state)
    return new


def replace_conv2d(model: nn.Module) -> nn.Module:
    """Swap every `nn.Conv2d` of `model` for a PrefixConv2d, in place, and return the model.

    A convolution that stands at several places is swapped once and stays shared. Its parameters stay the same objects
    (an optimizer need not know), and so do its hooks, whose handles still remove them. Only modules whose class is
    exactly `nn.Conv2d`, with a dtype that prefix_conv2d has, are swapped: the forward of a subclass (lazy, quantised,
    parametrized) may mean something else, so it stays as it is. So does one with a `forward` of its own (a wrapper that
    was put around it) or with parameters whose class has a `__torch_function__` of its own. What `compile()` made of a
    single convolution is left behind: compile after the swap. A model that is itself an `nn.Conv2d` cannot be swapped
    in place; its PrefixConv2d is returned.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"replace_conv2d: the model must be an nn.Module, got {type(model).__name__}")
    swapped: dict[nn.Module, PrefixConv2d] = {}

    def swap(module: nn.Module) -> nn.Module:
        if type(module) is not nn.Conv2d or _why_not(module) is not None:
            return module
        if module not in swapped:
            swapped[module] = _adopt(PrefixConv2d, module)
        return swapped[module]

    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child is not None:
                parent._modules[name] = swap(child)
    return swap(model)
