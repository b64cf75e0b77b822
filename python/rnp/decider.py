"""`Decider` asks the policy on the way through the network; `Trace` is what it remembers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .actions import check_integers, check_range
from .agent import Agent
from .policies import Fixed, FullWidth, Random, Uniform

if TYPE_CHECKING:
    from .network import PrunedNetwork

ANSWER_RIGHT = (Agent, Fixed, FullWidth, Random, Uniform)  # not their subclasses, whose `act` may be another


@dataclass
class Trace:
    """What was decided for a batch."""

    actions: Tensor  # (N, L) int32, 1…k
    macs: Tensor  # (N,) int64, the agent's own counted in
    dense_macs: int  # per image, no agent
    layers: list[str]
    features: list[Tensor] | None = field(default=None)  # (N, C_l) float32 each, with return_trace="features"


class Decider:
    """Asks the policy, decision by decision, for one batch; keeps the cap; remembers what was decided."""

    def __init__(self, network: PrunedNetwork, images: Tensor, want_features: bool) -> None:
        self.network, self.policy, self.want_features = network, network.policy, want_features
        self.trusted = type(self.policy) in ANSWER_RIGHT
        self.batch, self.device = images.shape[0], images.device
        self.needs_features = self.policy.needs_features or want_features
        self.taken: list[Tensor] = []
        self.features: list[Tensor] = []
        self.out_prefix: Tensor | None = None  # what the policy knows of the last decision's prefix
        self.allowance: int | None = None
        if network.max_macs is not None:
            self.allowance = network._allowance(network.max_macs)
            self.cap = network._cap
            self.spent = torch.full((images.shape[0],), self.cap.cheapest, dtype=torch.int64, device=images.device)
        self.state = self.policy.start(network, images.shape[0], images.device)

    def __call__(self, decision: int, features: Tensor | None) -> Tensor:
        """Actions (N,) int32 for one decision; features (N, C) float32, or None where they are not needed."""
        action, self.state = self.policy.act(decision, features, self.state)
        if not self.trusted:
            action = self._checked(decision, action)
        self.out_prefix = getattr(self.state, "out_prefix", None)
        if self.allowance is not None:
            action = self.cap.lower(decision, action, self.taken, self.spent, self.allowance)
            self.out_prefix = None
            if hasattr(self.policy, "took"):
                self.policy.took(decision, action, self.state)
        self.taken.append(action)
        if self.want_features and features is not None:
            self.features.append(features)
        return action

    def _checked(self, decision: int, action: Tensor) -> Tensor:
        """A policy's answer as (N,) int32. Values out of 1…k raise on the CPU and are clamped on a GPU.

        Raises:
            TypeError: no tensor, or not of integers.
            ValueError: another shape or device than the batch's, or values out of 1…k.
        """
        groups, name = self.network.groups, self.network.layers[decision]
        who = f"PrunedNetwork: actions of {type(self.policy).__name__} for decision {decision} ({name})"
        if not isinstance(action, Tensor):
            raise TypeError(f"{who} must be a tensor, got {type(action).__name__}")
        check_integers(action, who)
        if action.shape != (self.batch,) or action.device != self.device:
            got = f"{tuple(action.shape)} on {action.device}"
            raise ValueError(f"{who} must have shape {(self.batch,)} on {self.device}, got {got}")
        check_range(action, groups, who)
        if not action.is_cpu:
            action = action.clamp(1, groups)
        return action.to(torch.int32, copy=True)  # the policy may write its next answer over this one

    def trace(self) -> Trace:
        return trace_of(self.network, torch.stack(self.taken, 1), self.features if self.want_features else None)


def trace_of(network: PrunedNetwork, actions: Tensor, features: list[Tensor] | None) -> Trace:
    """The trace of a batch whose actions were (N, L)."""
    macs = network.counter.count(actions) + getattr(network.policy, "macs_per_image", 0)
    return Trace(actions, macs, network.dense_macs, list(network.layers), features)
