"""Small groups in bfloat16 and float16: float32's kernels between conversions, a band of rows at a time."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import rnp_kernels
from rnp_kernels import reference

HALVES = [torch.bfloat16, torch.float16]
LAYOUTS = [torch.channels_last, torch.contiguous_format]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def ours(x: Tensor, w: Tensor, **arguments: object) -> Tensor:
    """By our own kernels: a ReLU keeps the operator from a stock path, and -0 from being compared."""
    return rnp_kernels.prefix_conv2d(x, w, groups=x.shape[1], activation="relu", **arguments)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_every_value_is_converted_exactly_and_rounded_once(isa: str, dtype: torch.dtype, layout: torch.memory_format):
    values = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype).view(1, 16, 64, 64)
    for factor in (1.0, -1.0, 1 + 2**-7, 0.75, 3e-3, 2.0**9):
        weight = torch.full((16, 1, 1, 1), factor, dtype=dtype)
        expected = (values.float() * weight[0].float()).to(dtype).relu()  # such a product is exact in float32
        got = ours(values.to(memory_format=layout), weight)
        assert torch.equal(got.isnan(), expected.isnan())
        assert torch.equal(got.nan_to_num(), expected.nan_to_num())


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize(
    ("channels", "size", "kernel", "stride", "dilation", "padding"),
    [
        (128, (67, 40), 3, 1, 1, 1),  # several bands
        (20, (150, 150), 5, 2, 1, 2),
        (16, (90, 70), 3, 2, 3, (4, 1)),
        (40, (64, 64), 7, 1, 1, 3),
        (8, (40, 33), (2, 3), (3, 2), (2, 1), (5, 0)),  # more padding than the kernel's reach
        (3, (3, 90), 1, 1, 1, (6, 2)),  # rows in the padding alone
    ],
)
@pytest.mark.parametrize("layout", [*LAYOUTS, "every second column"], ids=str)
def test_bands_of_rows_join(
    dtype: torch.dtype, channels: int, size: tuple[int, int], kernel: object, stride: object, dilation: object,
    padding: object, layout: object, poisoned_memory: None,
) -> None:  # fmt: skip
    x = random(3, channels, *size)
    weight = random(channels, 1, *(kernel if isinstance(kernel, tuple) else (kernel, kernel)), seed=1).to(dtype)
    scale, bias = random(2, channels, seed=2), random(2, channels, seed=3)
    live = torch.tensor([channels, channels // 2, max(0, channels // 3 - 1)], dtype=torch.int32)
    below = torch.arange(channels)[None, :, None, None] < live[:, None, None, None]
    x = torch.where(below, x, torch.nan).to(dtype)
    if layout == "every second column":
        wide = torch.full((*x.shape[:3], 2 * x.shape[3]), torch.nan, dtype=dtype)
        wide[..., ::2] = x
        x = wide[..., ::2]
    else:
        x = x.to(memory_format=layout)
    geometry = (stride, padding, dilation, channels)
    tables = {"scale": scale, "row": torch.tensor([1, 0, 1], dtype=torch.int32)}
    plain = rnp_kernels.prefix_conv2d(x, weight, bias, *geometry, in_prefix=live, out_prefix=live, **tables)
    residual = random(*plain.shape, seed=4).to(dtype)
    got, means = rnp_kernels.prefix_conv2d(
        x, weight, bias, *geometry, in_prefix=live, out_prefix=live, residual=residual, activation="relu", pooled=True,
        **tables,
    )  # fmt: skip
    with rnp_kernels.backend("reference"):
        truth = rnp_kernels.prefix_conv2d(
            x.double(), weight.double(), bias.double(), *geometry, in_prefix=live, out_prefix=live,
            residual=residual.double(), activation="relu", scale=scale.double(), row=tables["row"],
        )  # fmt: skip
    assert torch.equal(plain, torch.where(reference.live(channels, live, plain), plain, 0))
    error = (got.double() - truth).abs()
    assert (error <= torch.finfo(dtype).eps * truth.abs() + 1e-5).all(), error.max()  # float32's sums, rounded once
    torch.testing.assert_close(means, got.float().mean((2, 3)), rtol=1e-4, atol=1e-5)
    alone = rnp_kernels.prefix_conv2d(
        x[1:2], weight, bias, *geometry, in_prefix=live[1:2], out_prefix=live[1:2], residual=residual[1:2],
        activation="relu", scale=scale, row=tables["row"][1:2],
    )  # fmt: skip
    assert torch.equal(alone, got[1:2])


@pytest.mark.parametrize("groups", [5, 10], ids=["4 of 4", "2 of 4 channels"])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_groups_of_several_channels(isa: str, dtype: torch.dtype, groups: int, threads: None) -> None:
    x = random(2, 20, 60, 50).to(dtype).contiguous(memory_format=torch.channels_last)
    weight = random(40 if groups == 10 else 20, 20 // groups, 3, 3, seed=1).to(dtype)
    live = torch.tensor([7, 20], dtype=torch.int32)

    def run(count: int) -> Tensor:
        torch.set_num_threads(count)
        return rnp_kernels.prefix_conv2d(x, weight, None, 1, 1, 1, groups, in_prefix=live, activation="relu")

    expected = reference.prefix_conv2d(
        x.double(), weight.double(), None, (1, 1), (1, 1, 1, 1), (1, 1), groups, in_prefix=live, activation="relu"
    )[0]
    got = run(1)
    assert ((got.double() - expected).abs() <= torch.finfo(dtype).eps * expected.abs() + 1e-4).all()
    assert torch.equal(run(2), got)
