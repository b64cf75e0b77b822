"""Fake kernel of `torch.ops.rnp.max_pool2d`, pooling of live channels only; the schema is in csrc/ops.cpp.

`max_pool2d(input, prefix, kernel, stride, padding, tail)` is `torch.nn.functional.max_pool2d` of a float32 input
(N, C, H, W) on a CPU; the output is channels_last. Channels from `prefix[n]` (int32 (N,), None: all) on are neither
read nor computed: 0 with tail "zero", undefined with "skip". No gradient: networks train through torch's own pooling.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


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
