"""`torch.ops.rnp.prefix_conv2d_triton` and its kin: the Triton kernels as operators with the schemas of csrc/ops.cpp.

They have names of their own because a device's dispatch key holds one kernel: the CUDA library's where it has one. The
functions in front (`rnp_kernels.prefix_conv2d`, a converted network) call the one that the backend in force names.
Where the CUDA library has no kernel, the plain names also lead here on CUDA tensors, as long as the backend is triton.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _libraries, agent_step, backends, gradients, registrations
from . import reason

SUFFIX = "_triton"
_FUNCTIONS = {  # operator -> function of launch.py
    "prefix_conv2d": "prefix_conv2d",
    "prefix_conv2d_input_grad": "input_grad",
    "prefix_conv2d_weight_grad": "weight_grad",
    "agent_step": "agent_step",
}
_LIBRARY = torch.library.Library("rnp", "FRAGMENT")


def _implementation(operator: str) -> Any:
    function = _FUNCTIONS[operator]

    def run(*arguments: Any) -> Any:
        why = reason()
        if why is not None:
            raise RuntimeError(f"{operator}: backend 'triton' cannot run: {why}")
        from . import launch  # imports triton, which most machines need not have

        return getattr(launch, function)(*arguments)

    return run


def _on_cuda(operator: str) -> Any:
    """What the plain name does on CUDA tensors where the CUDA library has no kernel for it."""
    ours = _implementation(operator)
    plain = {"prefix_conv2d_input_grad": gradients._input_grad, "prefix_conv2d_weight_grad": gradients._weight_grad}

    def run(first: Tensor, *arguments: Any) -> Any:
        if backends.resolve(first) == "triton":
            return ours(first, *arguments)
        if operator in plain:
            return plain[operator](first, *arguments)
        raise RuntimeError(f"{operator}: backend 'cuda' cannot run: {backends.available_backends()['cuda']}")

    return run


def _in_family(setup: Any) -> Any:
    """The gradient's operators are those of this family too."""

    def wrapped(ctx: Any, inputs: tuple, output: Any) -> None:
        ctx.family = SUFFIX
        setup(ctx, inputs, output)

    return wrapped


def _register() -> None:
    for operator in _FUNCTIONS:
        schema = str(getattr(torch.ops.rnp, operator).default._schema).removeprefix("rnp::")
        _LIBRARY.define(schema.replace(operator, operator + SUFFIX, 1))
        for key in ("CPU", "CUDA"):  # CPU: interpreted
            _LIBRARY.impl(operator + SUFFIX, _implementation(operator), key)
        if not _libraries.has_cuda(operator):
            _LIBRARY.impl(operator, _on_cuda(operator), "CUDA")
    for operator, fake in (
        ("prefix_conv2d", registrations._prefix_conv2d_fake),
        ("prefix_conv2d_input_grad", gradients._input_grad_fake),
        ("prefix_conv2d_weight_grad", gradients._weight_grad_fake),
        ("agent_step", agent_step._agent_step_fake),
    ):
        torch.library.register_fake(f"rnp::{operator}{SUFFIX}", fake)
    for operator, backward, setup in (
        ("prefix_conv2d", gradients._backward, gradients._setup),
        ("prefix_conv2d_input_grad", gradients._input_grad_backward, gradients._part_setup),
        ("prefix_conv2d_weight_grad", gradients._weight_grad_backward, gradients._part_setup),
    ):
        torch.library.register_autograd(f"rnp::{operator}{SUFFIX}", backward, setup_context=_in_family(setup))
    for device in ("cpu", "cuda"):
        registrations._autocast(device, SUFFIX)


_register()
PREFIX_CONV2D = torch.ops.rnp.prefix_conv2d_triton.default
AGENT_STEP = torch.ops.rnp.agent_step_triton.default
