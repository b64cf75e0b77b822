"""What of torch.func and forward-mode autograd is in force around a call.

The operator has reverse-mode gradients alone. Under `torch.func.grad`, `vjp`, `jvp` and what is made of them, and where
a tensor carries a tangent, the functions in front of it run the specification, plain torch, which every transform can
differentiate. Under `torch.vmap` alone the operator runs, once for each slice.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

_functorch = torch._C._functorch
_DIFFERENTIATING = (_functorch.TransformType.Grad, _functorch.TransformType.Jvp)

# None outside of every transform. Not to be asked in a function that torch.compile traces: there it is never None.
innermost = _functorch.peek_interpreter_stack


def differentiating() -> bool:
    """Whether a transform in force, however far out, differentiates."""
    return any(layer.key() in _DIFFERENTIATING for layer in _functorch.get_interpreter_stack() or ())


# Evaluated while tracing, when the transforms inside of a compiled function are in force. Set by hand, for
# torch.compiler.assume_constant_result would import the compiler.
differentiating._dynamo_marked_constant = True  # type: ignore[attr-defined]


def in_force() -> bool:
    """Whether there may be a transform or a tangent that what a module keeps for its calls knows nothing of."""
    return innermost() is not None or forward_ad._current_level >= 0


def has_tangent(*tensors: Tensor | None) -> bool:
    """Whether one of them is a dual tensor of forward-mode autograd."""
    return forward_ad._current_level >= 0 and any(
        t is not None and forward_ad.unpack_dual(t).tangent is not None for t in tensors
    )


def values_of(tensor: Tensor) -> Tensor | None:
    """The plain tensor inside those that transforms wrap around it; None where no values can be read, in a trace."""
    while _functorch.is_functorch_wrapped_tensor(tensor):
        tensor = _functorch.get_unwrapped(tensor)
    tracing = torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY) is not None
    return None if tracing or type(tensor) is not Tensor else tensor
