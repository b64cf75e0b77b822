"""Convolutions over only the live channel prefix of each sample; see `prefix_conv2d` and `PrefixConv2d`."""

from __future__ import annotations

from pathlib import Path

import torch


def _load_operators() -> None:
    library = Path(__file__).with_name("librnp_ops.so")
    if not library.exists():
        raise ImportError(
            f"rnp_kernels: the operator library {library} is missing; install the package with `pip install .`"
        )
    torch.ops.load_library(str(library))


_load_operators()

from .backends import available_backends, backend, get_backend, set_backend  # noqa: E402
from .conv import PrefixConv2d, replace_conv2d  # noqa: E402
from .ops import pack_weight, prefix_conv2d  # noqa: E402

__all__ = [
    "PrefixConv2d",
    "available_backends",
    "backend",
    "get_backend",
    "pack_weight",
    "prefix_conv2d",
    "replace_conv2d",
    "set_backend",
]
