"""Which implementation runs: `set_backend`, `backend`, `get_backend`, `available_backends`.

The choice is one setting of the process. "auto" takes what belongs to the device of the input: `cpu` on a CPU; on a
CUDA device the first of `cuda` and `triton` that can run and has passed the conformance suite on such hardware
(`TESTED_ON`), and with a warning `reference`, dense convolution and a mask, where none has. Any other name runs that
backend or raises with the reason.
"""

from __future__ import annotations

import contextlib
import os
import sys
import warnings
from collections.abc import Iterator

import torch
from torch import Tensor

from . import _libraries, triton
from .errors import message

BACKENDS = ("cpu", "cuda", "triton", "reference")

# GPUs on which the whole conformance suite passed (bench/gpu_suite.sh; its record lies in bench/results). A backend
# with none is "untested" in `rnp doctor`.
TESTED_ON: dict[str, tuple[str, ...]] = {"cuda": (), "triton": ()}
_current = "auto"
LOG = os.environ.get("RNP_LOG") == "1"
_logged: set[str] = set()
_warned: list[str] = []


def device_of(name: str) -> str | None:
    """The device type that a backend's tensors live on; None where any will do."""
    if name == "triton":
        return "cpu" if triton.interpreted() else "cuda"
    return {"cpu": "cpu", "cuda": "cuda"}.get(name)


def _reason(name: str) -> str | None:
    """Why `name` cannot run here, or None where it can."""
    if name == "cpu":
        has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key("rnp::prefix_conv2d", "CPU")
        return None if has_kernel else "the operator library has no CPU kernel"
    if name == "cuda":
        if _libraries.cuda_reason is not None:
            return _libraries.cuda_reason
        return None if _libraries.has_cuda("prefix_conv2d") else "the CUDA library has no prefix_conv2d kernel"
    if name == "triton":
        return triton.reason()
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
    able = [name for name in ("cuda", "triton") if _reason(name) is None and device_of(name) == "cuda"]
    tested = [name for name in able if TESTED_ON[name]]
    if tested:
        return tested[0]
    if not _warned:
        _warned.append(kind)
        why = "; ".join(
            f"{name}: {_reason(name) or 'never tested on a device (set_backend runs it)'}"
            for name in ("cuda", "triton")
        )
        warnings.warn(f"rnp_kernels: on CUDA tensors the reference runs, which skips no work. {why}", stacklevel=2)
    return "reference"


def resolve(input: Tensor) -> str:
    """The backend that runs for `input` under the current setting; RuntimeError where there is none."""
    if _current == "auto" and input.is_cpu:
        return "cpu"
    return resolve_on(input.device)


def resolve_on(device: torch.device) -> str:
    """`resolve` for a tensor of this device."""
    if _current == "auto":
        return _auto_for(device.type)
    kind = device_of(_current)
    if kind is not None and device.type not in (kind, "meta"):
        raise RuntimeError(message("prefix_conv2d", f"backend {_current!r} runs on {kind} tensors", device))
    return _current
