"""Policies: who decides how wide each layer runs for each sample.

A policy is asked once per decision. `start` begins a batch, `act` answers one decision with actions 1…k.
"""

from __future__ import annotations

import math
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from rnp_kernels.checks import may_read

from .actions import check_integers
from .agent import Agent
from .constant import Constant

__all__ = ["Agent", "Fixed", "FullWidth", "Policy", "Random", "Uniform"]


@runtime_checkable
class Policy(Protocol):
    """What `PrunedNetwork.policy` has to offer. `needs_features` False: features may not be computed, and be None."""

    needs_features: bool

    def start(self, network: Any, batch_size: int, device: torch.device) -> Any:
        """Begin a batch of `batch_size` samples; the answer is handed to `act` as `state`."""

    def act(self, layer: int, features: Tensor | None, state: Any) -> tuple[Tensor, Any]:
        """Decide for decision `layer`: features (N, C_layer) float32 → actions (N,), integers 1…k, and new state."""


class FullWidth:
    """Every sample at full width."""

    needs_features = False

    def start(self, network: Any, batch_size: int, device: torch.device) -> Any:
        return torch.full((batch_size,), network.groups, dtype=torch.int32, device=device)

    def act(self, layer: int, features: Tensor | None, state: Any) -> tuple[Tensor, Any]:
        return state, state

    def __repr__(self) -> str:
        return "FullWidth()"


class Uniform:
    """Every decision takes the smallest action that keeps at least the share `width` in (0, 1] of the groups."""

    needs_features = False

    def __init__(self, width: float) -> None:
        if not 0 < width <= 1:
            raise ValueError(f"Uniform: width must lie in (0, 1], got {width}")
        self.width = width

    def start(self, network: Any, batch_size: int, device: torch.device) -> Any:
        action = max(1, math.ceil(self.width * network.groups - 1e-9))
        return torch.full((batch_size,), action, dtype=torch.int32, device=device)

    def act(self, layer: int, features: Tensor | None, state: Any) -> tuple[Tensor, Any]:
        return state, state

    def __repr__(self) -> str:
        return f"Uniform({self.width})"


class Fixed:
    """Given actions: (L,) for every sample, or (N, L), one line per sample of the batch.

    `actions` may be assigned or changed in place. On a GPU the first batch after that copies them there, and no other
    does, so that a forward can be captured as a CUDA graph. A graph keeps the actions of its capture; for other actions
    at every replay, let `actions` be a tensor on the GPU and change it in place; values out of 1…k are clamped then.

    Raises TypeError for actions that are not integers, ValueError for another shape and, when a batch begins, for
    values out of 1…k.
    """

    needs_features = False

    def __init__(self, actions: Tensor | list[int] | list[list[int]]) -> None:
        self.actions = actions

    @property
    def actions(self) -> Tensor:
        """(L,) or (N, L) int32, 1…k."""
        return self._actions

    @actions.setter
    def actions(self, actions: Tensor | list[int] | list[list[int]]) -> None:
        given = torch.as_tensor(actions)
        if given.dim() not in (1, 2):
            raise ValueError(f"Fixed: actions must be (L,) or (N, L), got {tuple(given.shape)}")
        if given.numel():  # of nothing, a list makes a tensor of floats
            check_integers(given, "Fixed: actions")
        actions = given.to(torch.int32)
        self._actions = actions
        self._by_layer = Constant(actions[:, None] if actions.dim() == 1 else actions.t())  # (L, 1) or (L, N)
        self._measure(given)

    def _measure(self, actions: Tensor) -> None:
        """The range of `actions`: those given, which a cast to int32 could bring back into it, or those kept."""
        self.least, self.largest = (int(x) for x in actions.aminmax()) if actions.numel() else (1, 1)
        self._measured = 0 if self._actions.is_inference() else self._actions._version

    def start(self, network: Any, batch_size: int, device: torch.device) -> Any:
        actions, depth = self._actions, len(network.layers)
        if actions.shape[-1] != depth or (actions.dim() == 2 and actions.shape[0] != batch_size):
            raise ValueError(
                f"Fixed: actions must be ({depth},) or ({batch_size}, {depth}) here, got {tuple(actions.shape)}"
            )
        # Values on a GPU are looked at again under RNP_CHECK=1 alone: that waits for it.
        if may_read(actions) and (actions.is_inference() or actions._version != self._measured):
            self._measure(actions)
        if self.least < 1 or self.largest > network.groups:
            raise ValueError(f"Fixed: actions must lie in 1…{network.groups}, got {self.least}…{self.largest}")
        state = self._by_layer.on(device).expand(depth, batch_size).contiguous()
        return state if actions.is_cpu else state.clamp(1, network.groups)

    def act(self, layer: int, features: Tensor | None, state: Any) -> tuple[Tensor, Any]:
        return state[layer], state

    def __repr__(self) -> str:
        return f"Fixed(actions of shape {tuple(self.actions.shape)})"


class Random:
    """Every sample and decision independently uniform over 1…k, from `generator` (on the CPU) or torch's global one."""

    needs_features = False

    def __init__(self, generator: torch.Generator | None = None) -> None:
        self.generator = generator

    def start(self, network: Any, batch_size: int, device: torch.device) -> Any:
        size = (len(network.layers), batch_size)
        actions = torch.randint(1, network.groups + 1, size, generator=self.generator, dtype=torch.int32)
        return actions.to(device)

    def act(self, layer: int, features: Tensor | None, state: Any) -> tuple[Tensor, Any]:
        return state[layer], state

    def __repr__(self) -> str:
        return "Random()"


def check_policy(policy: Any, network: Any) -> None:
    """Raise TypeError for what is no policy, ValueError for an agent that was made for another network."""
    who = "PrunedNetwork.policy"
    if isinstance(policy, type):
        raise TypeError(f"{who}: must be an instance, {policy.__name__}(…), got the class {policy.__name__} itself")
    for needed in ("start", "act", "needs_features"):
        if not hasattr(policy, needed):
            raise TypeError(f"{who}: {type(policy).__name__} has no `{needed}`; see rnp.policies.Policy")
    if isinstance(policy, Agent):
        for name in ("groups", "feature_sizes"):
            own, wanted = getattr(policy, name), getattr(network, name)
            if own != wanted:
                raise ValueError(f"{who}: the agent's {name} must be the network's, {wanted}, got {own}")
