"""bfloat16 on the CPU: which kernel takes it, through every door, and that nothing else changes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn

import rnp
import rnp_kernels
from rnp_kernels import _C, PrefixConv2d, stock

TILES = "avx512amx"
PAIRS = ("avx512bf16", TILES)
needs_pairs = pytest.mark.skipif(PAIRS[0] not in _C.available_isas(), reason="needs a processor with AVX512-BF16")
NONE, CONVERTED, WITH_PAIRS, WITH_TILES = range(4)  # StockBFloat16 of csrc/core/stock.h


@pytest.fixture
def stock_rule() -> Iterator[None]:
    """Tests may say what oneDNN can do; what it really can is said again afterwards."""
    yield
    stock.tell_the_operator()


def path(c_in: int, size: int, c_out: int, kernel: int, groups: int = 1, last: bool = True) -> int:
    return _C.stock_path(
        (c_in, size, size), (c_out, c_in // groups, kernel, kernel), (1, 1), (kernel // 2,) * 4, (1, 1), groups,
        "bfloat16", last,
    )  # fmt: skip


def describe(c_in: int, size: int, c_out: int, kernel: int, dtype: str = "bfloat16") -> str:
    return _C.describe_kernel(
        (c_in, size, size), (c_out, c_in, kernel, kernel), (1, 1), (kernel // 2,) * 4, (1, 1), 1, dtype
    )


def test_full_width_goes_where_it_is_fastest(isa: str, stock_rule: None) -> None:
    for level, dense, depthwise in (
        (NONE, stock.OURS, stock.OURS),
        (CONVERTED, stock.OURS, stock.ONEDNN),
        (WITH_PAIRS, stock.OURS if isa in PAIRS else stock.ONEDNN, stock.ONEDNN),
        (WITH_TILES, stock.OURS if isa == TILES else stock.ONEDNN, stock.ONEDNN),
    ):
        _C.set_stock_dtypes(True, level, False)
        assert path(256, 14, 256, 3) == dense, level
        assert path(128, 28, 128, 3, groups=128) == depthwise, level
    _C.set_stock_dtypes(True, WITH_PAIRS, False)
    assert path(64, 56, 64, 3) == path(64, 56, 256, 1) == path(64, 28, 64, 3, last=False) == stock.ONEDNN
    with pytest.raises(ValueError, match=r"bfloat16 must be 0\.\.3, got 4"):
        _C.set_stock_dtypes(True, 4, False)


def test_the_log_names_the_kernel(isa: str) -> None:
    assert describe(256, 14, 256, 3).startswith(
        f"{isa} kernels, " + ({TILES: "matrices", PAIRS[0]: "tile"}.get(isa, "converted"))
    )
    assert describe(256, 14, 256, 3, "float16").startswith(f"{isa} kernels, converted to float32, tile")
    assert describe(256, 14, 256, 3, "float32").startswith(f"{isa} kernels, tile")


@needs_pairs
def test_it_is_the_product_of_bfloat16_and_not_of_something_narrower(isa: str) -> None:
    """Exact where float32 sums are: small integers."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(-8, 9, (3, 37, 9, 8), generator=generator).to(torch.bfloat16)
    w = torch.randint(-8, 9, (21, 37, 3, 3), generator=generator).to(torch.bfloat16)
    i, o = torch.tensor([37, 36, 5]).int(), torch.tensor([21, 16, 9]).int()
    for memory_format in (torch.channels_last, torch.contiguous_format):
        y = rnp_kernels.prefix_conv2d(
            x.contiguous(memory_format=memory_format), w, None, 1, 1, in_prefix=i, out_prefix=o, activation="relu"
        )
        expected = rnp_kernels.reference.prefix_conv2d(
            x.double(), w.double(), None, (1, 1), (1, 1, 1, 1), (1, 1), 1, in_prefix=i, out_prefix=o, activation="relu"
        )[0]
        assert torch.equal(y, expected.to(torch.bfloat16))


def test_autocast_gives_the_same_bits_as_bfloat16_tensors(isa: str) -> None:
    torch.manual_seed(0)
    conv = PrefixConv2d(64, 72, 3, padding=1)
    x = torch.randn(2, 64, 9, 9).contiguous(memory_format=torch.channels_last)
    prefix = torch.tensor([64, 33]).int()
    half = PrefixConv2d(64, 72, 3, padding=1, dtype=torch.bfloat16)
    half.load_state_dict(conv.state_dict())
    with torch.no_grad():
        for arguments in ((), (prefix, prefix)):
            with torch.autocast("cpu", torch.bfloat16):
                y = conv(x, *arguments)
            assert y.dtype is torch.bfloat16
            assert torch.equal(y, half(x.bfloat16(), *arguments))


LAYERS = {  # c_in, size, c_out, kernel, groups, channels_last: ours and oneDNN's at full width
    "ours": (96, 14, 72, 3, 1, True),
    "ours, odd channels": (97, 9, 40, 3, 1, True),
    "ours, 1x1": (256, 7, 512, 1, 1, True),
    "ours, small NCHW": (64, 7, 48, 3, 1, False),
    "large map": (16, 57, 16, 3, 1, True),
    "NCHW": (32, 14, 48, 3, 1, False),
    "depthwise": (64, 14, 64, 3, 64, True),
    "grouped": (64, 14, 64, 3, 4, True),
    "ours, groups of 24": (96, 14, 96, 3, 4, True),
}


@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS.keys())
def test_a_sample_keeps_its_bits_in_any_company(layer: tuple, isa: str, threads: None) -> None:
    c_in, size, c_out, kernel, groups, last = layer
    torch.manual_seed(0)
    conv = PrefixConv2d(c_in, c_out, kernel, padding=kernel // 2, groups=groups, dtype=torch.bfloat16)
    x = torch.randn(4, c_in, size, size, dtype=torch.bfloat16)
    x = x.contiguous(memory_format=torch.channels_last) if last else x
    i = torch.tensor([c_in, c_in // 2, c_in, c_in - 1]).int()
    o = torch.tensor([c_out, c_out // 2, c_out, 3]).int()
    with torch.no_grad():
        torch.set_num_threads(1)
        mixed, full = conv(x, i, o), conv(x)
        assert torch.equal(mixed[[0, 2]], full[[0, 2]])
        for count in (1, 2):
            torch.set_num_threads(count)
            for n in range(4):
                one = slice(n, n + 1)
                assert torch.equal(conv(x[one]), full[one])
                assert torch.equal(conv(x[one], i[one], o[one]), mixed[one])


def test_a_converted_network_runs_in_bfloat16(isa: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 64, 3, padding=1),
        nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(64, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10),
    ).eval()  # fmt: skip
    x = torch.randn(3, 3, 16, 16)
    pruned = rnp.convert(model, x, groups=4).eval()
    for policy in (rnp.policies.FullWidth(), rnp.policies.Uniform(0.5)):
        pruned.policy = policy
        with torch.no_grad():
            expected = pruned.float()(x)
            got = pruned.to(torch.bfloat16)(x.bfloat16())
        assert got.dtype is torch.bfloat16
        assert (got.float() - expected).norm() <= 0.02 * expected.norm()
