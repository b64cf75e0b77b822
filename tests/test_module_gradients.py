"""A module's gradients, whoever computes them: for inputs, weights and gradients in any strides, at every call."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rnp_kernels import PrefixConv2d, stock, training

LAYERS: dict[str, tuple[int, int, int, dict[str, Any]]] = {  # channels in, out, side, the rest
    "one product": (64, 20, 12, {"kernel_size": 1}),
    "1x1, one channel": (1, 16, 9, {"kernel_size": 1}),
    "1x1, stride 2": (16, 12, 10, {"kernel_size": 1, "stride": 2}),
    "1x1, groups": (32, 24, 8, {"kernel_size": 1, "groups": 2, "bias": False}),
    "1x1 map": (32, 16, 1, {"kernel_size": 1}),
    "3x3": (16, 12, 9, {"kernel_size": 3, "padding": 1}),
    "3x3, one channel": (1, 6, 12, {"kernel_size": 3}),
    "3x3, stride 2, groups": (32, 24, 11, {"kernel_size": 3, "stride": 2, "padding": 1, "groups": 2}),
    "3x3, winograd": (24, 32, 20, {"kernel_size": 3, "padding": 1}),
    "3x3, depthwise": (40, 40, 9, {"kernel_size": 3, "padding": 1, "groups": 40}),
    "5x5, depthwise, stride 2": (24, 24, 12, {"kernel_size": 5, "padding": 2, "stride": 2, "groups": 24}),
    "5x5": (12, 16, 8, {"kernel_size": 5, "padding": 2, "bias": False}),
}
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
VIEWS: dict[str, Callable[[Callable[..., Tensor], int, int, int], Tensor]] = {
    "whole": lambda new, n, c, side: new(n, c, side, side),
    "chunk": lambda new, n, c, side: new(n, 2 * c, side, side)[:, c:],
    "crop": lambda new, n, c, side: new(n, c, side + 2, side + 2)[:, :, 1:-1, 1:-1],
    "step of 2": lambda new, n, c, side: new(n, c, 2 * side, 2 * side)[:, :, ::2, ::2],
    "transposed": lambda new, n, c, side: new(n, c, side, side).transpose(2, 3),
    "expanded": lambda new, n, c, side: new(1, c, side, 1).expand(n, c, side, side),
}
GRADS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda grad: grad,
    "channels_last": lambda grad: grad.contiguous(memory_format=torch.channels_last),
    "expanded": lambda grad: grad.flatten()[0].expand_as(grad),  # of sum()
    "channels expanded": lambda grad: grad[:, :, :1, :1].expand_as(grad),  # of mean((2, 3))
    "sliced": lambda grad: torch.cat([torch.full_like(grad, torch.nan), grad], 1)[:, grad.shape[1] :],
    "transposed": lambda grad: grad.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
}


@pytest.fixture(params=[(True, True), None], ids=["both ours", "as the rule says"])
def ours(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which gradients in bfloat16 are ours."""
    if request.param is not None:
        monkeypatch.setattr(training, "_rule", lambda *_: request.param)


def made(name: str, layout: torch.memory_format, dtype: torch.dtype = torch.float32) -> PrefixConv2d:
    torch.manual_seed(0)
    c_in, c_out, _, settings = LAYERS[name]
    return PrefixConv2d(c_in, c_out, dtype=dtype, **settings).to(memory_format=layout)


def inputs(name: str, dtype: torch.dtype = torch.float32) -> Iterator[tuple[str, Tensor]]:
    c_in, _, side, _ = LAYERS[name]
    for layout, memory_format in LAYOUTS.items():

        def new(*size: int, memory_format: torch.memory_format = memory_format) -> Tensor:
            return torch.randn(size).to(dtype).contiguous(memory_format=memory_format)

        for view, make in VIEWS.items():
            for batch in (1, 4):
                x = make(new, batch, c_in, side)
                yield f"{layout}, {view}, batch {batch}, strides {x.stride()}", x.requires_grad_()


def check(conv: PrefixConv2d, inputs: Iterator[tuple[str, Tensor]], allowed: float, autocast: bool = False) -> None:
    """First calls of a shape and kept ones, with gradients and without; `allowed`: an error's norm in the tensor's."""
    kinds = itertools.cycle(GRADS.items())
    for name, x in inputs:
        tensors = (x, *conv.parameters())
        wide = [t.detach().double().contiguous().requires_grad_() for t in tensors]
        bias = None if conv.bias is None else wide[2]
        truth = F.conv2d(wide[0], wide[1], bias, conv.stride, conv.padding, conv.dilation, conv.groups)
        grad = torch.randn(truth.shape).to(torch.bfloat16 if autocast else x.dtype)
        for kind, strided in itertools.islice(kinds, 4):
            upstream = strided(grad)
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                output = conv(x)
            got = torch.autograd.grad(output, tensors, upstream)
            expected = torch.autograd.grad(truth, wide, upstream.double(), retain_graph=True)
            compared = zip(("output", "input", "weight", "bias"), (output, *got), (truth, *expected), strict=False)
            for what, mine, exact in compared:
                error = (mine.double() - exact).norm() / exact.norm()
                assert error <= allowed, f"{what}: error {error:.2g}, input {name}, gradient {kind}"
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            for _ in range(2):
                error = (conv(x).double() - truth).norm() / truth.norm()
                assert error <= allowed, f"without gradients: error {error:.2g}, input {name}"


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
@pytest.mark.parametrize("name", LAYERS)
def test_float32(name: str, layout: torch.memory_format) -> None:
    conv = made(name, layout)
    if name == "one product" and torch.backends.mkldnn.is_available():
        route = stock.route(conv, torch.randn(1, 64, 12, 12), conv.weight, conv.bias, conv.padding)
        assert route is not None and route.training == stock.GEMM, "the layer that conv2d's own backend answers"
    check(conv, inputs(name), 1e-5)


@pytest.mark.parametrize("autocast", [False, True], ids=["bfloat16", "autocast"])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
@pytest.mark.parametrize("name", ["one product", "3x3", "3x3, stride 2, groups", "3x3, depthwise"])
def test_bfloat16(name: str, layout: torch.memory_format, autocast: bool, ours: None) -> None:
    dtype = torch.float32 if autocast else torch.bfloat16
    check(made(name, layout, dtype), inputs(name, dtype), 1e-2, autocast)


def views_of_larger_ones(conv: PrefixConv2d) -> None:
    """Parameters in strides of their own, with the same values; what lies between them is NaN."""
    weight = conv.weight.detach()
    larger = torch.full((2 * weight.shape[0], weight.shape[1] + 1, *weight.shape[2:]), torch.nan, dtype=weight.dtype)
    conv.weight.data = larger[::2, 1:].copy_(weight)
    if conv.bias is not None:
        conv.bias.data = conv.bias.new_full((2 * weight.shape[0],), torch.nan)[::2].copy_(conv.bias.detach())


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize("name", ["one product", "1x1 map", "3x3", "3x3, winograd", "3x3, depthwise"])
def test_parameters_in_any_strides(name: str, autocast: bool) -> None:
    conv = made(name, torch.contiguous_format)
    allowed = 1e-2 if autocast else 1e-5
    plain = torch.randn(3, LAYERS[name][0], *[LAYERS[name][2]] * 2)
    for view in (plain, plain.contiguous(memory_format=torch.channels_last)):
        check(conv, iter([("whole", view.requires_grad_())]), allowed, autocast)
    views_of_larger_ones(conv)  # of a module that keeps calls for these inputs
    for view in (plain, plain.contiguous(memory_format=torch.channels_last)):
        check(conv, iter([("whole", view.detach().requires_grad_())]), allowed, autocast)


def test_a_bias_may_be_given_strides_under_a_kept_call() -> None:
    """Of oneDNN, where it is available: nothing else reads a bias as though it were contiguous."""
    conv, x = made("3x3", torch.contiguous_format), torch.randn(3, 16, 9, 9, requires_grad=True)
    for _ in range(3):
        conv(x)
    conv.bias.data = torch.full((24,), torch.nan)[::2].copy_(conv.bias.detach())
    check(conv, iter([("whole", x)]), 1e-5)


@pytest.mark.parametrize("name", ["one product", "1x1, one channel", "3x3"])
def test_gradients_of_gradients_of_views(name: str) -> None:
    conv = made(name, torch.channels_last)
    for view, x in inputs(name):

        def second(function: Callable[[Tensor], Tensor], tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
            first = torch.autograd.grad(function(tensors[0]).square().sum(), tensors, create_graph=True)
            return torch.autograd.grad(sum(g.square().sum() for g in first), tensors)

        wide = nn.Conv2d(*LAYERS[name][:2], **LAYERS[name][3])
        wide.load_state_dict(conv.state_dict())
        wide = wide.double()
        got = second(conv, (x, *conv.parameters()))
        truth = second(wide, (x.detach().double().contiguous().requires_grad_(), *wide.parameters()))
        for mine, exact in zip(got, truth, strict=True):
            assert (mine.double() - exact).norm() <= 1e-5 * exact.norm(), view
