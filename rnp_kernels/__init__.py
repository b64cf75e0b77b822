"""Convolutions over only the live channel prefix of each sample; see `prefix_conv2d` and `PrefixConv2d`."""

from __future__ import annotations

from . import _libraries
from ._version import __version__

_libraries.load()

from .algorithms import algorithm, forget_transformed_weights, get_algorithm, set_algorithm  # noqa: E402
from .backends import available_backends, backend, get_backend, set_backend  # noqa: E402
from .conv import PrefixConv2d, replace_conv2d  # noqa: E402
from .ops import pack_weight, pack_winograd, prefix_conv2d  # noqa: E402

__all__ = [
    "PrefixConv2d",
    "__version__",
    "algorithm",
    "available_backends",
    "backend",
    "forget_transformed_weights",
    "get_algorithm",
    "get_backend",
    "pack_weight",
    "pack_winograd",
    "prefix_conv2d",
    "replace_conv2d",
    "set_algorithm",
    "set_backend",
]
