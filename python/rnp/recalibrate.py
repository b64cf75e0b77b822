"""Re-estimate the running statistics of every BatchNorm of a converted network, for every in-prefix."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .batchnorm import PrefixBatchNorm2d
from .network import PrunedNetwork
from .policies import Policy

NORMS = nn.modules.batchnorm._NormBase


def default_paths(network: PrunedNetwork, batch: int, generator: torch.Generator | None) -> list[list[int]]:
    """One uniform width, a different one each batch, and two random paths."""
    depth, k = len(network.layers), network.groups
    random = torch.randint(1, k + 1, (2, depth), generator=generator).tolist()
    return [[k - batch % k] * depth, *random]


def recalibrate(
    network: PrunedNetwork,
    loader: Iterable[Any],
    paths: Sequence[Sequence[int]] | None = None,
    policy: Policy | None = None,
    batches: int | None = None,
    generator: torch.Generator | None = None,
) -> int:
    """Set running means and variances to their cumulative average over `loader`, over live samples and channels only.

    Every batch (images, or a sequence whose first item is images) runs under each of `paths` (L ints in 1…k each), or,
    with `policy`, mixed under its actions; by default under one uniform width in turn and two random paths drawn from
    `generator`. `batches` stops early. Statistics of channels that no path reached stay as they were. Weights, modes
    and momenta are left alone. Returns the number of batches seen; ValueError where there were none.
    """
    if paths is not None and policy is not None:
        raise ValueError("recalibrate: give paths or a policy, not both")
    norms = [m for m in network.backbone.modules() if isinstance(m, (NORMS, PrefixBatchNorm2d))]
    norms = [m for m in norms if m.running_mean is not None]
    modes = [(m, m.training) for m in network.modules()]
    momenta = [m.momentum for m in norms]
    before, budget = network.policy, (network.penalty_shift, network.max_macs)
    device = next(network.backbone.parameters()).device
    seen = 0
    try:
        network.eval()
        for m in norms:
            m.train()
            m.momentum = None
        if policy is not None:
            network.policy = policy
        with torch.no_grad():
            for batch in loader:
                if batches is not None and seen >= batches:
                    break
                if seen == 0:
                    for m in norms:
                        m.num_batches_tracked.zero_()
                images: Tensor = (batch if isinstance(batch, Tensor) else batch[0]).to(device)
                if policy is not None:
                    network(images)
                else:
                    for path in paths if paths is not None else default_paths(network, seen, generator):
                        network.forward_path(images, list(path))
                seen += 1
    finally:
        for m, momentum in zip(norms, momenta, strict=True):
            m.momentum = momentum
        for m, training in modes:
            m.training = training
        network.policy = before
        network.penalty_shift, network.max_macs = budget
    if seen == 0:
        raise ValueError("recalibrate: the loader gave no batch")
    return seen
