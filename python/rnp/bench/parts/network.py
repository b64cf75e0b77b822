"""Whole networks at 224 x 224: converted, against the model in stock torch, ONNX Runtime and OpenVINO, and, with mixed
actions of 3 times, against what others do with them: masks, slices, oneDNN packed for each pair of widths.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

import rnp
import rnp_kernels
from rnp import stock
from rnp.bench import models, network_rivals, runtimes
from rnp.bench.gate import require_close
from rnp.bench.rivals import Case, Side
from rnp.bench.run import Job, Options

GROUPS, PIXELS = 4, 224
TARGETS = (3.0, 4.0, 5.0, 10.0)  # theoretical speed-ups, mixed actions: the paper's table
RIVALS_AT = "mixed 3x"
LIMIT = 1e-4  # relative L2 error of the logits: some fifty layers, each within the gate's limit


def jobs(options: Options) -> list[Job]:
    """Every model at every batch and number of threads."""
    names = ["resnet18"] if options.quick else list(models.MODELS)
    runs = [(batch, threads) for threads in reversed(options.threads) for batch in options.batches]
    pixels = 64 if options.quick else PIXELS
    return [
        Job("network", f"{name} b{batch}", lambda n=name, b=batch, t=threads: network_case(n, b, t, pixels), threads,
            facts={"model": name, "batch": batch, "pixels": pixels})
        for batch, threads in dict.fromkeys(runs)
        for name in names
    ]  # fmt: skip


def network_case(name: str, batch: int, threads: int, pixels: int = PIXELS) -> Case:
    """``name`` of :data:`rnp.bench.models.MODELS`: dense rivals, ours at full width, at uniform 1/2, and mixed."""
    model = models.make(name)
    x = torch.randn(batch, 3, pixels, pixels, generator=torch.Generator().manual_seed(0))
    x = x.to(memory_format=torch.channels_last)
    plain, case = x.contiguous(), Case(f"{name} b{batch}", "prepacked", {})
    with torch.inference_mode():
        truth = model(plain)
    sides: dict[str, Callable[[], Tensor]] = {
        "prepacked": _bind(stock.prepacked(model, x), x),
        "eager": _bind(stock.eager(model), x),
    }
    ready, case.missing = runtimes.runtimes(model, plain, threads)
    sides |= {rival: _bind(run, plain) for rival, run in ready.items()}
    pruned = rnp.convert(model, x[:1], GROUPS)
    sides["full"] = _bind(pruned, x)
    for side, run in sides.items():
        require_close(f"{case.name}, {side}", run(), truth, LIMIT)
        case.sides[side] = Side(run)
    policies: dict[str, rnp.policies.Policy] = {"1/2": rnp.policies.Uniform(0.5)}
    for target in TARGETS:
        actions = mixed_actions(pruned, batch, target)
        if actions is not None:
            policies[f"mixed {target:g}x"] = rnp.policies.Fixed(actions)
    for side, policy in policies.items():
        narrow = rnp.convert(model, x[:1], GROUPS)  # a module of its own: its plan and packed weights stay warm
        narrow.policy = policy
        run = _bind(narrow, x)
        with rnp_kernels.backend("reference"):
            expected = run()
        require_close(f"{case.name}, {side}", run(), expected, LIMIT)
        macs = _bind(lambda images, n=narrow: n(images, return_trace=True)[1].macs, x)().double().mean().item()
        case.sides[side] = Side(run, narrow.dense_macs / macs)
        if side == RIVALS_AT:
            for name in network_rivals.OPERATORS:
                other = network_rivals.rival(narrow, x, name)
                require_close(f"{case.name}, {name} {side}", other(), expected, LIMIT)
                case.sides[f"{name} {side}"] = Side(other, case.sides[side].theory)
    return case


def mixed_actions(network: rnp.PrunedNetwork, batch: int, speedup: float) -> Tensor | None:
    """(N, L) random actions whose mean MACs come closest to dense ÷ ``speedup``; None where no actions save as much.

    Every sample and decision is drawn by itself; narrow actions are made likelier until the mean fits.
    """
    depth, k = len(network.layers), network.groups
    noise = torch.rand(batch, depth, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def draw(tilt: float) -> Tensor:
        weights = torch.softmax(-tilt * torch.arange(k, dtype=torch.float64), 0).cumsum(0)
        return (torch.searchsorted(weights, noise).clamp(max=k - 1) + 1).int()

    def achieved(tilt: float) -> float:
        return network.dense_macs / network.macs(draw(tilt)).double().mean().item()

    low, high = -20.0, 20.0
    if achieved(high) < speedup:
        return None
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if achieved(middle) < speedup else (low, middle)
    return draw(high)


def _bind(module: nn.Module | Callable[[Tensor], Tensor], x: Tensor) -> Callable[[], Tensor]:
    def run() -> Tensor:
        with torch.inference_mode():
            return module(x)

    return run
