"""torch.func and forward-mode autograd: the operator and its module against conv2d and the specification."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, hessian, jacrev, jvp, linearize, stack_module_state, vjp, vmap

import rnp_kernels
from rnp_kernels import PrefixConv2d, backends, prefix_conv2d, reference, replace_conv2d, training

pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop")

Function = Callable[..., Any]

# Channels in and out, kernel, settings, side of the map, batch: one of each way that a module's call can go.
LAYERS = {
    "winograd": (64, 64, 3, {"padding": 1}, 56, 2),
    "small map": (16, 24, 3, {"padding": 1}, 9, 2),
    "1x1": (32, 48, 1, {}, 14, 2),
    "strided": (16, 32, 3, {"stride": 2, "padding": 1}, 14, 2),
    "depthwise": (32, 32, 3, {"padding": 1, "groups": 32}, 14, 2),
    "reflect": (8, 8, 3, {"padding": 1, "padding_mode": "reflect", "bias": False}, 9, 2),
}


def int32(*values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def close(ours: Any, theirs: Any) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


def specification(x: Tensor, w: Tensor, b: Tensor, **prefixes: Tensor) -> Tensor:
    return reference.prefix_conv2d(x, w, b, padding=(1, 1, 1, 1), **prefixes)[0]


def ours(x: Tensor, w: Tensor, b: Tensor, **prefixes: Tensor) -> Tensor:
    return prefix_conv2d(x, w, b, padding=1, **prefixes)


# Each transform of a function of (input, weight, bias) that returns an output.
TRANSFORMS: dict[str, Callable[[Function, tuple[Tensor, ...]], Any]] = {
    "grad": lambda f, a: grad(lambda *t: f(*t).square().mean(), (0, 1, 2))(*a),
    "vjp": lambda f, a: vjp(f, *a)[1](torch.ones_like(F.conv2d(*a, padding=1))),
    "jacrev": lambda f, a: jacrev(f, (1, 2))(a[0][:1, :, :2, :3], *a[1:]),
    "jvp": lambda f, a: jvp(f, a, tuple(t.cos() for t in a)),
    "linearize": lambda f, a: linearize(f, *a)[1](*(t.cos() for t in a)),
    "gradients of samples": lambda f, a: vmap(
        grad(lambda w, b, x: f(x[None], w, b).square().mean(), (0, 1)), (None, None, 0)
    )(a[1], a[2], a[0]),
    "gradient of gradient": lambda f, a: grad(
        lambda w: grad(lambda w: f(a[0], w, a[2]).pow(3).mean())(w).square().sum()
    )(a[1]),
}


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS.keys())
def test_the_operator_without_prefixes_is_conv2d(transform: Callable) -> None:
    tensors = torch.randn(2, 6, 7, 8), torch.randn(9, 6, 3, 3), torch.randn(9)
    close(transform(ours, tensors), transform(lambda *a: F.conv2d(*a, padding=1), tensors))


@pytest.mark.parametrize("name", [name for name in TRANSFORMS if name not in ("jacrev", "gradients of samples")])
def test_the_operator_with_prefixes_is_the_specification(name: str) -> None:
    transform = TRANSFORMS[name]
    tensors = torch.randn(3, 6, 7, 8), torch.randn(9, 6, 3, 3), torch.randn(9)
    prefixes = {"in_prefix": int32(6, 2, 0), "out_prefix": int32(4, 9, 3)}
    clean = transform(lambda *a: specification(*a, **prefixes), tensors)
    tensors[0][1, 2:] = torch.nan  # never read
    close(transform(lambda *a: ours(*a, **prefixes), tensors), clean)


def test_each_sample_with_its_own_prefixes() -> None:
    x, w, b = torch.randn(3, 6, 7, 8), torch.randn(9, 6, 3, 3), torch.randn(9)
    prefixes = int32([6], [2], [0]), int32([4], [9], [3])

    def gradients(f: Function) -> Any:
        def loss(w: Tensor, b: Tensor, x: Tensor, in_prefix: Tensor, out_prefix: Tensor) -> Tensor:
            return f(x[None], w, b, in_prefix=in_prefix, out_prefix=out_prefix).square().sum()

        return vmap(grad(loss, (0, 1)), (None, None, 0, 0, 0))(w, b, x, *prefixes)

    close(gradients(ours), gradients(specification))


def test_the_hessian_in_float64() -> None:
    x, w = torch.randn(2, 3, 4, 4).double(), torch.randn(2, 3, 2, 2).double()
    truth = hessian(lambda w: F.conv2d(x, w, stride=2).pow(3).sum())(w)
    torch.testing.assert_close(hessian(lambda w: prefix_conv2d(x, w, stride=2).pow(3).sum())(w), truth)
    by_autograd = torch.autograd.functional.hessian(
        lambda w: prefix_conv2d(x, w, stride=2).pow(3).sum(), w, vectorize=True, outer_jacobian_strategy="forward-mode"
    )
    torch.testing.assert_close(by_autograd, truth)


def test_dual_tensors() -> None:
    x, w, tangent = torch.randn(2, 4, 5, 5), torch.randn(4, 4, 3, 3), torch.randn(2, 4, 5, 5)
    conv = PrefixConv2d(4, 4, 3)
    with torch.no_grad():
        conv(x), conv(x)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, tangent)
        for f, linear in (
            (lambda x: prefix_conv2d(x, w), lambda x: F.conv2d(x, w)),
            (conv, lambda x: F.conv2d(x, conv.weight)),
            (lambda x: training.conv2d(x, w), lambda x: F.conv2d(x, w)),
        ):
            close(torch.autograd.forward_ad.unpack_dual(f(dual)).tangent, linear(tangent))
        assert torch.equal(prefix_conv2d(x, w), prefix_conv2d(x, w))


def twins(name: str) -> tuple[nn.Conv2d, PrefixConv2d, Tensor]:
    c_in, c_out, kernel, settings, side, batch = LAYERS[name]
    theirs = nn.Conv2d(c_in, c_out, kernel, **settings)
    mine = PrefixConv2d.from_conv2d(copy.deepcopy(theirs))
    x = torch.randn(batch, c_in, side, side)
    for _ in range(3):  # until it keeps a call, with gradients and without
        mine(x)
        with torch.no_grad():
            mine(x)
    return theirs, mine, x


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_modules(name: str, layout: torch.memory_format) -> None:
    theirs, mine, x = twins(name)
    x = x.contiguous(memory_format=layout)
    parameters = {key: value.detach() for key, value in theirs.named_parameters()}
    tangents = {key: value.cos() for key, value in parameters.items()}

    def results(conv: nn.Conv2d) -> Any:
        def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
            return functional_call(conv, parameters, (x,)).square().mean()

        return (
            grad(loss, (0, 1))(parameters, x),
            vmap(grad(loss), (None, 0))(parameters, x[:, None]),
            jvp(lambda p: functional_call(conv, p, (x,)), (parameters,), (tangents,)),
            vjp(conv, x)[1](torch.ones_like(conv(x))),  # its own parameters, that of a kept call
            vmap(conv)(x[None]),
            grad(lambda x: conv(x).square().mean())(x[0]),  # no batch
        )

    for a, b in zip(results(mine), results(theirs), strict=True):
        close(a, b)


@pytest.mark.parametrize("name", ["winograd", "depthwise"])
def test_an_ensemble_has_all_its_gradients(name: str) -> None:
    theirs, _, x = twins(name)
    x = x[:1]
    models = [nn.Sequential(copy.deepcopy(theirs), nn.ReLU()) for _ in range(2)]
    for model in models[1:]:
        nn.init.normal_(model[0].weight, std=0.1)

    def gradients(models: list[nn.Module]) -> dict[str, Tensor]:
        parameters, buffers = stack_module_state(models)
        output = vmap(lambda p, b: functional_call(models[0], (p, b), (x,)))(parameters, buffers)
        output.square().mean().backward()
        return {key: value.grad for key, value in parameters.items()}

    expected = gradients(models)
    close(gradients([replace_conv2d(model) for model in models]), expected)


def test_vmap_gives_every_gradient() -> None:
    x = torch.randn(2, 8, 6, 6)
    results = []
    for f in (prefix_conv2d, F.conv2d):
        torch.manual_seed(0)
        weights, scales = torch.randn(3, 4, 8, 3, 3, requires_grad=True), torch.randn(3, requires_grad=True)
        vmap(lambda w, c, f=f: f(x, w) * c)(weights, scales).square().mean().backward()
        results.append((weights.grad, scales.grad))
    close(*results)


def test_vmap_is_a_loop() -> None:
    x, w = torch.randn(3, 2, 4, 5, 5), torch.randn(6, 4, 1, 1)
    mapped = vmap(lambda one: prefix_conv2d(one, w))(x)
    assert torch.equal(mapped, torch.stack([prefix_conv2d(one, w) for one in x]))
    prefixes = int32([4, 1], [2, 0], [3, 3])
    mapped = vmap(lambda one, prefix: prefix_conv2d(one, w, in_prefix=prefix))(x, prefixes)
    assert torch.equal(mapped, torch.stack([prefix_conv2d(x[i], w, in_prefix=prefixes[i]) for i in range(3)]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_training_conv2d(dtype: torch.dtype) -> None:
    x, w = torch.randn(2, 64, 28, 28, dtype=dtype), torch.randn(64, 64, 3, 3, dtype=dtype)

    def gradient(f: Function) -> Tensor:
        return grad(lambda w: f(x, w).float().square().mean())(w)

    assert torch.equal(gradient(training.conv2d), gradient(F.conv2d))


def test_autocast_inside_a_transform() -> None:
    tensors = torch.randn(2, 6, 7, 8), torch.randn(9, 6, 3, 3), torch.randn(9)
    with torch.autocast("cpu", torch.bfloat16):
        output, backward = vjp(ours, *tensors)
        expected = prefix_conv2d(*tensors, padding=1)
        assert output.dtype is expected.dtype is torch.bfloat16
        torch.testing.assert_close(output, expected, rtol=0.02, atol=0.02)
        assert [g.dtype for g in backward(output)] == [torch.float32] * 3


@pytest.mark.parametrize("prefix", [int32(7, 1), int32(1, -1)], ids=str)
def test_prefixes_out_of_range_raise(prefix: Tensor) -> None:
    x, w = torch.randn(2, 6, 5, 5), torch.randn(8, 6, 3, 3)

    def total(x: Tensor, prefix: Tensor) -> Tensor:
        return prefix_conv2d(x, w, in_prefix=prefix).sum()

    with pytest.raises(RuntimeError, match="in_prefix must lie in 0"):
        grad(total)(x, prefix)
    for each in (vmap(total), vmap(grad(total))):
        with pytest.raises(RuntimeError, match="in_prefix must lie in 0"):
            each(x[:, None], prefix[:, None])
    with pytest.raises(ValueError, match=r"in_prefix must have shape \(N,\)"):
        grad(total)(x, prefix[:1])


def test_the_log_names_the_specification(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(backends, "LOG", True)
    monkeypatch.setattr(backends, "_logged", set())
    grad(lambda x: prefix_conv2d(x, torch.randn(8, 6, 3, 3)).sum())(torch.randn(2, 6, 5, 5))
    assert capfd.readouterr().err.rstrip().endswith("backend reference")


COMPILED = {
    "grad": lambda f, x, w: grad(lambda w: f(x, w).square().sum())(w),
    "gradients of samples": lambda f, x, w: vmap(grad(lambda w, x: f(x[None], w).square().sum()), (None, 0))(w, x),
    "jvp": lambda f, x, w: jvp(lambda w: f(x, w), (w,), (w,)),
    "vmap": lambda f, x, w: vmap(lambda x: f(x[None], w))(x),
}


@pytest.mark.parametrize("transform", COMPILED.values(), ids=COMPILED.keys())
def test_compiled_transforms(transform: Callable) -> None:
    torch._dynamo.reset()
    x, w = torch.randn(2, 4, 5, 5), torch.randn(6, 4, 3, 3)
    compiled = torch.compile(lambda x, w: transform(prefix_conv2d, x, w), fullgraph=True, backend="aot_eager")
    close(compiled(x, w), transform(F.conv2d, x, w))


def test_compiled_without_a_transform_keeps_the_operator() -> None:
    torch._dynamo.reset()
    seen: list[Any] = []

    def backend(graph: torch.fx.GraphModule, _inputs: Any) -> Any:
        seen.extend(node.target for node in graph.graph.nodes if node.op == "call_function")
        return graph

    x, w = torch.randn(2, 4, 5, 5), torch.randn(6, 4, 3, 3)
    grad(lambda w: prefix_conv2d(x, w).sum())(w)
    torch.compile(prefix_conv2d, fullgraph=True, backend=backend)(x, w)
    assert torch.ops.rnp.prefix_conv2d.default in seen
    assert rnp_kernels.get_backend() == "auto"
