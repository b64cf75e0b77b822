"""What Python tells the CUDA library and what it reports of its choices. None of it needs a GPU."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from rnp_kernels import _C, _libraries, cuda_library


@pytest.fixture(autouse=True)
def the_setting_is_restored() -> Iterator[None]:
    before = torch.backends.cudnn.conv.fp32_precision
    yield
    torch.backends.cudnn.conv.fp32_precision = before


def test_torchs_setting_is_understood():
    torch.backends.cudnn.conv.fp32_precision = "ieee"
    assert not cuda_library.tf32_allowed()
    torch.backends.cudnn.conv.fp32_precision = "tf32"
    assert cuda_library.tf32_allowed()


def test_each_change_is_handed_over_once(monkeypatch: pytest.MonkeyPatch):
    told: list[int] = []
    monkeypatch.setattr(_libraries, "cuda_reason", None)
    monkeypatch.setattr(cuda_library, "_setter", told.append)
    monkeypatch.setattr(cuda_library, "_handed_over", None)
    for precision in ("tf32", "tf32", "ieee", "ieee", "tf32"):
        torch.backends.cudnn.conv.fp32_precision = precision
        cuda_library.follow_tf32()
    assert told == [1, 0, 1]


def test_nothing_is_called_without_the_library(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(_libraries, "cuda_reason", "not built")
    monkeypatch.setattr(cuda_library, "_setter", lambda _: pytest.fail("the library is not there"))
    cuda_library.follow_tf32()


def test_the_library_exports_the_setter():
    library = _libraries.cuda_library()
    if not library.exists():
        pytest.skip("the CUDA library was not built")
    assert b"rnp_cuda_allow_tf32\0" in library.read_bytes()


LAYER = {
    "input": (256, 128, 28, 28), "weight": (128, 128, 3, 3), "stride": (1, 1), "padding": (1, 1, 1, 1),
    "dilation": (1, 1), "groups": 1, "dtype": "bfloat16", "channels_last": True, "tf32": True, "multiprocessors": 132,
}  # fmt: skip


@pytest.mark.parametrize(
    ("changed", "kernel"),
    [
        ({}, "tile bf16_128x128, 128 rows x 128 channels"),
        ({"dtype": "float16", "weight": (64, 128, 3, 3)}, "tile fp16_128x64, 128 rows x 64 channels"),
        ({"dtype": "float32", "input": (8, 128, 7, 7)}, "tile tf32_64x64, 64 rows x 64 channels"),
        ({"dtype": "float32", "tf32": False}, "tile fp32_128x64, 128 rows x 64 channels"),
        ({"channels_last": False}, "tile bf16_128x64, 128 rows x 64 channels, gathered"),
        (
            {"input": (8, 3, 224, 224), "weight": (64, 3, 7, 7)},
            "tile bf16_128x64, 128 rows x 64 channels, rows of taps as channels of an unfolded copy",
        ),
        (
            {"input": (8, 16, 28, 28), "weight": (64, 4, 3, 3), "groups": 4},
            "tile bf16_128x64, 128 rows x 64 channels, taps and channels in one K, gathered",
        ),
        ({"groups": 128, "weight": (128, 1, 3, 3)}, "plain kernel, one output element a thread"),
        ({"dtype": "float64"}, "plain kernel, one output element a thread"),
    ],
)
def test_the_tile_depends_on_the_layer_the_dtype_and_the_layout(changed: dict, kernel: str):
    assert _C.describe_cuda_kernel(**{**LAYER, **changed}) == kernel


SMALL = {"input": (4, 512, 7, 7), "weight": (512, 512, 3, 3)}


@pytest.mark.parametrize(
    ("changed", "kernel"),
    [
        ({}, "tile sm90_bf16_128x128, 128 rows x 128 channels, input kept for all taps"),
        (
            {"weight": (64, 128, 3, 3)},
            "tile sm90_bf16_128x128, 128 rows x 64 channels, input kept for all taps",
        ),
        (
            {"input": (8, 128, 28, 28)},
            "tile sm90_bf16_128x128, 128 rows x 64 channels, input kept for all taps",
        ),
        (
            {"input": (256, 256, 56, 56), "weight": (64, 256, 1, 1), "padding": (0, 0, 0, 0)},
            "tile sm90_bf16_128x128, 256 rows x 64 channels",
        ),
        (
            {"input": (256, 512, 28, 28), "weight": (128, 512, 1, 1), "padding": (0, 0, 0, 0)},
            "tile sm90_bf16_128x128, 128 rows x 128 channels",
        ),
        (
            {"dtype": "float16", "input": (256, 256, 14, 14), "weight": (512, 256, 3, 3)},
            "tile sm90_fp16_128x256, 128 rows x 256 channels",
        ),
        (SMALL, "tile sm90_bf16_128x128, 128 rows x 64 channels, K in segments of 64 channels, split over blocks"),
        (
            {**SMALL, "input": (256, 512, 7, 7)},
            "tile sm90_bf16_128x128, 128 rows x 128 channels, K in segments of 64 channels",
        ),
        ({"weight": (48, 128, 3, 3)}, "tile bf16_128x64, 128 rows x 64 channels"),  # wgmma needs 64 outputs
        (
            {"input": (64, 3, 224, 224), "weight": (64, 3, 3, 3), "channels_last": False},
            "tile sm90_bf16_128x128, 256 rows x 64 channels, rows of taps as channels of an unfolded copy",
        ),
        ({"channels_last": False}, "tile bf16_128x64, 128 rows x 64 channels, gathered"),
        (
            {"dtype": "float32"},
            "tile sm90_tf32_128x128, 128 rows x 128 channels, input kept for all taps",
        ),
        (
            {"dtype": "float32", "input": (256, 256, 14, 14), "weight": (512, 256, 3, 3)},
            "tile sm90_tf32_128x256, 128 rows x 256 channels",
        ),
        (
            {**SMALL, "dtype": "float32"},
            "tile sm90_tf32_128x128, 128 rows x 64 channels, K in segments of 64 channels, split over blocks",
        ),
        ({"dtype": "float32", "tf32": False}, "tile fp32_128x64, 128 rows x 64 channels"),  # exact products
        ({"dtype": "float32", "weight": (48, 128, 3, 3)}, "tile tf32_128x64, 128 rows x 64 channels"),
        ({"dtype": "float32", "channels_last": False}, "tile tf32_128x64, 128 rows x 64 channels, gathered"),
    ],
)
def test_a_hopper_gpu_takes_wgmma_where_it_fits(changed: dict, kernel: str):
    assert _C.describe_cuda_kernel(**{**LAYER, **changed}, hopper=True) == kernel
