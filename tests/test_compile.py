"""torch.compile, torch.export, torch.fx, opcheck and autocast."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.library import opcheck

import rnp_kernels
from rnp_kernels import PrefixConv2d, testing
from rnp_kernels.testing import Case

OPCHECK_CASES = [
    testing.case(name)
    for name in (
        "3x3",
        "everything",
        "everything, contiguous",
        "skipped tail, pooled",
        "depthwise",
        "empty batch",
        "transposed input",
        "weight channels_last",
    )
]


def operands(case: Case, grad: bool) -> tuple:
    a = testing.make(case)
    a["input"] = a["input"].nan_to_num(0)
    stride, padding, dilation = testing.geometry(case)
    for name in ("input", "weight", "bias", "scale", "residual"):
        if grad and a[name] is not None:
            a[name] = a[name].detach().clone(memory_format=torch.preserve_format).requires_grad_()
    names = ("in_prefix", "out_prefix", "scale", "row", "residual")
    geometry = (list(stride), list(padding), list(dilation), case.groups)
    last = (case.activation, "zero", case.pooled, None)
    return (a["input"], a["weight"], a["bias"], *geometry, *(a[name] for name in names), *last)


@pytest.mark.parametrize("grad", [False, True], ids=["no grad", "grad"])
@pytest.mark.parametrize("case", OPCHECK_CASES, ids=str)
def test_opcheck(case: Case, grad: bool) -> None:
    x, w, _bias, *geometry, groups, in_prefix, out_prefix = (arguments := operands(case, grad))[:9]
    opcheck(torch.ops.rnp.prefix_conv2d.default, arguments)
    opcheck(torch.ops.rnp.pack_weight.default, (w.detach(), groups))
    output = torch.ops.rnp.prefix_conv2d(*arguments)[0].detach().requires_grad_(grad)
    opcheck(
        torch.ops.rnp.prefix_conv2d_input_grad.default,
        (output, w, list(x.shape), *geometry, groups, in_prefix, out_prefix),
    )
    opcheck(
        torch.ops.rnp.prefix_conv2d_weight_grad.default,
        (output, x, list(w.shape), *geometry, groups, in_prefix, out_prefix),
    )


class Chooser(nn.Module):
    """Computes its own prefixes, from what it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.first = PrefixConv2d(3, 16, 3, padding=1)
        self.second = PrefixConv2d(16, 24, 3, padding="same")
        self.scale = nn.Parameter(torch.rand(2, 24) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        hard = (x.mean((1, 2, 3)) > 0).to(torch.int32)
        h = self.first(x, None, hard * 8 + 8).relu()
        h = self.second(h, hard * 8 + 8, 24 - hard * 12)
        y, means = rnp_kernels.prefix_conv2d(
            h, self.second.weight.transpose(0, 1).contiguous(), padding=1, scale=self.scale[:, :16], row=hard,
            activation="relu", pooled=True,
        )  # fmt: skip
        return y.mean((2, 3)) + means


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    torch._dynamo.reset()


def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(n, 3, s, s + 1, generator=generator) for n, s in ((2, 8), (5, 8), (3, 11))]


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compile_with_data_dependent_prefixes(dynamic: bool) -> None:
    model = Chooser()
    compiled = torch.compile(model, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for x in batches():
        x.requires_grad_()
        ours = torch.autograd.grad(compiled(x).square().sum(), (x, *model.parameters()))
        eager = torch.autograd.grad(model(x).square().sum(), (x, *model.parameters()))
        for a, b in zip(ours, eager, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_compile_with_inductor() -> None:
    model = Chooser().eval()
    compiled = torch.compile(model, fullgraph=True)
    x = batches()[0]
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)


def test_a_compiled_module_follows_its_weights() -> None:
    conv = PrefixConv2d(4, 4, 3)
    compiled = torch.compile(conv, fullgraph=True, backend="aot_eager")
    x = torch.randn(1, 4, 6, 6)
    with torch.no_grad():
        for _ in range(3):
            torch.testing.assert_close(compiled(x), conv(x))
            conv.weight.data.mul_(-2)
            conv.weight.add_(1)


@pytest.mark.parametrize("strict", [False, True], ids=["non-strict", "strict"])
def test_export_with_a_dynamic_batch(strict: bool) -> None:
    model = Chooser().eval()
    with torch.no_grad():
        model(batches()[0]), model(batches()[0])  # packed weights must not become constants of the graph
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(model, (batches()[0],), dynamic_shapes=({0: batch},), strict=strict)
    for n in (1, 4):
        x = torch.randn(n, 3, 8, 9)
        torch.testing.assert_close(program.module()(x), model(x), rtol=1e-4, atol=1e-5)
    assert not program.constants


def test_symbolic_trace_sees_one_call() -> None:
    model = nn.Sequential(PrefixConv2d(3, 4, 3), nn.ReLU())
    with torch.no_grad():
        model(torch.randn(1, 3, 5, 5)), model(torch.randn(1, 3, 5, 5))
    traced = torch.fx.symbolic_trace(model)
    calls = [node.target for node in traced.graph.nodes if node.op == "call_function"]
    assert calls == [rnp_kernels.prefix_conv2d]
    x = torch.randn(2, 3, 5, 5)
    torch.testing.assert_close(traced(x), model(x))


def test_make_fx_keeps_no_pack() -> None:
    conv = PrefixConv2d(3, 4, 3)
    x = torch.randn(1, 3, 5, 5)
    with torch.no_grad():
        conv(x), conv(x)
        graph = torch.fx.experimental.proxy_tensor.make_fx(conv)(x)
        torch.testing.assert_close(graph(x), conv(x))
    calls = [n for n in graph.graph.nodes if n.target is torch.ops.rnp.prefix_conv2d.default]
    assert len(calls) == 1 and calls[0].args[15:] in ((), (None,))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype: torch.dtype) -> None:
    case = testing.case("everything")
    arguments = testing.make(case)
    arguments["weight"] = arguments["weight"].requires_grad_()
    with torch.autocast("cpu", dtype=dtype):
        output, means = rnp_kernels.prefix_conv2d(**arguments)
        conv = PrefixConv2d(24, 8, 3)
        with torch.no_grad():
            conv(arguments["residual"][:, :24]), conv(arguments["residual"][:, :24])
        assert conv(arguments["residual"][:, :24]).dtype == dtype
    assert output.dtype == dtype and means.dtype == torch.float32
    half = testing.convert(arguments, dtype) | {"scale": arguments["scale"], "bias": arguments["bias"]}
    expected, _ = rnp_kernels.prefix_conv2d(**half)
    assert torch.equal(output, expected)
    output.float().sum().backward()
    assert arguments["weight"].grad.dtype == torch.float32


def test_autocast_leaves_float64_alone() -> None:
    arguments = testing.make(testing.case("3x3"), torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert rnp_kernels.prefix_conv2d(**arguments).dtype == torch.float64


def test_a_compiled_graph_under_autocast() -> None:
    conv = PrefixConv2d(4, 4, 3)
    x = torch.randn(2, 4, 6, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        compiled = torch.compile(conv, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(x), conv(x)) and conv(x).dtype == torch.bfloat16
