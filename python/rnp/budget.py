"""``rnp.calibrate``: the Δp at which the agent reaches a speed-up that was asked for.

Source of Δp: Lin et al., *Runtime Neural Pruning*, NIPS 2017 (the balance point); naming a target is *ours*.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from rnp.agent import Agent
from rnp.network import PrunedNetwork

EXTREME = 1e6  # a Δp beyond every difference of Q-values: the agent takes action 1 or k everywhere


@dataclass
class Calibration:
    """The result of :func:`calibrate`."""

    penalty_shift: float  # Δp, set on the network
    speedup: float  # the theoretical speed-up reached on the images seen, the agent's MACs counted in
    target: float
    images: int
    probes: list[tuple[float, float]] = field(default_factory=list)  # (Δp, speed-up) of every rollout, in order

    def __str__(self) -> str:
        return (
            f"Δp = {self.penalty_shift:.4g}: theoretical speed-up {self.speedup:.3f} (target {self.target:g}) "
            f"on {self.images} images, {len(self.probes)} rollouts"
        )


def calibrate(
    pruned: PrunedNetwork,
    loader: Iterable[Any],
    speedup: float = 3.0,
    tolerance: float = 0.01,
    max_images: int | None = 2048,
    max_probes: int = 24,
) -> Calibration:
    """Find the Δp at which the agent's average theoretical speed-up is ``speedup``, and set it.

    The average is dense MACs ÷ mean MACs, the agent's own counted in, over the images of ``loader``. Each probe of a Δp
    is a whole rollout, because what a layer sees depends on the actions before it. A cap (``max_macs``) stays in force.

    Args:
        pruned: its policy must be an Agent.
        loader: yields images (N, C, H, W), or tuples that start with them. Use images the network was not trained on.
        speedup: the target, e.g. 3.0.
        tolerance: relative; the search stops within it.
        max_images: images used; None: all.
        max_probes: rollouts at most, 3 or more: at Δp = 0, at an end of the range and in between. Where the agent's
            behaviour jumps, the nearest Δp found is set, with a warning.

    Raises:
        ValueError: the policy is no Agent, a number is out of its range, there are no images, or the target cannot be
            reached: the message names the range that can be. The budget is then as it was.
    """
    if not isinstance(pruned.policy, Agent):
        raise ValueError(f"calibrate: Δp steers an Agent, but the network's policy is {pruned.policy!r}")
    if not speedup > 0:
        raise ValueError(f"calibrate: speedup must be positive, got {speedup}")
    if not tolerance >= 0:
        raise ValueError(f"calibrate: tolerance must not be negative, got {tolerance}")
    for name, value, least in (("max_images", max_images, 1), ("max_probes", max_probes, 3)):
        if value is not None and value < least:
            raise ValueError(f"calibrate: {name} must be at least {least}, got {value}")
    batches = _images(pruned, loader, max_images)
    count = sum(len(images) for images in batches)
    if count == 0:
        raise ValueError("calibrate: the loader gave no images")
    before = (pruned.penalty_shift, pruned.max_macs, pruned.policy.epsilon, pruned.training)
    probes: list[tuple[float, float]] = []

    def probe(shift: float) -> float:
        pruned.set_budget(shift, before[1])
        with torch.inference_mode():
            macs = sum(int(pruned(images, return_trace=True)[1].macs.sum()) for images in batches)
        probes.append((shift, pruned.dense_macs * count / macs))
        return probes[-1][1]

    try:
        pruned.eval()
        pruned.policy.epsilon = 0.0
        shift, reached = _search(probe, speedup, tolerance, max_probes, probes)
    except BaseException:
        pruned.set_budget(before[0], before[1])
        raise
    finally:
        pruned.policy.epsilon = before[2]
        pruned.train(before[3])
    if abs(reached / speedup - 1) > tolerance:
        warnings.warn(
            f"calibrate: nearest to {speedup:g}x is {reached:.3f}x at Δp = {shift:.4g}; the agent's choices jump there",
            stacklevel=2,
        )
    pruned.set_budget(shift, before[1])
    return Calibration(shift, reached, speedup, count, probes)


def _search(
    probe: Any, target: float, tolerance: float, max_probes: int, probes: list[tuple[float, float]]
) -> tuple[float, float]:
    """Bracket the target by doubling from Δp = ±0.05, then bisect; returns the nearest (Δp, speed-up) probed."""

    def near(reached: float) -> bool:
        return abs(reached / target - 1) <= tolerance

    here = probe(0.0)
    if near(here):
        return 0.0, here
    sign = -1.0 if here < target else 1.0  # Δp < 0 is faster
    end = probe(sign * EXTREME)
    if (end - target) * sign > 0 and not near(end):  # the end in that direction does not reach the target
        other = probe(-sign * EXTREME)
        low, high = sorted((end, other))
        raise ValueError(
            f"calibrate: a speed-up of {target:g} is out of range: this agent reaches {low:.3f} to {high:.3f} "
            f"on these images (its own MACs and the cap counted in)"
        )
    inner, outer = 0.0, sign * 0.05
    while len(probes) < max_probes:
        reached = probe(outer)
        if near(reached):
            return outer, reached
        if (reached < target) != (here < target) or abs(outer) >= EXTREME:
            break
        inner, outer = outer, outer * 2
    while len(probes) < max_probes:
        middle = (inner + outer) / 2
        reached = probe(middle)
        if near(reached):
            break
        if (reached < target) == (here < target):
            inner = middle
        else:
            outer = middle
    return min(probes, key=lambda pair: abs(pair[1] - target))


def _images(pruned: PrunedNetwork, loader: Iterable[Any], max_images: int | None) -> list[Tensor]:
    """The first images of the loader, as channels_last batches on the network's device."""
    device = next(pruned.parameters()).device
    batches, left = [], float("inf") if max_images is None else max_images
    for batch in loader:
        if left <= 0:
            break
        images = batch if isinstance(batch, Tensor) else batch[0]
        images = images[: int(min(left, len(images)))]
        left -= len(images)
        if len(images):
            batches.append(images.to(device, memory_format=torch.channels_last))
    return batches
