"""`Constant`: a tensor made on the CPU, and its copy on every device that has asked for it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Constant:
    """A tensor on the CPU that others read on their own device.

    The first `on(device)` copies, which waits for the device; those after do not, so that a forward can be captured as
    a CUDA graph once it has run. Copies follow the tensor's version (torch counts changes in place), but a captured
    graph does not: it reads the copy of its capture, and needs the `Constant` alive. Neither deepcopy nor pickle takes
    the copies along.
    """

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self._copies: dict[torch.device, tuple[int, Tensor]] = {}

    def on(self, device: torch.device) -> Tensor:
        tensor = self.tensor
        if tensor.device == device:
            return tensor
        if torch.compiler.is_compiling() or tensor.is_inference():  # a graph keeps its own; no version to compare
            return tensor.to(device)
        kept = self._copies.get(device)
        if kept is None or kept[0] != tensor._version:
            with torch.inference_mode(False):  # a copy made there could be read nowhere else
                kept = self._copies[device] = (tensor._version, tensor.to(device).contiguous())
        return kept[1]

    def __getstate__(self) -> dict[str, Any]:
        return {"tensor": self.tensor, "_copies": {}}
