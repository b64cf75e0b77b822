"""The CPU kernels of both gradients: against the masked dense ones, in any strides, the same bits every time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from rnp_kernels import reference, testing
from rnp_kernels.testing import Case, assert_as_accurate_as_native

NAMES = ("mixed prefixes", "3x3 stride 2", "mixed, 1x1 stride 2", "mixed, dilated", "asymmetric padding",
         "padding beyond the kernel", "prefix across groups", "prefix, unaligned channels")  # fmt: skip
KERNEL_CASES = [testing.case(name) for name in NAMES]


def operands(case: Case) -> tuple[Tensor, Tensor, Tensor, tuple[Any, ...]]:
    """grad_output with NaN beyond the prefixes, input (the same), weight, and the operators' further arguments."""
    arguments = testing.make(case)
    input, weight = arguments["input"], arguments["weight"]
    stride, padding, dilation = testing.geometry(case)
    rest = (stride, padding, dilation, case.groups, arguments["in_prefix"], arguments["out_prefix"])
    shape = testing.run_reference(case, arguments)[0].shape
    grad = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    grad = torch.where(reference.live(case.out, arguments["out_prefix"], grad), grad, torch.nan)
    return grad.contiguous(memory_format=torch.channels_last), input, weight, rest


def both(prefix: str, grad: Tensor, input: Tensor, weight: Tensor, rest: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
    """Gradients of the input and of the weight: the kernels' ("prefix_conv2d") or the masked dense ones ("masked")."""
    return (
        getattr(torch.ops.rnp, f"{prefix}_input_grad")(grad, weight, input.shape, *rest),
        getattr(torch.ops.rnp, f"{prefix}_weight_grad")(grad, input, weight.shape, *rest),
    )


def strided(grad: Tensor) -> dict[str, Tensor]:
    n, c, h, w = grad.shape
    return {
        "channels_last": grad,
        "contiguous": grad.contiguous(),
        "transposed": grad.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
        "slice": torch.full((n, c + 3, h, 2 * w), torch.nan)[:, 2:-1, :, ::2].copy_(grad),
        "expanded": grad[:, :, :1, :1].expand(n, c, h, w),
    }


@pytest.mark.parametrize("layout", strided(torch.empty(1, 1, 1, 1)))
@pytest.mark.parametrize("case", KERNEL_CASES, ids=str)
def test_kernels_equal_the_masked_ones_in_any_layout(case: Case, layout: str, isa: str) -> None:
    grad, input, weight, rest = operands(case)
    grad = strided(grad)[layout]
    ours = both("prefix_conv2d", grad, input, weight, rest)
    native = both("masked", grad, input, weight, rest)
    truth = both("masked", grad.double(), input.double(), weight.double(), rest)
    for name, got, other, expected in zip(("input", "weight"), ours, native, truth, strict=True):
        assert_as_accurate_as_native(f"gradient of {name}", got, other, expected)


@pytest.mark.parametrize("case", KERNEL_CASES, ids=str)
def test_the_same_bits_on_any_number_of_threads(case: Case, isa: str, threads: None, poisoned_memory: None) -> None:
    torch.set_num_threads(1)
    grad, input, weight, rest = operands(case)
    first = both("prefix_conv2d", grad, input, weight, rest)
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        for one, other in zip(first, both("prefix_conv2d", grad, input, weight, rest), strict=True):
            assert torch.equal(one, other), f"{count} threads"


@pytest.mark.parametrize("name,dtype,own", [
    ("3x3", torch.float32, True),
    ("mixed prefixes", torch.bfloat16, True),
    ("3x3", torch.bfloat16, False),
    ("mixed prefixes", torch.float64, False),
    ("depthwise", torch.float32, False),
    ("groups", torch.float32, False),
])  # fmt: skip
def test_which_calls_the_kernels_take(name: str, dtype: torch.dtype, own: bool) -> None:
    grad, input, weight, rest = operands(testing.case(name))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        both("prefix_conv2d", grad.to(dtype), input.to(dtype), weight.to(dtype), rest)
    ran = {event.key for event in profile.key_averages()}
    for which in ("input", "weight"):
        assert (f"rnp::masked_{which}_grad" in ran) != own


def test_wrong_calls_are_refused_by_name() -> None:
    grad, input, weight, rest = operands(testing.case("3x3"))
    calls = torch.ops.rnp
    with pytest.raises(RuntimeError, match="prefix_conv2d_input_grad: grad_output must have the output's shape"):
        calls.prefix_conv2d_input_grad(grad[:, :, 1:], weight, input.shape, *rest)
    with pytest.raises(
        RuntimeError, match="prefix_conv2d_weight_grad: in_prefix must lie in 0…16; got 17 for sample 1"
    ):
        prefix = torch.tensor([3, 17], dtype=torch.int32)
        calls.prefix_conv2d_weight_grad(grad, input, weight.shape, *rest[:4], prefix, None)
    with pytest.raises(RuntimeError, match="prefix_conv2d_weight_grad: all tensors must have grad_output's dtype"):
        calls.prefix_conv2d_weight_grad(grad, input.double(), weight.shape, *rest)
