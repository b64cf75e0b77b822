"""The rules that actions obey, wherever they come from: integers in 1…k, one for each sample and decision."""

from __future__ import annotations

import torch
from torch import Tensor

from rnp_kernels.checks import may_read

INTEGERS = (torch.int32, torch.int64, torch.int16, torch.int8, torch.uint8)


def check_integers(actions: Tensor, who: str) -> None:
    """Raise TypeError unless `actions` are integers: a fraction would be cut off, a bool is no action."""
    if actions.dtype not in INTEGERS:
        raise TypeError(f"{who} must be integers, got {actions.dtype}")


def check_range(actions: Tensor, groups: int, who: str) -> None:
    """Raise ValueError if one of `actions` lies outside 1…groups; on a GPU only under RNP_CHECK=1."""
    if actions.numel() == 0 or not may_read(actions):
        return
    least, largest = (int(value) for value in actions.aminmax())
    if least < 1 or largest > groups:
        raise ValueError(f"{who} must lie in 1…{groups}, got {least}…{largest}")
