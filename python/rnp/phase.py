"""What every phase of training has: a step, a beginning and an end, a state that survives a kill."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rnp.agent import Agent
from rnp.config import Length, TrainConfig
from rnp.network import PrunedNetwork

Batch = tuple[Tensor, Tensor]  # images (N, C, H, W) channels_last float, labels (N,) int64


@dataclass
class Context:
    """What the phases share."""

    network: PrunedNetwork
    agent: Agent
    config: TrainConfig
    generator: torch.Generator  # on the CPU; seeded anew at every epoch
    penalty: float  # p as it stands: config.penalty, or steered since


class Phase:
    """One phase. ``optimizer`` is made by ``begin``; ``state`` and ``load`` carry what else a resumed run needs."""

    name: str
    optimizer: torch.optim.Optimizer

    def __init__(self, context: Context, length: Length) -> None:
        self.context = context
        self.length = length

    def begin(self, batches: Iterable[Batch]) -> None:
        """Prepare; called once, not after a resume. ``batches`` is endless."""

    def arrange(self, batches: Iterable[Batch]) -> Iterator[tuple[Tensor, Tensor, Any]]:
        """The batches as ``step`` wants them: images, labels and something of the phase's own."""
        for images, labels in batches:
            yield images, labels, None

    def step(self, number: int, progress: float, images: Tensor, labels: Tensor, extra: Any) -> Tensor:
        """One step at ``progress`` (0…1); returns the loss, detached."""
        raise NotImplementedError

    def finish(self, batches: Iterable[Batch]) -> None:
        """After the last step."""

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        return {}, {}

    def load(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        """Restore what ``state`` gave."""
