"""rnp: runtime neural pruning. Convert a CNN, let a policy choose the width of each layer for each image."""

from __future__ import annotations

from typing import Any

from . import policies
from .agent import Agent
from .batchnorm import PrefixBatchNorm2d
from .convert import Report, convert
from .decider import Trace
from .network import PrunedNetwork
from .recalibrate import recalibrate

__all__ = [
    "Agent",
    "CheckpointError",
    "Length",
    "PrefixBatchNorm2d",
    "PrunedNetwork",
    "Report",
    "Trace",
    "TrainConfig",
    "calibrate",
    "compare",
    "convert",
    "evaluate",
    "load",
    "policies",
    "recalibrate",
    "save",
    "train",
]

# Loaded when first asked for: training is not needed to run a network.
_LATER = {
    "train": "training",
    "calibrate": "budget",
    "compare": "evaluation",
    "evaluate": "evaluation",
    "save": "checkpoint",
    "load": "checkpoint",
    "CheckpointError": "fileformat",
    "TrainConfig": "config",
    "Length": "config",
}


def __getattr__(name: str) -> Any:
    if name in _LATER:
        from importlib import import_module

        value = getattr(import_module(f".{_LATER[name]}", __name__), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'rnp' has no attribute {name!r}")
