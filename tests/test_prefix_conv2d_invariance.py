"""The same sample gives the same bits: alone, in any batch, with any number of threads, with or without prefixes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import rnp_kernels
from rnp_kernels import _C, reference, testing
from rnp_kernels.testing import CASES, Case

PER_SAMPLE = ("input", "residual", "in_prefix", "out_prefix", "row")
INVARIANCE_CASES = [c for c in CASES if c.input[0] > 0 and c.layout != "expanded"]


def call(case: Case, arguments: testing.Tensors) -> list[Tensor]:
    result = rnp_kernels.prefix_conv2d(**arguments)
    output, *means = result if case.pooled else (result,)
    if case.tail == "skip":  # what stands in the tail is undefined
        output = torch.where(reference.live(case.out, arguments["out_prefix"], output), output, 0)
    return [output, *means]


def pick(arguments: testing.Tensors, index: Any) -> testing.Tensors:
    return {k: v[index] if k in PER_SAMPLE and v is not None else v for k, v in arguments.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", INVARIANCE_CASES, ids=str)
def test_alone_and_in_any_batch(case: Case, dtype: torch.dtype, isa: str, threads: None, poisoned_memory: None) -> None:
    arguments = testing.make(case, dtype)
    batch = case.input[0]
    torch.set_num_threads(1)
    whole = call(case, arguments)
    order = torch.arange(batch).flip(0)
    longer = torch.cat([order, torch.arange(batch), order])
    for count in (1, 2):
        torch.set_num_threads(count)
        for tensor, again in zip(whole, call(case, arguments), strict=True):
            assert torch.equal(tensor, again), f"{count} threads"
        for index in (order, longer):
            for tensor, again in zip(whole, call(case, pick(arguments, index)), strict=True):
                assert torch.equal(tensor[index], again), f"{count} threads, samples {index.tolist()}"
        for n in range(batch):
            for tensor, again in zip(whole, call(case, pick(arguments, slice(n, n + 1))), strict=True):
                assert torch.equal(tensor[n : n + 1], again), f"{count} threads, sample {n} alone"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", [c for c in INVARIANCE_CASES if c.tail == "zero"], ids=str)
def test_none_is_an_explicit_full_prefix(case: Case, dtype: torch.dtype, isa: str) -> None:
    arguments = testing.make(case, dtype)
    arguments["input"] = torch.where(arguments["input"].isnan(), 0.5, arguments["input"])
    batch, c_in = case.input[:2]
    arguments |= {"in_prefix": None, "out_prefix": None}
    dense = call(case, arguments)
    prefixes = {"in_prefix": torch.full((batch,), c_in).int(), "out_prefix": torch.full((batch,), case.out).int()}
    for names in (("in_prefix",), ("out_prefix",), ("in_prefix", "out_prefix")):
        some = {name: prefixes[name] for name in names}
        for tensor, again in zip(dense, call(case, arguments | some), strict=True):
            assert torch.equal(tensor, again), names
    mixed = {name: value.clone() for name, value in prefixes.items()}
    mixed["in_prefix"][0] = c_in // 2
    mixed["out_prefix"][0] = case.out // 2
    for tensor, again in zip(dense, call(case, arguments | mixed), strict=True):
        assert torch.equal(tensor[1:], again[1:]), "beside a sample of another width"


@pytest.mark.parametrize("case", INVARIANCE_CASES, ids=str)
def test_a_live_sample_does_not_depend_on_poison(case: Case, isa: str) -> None:
    if case.in_prefix is None:
        return
    arguments = testing.make(case)
    clean = arguments | {"input": torch.where(arguments["input"].isnan(), 0, arguments["input"])}
    for tensor, again in zip(call(case, arguments), call(case, clean), strict=True):
        assert torch.equal(tensor, again)


# Layers of every branch of csrc/core/stock.cpp: (C_in, size, C_out, kernel, stride, groups, channels_last).
STOCK_LAYERS = {
    "3x3 on a large map": (16, 56, 32, 3, 1, 1, True),
    "contiguous 1x1 with stride": (320, 24, 64, 1, 2, 1, False),
    "groups of 16 in steps of two": (32, 14, 32, 3, 2, 2, True),
    "contiguous groups of 40 in steps of two": (80, 28, 80, 3, 2, 2, False),
    "contiguous multiplier 16": (4, 32, 64, 3, 1, 4, False),
    "contiguous 1x1 of few planes in steps of two": (8, 96, 32, 1, 2, 1, False),
    "contiguous patches": (3, 32, 24, 4, 4, 1, False),
    "contiguous, many channels in steps of two": (72, 60, 24, 3, 2, 1, False),
    "groups of 10": (40, 14, 40, 3, 1, 4, True),
    "contiguous large groups": (64, 14, 64, 3, 1, 2, False),
    "depthwise 9x9": (48, 14, 48, 9, 1, 48, True),
    "contiguous depthwise on a small map": (48, 14, 48, 3, 2, 48, False),
    "contiguous groups of 8": (32, 14, 32, 3, 1, 4, False),
    "contiguous 3x3": (32, 28, 48, 3, 1, 1, False),
    "contiguous 1x1 of few channels": (12, 48, 96, 1, 1, 1, False),
    "contiguous 1x1 on a small map": (520, 14, 96, 1, 1, 1, False),
    "contiguous 1x1, small": (12, 14, 96, 1, 1, 1, False),
    "contiguous stem": (3, 120, 32, 3, 2, 1, False),
}


@pytest.mark.parametrize("layer", STOCK_LAYERS.values(), ids=STOCK_LAYERS.keys())
def test_samples_that_take_the_stock_path_keep_their_bits(layer: tuple[Any, ...], threads: None) -> None:
    c_in, size, c_out, kernel, stride, groups, channels_last = layer
    layout = torch.channels_last if channels_last else torch.contiguous_format
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, c_in, size, size, generator=generator).contiguous(memory_format=layout)
    weight = torch.randn(c_out, c_in // groups, kernel, kernel, generator=generator)
    pad = kernel // 2
    path = _C.stock_path(
        x.shape[1:], weight.shape, (stride, stride), (pad,) * 4, (1, 1), groups, "float32", channels_last
    )
    assert path != 0 or not torch.backends.mkldnn.is_available(), "not a layer of the stock path"
    narrow = torch.tensor([c_out, c_out, c_out // 2, c_out, 1]).int()
    torch.set_num_threads(1)
    whole = rnp_kernels.prefix_conv2d(x, weight, None, stride, pad, 1, groups)
    for count in (1, 2):
        torch.set_num_threads(count)
        mixed = rnp_kernels.prefix_conv2d(x, weight, None, stride, pad, 1, groups, out_prefix=narrow)
        assert torch.equal(mixed[[0, 1, 3]], whole[[0, 1, 3]]), f"{count} threads, beside narrow samples"
        for first, end in ((0, 1), (4, 5), (1, 3), (0, 5)):
            part = rnp_kernels.prefix_conv2d(x[first:end], weight, None, stride, pad, 1, groups)
            assert torch.equal(part, whole[first:end]), f"{count} threads, samples {first}…{end - 1}"


# Layers to which oneDNN gives other bits alone than in some batch or on some number of threads, or, in bfloat16 on AMX,
# no numbers at all: (N, C_in, H, W, C_out, kernel, stride, padding, dilation, groups, channels_last).
UNSTEADY = {
    "grouped 1x1 on a line": (2, 6, 33, 1, 66, 1, 2, 0, 1, 2, False),
    "grouped 1x1 of whole vectors, which are steady": (20, 96, 16, 16, 16, 1, 1, 0, 1, 2, False),
    "one output channel a group": (3, 192, 28, 1, 3, 5, 1, 4, 1, 3, False),
    "kernel as large as the map": (5, 48, 7, 7, 4, 7, 1, 6, 1, 2, False),
    "groups of 17 to 1": (2, 34, 14, 14, 2, 5, 1, 4, 1, 2, False),
    "multiplier 16, widely padded": (8, 3, 14, 14, 48, 7, 3, 6, 1, 3, False),
    "groups of 9": (5, 27, 14, 14, 27, 1, 2, 0, 1, 3, False),
    "groups of 8 to 6": (3, 16, 33, 1, 12, 1, 2, 0, 1, 2, False),
    "7x7 in steps of two on a tiny map": (10, 256, 4, 4, 64, 7, 2, 3, 1, 1, False),
    "one column in steps of two": (4, 128, 28, 1, 128, 3, 2, 1, 1, 1, False),
    "one column, dilated": (3, 32, 28, 14, 9, 7, 2, 0, 2, 1, True),
    "one row, dilated": (4, 64, 1, 6, 8, 2, 2, 1, 2, 1, False),
    "5x5 in steps of two on a tiny map": (40, 16, 4, 4, 128, 5, 2, 2, 1, 1, False),
    "3x3 in steps of two on a tiny map": (3, 128, 4, 4, 128, 3, 2, 1, 1, 1, False),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layer", UNSTEADY.values(), ids=UNSTEADY.keys())
def test_layers_that_onednn_computes_unsteadily_keep_their_bits(
    layer: tuple[Any, ...], dtype: torch.dtype, threads: None
) -> None:
    n, c_in, h, w, c_out, kernel, *geometry, groups, channels_last = layer
    layout = torch.channels_last if channels_last else torch.contiguous_format
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, c_in, h, w, generator=generator, dtype=dtype).contiguous(memory_format=layout)
    weight = torch.randn(c_out, c_in // groups, kernel, kernel, generator=generator, dtype=dtype)
    torch.set_num_threads(1)
    whole = rnp_kernels.prefix_conv2d(x, weight, None, *geometry, groups)
    exact = torch.nn.functional.conv2d(x.double(), weight.double(), None, *geometry, groups)
    assert (whole.double() - exact).norm() <= (1e-6 if dtype is torch.float32 else 4e-3) * exact.norm()
    for count in (1, 2):
        torch.set_num_threads(count)
        for first, end in ((0, 1), (n - 1, n), (0, 2), (0, n)):
            part = rnp_kernels.prefix_conv2d(x[first:end], weight, None, *geometry, groups)
            assert torch.equal(part, whole[first:end]), f"{count} threads, samples {first}…{end - 1}"


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format], ids=["channels_last", "nchw"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kernel", [1, 3])
def test_outputs_that_are_stored_past_the_caches(
    kernel: int, dtype: torch.dtype, layout: torch.memory_format, isa: str, poisoned_memory: None
) -> None:
    """More than 16 MB (kStreamAbove of csrc/cpu/call.h) are stored otherwise than the same samples alone, to the same
    bits, tails that do not fill a cache line included."""
    generator = torch.Generator().manual_seed(5)
    size = 112 if dtype is torch.float32 else 160
    x = torch.randn(4, 16, size, size, generator=generator, dtype=dtype).contiguous(memory_format=layout)
    weight = torch.randn(96, 16, kernel, kernel, generator=generator, dtype=dtype)
    out_prefix = torch.tensor([0, 32, 41, 96], dtype=torch.int32)
    options = {"padding": kernel // 2}
    whole = rnp_kernels.prefix_conv2d(x, weight, out_prefix=out_prefix, **options)
    assert whole.numel() * whole.element_size() > 16 << 20
    for n, live in enumerate(out_prefix.tolist()):
        alone = rnp_kernels.prefix_conv2d(x[n : n + 1], weight, out_prefix=out_prefix[n : n + 1], **options)
        assert torch.equal(whole[n : n + 1], alone)
        assert not whole[n, live:].any()


@pytest.mark.parametrize(("channels", "groups", "stride"), [(48, 48, 1), (64, 64, 2), (256, 32, 1), (256, 64, 2)])
def test_small_groups_that_come_from_memory(channels: int, groups: int, stride: int, isa: str, threads: None) -> None:
    """More than 8 MB (kLargeBytes of csrc/cpu/grouped.cpp) go through the channels in another order than the same
    samples alone, and ask for rows ahead; the bits stay."""
    generator = torch.Generator().manual_seed(7)
    size = 140 - channels // 3
    x = torch.randn(4, channels, size, size, generator=generator).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(channels, channels // groups, 3, 3, generator=generator)
    live = torch.tensor([channels, channels // 2 + 3, 5, channels], dtype=torch.int32)
    options = {"stride": stride, "padding": 1, "groups": groups}
    torch.set_num_threads(1)
    whole = rnp_kernels.prefix_conv2d(x, weight, in_prefix=live, out_prefix=live.flip(0), **options)
    assert (x.numel() + whole.numel()) * 4 > 8 << 20 > (x[0].numel() + whole[0].numel()) * 4
    for count in (1, 2):
        torch.set_num_threads(count)
        for n in range(4):
            prefixes = {"in_prefix": live[n : n + 1], "out_prefix": live[3 - n : 4 - n]}
            alone = rnp_kernels.prefix_conv2d(x[n : n + 1], weight, **prefixes, **options)
            assert torch.equal(whole[n : n + 1], alone), f"{count} threads, sample {n}"
