"""Wall-clock time of rivals, interleaved in one process, and what is said of it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import torch


def quantile(values: Sequence[float], q: float) -> float:
    """The q-quantile (0…1) of a non-empty sequence, linear between neighbours."""
    ordered = sorted(values)
    position = q * (len(ordered) - 1)
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (position - low) * (ordered[high] - ordered[low])


def seconds_of(call: Callable[[], object], device: torch.device | str = "cpu") -> float:
    """Seconds of one call; on a GPU from an idle device to an idle device."""
    cuda = torch.device(device).type == "cuda"
    if cuda:
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    call()
    if cuda:
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def interleaved(
    calls: Mapping[str, Callable[[], object]], rounds: int, warmup: int = 1, device: torch.device | str = "cpu"
) -> dict[str, list[float]]:
    """Seconds of each call in each of ``rounds`` rounds.

    A round runs every call once; every other round in reverse order, so that a drift of the machine's speed, or what
    one call leaves in the caches, favours nobody. ``warmup`` rounds before them are not counted.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(-warmup, rounds):
        names = list(calls) if number % 2 == 0 else list(reversed(calls))
        for name in names:
            seconds = seconds_of(calls[name], device)
            if number >= 0:
                times[name].append(seconds)
    return times


def in_turn(
    sides: Mapping[str, Callable[[torch.Tensor], object]], batches: Sequence[torch.Tensor], rounds: int
) -> dict[str, list[list[float]]]:
    """Seconds of every side on every batch in every round: times[side][batch][round].

    In a round each side runs all batches in a row, as a network in use does, so that its weights stay in the caches;
    the order of the sides turns from round to round. One round before them is not counted.
    """
    times = {name: [[0.0] * rounds for _ in batches] for name in sides}
    for number in range(-1, rounds):
        names = list(sides) if number % 2 == 0 else list(reversed(sides))
        for name in names:
            for index, images in enumerate(batches):
                seconds = seconds_of(lambda side=sides[name], images=images: side(images), images.device)
                if number >= 0:
                    times[name][index][number] = seconds
    return times


def median(values: Sequence[float]) -> float:
    """The median of a non-empty sequence."""
    return statistics.median(values)
