"""Q-learning of the agent: the equations as pure functions, the replay buffer, one update.

Source: Lin, Rao, Lu, Zhou, *Runtime Neural Pruning*, NIPS 2017 (RNP below). Values that no text gives are *ours*.

One *episode* is one image on its way through the network: L decisions with actions a_1 … a_L (1…k), and the
classification loss of the logits at the end. Whole episodes are kept, because the agent is recurrent across the layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from rnp.agent import Agent


def epsilon(progress: float, start: float = 1.0, end: float = 0.1, fraction: float = 0.6) -> float:
    """Exploration rate at ``progress`` (0…1) of the agent's training: linear from start to end, then constant (RNP).

    ``fraction`` is the share of the training over which it falls (*ours*).
    """
    if fraction <= 0:
        return end
    return start + (end - start) * min(max(progress, 0.0) / fraction, 1.0)


def reward_scale(losses: Tensor) -> float:
    """α = 1 / mean(L_cls), "such that the average of α·L_cls is about 1" (RNP). ``losses``: (N,), not empty."""
    mean = float(losses.double().mean())
    if not mean > 0 or mean == float("inf"):
        raise ValueError(f"reward_scale: the mean classification loss must be positive and finite, got {mean}")
    return 1.0 / mean


def episode_losses(logits: Tensor, labels: Tensor, teacher: Tensor | None = None, share: float = 0.0) -> Tensor:
    """What an episode lost, (N,) float32: (1 − share)·L_cls + share·KL(teacher ‖ logits) (*ours*; share 0 is RNP's).

    For a teacher who knows the probabilities of the labels, the divergence is L_cls with its chance taken out: the mean
    over labels is put in place of one of them, and what no action can save is taken off. Both leave the best actions
    what they are.

    Args:
        logits: (N, K) at the end of the chosen path.
        labels: (N,) int64.
        teacher: (N, K) logits of the same images at full width; may be None where share is 0.
        share: 0…1.
    """
    own = logits.float()
    if share == 0:
        return F.cross_entropy(own, labels, reduction="none")
    if teacher is None:
        raise ValueError(f"episode_losses: a share of {share:g} needs the teacher's logits, got None")
    taught = teacher.float().log_softmax(1)
    divergence = F.kl_div(own.log_softmax(1), taught, reduction="none", log_target=True).sum(1)
    if share == 1:
        return divergence
    return (1 - share) * F.cross_entropy(own, labels, reduction="none") + share * divergence


def rewards(actions: Tensor, losses: Tensor, penalty: float, alpha: float) -> Tensor:
    """Rewards of whole episodes, (B, L) float32 (RNP): r_t = (a_t − 1)·p, and −α·L_cls more at the last decision.

    Args:
        actions: (B, L) integers 1…k.
        losses: (B,) classification loss of each episode.
        penalty: p < 0, the price of one more channel group.
        alpha: α > 0, see :func:`reward_scale`.
    """
    reward = (actions.to(torch.float32) - 1.0) * penalty
    reward[:, -1] -= alpha * losses.to(torch.float32)
    return reward


def td_targets(reward: Tensor, q_values: Tensor, gamma: float = 1.0) -> Tensor:
    """One-step targets r_t + γ·max_a Q(s_{t+1}, a), (B, L); after the last decision nothing follows: r_L (RNP).

    γ = 1 is *ours*: an episode is short and always ends.

    Args:
        reward: (B, L).
        q_values: (B, L, k), Q(s_t, ·) of the same episodes.
    """
    target = reward.clone()
    target[:, :-1] += gamma * q_values[:, 1:].amax(dim=2)
    return target


def steer_penalty(penalty: float, speedup: float, target: float, rate: float = 0.3) -> float:
    """p·(target / speed-up)^rate, at least −1 and at most −1e-4: dearer groups where the agent is too slow (*ours*)."""
    return -min(max(-penalty * (target / speedup) ** rate, 1e-4), 1.0)


def greedy(q_values: Tensor, penalty_shift: float = 0.0) -> Tensor:
    """a* = argmax_i [Q(s, a_i) + (i − 1)·Δp] (RNP's balance point), counted from 1. ``q_values``: (..., k)."""
    shift = penalty_shift * torch.arange(q_values.shape[-1], dtype=q_values.dtype, device=q_values.device)
    return (q_values + shift).argmax(dim=-1).to(torch.int32) + 1


@dataclass
class Episodes:
    """A batch of whole episodes."""

    features: list[Tensor]  # one (B, C_l) float32 per decision
    actions: Tensor  # (B, L) int32, 1…k
    losses: Tensor  # (B,) float32


class ReplayBuffer:
    """The last ``capacity`` episodes, in a ring of preallocated tensors.

    Args:
        feature_sizes: channels C_l of the pooled features at each of the L decisions.
        capacity: episodes kept; a new one replaces the oldest.
        device: where they are kept.
    """

    def __init__(self, feature_sizes: list[int], capacity: int, device: torch.device | str = "cpu") -> None:
        if capacity < 1:
            raise ValueError(f"ReplayBuffer: capacity must be at least 1, got {capacity}")
        self.capacity = capacity
        self.size = 0
        self.position = 0  # where the next episode goes
        self.features = [torch.zeros(capacity, channels, device=device) for channels in feature_sizes]
        self.actions = torch.ones(capacity, len(feature_sizes), dtype=torch.int32, device=device)
        self.losses = torch.zeros(capacity, device=device)

    def __len__(self) -> int:
        return self.size

    def add(self, features: list[Tensor], actions: Tensor, losses: Tensor) -> None:
        """Append B episodes (shapes as in :class:`Episodes`); of more than ``capacity`` the last ones stay."""
        count = losses.shape[0]
        if count > self.capacity:
            features = [feature[-self.capacity :] for feature in features]
            actions, losses, count = actions[-self.capacity :], losses[-self.capacity :], self.capacity
        first = min(count, self.capacity - self.position)  # before the ring wraps
        pairs = [*zip(self.features, features, strict=True), (self.actions, actions), (self.losses, losses)]
        for kept, new in pairs:
            kept[self.position : self.position + first] = new[:first]
            kept[: count - first] = new[first:]
        self.position = (self.position + count) % self.capacity
        self.size = min(self.size + count, self.capacity)

    def sample(self, count: int, generator: torch.Generator | None = None) -> Episodes:
        """Draw ``count`` episodes uniformly, with replacement. ``generator`` is a CPU generator."""
        if self.size == 0:
            raise ValueError("ReplayBuffer.sample: the buffer is empty")
        index = torch.randint(self.size, (count,), generator=generator).to(self.actions.device)
        return Episodes([kept[index] for kept in self.features], self.actions[index], self.losses[index])

    def state_dict(self) -> dict[str, Tensor]:
        """The episodes present (the ring's order kept) and the position, as tensors."""
        state = {f"features.{layer}": kept[: self.size] for layer, kept in enumerate(self.features)}
        state |= {"actions": self.actions[: self.size], "losses": self.losses[: self.size]}
        return state | {"position": torch.tensor(self.position)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore what :meth:`state_dict` gave, of a buffer of the same sizes and capacity."""
        size = state["losses"].shape[0]
        for layer, kept in enumerate(self.features):
            kept[:size] = state[f"features.{layer}"]
        self.actions[:size] = state["actions"]
        self.losses[:size] = state["losses"]
        self.size = size
        self.position = int(state["position"])


def q_loss(agent: Agent, episodes: Episodes, alpha: float, penalty: float, gamma: float = 1.0) -> Tensor:
    """Mean squared TD error over a batch of episodes (RNP). The target is held fixed (semi-gradient)."""
    q_values = agent.q_values(episodes.features, episodes.actions)  # (B, L, k)
    taken = q_values.gather(2, (episodes.actions.long() - 1).unsqueeze(2)).squeeze(2)  # (B, L)
    reward = rewards(episodes.actions, episodes.losses, penalty, alpha)
    return (taken - td_targets(reward, q_values.detach(), gamma)).square().mean()


def update_agent(
    agent: Agent,
    optimizer: torch.optim.Optimizer,
    episodes: Episodes,
    alpha: float,
    penalty: float,
    gamma: float = 1.0,
    max_grad_norm: float = 10.0,
) -> Tensor:
    """One gradient step on :func:`q_loss`; returns the loss (a detached scalar). Gradient clipping is *ours*."""
    loss = q_loss(agent, episodes, alpha, penalty, gamma)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(agent.parameters(), max_grad_norm)
    optimizer.step()
    return loss.detach()
