"""What the CUDA library cannot ask torch for itself, and what it says about its choices.

float32 convolutions round their operands to TF32 where torch allows it: `torch.backends.cudnn.conv.fp32_precision`, or
`torch.backends.cudnn.allow_tf32` before it. The stable ABI has no way to read that, so every call from Python hands it
over; a compiled graph keeps what was in force when the library was last called that way.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import torch

from . import _C, _libraries
from .registrations import output_memory_format

_handed_over: bool | None = None
_setter: Callable[[int], None] | None = None


def tf32_allowed() -> bool:
    """Whether torch allows float32 convolutions to round their operands to TF32."""
    return torch.backends.cudnn.conv.fp32_precision == "tf32"


def follow_tf32() -> None:
    """Make float32 on CUDA obey torch's setting as it is now; nothing to do where the CUDA library is not loaded."""
    global _handed_over, _setter
    if _libraries.cuda_reason is not None:
        return
    if _setter is None:
        _setter = ctypes.CDLL(str(_libraries.cuda_library())).rnp_cuda_allow_tf32
        _setter.argtypes, _setter.restype = [ctypes.c_int], None
    now = tf32_allowed()
    if now != _handed_over:
        _setter(int(now))
        _handed_over = now


def describe_kernel(arguments: tuple[Any, ...]) -> str:
    """The kernel and tile that the CUDA operator takes for its arguments, in words. The input is taken to be dense."""
    input, weight, _bias, stride, padding, dilation, groups, *_ = arguments
    if 0 in input.shape:
        return "nothing to compute"
    last = output_memory_format(input, weight) is torch.channels_last and input.stride(1) == 1
    device = torch.cuda.get_device_properties(input.device)
    units = device.multi_processor_count
    hopper = (device.major, device.minor) == (9, 0) and "90a" in str(_C.build_info()["cuda_archs"]).split(";")
    dtype = str(input.dtype).removeprefix("torch.")
    return _C.describe_cuda_kernel(
        tuple(input.shape),
        tuple(weight.shape),
        stride,
        padding,
        dilation,
        groups,
        dtype,
        last,
        tf32_allowed(),
        units,
        hopper,
    )
