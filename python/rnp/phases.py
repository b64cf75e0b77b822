"""The phases of Algorithm 1 of RNP in their order. :mod:`rnp.training` runs them.

Source: Lin, Rao, Lu, Zhou, *Runtime Neural Pruning*, NIPS 2017 (RNP).
"""

from __future__ import annotations

from collections.abc import Callable

from rnp.agent_phase import TrainAgent
from rnp.backbone_phases import BackbonePhase, Finetune, Pretrain, Sandwich, backbone_parameters, one_cycle
from rnp.config import Length
from rnp.phase import Batch, Context, Phase
from rnp.widening import widen

__all__ = [
    "BackbonePhase",
    "Batch",
    "Context",
    "Finetune",
    "Phase",
    "Pretrain",
    "Sandwich",
    "TrainAgent",
    "backbone_parameters",
    "one_cycle",
    "schedule",
    "widen",
]


def schedule(context: Context) -> list[Callable[[], Phase]]:
    """Makers of the phases of Algorithm 1, in order; phases of no length are left out."""
    config = context.config
    rounds: list[tuple[Length, Callable[[], Phase]]] = [
        (config.pretrain, lambda: Pretrain(context, config.pretrain)),
        (config.sandwich, lambda: Sandwich(context, config.sandwich)),
        (config.agent, lambda: TrainAgent(context, config.agent, first=True)),
    ]
    for _ in range(config.rounds):
        rounds.append((config.finetune, lambda: Finetune(context, config.finetune)))
        rounds.append((config.agent, lambda: TrainAgent(context, config.agent, first=False)))
    return [make for length, make in rounds if length.progress(0, 0.0) < 1]
