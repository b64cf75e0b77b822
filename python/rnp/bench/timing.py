"""Rivals timed side by side: in turn, in one process, with the machine's own noise beside the figures.

A *side* is a function without arguments. In every round each side has one turn, every other round in reverse order, so
that a drift of the machine favours nobody. The baseline has two turns a round, its second one called ``again``: a
ratio between the two is noise, and differences below it say nothing.

*Warm*: a turn is one call that is not counted, then as many as take about a millisecond; the mean of those is one
sample. *Cold*: caches are filled with other data before each call, and a turn is one call.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from rnp.measure import median, quantile

AGAIN = "again"
CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.thread_time}
_TURN = 1e-3  # seconds of a warm turn, at least
_LONG = 20e-3  # a call that takes longer finds the caches as it leaves them: no uncounted call before it on one thread
# Between turns on several threads. ONNX Runtime's threads go on spinning after a call, for more than 10 ms: whoever's
# turn came next took up to twice as long (512->512 at 7x7, OpenVINO 20 ms behind ONNX Runtime, 8 behind itself).
_PAUSE = 0.05
# Then the side's own threads sleep too: uncounted calls for so long wake them (one call was not enough: a quarter of a
# layer's width read 0.1 to 0.4 of theory).
_AWAKE = 0.01


def keep_freed_memory() -> None:
    """Tell glibc to keep memory that is freed.

    Outputs above 32 MB are otherwise given back to the system and faulted in again at every call, on all sides alike,
    and that can cost more than a convolution of quarter width. A deployment should do the same.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD
        libc.mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD


class Eviction:
    """Fills the caches with other data: works over a buffer of ``megabytes``, larger than the last-level cache."""

    def __init__(self, megabytes: int = 96) -> None:
        self.buffer = torch.ones(megabytes << 18)

    def __call__(self) -> None:
        self.buffer.mul_(1.0)


def measure(
    sides: Mapping[str, Callable[[], object]],
    baseline: str,
    *,
    seconds: float = 1.0,
    rounds: int = 7,
    clock: str = "wall",
    cold: Callable[[], object] | None = None,
) -> dict[str, list[float]]:
    """Seconds of a call of every side, and of the baseline :data:`AGAIN`, in every round.

    Args:
        sides: the calls, by name.
        baseline: the name of the side that has a second turn in every round.
        seconds: rounds go on until this much time has passed,
        rounds: but there are at least so many.
        clock: "wall", or "cpu" for this thread's CPU time: for a machine that others use too, and one thread only.
        cold: called, off the clock, before every counted call; None for warm calls.

    Raises:
        ValueError: the baseline is no side, a side is called "again", or the clock cannot measure this.
    """
    if baseline not in sides or AGAIN in sides:
        raise ValueError(f"measure: baseline must be a side and {AGAIN!r} must not, got {baseline!r} of {list(sides)}")
    if clock not in CLOCKS:
        raise ValueError(f"measure: clock must be one of {', '.join(CLOCKS)}, got {clock!r}")
    if clock == "cpu" and torch.get_num_threads() != 1:
        raise ValueError(f"measure: the cpu clock sees one thread, got {torch.get_num_threads()}")
    now, threads = CLOCKS[clock], torch.get_num_threads()
    calls = dict(sides) | {AGAIN: sides[baseline]}
    once = {}
    for name, call in calls.items():
        call()
        start = now()
        call()
        once[name] = now() - start
    times: dict[str, list[float]] = {name: [] for name in calls}
    begin = time.perf_counter()
    number = 0
    while number < rounds or time.perf_counter() - begin < seconds:
        for name in calls if number % 2 == 0 else reversed(calls):
            call, repeats = calls[name], 1
            if threads > 1:
                time.sleep(_PAUSE)
                awake = time.perf_counter() + _AWAKE
                while time.perf_counter() < awake:
                    call()
            if cold is not None:
                cold()
            elif once[name] < _LONG:
                if threads == 1:
                    call()
                repeats = max(1, int(_TURN / max(once[name], 1e-7)))
            start = now()
            for _ in range(repeats):
                call()
            times[name].append((now() - start) / repeats)
        number += 1
    return times


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, p20 and p80 of a non-empty sequence."""
    return {"median": median(values), "p20": quantile(values, 0.2), "p80": quantile(values, 0.8)}


def ratio(times: Mapping[str, Sequence[float]], slow: str, fast: str) -> dict[str, float]:
    """How many times as fast ``fast`` is: median, p20, p80 of the quotients, round by round."""
    return spread([a / b for a, b in zip(times[slow], times[fast], strict=True)])


def summary(times: Mapping[str, Sequence[float]], baseline: str) -> dict[str, Any]:
    """What is kept of a measurement: milliseconds and speed-up over the baseline of every side, and the noise.

    ``noise`` is what comes out where both sides are the same: the spread of baseline ÷ itself, all three figures.
    """
    return {
        "rounds": len(times[baseline]),
        "ms": {name: {k: 1e3 * v for k, v in spread(values).items()} for name, values in times.items()},
        "speedup": {name: ratio(times, baseline, name) for name in times if name not in (baseline, AGAIN)},
        "noise": ratio(times, baseline, AGAIN),
    }
