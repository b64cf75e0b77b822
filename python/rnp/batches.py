"""Batches of images and labels: checked, and read pass by pass so that an interrupted run can read on where it was."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

END = object()


def images_and_labels(batch: Any, who: str) -> tuple[Tensor, Tensor]:
    """A batch of the loader, checked: labels of another shape would be compared with every answer.

    Raises TypeError where it is no pair of tensors or labels are no integers, ValueError where labels are not (N,).
    """
    if not isinstance(batch, (tuple, list)) or len(batch) != 2 or not all(isinstance(part, Tensor) for part in batch):
        got = type(batch).__name__
        if isinstance(batch, (tuple, list)):
            got += f" of {', '.join(type(part).__name__ for part in batch)}"
        raise TypeError(f"{who}: loader must yield pairs of tensors, images and labels, got {got}")
    images, labels = batch
    if labels.shape != images.shape[:1]:
        raise ValueError(f"{who}: labels must have shape (N,) = {tuple(images.shape[:1])}, got {tuple(labels.shape)}")
    if labels.dtype is torch.bool or labels.is_floating_point() or labels.is_complex():
        raise TypeError(f"{who}: labels must be integers, got {labels.dtype}")
    return images, labels


class Streams:
    """Random streams in place of torch's (CPU), numpy's and Python's global ones inside of `with streams.on():`."""

    def __init__(self, seeds: tuple[int, int, int]) -> None:
        self.torch = torch.Generator().manual_seed(seeds[0]).get_state()
        self.numpy: Any = np.random.MT19937(seeds[1])
        self.python = random.Random(seeds[2]).getstate()

    @contextmanager
    def on(self) -> Iterator[None]:
        before = torch.get_rng_state(), np.random.get_bit_generator(), random.getstate()
        self._put(self.torch, self.numpy, self.python)
        try:
            yield
        finally:
            self.torch, self.numpy, self.python = (
                torch.get_rng_state(),
                np.random.get_bit_generator(),
                random.getstate(),
            )
            self._put(*before)

    @staticmethod
    def _put(state: Tensor, numpy: Any, python: Any) -> None:
        torch.set_rng_state(state)
        np.random.set_bit_generator(numpy)  # a state of numpy's costs 50 µs to read and to write
        random.setstate(python)


class Passes:
    """One pass over a loader after another.

    A pass draws from random streams of its own, seeded by its number: what is computed between two batches changes
    nothing, so that the batches after the first `read` of pass `number` can be read again.
    """

    def __init__(
        self, loader: Iterable[Any], seeds: Callable[[int], tuple[int, int, int]], number: int = 0, read: int = 0
    ) -> None:
        """`seeds`: number of a pass → the seeds of its streams. `number`, `read`: where to begin."""
        self.loader, self.seeds, self.number, self.read = loader, seeds, number, read
        self.iterator: Iterator[Any] | None = None

    def rest(self) -> Iterator[Any]:
        """What is left of the pass."""
        while (batch := self._next()) is not END:
            yield batch

    def endless(self) -> Iterator[Any]:
        """Batches of this pass and all that follow. Raises ValueError where a pass is empty."""
        while True:
            yield from self.rest()

    def _next(self) -> Any:
        if self.iterator is None:
            self._open()
        assert self.iterator is not None
        with self.streams.on():
            batch = next(self.iterator, END)
        if batch is END:
            if self.read == 0:
                raise ValueError("train: train_loader yielded no batch")
            self.number, self.read, self.iterator = self.number + 1, 0, None
        else:
            self.read += 1
        return batch

    def _open(self) -> None:
        """Begin the pass, in the order that the streams and ``set_epoch`` give, and skip what was read of it."""
        seeds = self.seeds(self.number)
        self.streams = Streams(seeds)
        with self.streams.on():
            for part in (self.loader, getattr(self.loader, "sampler", None)):
                if hasattr(part, "set_epoch"):
                    part.set_epoch(seeds[0] >> 1)
            own = getattr(self.loader, "generator", None)  # a DataLoader's; without it torch's global one counts
            if isinstance(own, torch.Generator):
                own.manual_seed(int(torch.randint(2**62, ())))
            self.iterator = iter(self.loader)
            for _ in range(self.read):
                next(self.iterator, END)
