"""A thousand calls leave the heap as large as it was. Bytes in use are counted: pages hide a leak for long."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable

import pytest
import torch

import rnp
import rnp_kernels

CALLS = 1000


class MallInfo2(ctypes.Structure):
    """glibc's struct mallinfo2."""

    # arena, ordblks, smblks, hblks, hblkhd, usmblks, fsmblks, uordblks, fordblks, keepcost
    _fields_ = [(f"field_{i}", ctypes.c_size_t) for i in range(10)]


def bytes_in_use() -> int:
    """Bytes of malloc that nobody has given back."""
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallinfo2"):
        pytest.skip("needs glibc 2.33 or later, whose mallinfo2 counts bytes in use")
    libc.mallinfo2.restype = MallInfo2
    gc.collect()
    found = libc.mallinfo2()
    return found.field_7 + found.field_4  # in the heap, and in pages of their own


def calls() -> dict[str, Callable[[], object]]:
    x = torch.randn(2, 16, 8, 8).to(memory_format=torch.channels_last)
    weight = torch.randn(32, 16, 3, 3)
    prefixes = {"in_prefix": torch.tensor([16, 8], dtype=torch.int32), "out_prefix": torch.tensor([32, 8]).int()}
    module = rnp_kernels.PrefixConv2d(16, 32, 3, padding=1)
    operator = torch.ops.rnp.max_pool2d.default

    @torch.no_grad()
    def without_gradients() -> None:
        rnp_kernels.prefix_conv2d(x, weight, padding=1, **prefixes, activation="relu", tail="skip", pooled=True)

    layers = torch.nn.Conv2d(3, 16, 3, padding=1), torch.nn.ReLU(), torch.nn.Conv2d(16, 16, 3, padding=1)
    model = torch.nn.Sequential(*layers, torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(16, 4))
    image = torch.randn(2, 3, 8, 8)
    network = rnp.convert(model.eval(), image)

    @torch.no_grad()
    def refused() -> None:
        with pytest.raises(RuntimeError, match="activation must be"):
            torch.ops.rnp.prefix_conv2d(
                x, weight, None, [1, 1], [1] * 4, [1, 1], 1, None, None, None, None, None, "long enough for the heap",
                "zero", False, None, None,
            )  # fmt: skip

    def step() -> None:
        module.zero_grad()
        module(x, **prefixes).sum().backward()

    return {
        "operator": without_gradients,
        "refused": refused,
        "step": step,
        "network": lambda: network(image),
        "max_pool2d": lambda: operator(x, prefixes["in_prefix"], [2, 2], [2, 2], [0, 0], "zero"),
    }


@pytest.mark.parametrize("name", calls())
def test_calls_leave_nothing_behind(name: str):
    call = calls()[name]
    for _ in range(100):
        call()
    before = bytes_in_use()
    for _ in range(CALLS):
        call()
    grown = (bytes_in_use() - before) / CALLS
    assert grown < 8, f"{grown} bytes a call more than before"
