"""Whole networks at 224 × 224: full width beside OpenVINO and ONNX Runtime, and what pruning really saves.

    python bench/networks.py [--parts full,agent,pruned,breakdown,memory] [--models vgg16,resnet18,resnet50]
                             [--threads 1,2] [--rounds 7] [--clock wall|cpu] [--algorithm auto|direct]
                             [--json FILE]

Every side is checked before anything is timed; the sides of a row are timed in turn in one process. A rival that is not
installed is named as missing.

* full: the converted network at full width, the same with direct convolution only, and the runtimes; batch 1 and 8.
* agent: an agent that decides against the same actions without it; its share of the network's time, batch 1.
* pruned: mixed actions drawn so that the batch's theoretical speed-up is 3, 4, 5 and 10 (the paper's table), batch 8
  and 32. `realised` is (own full width ÷ time) ÷ theory, both of --algorithm; `over` the runtime's time ÷ ours.
* breakdown: the same actions layer by layer, and the bound that the layers outside of the pruning set (breakdown.py).
* memory: the most that a forward needs beyond what the process held before it (Linux), for the original and for ours.
"""

from __future__ import annotations

import argparse
import functools
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import breakdown
import torch
from torch import Tensor, nn

import rnp
import rnp_kernels
from rnp.bench import models, timing
from rnp.bench.environment import environment
from rnp.bench.gate import require_close
from rnp.bench.rivals import directly
from rnp.bench.runtimes import runtimes

K, PIXELS = 4, 224
SPEEDUPS = (3, 4, 5, 10)
LIMIT = 1e-4  # relative L2 error after up to 54 layers, Winograd's included


def images(batch: int, seed: int = 1) -> Tensor:
    x = torch.randn(batch, 3, PIXELS, PIXELS, generator=torch.Generator().manual_seed(seed))
    return x.to(memory_format=torch.channels_last)


def dense_sides(model: nn.Module, x: Tensor, threads: int) -> tuple[dict[str, Callable[[], Tensor]], dict[str, str]]:
    """The runtimes, checked against the original; and why those that are missing cannot run."""
    ready, missing = runtimes(model, x, threads)
    plain, truth = x.contiguous(), model(x)
    for name, run in ready.items():
        require_close(name, run(plain), truth, LIMIT)
    return {name: (lambda run=run: run(plain)) for name, run in ready.items()}, missing


def full_row(name: str, batch: int, options: argparse.Namespace) -> dict[str, Any]:
    model, x = models.make(name), images(batch)
    network = rnp.convert(model, x[:1], K)
    sides: dict[str, Callable[[], Any]] = {"ours": lambda: network(x)}
    sides["direct"] = directly(sides["ours"])
    for side in ("ours", "direct"):
        require_close(f"{name}, {side}", sides[side](), model(x), LIMIT)
    rivals, missing = dense_sides(model, x, torch.get_num_threads())
    times = timing.measure(sides | rivals, "ours", seconds=0, rounds=options.rounds, clock=options.clock)
    row = {"model": name, "batch": batch, "missing": missing, **timing.summary(times, "ours")}
    row["over"] = {side: timing.ratio(times, side, "ours") for side in [*rivals, "direct"]}
    return row


def agent_row(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """The same actions, decided by an agent on the way or known before: the pooled features count as the agent's.

    One network runs both, from the same packed weights in the same pages. In every round the agent's turn lies between
    two of the known actions and is compared with their mean, so that a machine whose speed drifts favours nobody.
    """
    x = images(1)
    network = rnp.convert(models.make(name), x, K)
    network.policy = rnp.policies.Random(torch.Generator().manual_seed(0))
    features = network(images(4, 2), return_trace="features")[1].features
    agent = rnp.Agent(network.feature_sizes, K).eval().requires_grad_(False)
    agent.set_feature_statistics([f.mean(0) for f in features], [f.std(0) for f in features])
    nn.init.normal_(agent.decoders[0].weight, std=3.0, generator=torch.Generator().manual_seed(0))
    rows: dict[str, Any] = {"model": name, "decisions": len(network.layers)}
    for label, shift in (("chosen", 0.0), ("full width", 1e6)):
        network.policy = agent
        network.set_budget(shift)
        actions = network(x, return_trace=True)[1].actions
        policies = {"known": rnp.policies.Fixed(actions), "agent": agent}

        def run(side: str, policies: Any = policies) -> Any:
            network.policy = policies[side]
            return network(x)

        require_close(f"{name}, agent", run("agent"), run("known"), 1e-6)
        sides = {side: functools.partial(run, side) for side in policies}
        times = timing.measure(sides, "known", seconds=0, rounds=2 * options.rounds, clock=options.clock)
        rounds = zip(times["known"], times["agent"], times[timing.AGAIN], strict=True)
        share = [1 - (before + after) / 2 / agent for before, agent, after in rounds]
        rows[label] = {"share": timing.spread(share), **timing.summary(times, "known")}
    return rows


def mixed_actions(network: rnp.PrunedNetwork, batch: int, speedup: float, seed: int = 0) -> Tensor:
    """Actions (batch, L), independent for every sample and layer, tilted until the batch's theory is `speedup`.

    P(a) ∝ exp(tilt · a); the same uniform numbers for every tilt, so that the search sees a monotone function.
    """
    uniform = torch.rand(batch, len(network.layers), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)

    def draw(tilt: float) -> Tensor:
        weights = torch.exp(tilt * torch.arange(1, K + 1, dtype=torch.float64))
        bounds = (weights / weights.sum()).cumsum(0)
        return (torch.searchsorted(bounds, uniform).clamp(max=K - 1) + 1).to(torch.int32)

    low, high = -40.0, 40.0
    for _ in range(60):
        middle = (low + high) / 2
        if network.dense_macs / network.macs(draw(middle)).double().mean() > speedup:
            low = middle
        else:
            high = middle
    return draw(high)


def pruned_rows(name: str, batch: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    model, x = models.make(name), images(batch)
    full = rnp.convert(model, x[:1], K)
    require_close(name, full(x[:2]), model(x[:2]), LIMIT)
    rivals, missing = dense_sides(model, x, torch.get_num_threads())
    sides: dict[str, Callable[[], Any]] = {"full": lambda: full(x)}
    theory = {}
    mixed = rnp.convert(model, x[:1], K)
    policies: dict[str, rnp.policies.Fixed] = {}
    for speedup in SPEEDUPS:
        actions, side = mixed_actions(mixed, batch, speedup), f"{speedup}x"
        theory[side] = float(mixed.dense_macs / mixed.macs(actions).double().mean())
        mixed.policy = rnp.policies.Fixed(actions[:2])
        with rnp_kernels.backend("reference"):
            expected = mixed(x[:2])
        require_close(f"{name}, {side}", mixed(x[:2]), expected, LIMIT)
        policies[side] = rnp.policies.Fixed(actions)

        def run(side: str = side) -> Any:
            mixed.policy = policies[side]
            return mixed(x)

        sides[side] = run
    times = timing.measure(sides | rivals, "full", seconds=0, rounds=options.rounds, clock=options.clock)
    rows = []
    for side, value in theory.items():
        realised = [a / b / value for a, b in zip(times["full"], times[side], strict=True)]
        row: dict[str, Any] = {"model": name, "batch": batch, "theory": value, "missing": missing}
        row["realised"] = timing.spread(realised)
        row["over"] = {rival: timing.ratio(times, rival, side) for rival in rivals}
        row["ms"] = {k: 1e3 * v for k, v in timing.spread(times[side]).items()}
        rows.append(row)
    return rows


def breakdown_row(name: str, batch: int, options: argparse.Namespace) -> dict[str, Any]:
    model, x = models.make(name), images(batch)
    full = rnp.convert(model, x[:1], K)
    sides = {}
    for speedup in SPEEDUPS:
        mixed = rnp.convert(model, x[:1], K)
        actions = mixed_actions(mixed, batch, speedup)
        mixed.policy = rnp.policies.Fixed(actions)
        mixed._packs = full._packs  # one copy of the weights, as one network would have
        theory = float(mixed.dense_macs / mixed.macs(actions).double().mean())
        sides[f"{speedup}x"] = (breakdown.Side(mixed, x, options.clock), theory)
    # A heap that still grows faults its new pages in inside of some layer (64->64 at 224x224: 371 ms instead of 93).
    torch.zeros(248 << 20)
    found = breakdown.breakdown(breakdown.Side(full, x, options.clock), sides, options.rounds)
    return {"model": name, "batch": batch, **found}


def status(field: str) -> int:
    """Bytes of a line of /proc/self/status."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def memory_of(name: str, side: str, batch: int) -> dict[str, int]:
    """In a process of its own: bytes beyond those held before the first forward, at most and after three of them."""
    model, x = models.make(name), images(batch)
    network = rnp.convert(model, x[:1], K) if side == "ours" else model.to(memory_format=torch.channels_last)
    del model
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts here
    before = status("VmRSS")
    for _ in range(3):
        network(x)
    found = {"peak": status("VmHWM") - before, "kept": status("VmRSS") - before, "packed": 0, "transformed": 0}
    if side == "ours":
        for packed, transforms in network._packs.values():
            found["packed"] += packed.data.nbytes
            found["transformed"] += sum(t.nbytes for t in transforms._by_tile.values()) if transforms else 0
    return found


def memory_row(name: str, batch: int) -> dict[str, Any]:
    row: dict[str, Any] = {"model": name, "batch": batch}
    for side in ("original", "ours"):
        command = [sys.executable, __file__, "--memory-of", f"{name},{side},{batch}"]
        row[side] = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    return row


def text(row: dict[str, Any]) -> str:
    """One line of the table on the terminal."""
    head = f"{row['model']:<9}" + (f" batch {row['batch']:<3}" if "batch" in row else "")
    if "layers" in row:
        return "\n".join(breakdown.lines(row))
    if "theory" in row:
        over = ", ".join(f"{v['median']:.2f}× {k}" for k, v in row["over"].items())
        return f"{head} theory {row['theory']:5.2f}×, realised {row['realised']['median']:.2f}; {over}"
    if "over" in row:
        over = ", ".join(f"{v['median']:.2f}× {k}" for k, v in row["over"].items())
        return f"{head} {row['ms']['ours']['median']:8.2f} ms; {over}; missing: {', '.join(row['missing']) or 'none'}"
    if "decisions" in row:
        shares = ", ".join(f"{100 * row[k]['share']['median']:.1f} % ({k})" for k in ("chosen", "full width"))
        return f"{head} {row['decisions']} decisions: {shares}"
    sides = []
    for side in ("original", "ours"):
        sides.append(f"{side} {row[side]['peak'] / 2**20:.0f} MB")
    packed, transformed = (row["ours"][key] / 2**20 for key in ("packed", "transformed"))
    return f"{head} peak {', '.join(sides)}; of it packed weights {packed:.0f} MB, for Winograd {transformed:.0f} MB"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default="full,agent,pruned,memory")
    parser.add_argument("--models", default=",".join(models.MODELS))
    parser.add_argument("--batches", default="", help="instead of each part's own")
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--clock", choices=tuple(timing.CLOCKS), default="wall")
    parser.add_argument("--algorithm", choices=("auto", "direct"), default="auto", help="of our convolutions")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_grad_enabled(False)
    if options.memory_of:
        name, side, batch = options.memory_of.split(",")
        print(json.dumps(memory_of(name, side, int(batch))))
        return
    timing.keep_freed_memory()
    rnp_kernels.set_algorithm(options.algorithm)
    names, parts = options.models.split(","), options.parts.split(",")
    batches = {"full": [1, 8], "pruned": [8, 32], "breakdown": [8, 32], "memory": [1, 8]}
    if options.batches:
        batches = {part: [int(batch) for batch in options.batches.split(",")] for part in batches}
    runs = []
    for threads in map(int, options.threads.split(",")):
        torch.set_num_threads(threads)
        run: dict[str, Any] = {"environment": environment(), "rows": {part: [] for part in parts}}
        runs.append(run)
        for part in parts:
            print(f"\n{part}, {threads} thread(s)", flush=True)
            for name in names:
                if part == "agent":
                    rows = [agent_row(name, options)]
                elif part == "pruned":
                    rows = [row for b in batches[part] if name != "resnet18" for row in pruned_rows(name, b, options)]
                elif part == "breakdown":
                    rows = [breakdown_row(name, batch, options) for batch in batches[part] if name != "resnet18"]
                else:
                    make = memory_row if part == "memory" else lambda n, b: full_row(n, b, options)
                    rows = [make(name, batch) for batch in batches[part]]
                run["rows"][part] += rows
                for row in rows:
                    print(text(row), flush=True)
    if options.json:
        options.json.write_text(json.dumps({"command": sys.argv, "runs": runs}, indent=1) + "\n")


if __name__ == "__main__":
    main()
