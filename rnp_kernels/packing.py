"""A cache of packed weights beside the parameter they were made from: rebuilt when it changes, never saved."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor, nn

from .ops import pack_weight

_STALE_WORD = 15  # of the pack's int32 header; the operator sets it where it finds the pack older than the weights

_PACKED = (torch.float32, torch.float16, torch.bfloat16)


def _identity(weight: Tensor) -> tuple[Any, ...]:
    """Changes when the tensor is written in place, resized, converted or given other data.

    Writing through `weight.data` changes nothing here: the operator compares samples of the weights for that.
    """
    version = 0 if weight.is_inference() else weight._version
    return (weight.data_ptr(), version, weight.dtype, weight.shape, weight.stride())


class PackedWeight:
    """One weight's pack, immutable, so that threads may share it.

    It holds the weight's storage, whose address therefore cannot be reused while it stands in `identity`.
    """

    __slots__ = ("_held", "_stale", "data", "groups", "identity", "weight")

    def __init__(self, weight: nn.Parameter, groups: int) -> None:
        self.weight = weight
        self.groups = groups
        self.identity = _identity(weight)
        self._held = weight.detach()
        self.data = pack_weight(weight, groups)
        self._stale = ctypes.c_int32.from_address(self.data.data_ptr() + 4 * _STALE_WORD)

    def belongs_to(self, weight: Tensor, groups: int) -> bool:
        return (
            weight is self.weight
            and groups == self.groups
            and not self._stale.value
            and _identity(weight) == self.identity
        )


class PackCache:
    """Decides when a module's weight is packed: at the second call that sees it unchanged.

    A training step changes the weight before every forward, so it never packs in vain; the operator then packs for that
    call alone, as cheaply. An inference loop packs once.
    """

    __slots__ = ("_packed", "_seen")

    def __init__(self) -> None:
        self._packed: PackedWeight | None = None
        self._seen: tuple[Any, ...] | None = None

    def get(self, weight: Tensor, groups: int, now: bool = False) -> Tensor | None:
        """The pack of `weight`, or None where it is not worth one yet; with `now`, wherever it can be packed."""
        packed = self._packed
        if packed is not None:
            if packed.belongs_to(weight, groups):
                return packed.data
            self._packed = None
        if type(weight) is not nn.Parameter or weight.is_inference():
            return None  # computed anew for each call, or without a version counter
        if not weight.is_cpu or weight.dtype not in _PACKED:
            return None
        if not now:
            seen = (id(weight), _identity(weight))
            if seen != self._seen:
                self._seen = seen
                return None
        packed = self._packed = PackedWeight(weight, groups)
        return packed.data

    def clear(self) -> None:
        self._packed = self._seen = None
