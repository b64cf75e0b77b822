"""Winograd convolution: its own accuracy rule, prefixes, bits, the switch, and the transformed weights' life.

The rule of the other conformance tests (an error of at most twice native torch's) judges direct convolution and cannot
hold for Winograd. Here the documented bound holds: a relative L2 error of at most 1e-5 against float64.
"""

from __future__ import annotations

import gc
import pickle
import threading
import weakref

import pytest
import torch
from torch import Tensor, nn

import rnp_kernels
from rnp_kernels import _C, PrefixConv2d, reference, testing
from rnp_kernels.testing import CASES, Case

BOUND = 1e-5
EXTRA = (
    Case("3x3, three blocks of tiles", (2, 40, 30, 27), 72, in_prefix=(40, 23), out_prefix=(72, 33)),
    Case("3x3, 512 channels", (2, 512, 7, 7), 48),
    Case("3x3, padding 2", (2, 9, 6, 5), 20, padding=2),
    Case("3x3, one output pixel", (2, 9, 3, 3), 20, padding=0),
    Case("3x3, shared prefixes", (5, 40, 8, 8), 70, in_prefix=(20, 40, 20, 40, 20), out_prefix=(35, 70, 35, 35, 35),
         scale="table", bias="table", row=(0, 1, 2, 1, 0), activation="relu", pooled=True),
    Case("3x3, skipped tail, contiguous", (3, 16, 7, 8), 40, layout="contiguous", tail="skip", in_prefix=(16, 8, 3),
         out_prefix=(40, 20, 1), pooled=True),
)  # fmt: skip
STEM = {"kernel": (7, 7), "stride": 2, "padding": 3}
STEMS = (
    Case("stem, two bands and a half", (2, 3, 44, 61), 64, **STEM),
    Case("stem, input contiguous", (1, 3, 32, 32), 20, layout="contiguous", weight_layout="channels_last", **STEM),
    Case("stem, every epilogue", (4, 3, 21, 26), 40, scale="table", bias="table", row=(0, 1, 2, 1), residual=True,
         activation="relu", pooled=True, out_prefix=(40, 9, 0, 33), **STEM),
    Case("stem, two channels, skipped tail", (3, 2, 18, 19), 33, kernel=(7, 7), stride=2, padding=0, tail="skip",
         out_prefix=(33, 1, 20)),
    Case("stem, dead input", (3, 3, 20, 21), 40, in_prefix=(3, 2, 0), **STEM),
)  # fmt: skip
# Every case of the common list that Winograd can compute, layouts, epilogues and prefixes included.
WINOGRAD_CASES = [
    *(c for c in CASES if c.kernel == (3, 3) and c.stride == 1 and c.groups == 1 and c.input[0] > 0),
    *EXTRA,
]
WITH_TILES = [(c, tile) for c in WINOGRAD_CASES for tile in (2, 4)] + [
    (c, 4) for c in (*STEMS, *(c for c in CASES if c.kernel == (7, 7) and c.layout == "channels_last"))
]
every_case = pytest.mark.parametrize(("case", "tile"), WITH_TILES, ids=str, indirect=["tile"])
PER_SAMPLE = ("input", "residual", "in_prefix", "out_prefix", "row")


@pytest.fixture(params=[2, 4])
def tile(request: pytest.FixtureRequest) -> int:
    with rnp_kernels.algorithm(f"winograd{request.param}"):
        yield request.param


def call(case: Case, arguments: testing.Tensors, winograd: Tensor) -> list[Tensor]:
    result = rnp_kernels.prefix_conv2d(**arguments, winograd=winograd)
    output, *means = result if case.pooled else (result,)
    if case.tail == "skip":
        output = torch.where(reference.live(case.out, arguments["out_prefix"], output), output, 0)
    return [output, *means]


def relative(ours: Tensor, truth: Tensor) -> float:
    """Relative L2 error; NaN where ours has one."""
    return ((ours.double() - truth).norm() / truth.norm().clamp(min=1e-30)).item()


def test_the_list_holds_what_it_should() -> None:
    assert len(WINOGRAD_CASES) >= 25
    assert {c.layout for c in WINOGRAD_CASES} == set(testing.LAYOUTS)
    assert {True, False} == {c.residual for c in WINOGRAD_CASES} == {c.pooled for c in WINOGRAD_CASES}


@every_case
def test_every_case_within_the_bound(case: Case, tile: int, isa: str, poisoned_memory: None) -> None:
    arguments = testing.make(case)
    winograd = rnp_kernels.pack_winograd(arguments["weight"], tile)
    output, *means = call(case, arguments, winograd)
    truth, truth_means = testing.run_reference(case, testing.convert(arguments, torch.float64))
    assert relative(output, truth) <= BOUND
    assert torch.equal(output == 0, (output == 0) & (truth.abs() < 1e-3)), "a zero where there is none"
    if case.pooled:
        assert (means[0] - truth_means).norm() <= BOUND * truth.norm() / truth[0, 0].numel() ** 0.5
    direct = rnp_kernels.prefix_conv2d(**arguments)
    direct = direct[0] if case.pooled else direct
    assert output.stride() == direct.stride()
    if case.in_prefix is None and case.out_prefix is None and case.input[1] > 1:
        assert not torch.equal(output, direct), "computed directly"


@every_case
def test_the_same_bits_alone_and_in_any_batch(case: Case, tile: int, isa: str, threads: None) -> None:
    arguments = testing.make(case)
    winograd = rnp_kernels.pack_winograd(arguments["weight"], tile)
    torch.set_num_threads(1)
    whole = call(case, arguments, winograd)
    batch = case.input[0]
    backwards = torch.arange(batch).flip(0)
    for count in (1, 2):
        torch.set_num_threads(count)
        for index in (torch.arange(batch), torch.cat([backwards, backwards]), *torch.arange(batch)[:, None]):
            picked = {k: v[index] if k in PER_SAMPLE and v is not None else v for k, v in arguments.items()}
            for tensor, again in zip(whole, call(case, picked, winograd), strict=True):
                assert torch.equal(tensor[index], again), f"{count} threads, samples {index.tolist()}"


def test_none_is_an_explicit_full_prefix(tile: int, isa: str) -> None:
    case = testing.case("several blocks")
    arguments = testing.make(case)
    winograd = rnp_kernels.pack_winograd(arguments["weight"], tile)
    full = {"in_prefix": torch.tensor([130], dtype=torch.int32), "out_prefix": torch.tensor([100], dtype=torch.int32)}
    whole, explicit = call(case, arguments, winograd), call(case, arguments | full, winograd)
    assert torch.equal(whole[0], explicit[0])


def test_nan_and_infinity_reach_the_outputs_that_read_them(isa: str) -> None:
    x = torch.randn(1, 20, 12, 12).contiguous(memory_format=torch.channels_last)
    w = torch.randn(33, 20, 3, 3)
    x[0, 3, 5, 5] = torch.nan
    with rnp_kernels.algorithm("winograd4"):
        y = rnp_kernels.prefix_conv2d(x, w, padding=1, activation="relu", winograd=rnp_kernels.pack_winograd(w, 4))
    assert y[0, :, 4:7, 4:7].isnan().all()
    assert y[0, :, :, 8:].isfinite().all() and y[0, :, 8:].isfinite().all(), "beyond the tiles that read it"


def test_the_default_uses_it_and_direct_does_not() -> None:
    assert rnp_kernels.get_algorithm() == "auto"
    conv = PrefixConv2d(64, 64, 3, padding=1)
    x = torch.randn(2, 64, 14, 14).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        first = conv(x)
        assert torch.equal(conv(x), first), "the second call has other bits"
        with rnp_kernels.algorithm("direct"):
            assert rnp_kernels.get_algorithm() == "direct"
            direct = conv(x)
        assert torch.equal(conv(x), first)
    assert not torch.equal(first, direct)
    truth = nn.functional.conv2d(x.double(), conv.weight.double(), conv.bias.double(), padding=1)
    assert relative(direct, truth) < relative(first, truth) <= BOUND
    assert torch.equal(conv(x), direct), "a call that needs gradients on a small map is computed directly"


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format], ids=["NHWC", "NCHW"])
def test_the_operator_transforms_weights_that_nobody_keeps(
    isa: str, threads: None, memory_format: torch.memory_format
) -> None:
    w, bias = torch.randn(96, 64, 3, 3), torch.randn(96)
    packed = rnp_kernels.pack_weight(w)
    i, o = torch.tensor([64, 40, 64, 0], dtype=torch.int32), torch.tensor([96, 96, 33, 96], dtype=torch.int32)
    for height, transforms in ((20, True), (19, False)):
        x = torch.randn(4, 64, height, 20).contiguous(memory_format=memory_format)
        tile = _C.winograd_tile((64, height, 20), (96, 64, 3, 3), (1, 1), (1,) * 4, (1, 1), 1, "float32")
        assert tile == 4
        winograd = rnp_kernels.pack_winograd(w, tile)

        def call(x: Tensor, i: Tensor, o: Tensor, **held: Tensor) -> Tensor:
            return rnp_kernels.prefix_conv2d(x, w, bias, padding=1, in_prefix=i, out_prefix=o, **held)

        given = call(x, i, o, winograd=winograd)
        with rnp_kernels.algorithm("direct"):
            direct = call(x, i, o)
        assert not torch.equal(given, direct)
        for count in (1, 2):
            torch.set_num_threads(count)
            y = call(x, i, o)
            assert torch.equal(y, given if transforms else direct)
            assert torch.equal(call(x, i, o, packed=packed), y), "a pack changes no bit"
            alone = [call(x[n : n + 1], i[n : n + 1], o[n : n + 1]) for n in range(4)]
            assert torch.equal(torch.cat(alone), y), "a sample has the same bits alone"
        nothing = torch.zeros(4, dtype=torch.int32)
        assert torch.equal(call(x, nothing, o)[0, :, 0, 0], bias), "no live input: the bias"
        assert not call(x, i, nothing).any()


@pytest.mark.parametrize("channels, size", [(64, 56), (96, 20)], ids=["torch's own without Winograd", "ours"])
def test_a_module_gives_the_same_bits_with_and_without_gradients(channels: int, size: int) -> None:
    conv = PrefixConv2d(channels, channels, 3, padding=1)
    x = torch.randn(2, channels, size, size).contiguous(memory_format=torch.channels_last).requires_grad_()
    upstream = torch.randn(2, channels, size, size).contiguous(memory_format=torch.channels_last)
    for _ in range(2):  # the second time with other weights
        with torch.no_grad():
            whole = conv(x)
            assert torch.equal(conv(x), whole)
        for _ in range(3):  # the long way, then whatever is kept
            y = conv(x)
            assert y.requires_grad and torch.equal(y, whole)
            y.backward(upstream)
        exact = x.detach().double().requires_grad_(), conv.weight.detach().double().requires_grad_()
        truth = nn.functional.conv2d(*exact, conv.bias.detach().double(), padding=1)
        assert relative(whole, truth.detach()) <= BOUND
        truth.backward(upstream.double())
        assert relative(x.grad / 3, exact[0].grad) <= BOUND and relative(conv.weight.grad / 3, exact[1].grad) <= BOUND
        x.grad = conv.weight.grad = None
        with rnp_kernels.algorithm("direct"):
            assert not torch.equal(conv(x), whole)
        with torch.no_grad():
            conv.weight.mul_(-0.5)


def test_autocast_leaves_no_other_route_behind() -> None:
    conv = PrefixConv2d(32, 32, 3, padding=1)
    x = torch.randn(2, 32, 24, 24).contiguous(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):
        conv(x)
    with torch.no_grad():
        whole = conv(x)
    assert torch.equal(conv(x), whole)


def test_a_computed_weight_has_the_bits_of_the_operator() -> None:
    """Its module keeps no transform; 16 channels to 16 train through torch's own convolution."""
    conv = nn.utils.parametrizations.weight_norm(PrefixConv2d(16, 16, 3, padding=1))
    x = torch.randn(2, 16, 60, 60).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        operator = rnp_kernels.prefix_conv2d(x, conv.weight, conv.bias, padding=1)
        assert torch.equal(conv(x), operator)
        assert torch.equal(conv(x, torch.full((2,), 16, dtype=torch.int32)), operator)


def test_a_module_gives_the_same_bits_on_every_way(threads: None) -> None:
    conv = PrefixConv2d(64, 96, 3, padding=1)
    x = torch.randn(3, 64, 14, 14).contiguous(memory_format=torch.channels_last)
    full, part = torch.full((3,), 64, dtype=torch.int32), torch.tensor([96, 40, 96], dtype=torch.int32)
    for count in (1, 2):
        torch.set_num_threads(count)
        with torch.no_grad():
            whole = conv(x)
            assert torch.equal(torch.stack([conv(x[n]) for n in range(3)]), whole), "unbatched"
            assert torch.equal(torch.cat([conv(x[n : n + 1]) for n in range(3)]), whole)
            assert torch.equal(conv(x, full), whole)
            assert torch.equal(conv(x, full, part)[::2], whole[::2])


def test_the_switch_refuses_other_names() -> None:
    with pytest.raises(ValueError, match=r"set_algorithm: .*auto.*'fast'"):
        rnp_kernels.set_algorithm("fast")
    with pytest.raises(ZeroDivisionError), rnp_kernels.algorithm("direct"):
        _ = 1 / 0
    assert rnp_kernels.get_algorithm() == "auto"


def test_transformed_weights_are_dropped_and_made_again() -> None:
    conv = PrefixConv2d(64, 64, 3, padding=1)
    model = nn.Sequential(conv, nn.ReLU())
    x = torch.randn(1, 64, 14, 14)
    with torch.no_grad():
        y = model(x)
        kept = weakref.ref(conv._pack_cache().transformed(conv.weight, 4))
        assert kept().numel() >= 4 * conv.weight.numel()
        assert rnp_kernels.forget_transformed_weights(model) is model
        gc.collect()
        assert kept() is None, "the memory was not let go"
        assert torch.equal(model(x), y)
        with rnp_kernels.algorithm("direct"):
            rnp_kernels.forget_transformed_weights(model)
            model(x)
            assert conv._pack_cache()._transformed is None
    assert len(pickle.dumps(model)) < 1.2 * 4 * conv.weight.numel(), "it was saved"


def test_memory_is_what_the_documents_say() -> None:
    w = torch.randn(64, 64, 3, 3)
    for tile, factor in ((2, 16 / 9), (4, 4)):
        assert factor <= rnp_kernels.pack_winograd(w, tile).numel() / w.numel() < factor * 1.01


@pytest.mark.parametrize("change", ["in place", "assigned", ".data written", "loaded"])
def test_a_changed_weight_is_transformed_again(change: str) -> None:
    conv = PrefixConv2d(64, 64, 3, padding=1)
    x = torch.randn(2, 64, 14, 14).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        conv(x)
        if change == "in place":
            conv.weight[3, 4, 1, 1] += 5
        elif change == "assigned":
            conv.weight = nn.Parameter(torch.randn_like(conv.weight))
        elif change == ".data written":
            conv.weight.data.mul_(2)
        else:
            conv.load_state_dict({k: torch.randn_like(v) for k, v in conv.state_dict().items()})
        truth = nn.functional.conv2d(x.double(), conv.weight.double(), conv.bias.double(), padding=1)
        again = conv(x)
        assert relative(again, truth) <= BOUND
        assert torch.equal(conv(x), again)


def test_what_does_not_belong_is_refused() -> None:
    w = torch.randn(8, 6, 3, 3)
    x = torch.randn(1, 6, 8, 8)
    other = rnp_kernels.pack_winograd(torch.randn(6, 8, 3, 3), 4)
    for wrong in (other, rnp_kernels.pack_weight(w), torch.zeros(3), rnp_kernels.pack_winograd(w, 4)[:-1]):
        with pytest.raises(RuntimeError, match="winograd does not belong to weight"):
            rnp_kernels.prefix_conv2d(x, w, winograd=wrong)
    stem, last = torch.randn(8, 3, 7, 7), torch.randn(1, 3, 8, 8).contiguous(memory_format=torch.channels_last)
    for wrong in (rnp_kernels.pack_winograd(torch.randn(8, 3, 3, 3)), rnp_kernels.pack_winograd(stem)[:-1]):
        with pytest.raises(RuntimeError, match="winograd does not belong to weight"):
            rnp_kernels.prefix_conv2d(last, stem, stride=2, winograd=wrong)
    for bad, rule in (
        (torch.randn(8, 6, 1, 1), "3x3"),
        (w.double(), "float32"),
        (torch.randn(8, 5, 7, 7), "at most 4"),
    ):
        with pytest.raises(RuntimeError, match=rule):
            rnp_kernels.pack_winograd(bad, 4)
    with pytest.raises(RuntimeError, match="tile must be 2 or 4"):
        rnp_kernels.pack_winograd(w, 3)
    with pytest.raises(RuntimeError, match="tile must be 4 for a 7x7"):
        rnp_kernels.pack_winograd(stem, 2)


def test_it_is_ignored_where_winograd_does_not_apply() -> None:
    w = torch.randn(64, 64, 3, 3)
    x = torch.randn(2, 64, 14, 14)
    winograd = rnp_kernels.pack_winograd(w, 4)
    for options in ({"stride": 2}, {"stride": (1, 2)}, {"padding": 14, "dilation": (20, 1)}):
        ours = rnp_kernels.prefix_conv2d(x, w, winograd=winograd, **options)
        assert torch.equal(ours, rnp_kernels.prefix_conv2d(x, w, **options))
    with torch.autocast("cpu", torch.bfloat16):
        assert rnp_kernels.prefix_conv2d(x, w, winograd=winograd).dtype == torch.bfloat16
    stem, image = torch.randn(64, 3, 7, 7), torch.randn(2, 3, 32, 32)
    folded = rnp_kernels.pack_winograd(stem)
    for options in ({}, {"stride": (2, 1)}, {"stride": 2, "dilation": 2}):
        ours = rnp_kernels.prefix_conv2d(image, stem, winograd=folded, **options)
        assert torch.equal(ours, rnp_kernels.prefix_conv2d(image, stem, **options)), options


def test_a_module_folds_a_stem(threads: None) -> None:
    conv = PrefixConv2d(3, 64, 7, stride=2, padding=3)
    image = torch.randn(3, 3, 64, 64)
    for x in (image.contiguous(memory_format=torch.channels_last), image):
        truth = nn.functional.conv2d(x.double(), conv.weight.double(), conv.bias.double(), stride=2, padding=3)
        for count in (1, 2):
            torch.set_num_threads(count)
            with torch.no_grad():
                y = conv(x)
                assert torch.equal(torch.cat([conv(x[n : n + 1]) for n in range(3)]), y)
                assert torch.equal(conv(x), y)
                with rnp_kernels.algorithm("direct"):
                    direct = conv(x)
            assert relative(y, truth) <= BOUND and y.stride() == direct.stride()
            assert not torch.equal(y, direct)
            assert relative(conv(x).detach(), truth) <= 1e-6, "a call that needs gradients is computed directly"


def test_operator_check() -> None:
    w, x = torch.randn(20, 12, 3, 3, requires_grad=True), torch.randn(2, 12, 8, 8, requires_grad=True)
    torch.library.opcheck(torch.ops.rnp.pack_winograd, (torch.randn(40, 3, 7, 7), 4))
    for tile in (2, 4):
        torch.library.opcheck(torch.ops.rnp.pack_winograd, (w.detach(), tile))
        winograd = rnp_kernels.pack_winograd(w, tile)
        with rnp_kernels.algorithm(f"winograd{tile}"):
            arguments = (
                x,
                w,
                None,
                [1, 1],
                [1] * 4,
                [1, 1],
                1,
                None,
                None,
                None,
                None,
                None,
                "relu",
                "zero",
                True,
                None,
            )
            torch.library.opcheck(torch.ops.rnp.prefix_conv2d, (*arguments, winograd), rtol=1e-3, atol=1e-4)


def test_gradients_are_those_of_direct_convolution() -> None:
    w, x = torch.randn(20, 12, 3, 3, requires_grad=True), torch.randn(2, 12, 9, 8, requires_grad=True)
    grad = torch.randn(2, 20, 9, 8)
    direct = torch.autograd.grad(rnp_kernels.prefix_conv2d(x, w, padding=1), (x, w), grad)
    with rnp_kernels.algorithm("winograd4"):
        y = rnp_kernels.prefix_conv2d(x, w, padding=1, winograd=rnp_kernels.pack_winograd(w, 4))
        for ours, theirs in zip(torch.autograd.grad(y, (x, w), grad), direct, strict=True):
            assert torch.equal(ours, theirs)


def test_two_threads_give_the_same_bits() -> None:
    conv = PrefixConv2d(64, 64, 3, padding=1)
    x = torch.randn(2, 64, 14, 14).contiguous(memory_format=torch.channels_last)
    results: list[Tensor] = []

    def run() -> None:
        with torch.no_grad():
            for _ in range(10):
                results.append(conv(x))

    workers = [threading.Thread(target=run) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(results) == 20 and all(torch.equal(r, results[0]) for r in results)


def test_the_rule_looks_at_the_layer_and_the_prefixes(xeon: bool) -> None:
    def chosen(c: int, size: int, out: int, i: int, o: int, **other: int) -> int:
        kernel, stride, groups = other.get("kernel", 3), other.get("stride", 1), other.get("groups", 1)
        shape = ((c, size, size), (out, c // groups, kernel, kernel), (stride,) * 2, (kernel // 2,) * 4, (1, 1), groups)
        return _C.choose_algorithm(*shape, "float32", i, o)

    assert chosen(64, 56, 64, 64, 64) == chosen(512, 14, 512, 512, 512) == chosen(64, 7, 64, 64, 64) == 4
    assert chosen(512, 7, 512, 512, 512) == chosen(512, 7, 512, 8, 8) == (2 if xeon else 4)
    assert chosen(3, 224, 64, 3, 64, kernel=7, stride=2) == chosen(3, 224, 64, 3, 8, kernel=7, stride=2) == 4
    assert chosen(3, 224, 64, 2, 64, kernel=7, stride=2) == chosen(5, 224, 64, 5, 64, kernel=7, stride=2) == 0
    assert chosen(1, 224, 64, 1, 64, kernel=7, stride=2) == chosen(3, 224, 64, 3, 64, kernel=7) == 0
    assert chosen(64, 56, 64, 64, 0) == chosen(64, 56, 64, 0, 64) == 0
    assert chosen(64, 56, 64, 1, 64) == 0, "one channel is not worth a transform"
    for other in ({"stride": 2}, {"kernel": 5}, {"kernel": 1}, {"groups": 2}):
        assert chosen(64, 56, 64, 64, 64, **other) == 0
