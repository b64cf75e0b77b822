"""`rnp_kernels.training.conv2d`: torch.conv2d's outputs and gradients, whoever computes them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rnp_kernels
from rnp_kernels import PrefixConv2d, layer_call, stock, training

BOTH, WEIGHT, NONE = (True, True), (False, True), (False, False)


@pytest.fixture(params=[BOTH, WEIGHT], ids=["both gradients", "the weight's alone"])
def ours(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tuple[bool, bool]:
    """What the rule says of every layer, on whatever machine the tests run."""
    monkeypatch.setattr(training, "_rule", lambda *_: request.param)
    return request.param


@pytest.fixture
def rule() -> Iterator[Callable[[int], None]]:
    """Says what oneDNN can do in bfloat16; what it really can is said again afterwards."""

    def say(level: int) -> None:
        training._rule.cache_clear()
        rnp_kernels._C.set_stock_dtypes(True, level, False)

    yield say
    training._rule.cache_clear()
    stock.tell_the_operator()


def operands(last: bool = True, dtype: torch.dtype = torch.float32, channels: int = 24) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    layout = torch.channels_last if last else torch.contiguous_format
    x = torch.randn(3, channels, 9, 7, generator=generator).to(dtype).contiguous(memory_format=layout)
    w = (torch.randn(40, channels, 3, 3, generator=generator) / 15).to(dtype).contiguous(memory_format=layout)
    b = torch.randn(40, generator=generator).to(dtype)
    return tuple(t.requires_grad_() for t in (x, w, b))


def both(function: Any, tensors: tuple[Tensor, ...], autocast: bool, **options: Any) -> tuple[Tensor, list[Tensor]]:
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = function(*tensors, **options)
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y)
    return y, list(torch.autograd.grad(y, tensors, grad))


@pytest.mark.parametrize("options", [{"padding": 1}, {"stride": 2, "padding": (1, 0)}, {"padding": "same"}], ids=str)
@pytest.mark.parametrize("last", [True, False], ids=["channels_last", "contiguous"])
@pytest.mark.parametrize("autocast", [True, False], ids=["autocast", "bfloat16"])
def test_it_is_torch_conv2d(ours: tuple, options: dict, last: bool, autocast: bool, isa: str) -> None:
    tensors = operands(last, torch.float32 if autocast else torch.bfloat16)
    y, grads = both(training.conv2d, tensors, autocast, **options)
    expected, theirs = both(F.conv2d, tensors, autocast, **options)
    assert "_Conv2dBackward" in y.grad_fn.name()
    assert y.dtype is expected.dtype and torch.equal(y, expected)
    wide = tuple(t.detach().bfloat16().double().requires_grad_() for t in tensors)
    truth = both(F.conv2d, wide, False, **options)[1]
    for grad, their, exact, like in zip(grads, theirs, truth, tensors, strict=True):
        assert grad.dtype is like.dtype and grad.stride() == their.stride()
        error, bound = ((g.double() - exact).norm() / exact.norm() for g in (grad, their))
        assert error <= max(1.1 * bound, 1e-6)


def test_under_autocast_the_weights_gradient_is_not_rounded(ours: tuple) -> None:
    grads = both(training.conv2d, operands(), True, padding=1)[1]
    assert not torch.equal(grads[1], grads[1].bfloat16().float())
    rounded = both(F.conv2d, operands(), True, padding=1)[1]
    assert torch.equal(rounded[1], rounded[1].bfloat16().float())


@pytest.mark.parametrize("autocast", [True, False], ids=["autocast", "bfloat16"])
def test_gradients_of_gradients(ours: tuple, autocast: bool) -> None:
    def second(function: Any) -> tuple[Tensor, ...]:
        tensors = operands(dtype=torch.float32 if autocast else torch.bfloat16)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = function(*tensors, padding=1)
        first = torch.autograd.grad(y.float().square().sum(), tensors, create_graph=True)
        return torch.autograd.grad(sum(g.float().square().sum() for g in first), tensors)

    for got, expected in zip(second(training.conv2d), second(F.conv2d), strict=True):
        assert (got.double() - expected.double()).norm() <= 0.01 * expected.double().norm()


def test_the_weight_may_change_before_the_backward_pass_as_under_autocast(ours: tuple) -> None:
    def gradients(function: Any) -> tuple[Tensor, ...]:
        x, w, b = operands()
        with torch.autocast("cpu", torch.bfloat16):
            y = function(x, w, b, padding=1)
        with torch.no_grad():
            w.zero_()
        return torch.autograd.grad(y.sum(), (x, w))

    for got, expected in zip(gradients(training.conv2d), gradients(F.conv2d), strict=True):
        assert (got - expected).norm() <= 0.01 * expected.norm()
    x, w, b = operands()
    with torch.autocast("cpu", torch.bfloat16):
        y = training.conv2d(x, w, b, padding=1)
    with torch.no_grad():
        w.zero_()
    with pytest.raises(RuntimeError, match="the weight must not change in place"):
        torch.autograd.grad(y.sum(), x, create_graph=True)


def test_what_is_no_floating_point_number_is_refused_as_by_torch(ours: tuple) -> None:
    _, w, b = operands()
    for wrong in (torch.ones(3, 24, 9, 7, dtype=torch.int64), torch.ones(3, 24, 9, 7, dtype=torch.complex64)):
        with torch.autocast("cpu", torch.bfloat16), pytest.raises(RuntimeError):
            training.conv2d(wrong, w, b)


def test_autocast_casts_no_integers_for_a_module() -> None:
    conv, x = PrefixConv2d(24, 40, 3), torch.ones(3, 24, 9, 7, dtype=torch.int64)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(TypeError, match=r"got torch\.int64"):
        conv(x)


def test_only_what_needs_a_gradient_gets_one(ours: tuple) -> None:
    for needed in range(3):
        tensors = tuple(t.detach().requires_grad_(i == needed) for i, t in enumerate(operands()))
        with torch.autocast("cpu", torch.bfloat16):
            y = training.conv2d(*tensors, padding=1)
            expected = F.conv2d(*tensors, padding=1)
        y.sum().backward()
        mine, tensors[needed].grad = tensors[needed].grad, None
        expected.sum().backward()
        assert [t.grad is not None for t in tensors] == [i == needed for i in range(3)]
        assert (mine - tensors[needed].grad).norm() <= 0.01 * mine.norm()


def test_what_others_must_see_is_torchs_own_call(ours: tuple) -> None:
    x, w, b = operands(dtype=torch.bfloat16)
    assert training.conv2d(x.detach(), w.detach(), b.detach()).grad_fn is None
    with torch.no_grad():
        assert training.conv2d(x, w, b).grad_fn is None
    for tensors in ((x.double(), w.double(), b.double()), (x[0], w, b), (x[:0], w, b), (x.half(), w.half(), b.half())):
        assert "_Conv2d" not in training.conv2d(*tensors).grad_fn.name()
    with rnp_kernels.backend("reference"):
        assert "_Conv2d" not in training.conv2d(x, w, b).grad_fn.name()
    mapped = torch.func.vmap(lambda x: training.conv2d(x[None], w, b))(x)
    assert torch.equal(mapped[:, 0], F.conv2d(x, w, b))
    compiled = torch.compile(lambda x, w: training.conv2d(x, w, padding=1), backend="eager", fullgraph=True)
    assert torch.equal(compiled(x, w), F.conv2d(x, w, padding=1))
    with pytest.raises(RuntimeError, match="expected input"):
        training.conv2d(x[:, 1:], w, b)


def test_float32_takes_the_operator_where_a_step_is_faster_that_way() -> None:
    x, w = torch.randn(2, 64, 56, 56, requires_grad=True), torch.randn(64, 64, 3, 3)
    names = [training.conv2d(x, w, padding=1).grad_fn.name() for x in (x, x[:, :, :8, :8])]
    assert "prefix_conv2d" in names[0] and "prefix_conv2d" not in names[1]


@pytest.mark.parametrize("autocast", [True, False], ids=["autocast", "bfloat16"])
def test_a_module_takes_it(ours: tuple, autocast: bool) -> None:
    theirs = nn.Conv2d(24, 40, 3, padding=1, dtype=torch.float32 if autocast else torch.bfloat16)
    conv = PrefixConv2d.from_conv2d(theirs)
    x = operands(dtype=theirs.weight.dtype)[0]
    y, grads = both(lambda x, *_: conv(x), (x, *conv.parameters()), autocast)
    expected, wanted = both(lambda x, *_: theirs(x), (x, *conv.parameters()), autocast)
    assert "_Conv2dBackward" in y.grad_fn.name() and torch.equal(y, expected)
    for grad, other in zip(grads, wanted, strict=True):
        assert (grad.double() - other.double()).norm() <= 0.01 * other.double().norm()
    assert isinstance(conv._calls[x.shape].__self__, layer_call.StockCall)
    again = both(lambda x, *_: conv(x), (x, *conv.parameters()), autocast)
    assert torch.equal(again[0], y) and all(torch.equal(a, b) for a, b in zip(again[1], grads, strict=True))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        live = torch.tensor([3, 40, 17], dtype=torch.int32)
        assert "prefix_conv2d" in conv(x, out_prefix=live).grad_fn.name()


def test_a_modules_kept_call_knows_what_it_may_not_answer(ours: tuple) -> None:
    conv, x = PrefixConv2d(24, 40, 3, padding=1), operands()[0]

    def named(autocast: bool, x: Tensor = x, dtype: torch.dtype = torch.bfloat16) -> str:
        with torch.autocast("cpu", dtype, enabled=autocast):
            return str(conv(x).grad_fn)

    for _ in range(2):
        assert "_Conv2dBackward" in named(True)
    assert "_Conv2dBackward" not in named(False) and "_Conv2dBackward" not in named(True, dtype=torch.float16)
    assert "_Conv2dBackward" in named(True, x.contiguous())
    with torch.no_grad():
        assert named(True) == "None"
    kept = conv.weight
    conv.weight = nn.Parameter(torch.zeros_like(kept))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(conv(x), conv.bias.bfloat16()[:, None, None].expand(3, 40, 9, 7))
    conv.weight = kept
    conv.padding = (0, 0)
    with torch.autocast("cpu", torch.bfloat16):
        assert conv(x).shape == (3, 40, 7, 5)
    conv.requires_grad_(False)
    with torch.autocast("cpu", torch.bfloat16):
        assert conv(x.detach()).grad_fn is None


def test_which_layers_of_bfloat16_have_gradients_of_ours(rule: Callable[[int], None], isa: str) -> None:
    def choice(c_in: int, side: int, c_out: int, kernel: int, last: bool = True, batch: int = 8) -> tuple[bool, bool]:
        layout = torch.channels_last if last else torch.contiguous_format
        x = torch.empty(batch, c_in, side, side, dtype=torch.bfloat16).contiguous(memory_format=layout)
        w = torch.empty(c_out, c_in, kernel, kernel).contiguous(memory_format=layout)
        return training.our_gradients(x, w, (1, 1), (kernel // 2,) * 4, (1, 1), 1)

    rule(3)
    tiles = isa == "avx512amx"
    assert choice(128, 8, 128, 3) == (WEIGHT if tiles else NONE)
    assert choice(512, 7, 512, 3) == (BOTH if tiles else NONE)
    assert choice(128, 28, 128, 3) == NONE
    assert choice(128, 28, 128, 3, last=False) == (WEIGHT if tiles else NONE)
    assert choice(16, 8, 16, 3) == choice(128, 8, 128, 3, batch=1) == NONE
    rule(2)
    assert choice(128, 8, 128, 3) == NONE


@pytest.mark.parametrize("last", [True, False], ids=["channels_last", "contiguous"])
def test_the_operator_passes_opcheck(last: bool) -> None:
    x, w, _ = (t.detach() for t in operands(last))
    grad = torch.randn(3, 40, 9, 7).bfloat16()
    arguments = (grad, x.bfloat16(), w, [1, 1], [1] * 4, [1, 1], 1)
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(torch.ops.rnp.conv2d_weight_grad.default, arguments, test_utils=tests)


def test_wrong_calls_are_refused_by_name() -> None:
    grad, x = torch.randn(2, 40, 9, 7), torch.randn(2, 24, 9, 7)
    call = torch.ops.rnp.conv2d_weight_grad
    geometry = ([1, 1], [1] * 4, [1, 1], 1)
    with pytest.raises(RuntimeError, match="conv2d_weight_grad: grad_output must have the output's shape"):
        call(grad[:, :, 1:], x, torch.empty(40, 24, 3, 3), *geometry)
    with pytest.raises(RuntimeError, match=r"conv2d_weight_grad: grad_output must be float32.*got Float and Half"):
        call(grad, x, torch.empty(40, 24, 3, 3, dtype=torch.half), *geometry)
    with pytest.raises(RuntimeError, match="conv2d_weight_grad: all tensors must have grad_output's dtype"):
        call(grad, x.bfloat16(), torch.empty(40, 24, 3, 3), *geometry)


@pytest.mark.parametrize("autocast", [True, False], ids=["autocast", "bfloat16"])
def test_layers_that_onednn_computes_wrongly_are_ours(autocast: bool) -> None:
    """Outputs of one column, in steps of two: on AMX oneDNN leaves some unwritten."""
    dtype = torch.float32 if autocast else torch.bfloat16
    torch.manual_seed(0)
    module = rnp_kernels.PrefixConv2d(48, 64, 3, 2, 1, dtype=dtype)
    x = torch.randn(4, 48, 28, 1, dtype=dtype)
    weight, bias = (p.detach().double().requires_grad_() for p in (module.weight, module.bias))
    exact = F.conv2d(x.double(), weight, bias, 2, 1)
    (gradient,) = torch.autograd.grad(exact.square().sum(), weight)
    for function in (module, module, lambda x: training.conv2d(x, module.weight, module.bias, 2, 1)):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = function(x)
        assert y.dtype is torch.bfloat16
        got = torch.autograd.grad(y.float().square().sum(), module.weight)[0]
        assert (got.double() - gradient).norm() <= 0.02 * gradient.norm()
        assert (y.double() - exact).norm() <= 0.01 * exact.norm()
