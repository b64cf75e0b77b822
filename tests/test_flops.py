"""torch's flop counter sees the operators, and counts for them what it counts for conv2d."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from rnp_kernels import PrefixConv2d, prefix_conv2d

LAYERS: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "3x3": ((16, 24, 3), {"padding": 1}),
    "strided": ((16, 24, 3), {"stride": 2, "bias": False}),
    "same": ((16, 24, (2, 4)), {"padding": "same"}),
    "1x1": ((16, 24, 1), {}),
    "grouped": ((16, 24, 3), {"groups": 4, "dilation": 2}),
    "depthwise": ((16, 16, 3), {"groups": 16}),
}


def flops(conv: nn.Conv2d, x: torch.Tensor) -> tuple[int, int, int]:
    """Without a gradient, with those of the parameters, and with the input's too."""
    with torch.no_grad(), FlopCounterMode(display=False) as forward:
        conv(x)
    totals = [forward.get_total_flops()]
    for needs in (False, True):
        with FlopCounterMode(display=False) as both:
            conv(x.clone().requires_grad_(needs)).sum().backward()
        totals.append(both.get_total_flops())
    return tuple(totals)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS.keys())
def test_as_conv2d(layer: tuple[tuple[int, ...], dict[str, Any]], dtype: torch.dtype) -> None:
    theirs = nn.Conv2d(*layer[0], **layer[1], dtype=dtype)
    ours = PrefixConv2d.from_conv2d(copy.deepcopy(theirs))
    for shape in ((2, 16, 15, 14), (16, 15, 14)):
        x = torch.randn(shape, dtype=dtype)
        expected = flops(theirs, x[None] if x.dim() == 3 else x)
        for _ in range(3):  # a module keeps calls that go around the operator
            assert flops(ours, x) == expected and all(expected)
            ours(x)
            with torch.no_grad():
                ours(x)


def test_prefixes_change_no_count() -> None:
    x, w = torch.randn(2, 16, 9, 9), torch.randn(8, 16, 3, 3)
    with FlopCounterMode(display=False) as counter:
        prefix_conv2d(x, w, in_prefix=torch.tensor([3, 0], dtype=torch.int32))
    assert counter.get_total_flops() == 2 * 2 * 7 * 7 * w.numel()
