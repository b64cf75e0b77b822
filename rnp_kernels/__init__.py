"""Convolutions over only the live channel prefix of each sample; see `prefix_conv2d` and `PrefixConv2d`."""

from __future__ import annotations

from . import _libraries
from ._version import __version__

_libraries.load()

from .backends import available_backends, backend, get_backend, set_backend  # noqa: E402
from .conv import PrefixConv2d, replace_conv2d  # noqa: E402
from .ops import pack_weight, prefix_conv2d  # noqa: E402

__all__ = [
    "PrefixConv2d",
    "__version__",
    "available_backends",
    "backend",
    "get_backend",
    "pack_weight",
    "prefix_conv2d",
    "replace_conv2d",
    "set_backend",
]
