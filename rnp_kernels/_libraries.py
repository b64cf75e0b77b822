"""Loads the shared libraries beside this file: the CPU operators, and the CUDA ones where torch sees a CUDA device."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch

_FOLDER = Path(__file__).resolve().parent

#: Why the CUDA library is not loaded: None where it is.
cuda_reason: str | None = None
_cuda_operators: frozenset[str] | None = None


def cuda_library() -> Path:
    return _FOLDER / "librnp_cuda.so"


def _load_cuda() -> str | None:
    library = cuda_library()
    if not library.exists():
        return "the CUDA library was not built (see RNP_CUDA)"
    if torch.version.cuda is None:
        return "this torch was built without CUDA"
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    try:
        torch.ops.load_library(str(library))
    except OSError as error:
        reason = f"{library.name} does not load: {error}"
        warnings.warn(f"rnp_kernels: {reason}", stacklevel=2)
        return reason
    return None


def _remedy() -> str:
    if (_FOLDER.parent / "CMakeLists.txt").exists():
        return (
            f"Python took the package's sources in {_FOLDER.parent} before an installed one, as it does when it is "
            f"started there. Start it elsewhere, or as `python -P` (3.11 and later). To install: `pip install .`"
        )
    return "install the package with `pip install .`"


def load() -> None:
    """Register torch.ops.rnp.*; ImportError, with what to do, where the operator library is missing."""
    global cuda_reason
    library = _FOLDER / "librnp_ops.so"
    if not library.exists():
        raise ImportError(f"rnp_kernels: {library} is missing; {_remedy()}")
    torch.ops.load_library(str(library))
    cuda_reason = _load_cuda()


_OPERATORS = ("prefix_conv2d", "prefix_conv2d_input_grad", "prefix_conv2d_weight_grad", "agent_step", "max_pool2d")


def has_cuda(operator: str) -> bool:
    """Whether the CUDA library has a kernel for one of `_OPERATORS`; asked before anything else attaches there."""
    global _cuda_operators
    if _cuda_operators is None:
        has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
        _cuda_operators = frozenset(name for name in _OPERATORS if has_kernel(f"rnp::{name}", "CUDA"))
    return operator in _cuda_operators
