"""When torch's own convolution is the faster one at full width, and how a module gets there without a detour.

The rule itself is `prefers_stock` in csrc/core/stock.cpp: the operator follows it for every sample of full width. What is
here only saves the way through the operator where no sample can be pruned.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from . import _C
from .checks import pair
from .registrations import output_memory_format

OURS, CONV2D, MKLDNN = range(3)  # the operator; F.conv2d; aten::mkldnn_convolution, which has no gradient


def tell_the_operator() -> None:
    """Say in which dtypes this torch has oneDNN on this processor."""
    if not torch.backends.mkldnn.is_available():
        _C.set_stock_dtypes(False, False, False)
        return
    ops = torch.ops.mkldnn
    _C.set_stock_dtypes(True, ops._is_mkldnn_bf16_supported(), ops._is_mkldnn_fp16_supported())


def path_of(conv: nn.Conv2d, input: Tensor, weight: Tensor, padding: Any) -> int:
    """Which of the three a convolution of full width takes for inputs of this shape and layout, in any batch."""
    if input.dim() != 4 or weight.dim() != 4 or isinstance(padding, str) or 0 in input.shape:
        return OURS
    dtype = str(input.dtype).removeprefix("torch.")
    if dtype not in ("float32", "bfloat16", "float16") or weight.dtype is not input.dtype:
        return OURS
    if conv.bias is not None and conv.bias.dtype is not input.dtype:
        return OURS
    stride, dilation = pair(conv.stride, "stride"), pair(conv.dilation, "dilation")
    vertical, horizontal = pair(padding, "padding")
    last = output_memory_format(input, weight) is torch.channels_last
    if not _C.prefers_stock(
        tuple(input.shape[1:]), tuple(weight.shape), stride, (vertical, vertical, horizontal, horizontal), dilation,
        conv.groups, dtype, last,
    ):  # fmt: skip
        return OURS
    # F.conv2d chooses by the batch too, and on one thread avoids oneDNN for 1x1. Where it takes oneDNN for a single sample
    # and a larger kernel, it always does.
    backend = torch._C._select_conv_backend(
        input[:1], weight, conv.bias, stride, (vertical, horizontal), dilation, False, (0, 0), conv.groups
    )
    return CONV2D if backend == torch._C._ConvBackend.Mkldnn and tuple(weight.shape[2:]) != (1, 1) else MKLDNN


tell_the_operator()
