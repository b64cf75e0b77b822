"""Gradients: gradcheck in float64, odd upstream gradients, what is asked for alone, what must raise.

Every gradient of every case against the specification is in tests/conformance; torch.func in test_transforms.py.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import rnp_kernels
from rnp_kernels import reference, testing
from rnp_kernels.conformance import PARAMETERS, gradients, leaves, reference_call
from rnp_kernels.conformance import call as operator_call
from rnp_kernels.testing import Case

MIXED = [
    testing.case(name)
    for name in ("everything", "mixed, dilated", "prefix across groups", "skipped tail", "prefix, depthwise")
]


def grad_outputs(shape: tuple[int, ...]) -> dict[str, Tensor]:
    n, c, h, w = shape
    values = torch.randn(shape, dtype=torch.float64)
    return {
        "contiguous": values,
        "channels_last": values.contiguous(memory_format=torch.channels_last),
        "transposed": values.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
        "expanded": torch.ones((), dtype=torch.float64).expand(shape),
        "expanded over positions": values[:, :, :1, :1].expand(shape),
        "slice": torch.full((n, c + 3, h, 2 * w), torch.nan, dtype=torch.float64)[:, 2:-1, :, ::2].copy_(values),
    }


@pytest.mark.parametrize("case", MIXED, ids=str)
@pytest.mark.parametrize("layout", grad_outputs((1, 1, 1, 1)))
def test_any_strides_of_grad_output(layout: str, case: Case) -> None:
    arguments = testing.make(case, torch.float64)
    upstream = grad_outputs(tuple(testing.run_reference(case, arguments)[0].shape))[layout]
    results = []
    for call in (operator_call, reference_call):
        mine = leaves(arguments, torch.float64)
        output, _ = call(case, mine)
        wanted = [mine[name] for name in PARAMETERS if mine[name] is not None]
        if case.tail == "skip":
            prefix = torch.tensor(case.out_prefix, dtype=torch.int32)
            upstream = torch.where(reference.live(case.out, prefix, upstream), upstream, torch.nan)
            output = output if call is operator_call else torch.where(upstream.isnan(), 0, output)
            upstream = upstream if call is operator_call else upstream.nan_to_num(0)
        results.append(torch.autograd.grad(output, wanted, upstream))
    for ours, truth in zip(*results, strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("case", MIXED, ids=str)
def test_gradcheck_and_gradgradcheck(case: Case) -> None:
    small = {k: v for k, v in testing.make(case, torch.float64).items() if k != "pooled"}
    small = leaves(small, torch.float64)
    small["input"] = small["input"].detach().nan_to_num(0.25).requires_grad_()
    names = [name for name in PARAMETERS if small[name] is not None]

    def function(*tensors: Tensor) -> Tensor:
        output = rnp_kernels.prefix_conv2d(**{**small, **dict(zip(names, tensors, strict=True))})
        if case.tail == "zero":
            return output
        return torch.where(reference.live(case.out, small["out_prefix"], output), output, 0)

    inputs = [small[name] for name in names]
    assert torch.autograd.gradcheck(function, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)


def test_gradcheck_in_full_on_a_tiny_case() -> None:
    x, w = torch.randn(3, 3, 4, 3).double().requires_grad_(), torch.randn(4, 3, 2, 2).double().requires_grad_()
    table = (torch.randn(2, 4).double() + 1).requires_grad_()
    prefixes = {name: torch.tensor(v, dtype=torch.int32) for name, v in
                {"in_prefix": (3, 1, 0), "out_prefix": (2, 4, 3), "row": (1, 0, 1)}.items()}  # fmt: skip

    def function(x: Tensor, w: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        return rnp_kernels.prefix_conv2d(x, w, bias, 1, (1, 0, 0, 1), scale=scale, **prefixes)

    assert torch.autograd.gradcheck(function, (x, w, table, table.detach().clone().requires_grad_()))


def test_poison_beyond_the_prefixes_reaches_no_gradient() -> None:
    case = testing.case("mixed prefixes")
    arguments = leaves(testing.make(case), torch.float32)
    output = rnp_kernels.prefix_conv2d(**arguments)
    live = reference.live(case.out, arguments["out_prefix"], output)
    output.backward(torch.where(live, torch.ones_like(output), torch.nan))
    for name in ("input", "weight", "bias"):
        assert torch.isfinite(arguments[name].grad).all(), name
    dead = ~reference.live(case.input[1], arguments["in_prefix"], arguments["input"])
    assert (arguments["input"].grad.masked_select(dead) == 0).all()


@pytest.mark.parametrize("wanted", PARAMETERS)
def test_only_what_is_asked_for_is_computed(wanted: str) -> None:
    case = testing.case("everything")
    arguments = testing.make(case)
    arguments = {k: v.detach() if isinstance(v, Tensor) else v for k, v in arguments.items()}
    arguments[wanted] = arguments[wanted].clone().requires_grad_()
    output, means = rnp_kernels.prefix_conv2d(**arguments)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        (output.sum() + means.sum()).backward()
    assert arguments[wanted].grad is not None
    ran = {event.key for event in profile.key_averages()}
    for name, operator in (("input", "rnp::prefix_conv2d_input_grad"), ("weight", "rnp::prefix_conv2d_weight_grad")):
        assert (operator in ran) == (wanted == name), f"{operator} for {wanted}"
    assert ("rnp::prefix_conv2d" in ran) == (wanted == "scale")


def test_the_means_alone_have_gradients() -> None:
    case = testing.case("everything")
    ours, truth = leaves(testing.make(case), torch.float32), leaves(testing.make(case), torch.float64)
    rnp_kernels.prefix_conv2d(**ours)[1].sum().backward()
    testing.run_reference(case, truth)[1].sum().backward()
    for name in PARAMETERS:
        torch.testing.assert_close(ours[name].grad.double(), truth[name].grad, rtol=1e-4, atol=1e-5)


def test_deterministic_mode_repeats_bit_by_bit() -> None:
    case = testing.case("everything")
    torch.use_deterministic_algorithms(True)
    try:
        upstream = torch.randn(4, 48, 5, 5)
        runs = [gradients(operator_call, case, testing.make(case), torch.float32, upstream) for _ in range(2)]
    finally:
        torch.use_deterministic_algorithms(False)
    for name in PARAMETERS:
        assert torch.equal(runs[0][name], runs[1][name]), name


def test_grad_mode_and_inference_mode() -> None:
    x, w = torch.randn(2, 4, 5, 5), torch.randn(4, 4, 1, 1, requires_grad=True)
    assert rnp_kernels.prefix_conv2d(x, w).requires_grad
    with torch.no_grad():
        assert not rnp_kernels.prefix_conv2d(x, w).requires_grad
    assert not rnp_kernels.prefix_conv2d(x, w.detach()).requires_grad
    with torch.inference_mode():
        assert rnp_kernels.prefix_conv2d(x, w).is_inference()


@pytest.mark.parametrize("pooled_alone", [True, False])
def test_the_means_of_float64_have_gradients_in_float64(pooled_alone: bool) -> None:
    x, w = torch.randn(2, 3, 3, 3).double(), torch.randn(4, 3, 1, 1).double().requires_grad_()
    output, means = rnp_kernels.prefix_conv2d(x, w, pooled=True)
    upstream = torch.randn(2, 4)
    ours = torch.autograd.grad(means if pooled_alone else (means, output), w, upstream if pooled_alone else
                               (upstream, torch.zeros_like(output)))[0]  # fmt: skip
    theirs = torch.einsum("no,ni->oi", upstream.double(), x.mean((2, 3)))
    torch.testing.assert_close(ours[:, :, 0, 0], theirs, rtol=1e-12, atol=1e-12)


DILATED = {  # channels, kernel, dilation, padding: of depthwise layers
    "3x3": (32, (3, 3), 2, 2),
    "few channels": (8, (3, 3), (3, 1), (3, 1)),
    "uneven padding": (32, (3, 3), 2, (1, 3, 2, 2)),
    "one row": (32, (1, 3), (3, 2), (0, 2)),
    "pointwise": (32, (1, 1), (2, 1), 0),
}


@pytest.mark.parametrize("way", ["operator", "pruned", "module", "autocast", "training", "reference"])
@pytest.mark.parametrize("last", [True, False], ids=["channels_last", "contiguous"])
@pytest.mark.parametrize("name", DILATED)
def test_dilated_depthwise_weights_in_bfloat16(name: str, last: bool, way: str) -> None:
    """oneDNN's gradient is garbage here."""
    channels, kernel, dilation, padding = DILATED[name]
    if way in ("module", "autocast", "training") and name == "uneven padding":
        return
    torch.manual_seed(0)
    layout = torch.channels_last if last else torch.contiguous_format
    x = torch.randn(2, channels, 33, 33).bfloat16().contiguous(memory_format=layout)
    prefix = torch.tensor([channels, channels // 2], dtype=torch.int32) if way == "pruned" else None
    w = torch.randn(channels, 1, *kernel).bfloat16()
    arguments = (1, padding, dilation, channels)
    exact = w.double().requires_grad_()
    y = rnp_kernels.prefix_conv2d(x.double(), exact, None, *arguments, out_prefix=prefix)
    upstream = torch.randn(y.shape).bfloat16()
    (expected,) = torch.autograd.grad(y, exact, upstream.double())
    (ours,) = leaves = [(w.float() if way == "autocast" else w.clone()).requires_grad_()]
    if way in ("module", "autocast"):
        conv = rnp_kernels.PrefixConv2d(channels, channels, kernel, 1, padding, dilation, channels, bias=False)
        conv.weight = torch.nn.Parameter(ours.detach())
        leaves = [conv.weight]
    for _ in range(3):
        with torch.autocast("cpu", torch.bfloat16, enabled=way == "autocast"):
            if way in ("module", "autocast"):
                output = conv(x)
            elif way == "training":
                output = rnp_kernels.training.conv2d(x, ours, None, *arguments)
            else:
                with rnp_kernels.backend("reference" if way == "reference" else "auto"):
                    output = rnp_kernels.prefix_conv2d(x, ours, None, *arguments, out_prefix=prefix)
        (gradient,) = torch.autograd.grad(output, leaves, upstream)
        assert output.dtype is torch.bfloat16
        assert (gradient.double() - expected).abs().max() <= 0.02 * expected.abs().max()
