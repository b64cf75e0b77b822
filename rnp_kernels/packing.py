"""A cache of packed weights beside the parameter they were made from: rebuilt when it changes, never saved."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from . import _C
from .algorithms import get_algorithm
from .ops import pack_weight, pack_winograd

_STALE_WORD = 15  # of the pack's int32 header; the operator sets it where it finds the pack older than the weights

_PACKED = (torch.float32, torch.float16, torch.bfloat16)


def identity_of(weight: Tensor) -> tuple[Any, ...]:
    """Changes when the tensor is written in place, resized, converted, negated or given other data.

    Writing through `weight.data` changes nothing here: on a CPU the operator compares samples of the weights for that.
    """
    version = 0 if weight.is_inference() else weight._version
    return (weight.data_ptr(), version, weight.dtype, weight.shape, weight.stride(), weight.is_neg())


_NEVER_STALE = ctypes.c_int32(0)


def _stream_of(weight: Tensor) -> int | None:
    """The stream on which a pack of `weight` is made and may be read: 0 on a CPU; None where no pack may be kept.

    A CUDA graph under capture packs inside the graph: what it replays must follow the weights, and outlive no cache.
    """
    if weight.is_cpu:
        return 0
    if not weight.is_cuda or torch.cuda.is_current_stream_capturing():
        return None
    return torch.cuda.current_stream(weight.device).cuda_stream


class PackedWeight:
    """One weight's pack, or with `tile` its Winograd transform; immutable, so that threads may share it.

    It holds the weight's storage, whose address therefore cannot be reused while it stands in `identity`. On CUDA it is
    good for the stream that made it: another one might read it too early.
    """

    __slots__ = ("_held", "_stale", "_stream", "data", "groups", "identity", "tile", "weight")

    def __init__(self, weight: nn.Parameter, groups: int, tile: int = 0) -> None:
        self.weight = weight
        self.tile = tile
        self.groups = groups
        self.identity = identity_of(weight)
        self._held = weight.detach()
        self.data = pack_winograd(weight, tile) if tile else pack_weight(weight, groups)
        if weight.is_cpu:
            self._stream = None
            self._stale = ctypes.c_int32.from_address(self.data.data_ptr() + 4 * _STALE_WORD)
        else:
            self._stream = _stream_of(weight)
            self._stale = _NEVER_STALE  # the operator does not look: that would wait for the device

    def belongs_to(self, weight: Tensor, groups: int) -> bool:
        return (
            weight is self.weight
            and groups == self.groups
            and not self._stale.value
            and identity_of(weight) == self.identity
            and (self._stream is None or self._stream == _stream_of(weight))
        )


class PackCache:
    """Decides when a module's weight is packed: at the second call that sees it unchanged.

    A training step changes the weight before every forward, so it never packs in vain; the operator then packs for that
    call alone, as cheaply. An inference loop packs once.
    """

    __slots__ = ("_packed", "_seen", "_transformed", "dropped")

    def __init__(self) -> None:
        self.dropped = False  # set when weights turn out to have changed, for the owner to see and reset
        self._packed: PackedWeight | None = None
        self._seen: tuple[Any, ...] | None = None
        self._transformed: PackedWeight | None = None

    def __reduce__(self) -> tuple[type[PackCache], tuple[()]]:
        return (PackCache, ())  # a copy is empty: it is another module's, with other weights

    def get(self, weight: Tensor, groups: int, now: bool = False) -> Tensor | None:
        """The pack of `weight`, or None where it is not worth one yet; with `now`, wherever it can be packed."""
        packed = self._packed
        if packed is not None:
            if packed.belongs_to(weight, groups):
                return packed.data
            self._packed = None
            self.dropped = True
        if type(weight) is not nn.Parameter or weight.is_inference():
            return None  # computed anew for each call, or without a version counter
        if weight.dtype not in _PACKED or (not weight.is_cpu and _stream_of(weight) is None):
            return None
        if not now:
            seen = (id(weight), identity_of(weight))
            if seen != self._seen:
                self._seen = seen
                return None
        packed = self._packed = PackedWeight(weight, groups)
        return packed.data

    def transformed(self, weight: Tensor, tile: int) -> Tensor | None:
        """The transform of `weight` for tiles of tile x tile, made now if need be; None for a weight without a version.

        Made at the first call already, since it changes the bits of the result: the second call then gives the same.
        """
        transformed = self._transformed
        if transformed is not None:
            if transformed.tile == tile and transformed.belongs_to(weight, 1):
                return transformed.data
            if transformed._stale.value:
                self._packed = None  # of the same old values; the operator looks at one of the two only
            self._transformed = None
            self.dropped |= not transformed.belongs_to(weight, 1)  # else of another tile, for other sizes
        if type(weight) is not nn.Parameter or weight.is_inference():
            return None
        transformed = self._transformed = PackedWeight(weight, 1, tile)
        return transformed.data

    def kept(self, weight: Tensor, groups: int, tile: int) -> tuple[PackedWeight | None, PackedWeight | None]:
        """The pack and the transform (None for tile 0) of `weight`, each None where none stands ready."""
        packed, transformed = self._packed, self._transformed
        return (
            packed if packed is not None and packed.belongs_to(weight, groups) else None,
            transformed
            if tile and transformed is not None and transformed.tile == tile and transformed.belongs_to(weight, 1)
            else None,
        )

    def forget_transformed(self) -> None:
        self._transformed = None

    def clear(self) -> None:
        self._packed = self._seen = self._transformed = None


class LayerTransforms:
    """One convolution's weights, transformed for the tile that the rule names at each size of its input, when needed.

    For a caller that makes a new one whenever the weight changes. Under torch.compile and torch.export, where nothing
    can be made, it gives what the last eager call was given.
    """

    __slots__ = ("_algorithm", "_by_tile", "_geometry", "_last", "_tiles", "_weight")

    def __init__(
        self, weight: Tensor, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int
    ) -> None:
        """padding is (top, bottom, left, right)."""
        self._weight = weight.detach()
        self._geometry = (tuple(weight.shape), tuple(stride), tuple(padding), tuple(dilation), groups)
        self._algorithm = ""
        self._tiles: dict[tuple[int, ...], int] = {}
        self._by_tile: dict[int, Tensor] = {}
        self._last: Tensor | None = None

    @staticmethod
    def possible(weight: Tensor, stride: Sequence[int], dilation: Sequence[int], groups: int) -> bool:
        """Whether any input could make the rule name a tile."""
        return (
            weight.is_cpu and weight.dtype is torch.float32
            and _C.winograd_can(tuple(weight.shape), tuple(stride), tuple(dilation), groups)
        )  # fmt: skip

    def get(self, size: Sequence[int]) -> Tensor | None:
        """For `prefix_conv2d(input, ..., winograd=...)`, `size` being the input's height and width.

        None where no sample of this layer would use it.
        """
        if torch.compiler.is_compiling():
            return self._last
        algorithm, size = get_algorithm(), tuple(size)
        if algorithm != self._algorithm:
            self._algorithm, self._tiles, self._by_tile = algorithm, {}, {}
        tile = self._tiles.get(size)
        if tile is None:
            tile = self._tiles[size] = _C.winograd_tile((self._weight.shape[1], *size), *self._geometry, "float32")
        if tile and tile not in self._by_tile:
            self._by_tile[tile] = pack_winograd(self._weight, tile)
        self._last = self._by_tile.get(tile)
        return self._last
