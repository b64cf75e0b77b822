"""Fake kernel of `torch.ops.rnp.max_pool2d`, pooling of live channels only; the schema is in csrc/ops.cpp.

`max_pool2d(input, prefix, kernel, stride, padding, tail)` is `torch.nn.functional.max_pool2d` of an input (N, C, H, W),
float32 or on CUDA also bfloat16 and float16; the output is channels_last. Channels from `prefix[n]` (int32 (N,), None:
all) on are neither read nor computed: 0 with tail "zero", undefined with "skip". No gradient: networks train through
torch's own pooling.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import _libraries


@torch.library.register_fake("rnp::max_pool2d")
def _max_pool2d_fake(
    input: Tensor,
    prefix: Tensor | None,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    tail: str,
) -> Tensor:
    height, width = (
        (input.shape[2 + i] + 2 * padding[i] - kernel[i]) // stride[i] + 1 for i in range(2)
    )  # a window never hangs over the padding's end
    size = (input.shape[0], input.shape[1], height, width)
    return torch.empty(size, dtype=input.dtype, device=input.device, memory_format=torch.channels_last)


def runs_on(device: torch.device) -> bool:
    """Whether the operator has a kernel there."""
    return device.type == "cpu" or (device.type == "cuda" and _libraries.has_cuda("max_pool2d"))


def takes(feature_map: Tensor) -> bool:
    """Whether it may stand in for torch's pooling, where it runs: by dtype, and on CUDA by layout, which it keeps."""
    if feature_map.device.type == "cpu":
        return feature_map.dtype is torch.float32
    halves = feature_map.dtype in (torch.bfloat16, torch.float16)
    return (halves or feature_map.dtype is torch.float32) and feature_map.is_contiguous(
        memory_format=torch.channels_last
    )
