"""Paths: one action per decision for a whole batch, so that the batch runs on physically sliced tensors.

What trains every width before the agent starts; and the statistics of the features the agent sees.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from rnp.network import PrunedNetwork

Path = list[int]  # L actions 1…k


def random_path(layers: int, groups: int, generator: torch.Generator) -> Path:
    """Each decision uniform over 1…k on its own."""
    return torch.randint(1, groups + 1, (layers,), generator=generator).tolist()


def sandwich_path(step: int, layers: int, groups: int, generator: torch.Generator) -> Path:
    """The path of a step: full width, the narrowest, and two random ones, in turn (RNP.md's recipe, *ours*)."""
    turn = step % 4
    if turn < 2:
        return [groups if turn == 0 else 1] * layers
    return random_path(layers, groups, generator)


@torch.no_grad()
def measure_features(
    network: PrunedNetwork, batches: Iterable[Tensor], on_logits: Callable[[Tensor], None] | None = None
) -> tuple[list[Tensor], list[Tensor]]:
    """Mean and standard deviation, (C_l,) float32 per decision, of the pooled features under the network's policy.

    A deviation is at least a tenth of its layer's root mean square, so that a channel that hardly ever moved does not
    drown the others later. ``on_logits`` sees the logits of every batch.
    """
    count, sums, squares = 0, [], []
    for images in batches:
        logits, trace = network(images, return_trace="features")
        if on_logits is not None:
            on_logits(logits)
        features = [feature.double() for feature in trace.features]
        if not sums:
            sums = [torch.zeros_like(feature[0]) for feature in features]
            squares = [torch.zeros_like(feature[0]) for feature in features]
        count += images.shape[0]
        for total, square, feature in zip(sums, squares, features, strict=True):
            total += feature.sum(0)
            square += feature.square().sum(0)
    means, deviations = [], []
    for total, square in zip(sums, squares, strict=True):
        mean = total / count
        variance = (square / count - mean.square()).clamp_min(0)
        floor = 0.1 * variance.mean().sqrt()
        means.append(mean.float())
        deviations.append(variance.sqrt().clamp_min(floor).float())
    return means, deviations
