"""What the machine can do at most: multiply-adds in registers, and bytes to and from memory. Both are measured."""

from __future__ import annotations

import threading
from dataclasses import asdict, dataclass

import torch

from rnp.bench.timing import CLOCKS
from rnp.measure import median
from rnp_kernels import _C


@dataclass(frozen=True)
class Limits:
    """``gflops``: peak of the dtype's multiply-adds, two operations each; ``gbytes``: bytes read plus written a second
    by a copy."""

    threads: int
    gflops: float
    gbytes: float

    def seconds(self, flops: float, bytes: float) -> float:
        """The roofline: no kernel can do this work faster."""
        return max(flops / self.gflops, bytes / self.gbytes) / 1e9

    def as_dict(self) -> dict[str, float]:
        return asdict(self)


def fma_peak(threads: int, clock: str = "wall", seconds: float = 0.3, dtype: torch.dtype = torch.float32) -> float:
    """GFLOP/s of multiply-adds on registers, ``threads`` at once, with the instruction set in use."""
    rounds, rates = 1 << 16, [0.0] * threads
    now, peak = CLOCKS[clock], _C.bfloat16_peak if dtype is torch.bfloat16 else _C.fma_peak

    def work(index: int, duration: float) -> None:
        start, count = now(), 0
        while now() - start < duration:
            count += peak(rounds)
        rates[index] = 2 * count / (now() - start) / 1e9

    work(0, 0.05)  # a processor may need some time to reach its clock
    workers = [threading.Thread(target=work, args=(i, seconds)) for i in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return sum(rates)


def copy_bandwidth(clock: str = "wall", megabytes: int = 256, rounds: int = 7) -> float:
    """GB/s of a copy between two buffers that no cache holds, with torch's threads: bytes read plus bytes written."""
    source, target = (torch.ones(megabytes << 18) for _ in range(2))
    seconds, now = [], CLOCKS[clock]
    for _ in range(rounds):
        start = now()
        target.copy_(source)
        seconds.append(now() - start)
    return 2 * source.nbytes / median(seconds) / 1e9


def limits(clock: str = "wall", dtype: torch.dtype = torch.float32) -> Limits:
    """The limits of torch's number of threads, now. ``clock`` as in :func:`rnp.bench.timing.measure`."""
    threads = torch.get_num_threads()
    return Limits(threads, fma_peak(threads, clock, dtype=dtype), copy_bandwidth(clock))
