"""The shortest way through a module is taken where nothing stands against it, and only there, with the same bits."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import BaseTorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import rnp_kernels
from rnp_kernels import PrefixConv2d, layer_call, stock

LAYERS = {  # channels in, out, kernel, side, groups, channels_last: kernels by address, and torch's own
    "direct": (12, 40, 3, 9, 1, True),
    "winograd": (32, 32, 3, 16, 1, True),
    "1x1 map": (96, 24, 1, 1, 1, False),
    "depthwise": (40, 40, 3, 9, 40, True),
    "depthwise, contiguous": (8, 8, 5, 30, 8, False),
    "groups of 4": (24, 24, 3, 9, 6, True),
    "conv2d": (64, 64, 3, 9, 4, True),
    "one product": (64, 20, 1, 12, 1, False),
    "stem": (3, 20, 3, 12, 1, False),
}


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bool]]:
    """For every call that a module kept, whether it answered."""
    answers: list[bool] = []
    for kind in (layer_call.LayerCall, layer_call.StockCall):

        def call(self: object, *arguments: object, real: Callable = kind.__call__) -> torch.Tensor | None:
            output = real(self, *arguments)
            answers.append(output is not None)
            return output

        monkeypatch.setattr(kind, "__call__", call)
    yield answers


def made(layer: tuple[int, int, int, int, int, bool], batch: int = 3) -> tuple[PrefixConv2d, torch.Tensor]:
    c_in, c_out, kernel, side, groups, last = layer
    torch.manual_seed(0)
    conv = PrefixConv2d(c_in, c_out, kernel, padding=kernel // 2, groups=groups).eval()
    x = torch.randn(batch, c_in, side, side)
    return conv, x.contiguous(memory_format=torch.channels_last) if last else x


def int32(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS.keys())
def test_it_is_taken_and_has_the_bits_of_the_long_way(layer: tuple, isa: str, threads: None, taken: list[bool]) -> None:
    conv, x = made(layer)
    with torch.no_grad():
        long = conv(x)
        assert taken == []
        for _ in range(4):
            y = conv(x)
            assert torch.equal(y, long) and y.stride() == long.stride()
        assert taken[-1] and taken.count(True) >= 2
        for n in range(3):
            for _ in range(3):
                assert torch.equal(conv(x[n : n + 1]), long[n : n + 1])
        assert taken[-1]
    theirs = nn.functional.conv2d(x, conv.weight, conv.bias, padding=conv.padding, groups=conv.groups)
    torch.testing.assert_close(long, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["direct", "winograd", "depthwise", "groups of 4"])
def test_prefixes_go_the_same_way(name: str, isa: str, taken: list[bool]) -> None:
    conv, x = made(LAYERS[name])
    c_in, c_out = LAYERS[name][:2]
    narrow_in, narrow_out = int32(c_in, c_in // 2, 3), int32(c_out // 2, c_out, 5)
    poisoned = x.clone()
    poisoned[1, c_in // 2 :], poisoned[2, 3:] = torch.nan, torch.nan
    with torch.no_grad():
        answers = [conv(poisoned, narrow_in, narrow_out) for _ in range(4)]
        assert taken[-1] and all(torch.equal(answer, answers[0]) for answer in answers)
        assert torch.isfinite(answers[0]).all()
        for wrong in (int32(c_in + 1, 0, 0), int32(-1, 0, 0)):
            with pytest.raises(RuntimeError, match="in_prefix must lie in"):
                conv(x, wrong, None)
        with pytest.raises(ValueError, match="in_prefix must have shape"):
            conv(x, int32(1), None)
        with pytest.raises(TypeError, match="in_prefix must be int32"):
            conv(x, narrow_in.long(), None)


def settle(conv: PrefixConv2d, x: torch.Tensor) -> None:
    with torch.no_grad():
        for _ in range(3):
            conv(x)


CHANGES: dict[str, Callable[[PrefixConv2d], object]] = {
    "bias written": lambda c: c.bias.data.add_(1),
    "bias swapped": lambda c: setattr(c.bias, "data", torch.randn_like(c.bias)),
    "bias negated": lambda c: setattr(c.bias, "data", torch._neg_view(c.bias.data)),
    "another bias": lambda c: setattr(c, "bias", nn.Parameter(torch.randn_like(c.bias))),
    "another bias, negated": lambda c: setattr(c, "bias", nn.Parameter(torch._neg_view(torch.randn_like(c.bias)))),
    "no bias": lambda c: setattr(c, "bias", None),
    "padding": lambda c: setattr(c, "padding", (0, 0)),
    "stride": lambda c: setattr(c, "stride", (2, 2)),
    "weight written": lambda c: c.weight.data.mul_(2),
    "weight negated": lambda c: setattr(c.weight, "data", torch._neg_view(c.weight.data)),
    "weight transposed": lambda c: setattr(c.weight, "data", c.weight.data.transpose(2, 3)),
    "float64": lambda c: c.double(),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
@pytest.mark.parametrize("name", ["direct", "winograd", "depthwise", "conv2d"])
def test_changes_are_noticed(name: str, change: Callable[[PrefixConv2d], object]) -> None:
    conv, x = made(LAYERS[name])
    settle(conv, x)
    change(conv)
    x = x.to(conv.weight.dtype)
    for _ in range(3):
        with torch.no_grad():
            theirs = nn.functional.conv2d(x, conv.weight, conv.bias, conv.stride, conv.padding, groups=conv.groups)
            torch.testing.assert_close(conv(x), theirs, rtol=1e-4, atol=1e-4)


class Seen(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def test_what_must_see_operators_sees_them(taken: list[bool]) -> None:
    conv, x = made(LAYERS["direct"])
    settle(conv, x)
    taken.clear()
    with torch.no_grad(), Seen() as seen:
        conv(x)
    assert any("prefix_conv2d" in name for name in seen.names)
    with torch.no_grad(), torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        conv(x)
    assert any("prefix_conv2d" in event.key for event in profile.key_averages())
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert conv(x).dtype is torch.bfloat16
    with torch.no_grad(), BaseTorchFunctionMode():
        conv(x)
    assert not any(taken)
    taken.clear()
    y = conv(x)
    assert y.requires_grad and taken and all(taken), "torch's own convolution sees gradients"
    taken.clear()
    y.sum().backward()
    with torch.no_grad(), rnp_kernels.backend("reference"):
        torch.testing.assert_close(conv(x), y, rtol=1e-4, atol=1e-4)
    assert not any(taken)


STOCK = {  # path of csrc/core/stock.h, and layers that take it
    "conv2d": (stock.CONV2D, (64, 64, 3, 9, 4, True)),
    "oneDNN": (stock.ONEDNN, (128, 32, 1, 14, 1, False)),
    "one product": (stock.GEMM, (64, 20, 1, 30, 1, False)),
}


@pytest.mark.parametrize(("path", "layer"), STOCK.values(), ids=STOCK.keys())
def test_torchs_own_convolution_in_every_mode(path: int, layer: tuple, taken: list[bool]) -> None:
    """torch.conv2d may be called at once in all of them; what lies below it only in none."""
    conv, x = made(layer)
    if stock.route(conv, x, conv.weight, conv.bias, conv.padding).path != path:
        pytest.skip("this torch has another path here")
    settle(conv, x)
    taken.clear()
    theirs = nn.functional.conv2d(x, conv.weight, conv.bias, padding=conv.padding, groups=conv.groups)
    at_once = path == stock.CONV2D

    def check(y: torch.Tensor, expected: torch.Tensor = theirs) -> None:
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)

    with torch.no_grad(), Seen() as seen:
        check(conv(x))
    assert taken == [at_once] and any("conv" in name for name in seen.names)
    y = conv(x)
    assert y.requires_grad and taken[1:] and all(taken[1:]), "its gradients are torch's own"
    check(y)
    ours, own = (torch.autograd.grad(v.square().sum(), (conv.weight, conv.bias)) for v in (y, theirs))
    for mine, other in zip(ours, own, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-2)
    with torch.no_grad():
        traced = torch.jit.trace(conv, (x,), check_trace=False)
        check(traced(-x), nn.functional.conv2d(-x, conv.weight, conv.bias, padding=conv.padding, groups=conv.groups))
        taken.clear()
        with torch.autocast("cpu", torch.bfloat16):
            assert conv(x).dtype is torch.bfloat16
        with rnp_kernels.backend("reference"):
            check(conv(x))
        assert not any(taken)
        lines = int32(*[layer[1]] * 3)
        check(conv(x, None, lines))  # what has prefixes is the operator's
        assert not any(taken)
        check(conv(x))
        assert taken[-1]


def test_torchs_own_convolution_under_transforms() -> None:
    layer = STOCK["conv2d"][1]
    conv, x = made(layer)
    settle(conv, x)
    theirs = nn.Conv2d(layer[0], layer[1], layer[2], padding=conv.padding, groups=conv.groups)
    theirs.load_state_dict(conv.state_dict())
    expected = torch.func.grad(lambda x: theirs(x).sum())
    torch.testing.assert_close(torch.func.grad(lambda x: conv(x).sum())(x), expected(x), rtol=1e-4, atol=1e-3)


def test_lazy_negation_is_resolved(taken: list[bool]) -> None:
    conv, x = made(LAYERS["direct"])
    settle(conv, x)
    negated = torch._neg_view(x)
    with torch.no_grad():
        torch.testing.assert_close(conv(negated), conv(-x), rtol=1e-4, atol=1e-5)
    assert taken[-2:] == [False, True]


def test_the_algorithm_in_force_is_followed() -> None:
    conv, x = made(LAYERS["winograd"])
    settle(conv, x)
    with torch.no_grad():
        auto = conv(x)
        with rnp_kernels.algorithm("direct"):
            direct = [conv(x) for _ in range(3)]
        assert all(torch.equal(y, direct[0]) for y in direct) and not torch.equal(direct[0], auto)
        assert torch.equal(conv(x), auto)


def test_it_is_never_copied_and_can_be_dropped(taken: list[bool]) -> None:
    conv, x = made(LAYERS["direct"])
    settle(conv, x)
    assert "_calls" in vars(conv) and "_calls" not in vars(copy.deepcopy(conv))
    conv.forget_packed_weight()
    assert "_calls" not in vars(conv)
    taken.clear()
    settle(conv, x)
    assert taken.count(True) == 1


def test_a_kept_call_knows_its_weights_from_others_at_the_same_address() -> None:
    """The allocator likes to hand out again what the assignment before last has freed."""
    conv, x = made(LAYERS["direct"])
    other = torch.randn(1, 12, 11, 11).contiguous(memory_format=torch.channels_last)
    base = conv.weight.detach().clone()
    for trial in range(20):
        conv.weight.data = base.clone()
        settle(conv, x)
        conv.weight.data = torch.randn_like(base)
        settle(conv, other)
        changed = base.clone()
        changed[:, trial % 12, 1, trial % 3] += 1  # elements that the operator does not compare
        conv.weight.data = changed
        with torch.no_grad():
            theirs = nn.functional.conv2d(x, changed, conv.bias, padding=conv.padding)
            torch.testing.assert_close(conv(x), theirs, rtol=1e-4, atol=1e-4)


def test_kept_calls_go_with_the_weights_they_hold() -> None:
    conv, _ = made(LAYERS["direct"])
    for _ in range(3):
        for side in range(5, 15):
            settle(conv, torch.randn(1, side, side, 12).permute(0, 3, 1, 2))
        assert len(vars(conv)["_calls"]) == 10
        old = StorageWeakRef(conv.weight.untyped_storage())
        conv.weight.data = torch.randn_like(conv.weight)
        settle(conv, torch.randn(1, 9, 9, 12).permute(0, 3, 1, 2))
        assert len(vars(conv)["_calls"]) == 1 and old.expired()


def test_calls_of_two_tiles_are_kept_side_by_side(taken: list[bool]) -> None:
    conv, x = made(LAYERS["winograd"])
    other = x[:, :, :5, :5].contiguous(memory_format=torch.channels_last)
    tiles = [stock.route(conv, x, conv.weight, conv.bias, conv.padding).tile for x in (x, other)]
    assert tiles == [4, 2]
    for _ in range(3):
        settle(conv, x)
        settle(conv, other)
    assert all(taken[-6:])


@pytest.mark.parametrize("name", ["direct", "winograd", "depthwise", "one product", "conv2d"])
def test_tensors_without_memory_are_zeros(name: str) -> None:
    """Their address is null: a kernel that is given it would end the process."""
    conv, x = made(LAYERS[name])
    settle(conv, x)
    zeros = torch._efficientzerotensor(x.shape)
    if x.is_contiguous(memory_format=torch.channels_last):
        n, c, h, w = x.shape
        zeros = torch._efficientzerotensor((n, h, w, c)).permute(0, 3, 1, 2)
    assert zeros.data_ptr() == 0 and zeros.stride() == x.stride()

    def check(x: torch.Tensor) -> None:
        for _ in range(3):
            with torch.no_grad():
                y = conv(x)
            theirs = nn.functional.conv2d(x, conv.weight, conv.bias, padding=conv.padding, groups=conv.groups)
            torch.testing.assert_close(y, theirs, rtol=1e-4, atol=1e-4)

    check(zeros)
    with torch.no_grad():
        none = torch._efficientzerotensor((3,), dtype=torch.int32)
        assert torch.equal(conv(x, None, none), torch.zeros_like(conv(x)))
    conv.bias = nn.Parameter(torch._efficientzerotensor(conv.bias.shape))
    check(x)
    conv.weight = nn.Parameter(torch._efficientzerotensor(conv.weight.shape))
    check(x)


def test_many_shapes_do_not_pile_up() -> None:
    conv = PrefixConv2d(4, 4, 3)
    with torch.no_grad():
        for side in range(3, 103):
            for _ in range(2):
                conv(torch.zeros(1, 4, side, 3))
    assert len(vars(conv)["_calls"]) <= 64 and len(vars(conv)["_routes"]) <= 64
