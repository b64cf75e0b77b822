"""A tiny network, tiny data and a short schedule for the tests of training. Also a program, for what must be killed.

python toy_training.py <checkpoint folder> <batch number at which it kills itself>
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

import rnp

CLASSES = 4


def scenes(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """(count, 1, 8, 8) images of CLASSES noisy patterns, and their labels."""
    generator = torch.Generator().manual_seed(seed)
    patterns = torch.randn(CLASSES, 8, 8, generator=torch.Generator().manual_seed(99))
    labels = torch.randint(CLASSES, (count,), generator=generator)
    images = 0.7 * torch.randn(count, 1, 8, 8, generator=generator)
    images[:, 0] += patterns[labels]
    return images, labels


def model() -> nn.Sequential:
    """Three convolutions with BatchNorm, two of them prunable, and dropout."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Dropout(0.1),
        nn.Linear(16, CLASSES),
    )


def network() -> rnp.PrunedNetwork:
    return rnp.convert(model(), torch.zeros(2, 1, 8, 8), groups=4)


class Loader:
    """Batches in an order from torch's global generator; sends itself the signal ``number`` before batch ``at``."""

    def __init__(self, count: int = 96, batch: int = 16, seed: int = 1, number: int = 0, at: int = -1) -> None:
        self.images, self.labels = scenes(count, seed)
        self.batch, self.number, self.at = batch, number, at
        self.served = 0

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for index in torch.randperm(len(self.labels)).split(self.batch):
            if self.served == self.at:
                os.kill(os.getpid(), self.number)
            self.served += 1
            yield self.images[index], self.labels[index]


def config(**changes: Any) -> rnp.TrainConfig:
    """A schedule of 37 steps in six phases; an epoch is 4 batches."""
    steps = {"pretrain": 4, "sandwich": 11, "agent": 7, "finetune": 8}
    settings: dict[str, Any] = {name: rnp.Length(steps=count) for name, count in steps.items()}
    settings |= {"recalibration_batches": 4, "statistics_batches": 2, "agent_batch": 32, "replay": 60}
    settings |= {"finetune_chunk": 3, "epoch_steps": 4, "progress": False, "validation_batches": 0}
    return rnp.TrainConfig(**(settings | changes))


def train(loader: Loader, **changes: Any) -> dict[str, Tensor]:
    """Train the toy; returns its whole state."""
    torch.set_num_threads(1)
    pruned = network()
    rnp.train(pruned, loader, None, config(**changes))
    return {name: tensor.clone() for name, tensor in pruned.state_dict().items()}


if __name__ == "__main__":
    train(Loader(number=signal.SIGKILL, at=int(sys.argv[2])), checkpoint_dir=sys.argv[1])
