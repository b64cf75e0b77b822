"""`rnp bench`: measures a part, or all of them, and writes results.json, results.txt and index.html."""

from __future__ import annotations

import argparse
import math
import shlex
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from rnp.bench import report
from rnp.bench.environment import environment
from rnp.bench.gate import WrongResult
from rnp.bench.machine import limits
from rnp.bench.run import Options, default_threads, measure_jobs, progress
from rnp.bench.timing import CLOCKS
from rnp.usage import UsageError, require, writable_folder

PARTS = ("operator", "layer", "network", "training")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `rnp bench`."""
    parser.add_argument("part", nargs="?", choices=(*PARTS, "all"), default="all", help="what to measure (all)")
    parser.add_argument(
        "--out", type=Path, default=Path("bench-out"), metavar="DIR", help="reports go there (bench-out)"
    )
    parser.add_argument("--seconds", type=float, default=0.6, help="time for each row, at least (0.6)")
    parser.add_argument("--rounds", type=int, default=7, help="rounds for each row, at least (7)")
    parser.add_argument("--threads", type=int, nargs="+", help="numbers of threads (1 and all)")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8], help="batches of layers and networks (1 8)")
    parser.add_argument("--only", default="", metavar="TEXT", help="only rows whose name contains this")
    parser.add_argument("--quick", action="store_true", help="a few rows, to see that everything runs")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32",
        help="of parts layer and training (float32); layers in bfloat16 beside our own float32 kernels too",
    )  # fmt: skip
    parser.add_argument(
        "--clock", choices=sorted(CLOCKS), default="wall",
        help="cpu: this thread's CPU time, for a machine that others use too (one thread)",
    )  # fmt: skip


def run(arguments: argparse.Namespace) -> int:
    """Measure and report; the exit status: 1 where a result was wrong (nothing is timed then).

    Raises UsageError for arguments that cannot be met, before any work but for `--only` that names no row.
    """
    threads = tuple(sorted(set(arguments.threads or default_threads())))
    check(arguments, threads)
    out = writable_folder(arguments.out, "--out")
    dtype = getattr(torch, arguments.dtype)
    seconds, rounds, batches = arguments.seconds, arguments.rounds, tuple(arguments.batch)
    if arguments.quick:
        seconds, rounds, batches = 0.0, 2, (2,)
    options = Options(seconds, rounds, arguments.clock, threads, batches, arguments.only, arguments.quick, dtype)
    results: dict[str, Any] = {
        "command": shlex.join(["rnp", "bench", *sys.argv[2:]]),
        "quick": arguments.quick,
        "clock": arguments.clock,
        "environment": environment(),
        "limits": [],
        "rows": [],
    }
    progress(report.head(results["environment"]))
    before, start = torch.get_num_threads(), time.monotonic()
    for count in threads:
        torch.set_num_threads(count)
        results["limits"].append(limits(arguments.clock, dtype).as_dict())
        progress(report.roof(results["limits"][-1]))
    torch.set_num_threads(before)
    try:
        for part in PARTS if arguments.part == "all" else (arguments.part,):
            progress(f"\n{part}: baseline ms ± noise | speed-up over it (share of the theoretical speed-up)")
            results["rows"] += measure_jobs(import_module(f"rnp.bench.parts.{part}").jobs(options), options, progress)
    except WrongResult as wrong:
        print(f"rnp bench: wrong result, nothing more is measured: {wrong}", file=sys.stderr)
        return 1
    if not results["rows"]:
        raise UsageError(f"no row's name contains {arguments.only!r}")
    results["environment"]["load_after"] = environment()["load"]
    results["seconds"] = time.monotonic() - start
    report.write(results, out)
    progress("\n" + report.closing(results, out))
    return 0


def check(arguments: argparse.Namespace, threads: tuple[int, ...]) -> None:
    """Raise UsageError for a number out of its range, or for options that exclude each other."""
    for name, least in (("threads", min(threads)), ("batch", min(arguments.batch)), ("rounds", arguments.rounds)):
        require(least >= 1, f"--{name} must be at least 1", least)
    require(0 <= arguments.seconds < math.inf, "--seconds must be a number, not negative", arguments.seconds)
    if arguments.clock == "cpu":
        require(threads == (1,), "--clock cpu needs --threads 1", " ".join(map(str, threads)))
    if arguments.dtype != "float32":
        rule = f"--dtype {arguments.dtype} needs part layer or training"
        require(arguments.part in ("layer", "training"), rule, arguments.part)
