"""torch's TF32 setting reaches the CUDA library. The library itself needs no GPU to be told."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from rnp_kernels import _libraries, tf32


@pytest.fixture(autouse=True)
def the_setting_is_restored() -> Iterator[None]:
    before = torch.backends.cudnn.conv.fp32_precision
    yield
    torch.backends.cudnn.conv.fp32_precision = before


def test_both_of_torchs_settings_are_understood():
    torch.backends.cudnn.conv.fp32_precision = "ieee"
    assert not tf32.allowed()
    torch.backends.cudnn.conv.fp32_precision = "tf32"
    assert tf32.allowed()


def test_each_change_is_handed_over_once(monkeypatch: pytest.MonkeyPatch):
    told: list[int] = []
    monkeypatch.setattr(_libraries, "cuda_reason", None)
    monkeypatch.setattr(tf32, "_setter", told.append)
    monkeypatch.setattr(tf32, "_handed_over", None)
    for precision in ("tf32", "tf32", "ieee", "ieee", "tf32"):
        torch.backends.cudnn.conv.fp32_precision = precision
        tf32.follow()
    assert told == [1, 0, 1]


def test_nothing_is_called_without_the_library(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(_libraries, "cuda_reason", "not built")
    monkeypatch.setattr(tf32, "_setter", lambda _: pytest.fail("the library is not there"))
    tf32.follow()


def test_the_library_exports_the_setter():
    library = Path(_libraries.cuda_library())
    if not library.exists():
        pytest.skip("the CUDA library was not built")
    names = library.read_bytes()
    assert b"rnp_cuda_allow_tf32\0" in names
