"""The cases of `rnp bench` under pytest-benchmark: each side of each case is a test, rivals in one group.

    pip install 'rnp-kernels[bench]'
    pytest bench -k "layer and r3_3x3" --benchmark-columns=median,iqr,rounds

A case is built, and so checked, before any of its sides is timed; a wrong side fails all of them. A rival that cannot
run is skipped with the reason. pytest-benchmark times one side after the other: for ratios take `rnp bench`, which lets
the sides take turns.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module

import pytest
import torch

from rnp.bench import timing
from rnp.bench.environment import environment
from rnp.bench.rivals import Case
from rnp.bench.run import Job, Options, default_threads

_built: dict[str, Case] = {}  # the case at hand, alone: the next one needs the memory


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """`timed` of a module with PART and SIDES: every job of that part, and each of these sides."""
    if "timed" in metafunc.fixturenames:
        part = import_module(f"rnp.bench.parts.{metafunc.module.PART}")
        jobs = part.jobs(Options(threads=default_threads()))
        pairs = [(job, side) for job in jobs for side in metafunc.module.SIDES]
        names = [f"{job.name}, {job.threads} thr, {side}" for job, side in pairs]
        metafunc.parametrize(("job", "side"), pairs, ids=names)


@pytest.fixture(scope="session", autouse=True)
def keep_freed_memory() -> None:
    timing.keep_freed_memory()


@pytest.fixture
def timed(job: Job, side: str, benchmark: Callable[..., object]) -> Callable[[], None]:
    """Times the side of the job; called by the test."""
    torch.set_num_threads(job.threads)
    key = f"{job.part} {job.name} {job.threads} {job.cold}"
    with torch.no_grad():
        if key not in _built:
            _built.clear()
            _built[key] = job.make()
        case = _built[key]
    if side not in case.sides:
        pytest.skip(case.missing.get(side, f"{job.name} has no side {side!r}"))

    def run() -> None:
        benchmark.group = f"{job.name}, {job.threads} thread(s){', cold' if job.cold else ''}"
        benchmark.extra_info.update(theory=case.sides[side].theory, environment=environment(), **job.facts)
        with torch.no_grad():
            if job.cold:
                benchmark.pedantic(case.sides[side].run, setup=timing.Eviction(), rounds=15)
            else:
                benchmark(case.sides[side].run)

    return run
