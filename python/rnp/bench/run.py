"""Running a list of jobs: build the case (which checks it), time it, keep a row."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch

from rnp.bench import timing
from rnp.bench.rivals import Case


@dataclass(frozen=True)
class Options:
    """What a run is asked for. ``seconds``: for each row, at least; ``only``: part of the names of the jobs to run."""

    seconds: float = 1.0
    rounds: int = 7
    clock: str = "wall"
    threads: tuple[int, ...] = ()
    batches: tuple[int, ...] = (1, 8)
    only: str = ""
    quick: bool = False
    dtype: torch.dtype = torch.float32  # of parts layer and training

    @property
    def all_threads(self) -> int:
        return max(self.threads)


@dataclass(frozen=True)
class Job:
    """One row to be. ``facts`` go into it: what was measured, and what plots want to know."""

    part: str
    name: str
    make: Callable[[], Case]
    threads: int
    cold: bool = False
    facts: dict[str, Any] = field(default_factory=dict)


def measure_jobs(jobs: Iterable[Job], options: Options, say: Callable[[str], None] = print) -> list[dict[str, Any]]:
    """Every job whose name contains ``options.only``, in order, one line each. Torch's threads are restored."""
    timing.keep_freed_memory()
    eviction: timing.Eviction | None = None
    rows, before = [], torch.get_num_threads()
    try:
        for job in jobs:
            if options.only not in job.name:
                continue
            torch.set_num_threads(job.threads)
            if job.cold and eviction is None:
                eviction = timing.Eviction()
            with torch.no_grad():
                rows.append(row(job, options, eviction if job.cold else None))
            say(line(rows[-1]))
    finally:
        torch.set_num_threads(before)
    return rows


def row(job: Job, options: Options, cold: Callable[[], object] | None) -> dict[str, Any]:
    """Build, check and time one job."""
    case = job.make()
    sides = {name: side.run for name, side in case.sides.items()}
    times = timing.measure(
        sides, case.baseline, seconds=options.seconds, rounds=options.rounds, clock=options.clock, cold=cold
    )
    found = timing.summary(times, case.baseline)
    theory = {name: side.theory for name, side in case.sides.items()}
    realised = {name: value["median"] / theory[name] for name, value in found["speedup"].items() if theory[name] > 1}
    return {
        "part": job.part, "name": job.name, "threads": job.threads, "cold": job.cold, **job.facts, **case.facts,
        "baseline": case.baseline, "theory": theory, **found, "realised": realised, "missing": case.missing,
    }  # fmt: skip


def line(row: dict[str, Any]) -> str:
    """A row for the terminal: the baseline's time, then each side's speed-up over it, with the share of theory."""
    noise = row["noise"]
    milliseconds = row["ms"][row["baseline"]]["median"]
    head = f"{row['name']:34} {row['threads']:2d} thr {milliseconds:9.3f} ms ±{spread(noise):2.0f} %"
    cells = []
    for name, value in row["speedup"].items():
        share = f" ({row['realised'][name]:.2f})" if name in row["realised"] else ""
        cells.append(f"{name} {value['median']:.2f}{share}")
    return f"{head} | {' · '.join(cells)}"


def spread(noise: dict[str, float]) -> float:
    """Per cent within which two equal sides differ."""
    return 100 * max(abs(noise["p80"] - 1), abs(noise["p20"] - 1))


def default_threads() -> tuple[int, ...]:
    """One, and all that torch uses here."""
    return tuple(sorted({1, torch.get_num_threads()}))


def progress(text: str) -> None:
    """A line on the terminal at once, also through a pipe."""
    print(text, flush=True, file=sys.stdout)
