"""Which implementation runs: `set_backend`, `backend`, `get_backend`, `available_backends`.

The choice is one setting of the process. "auto" takes what belongs to the device of the input: `cpu` on a CPU; on a
CUDA device `cuda`, and `triton` where the CUDA library was not built. Any other name runs that backend or raises with
the reason.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import sys
from collections.abc import Iterator

import torch
from torch import Tensor

from . import _libraries
from .errors import message

BACKENDS = ("cpu", "cuda", "triton", "reference")
_DEVICE = {"cpu": "cpu", "cuda": "cuda", "triton": "cuda"}  # the reference runs anywhere
_OPERATOR = "rnp::prefix_conv2d"
_current = "auto"
LOG = os.environ.get("RNP_LOG") == "1"
_logged: set[str] = set()


def _has_kernel(key: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(_OPERATOR, key)


def _reason(name: str) -> str | None:
    """Why `name` cannot run here, or None where it can."""
    if name == "cpu":
        return None if _has_kernel("CPU") else "the operator library has no CPU kernel"
    if name == "cuda":
        if _libraries.cuda_reason is not None:
            return _libraries.cuda_reason
        return None if _has_kernel("CUDA") else "this version's CUDA library has no prefix_conv2d kernel"
    if name == "triton":
        if importlib.util.find_spec("rnp_kernels.triton") is None:
            return "this version has no Triton kernels"
        return None if torch.cuda.is_available() else "no CUDA device is visible"
    return None


def log(input: Tensor, weight: Tensor, stride: object, padding: object, groups: int, chosen: str) -> None:
    """Under RNP_LOG=1, say once per shape on stderr what was chosen."""
    line = (
        f"rnp: prefix_conv2d {input.dtype} {tuple(input.shape)} with weight {tuple(weight.shape)}, strides "
        f"{input.stride()}, stride {stride}, padding {padding}, groups {groups}: {chosen}"
    )
    if line not in _logged:
        _logged.add(line)
        print(line, file=sys.stderr, flush=True)


def available_backends() -> dict[str, str | None]:
    """Every backend's name, and None where it runs on this machine or else the reason why it does not."""
    return {name: _reason(name) for name in BACKENDS}


def get_backend() -> str:
    """The name last set: "auto" or one of `BACKENDS`."""
    return _current


def set_backend(name: str) -> None:
    """Choose the backend of the process: "auto" or one of `BACKENDS`.

    Raises ValueError for an unknown name and RuntimeError, with the reason, for one that cannot run on this machine.
    """
    global _current
    if name != "auto":
        if name not in BACKENDS:
            raise ValueError(message("set_backend", f"the backend must be one of {('auto', *BACKENDS)}", repr(name)))
        reason = _reason(name)
        if reason is not None:
            raise RuntimeError(f"set_backend: backend {name!r} cannot run: {reason}")
    _current = name


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """`with backend("reference"): ...` sets the backend and restores the one before it."""
    before = _current
    set_backend(name)
    try:
        yield
    finally:
        set_backend(before)


def _auto_for(kind: str) -> str:
    if kind in ("cpu", "meta"):
        return "cpu"
    if kind != "cuda":
        raise RuntimeError(message("prefix_conv2d", "only CPU and CUDA tensors have kernels", kind))
    for name in ("cuda", "triton"):
        if _reason(name) is None:
            return name
    reasons = f"cuda: {_reason('cuda')}; triton: {_reason('triton')}"
    raise RuntimeError(f"prefix_conv2d: no backend for a CUDA tensor: {reasons}")


def resolve(input: Tensor) -> str:
    """The backend that runs for `input` under the current setting; RuntimeError where there is none."""
    if _current == "auto":
        return "cpu" if input.is_cpu else _auto_for(input.device.type)
    device = _DEVICE.get(_current)
    if device is not None and input.device.type not in (device, "meta"):
        raise RuntimeError(message("prefix_conv2d", f"backend {_current!r} runs on {device} tensors", input.device))
    return _current
