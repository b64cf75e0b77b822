"""Hands torch's TF32 setting for convolutions over to the CUDA library, which cannot ask for it through the stable ABI.

The setting is torch's own: `torch.backends.cudnn.conv.fp32_precision`, or `torch.backends.cudnn.allow_tf32` before it.
It is read at every call from Python; a compiled graph keeps what was in force when the library was last called that
way.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import torch

from . import _libraries

_handed_over: bool | None = None
_setter: Callable[[int], None] | None = None


def allowed() -> bool:
    """Whether torch allows float32 convolutions to round their operands to TF32."""
    return torch.backends.cudnn.conv.fp32_precision == "tf32"


def follow() -> None:
    """Make float32 on CUDA obey the setting as it is now; nothing to do where the CUDA library is not loaded."""
    global _handed_over, _setter
    if _libraries.cuda_reason is not None:
        return
    if _setter is None:
        _setter = ctypes.CDLL(str(_libraries.cuda_library())).rnp_cuda_allow_tf32
        _setter.argtypes, _setter.restype = [ctypes.c_int], None
    now = allowed()
    if now != _handed_over:
        _setter(int(now))
        _handed_over = now
