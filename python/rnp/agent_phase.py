"""The phase of Algorithm 1 of RNP that trains the agent, the backbone fixed.

Source: Lin, Rao, Lu, Zhou, *Runtime Neural Pruning*, NIPS 2017 (RNP);
replay, full width as the judge of a path and a steered penalty are *ours*.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from rnp import qlearning
from rnp.config import Length
from rnp.paths import measure_features
from rnp.phase import Batch, Context, Phase
from rnp.policies import FullWidth, Random

STEERING_STEPS = 12  # of so many batches of episodes one is greedy and steers the penalty, if there is a target


class TrainAgent(Phase):
    """Episodes under ε-greedy actions through the real kernels, and Q-learning from replay; the backbone is fixed.

    With ``target_speedup`` every so many batches run greedily and steer p. Rewards are made of the stored losses and
    actions when episodes are replayed, so all of the replay counts with the p of the day.
    """

    name = "agent"

    def __init__(self, context: Context, length: Length, first: bool) -> None:
        super().__init__(context, length)
        config = context.config
        self.first = first
        self.alpha = 1.0
        self.optimizer = torch.optim.Adam(context.agent.parameters(), lr=config.agent_lr, fused=True)
        device = next(context.agent.parameters()).device
        self.replay = qlearning.ReplayBuffer(context.network.feature_sizes, config.replay, device)

    def begin(self, batches: Iterable[Batch]) -> None:
        """Measure α, and before the first round the statistics of the features, under random actions."""
        network, agent, config = self.context.network, self.context.agent, self.context.config
        network.eval()
        seen: list[tuple[Tensor, Tensor | None]] = []  # labels and full width's logits
        losses: list[Tensor] = []

        def images() -> Iterator[Tensor]:
            for (images, labels), _ in zip(batches, range(config.statistics_batches), strict=False):
                seen.append((labels, self._teacher(images)))
                yield images

        def keep(logits: Tensor) -> None:
            losses.append(self._losses(logits, *seen[-1]))

        network.policy = Random(self.context.generator)
        try:
            means, deviations = measure_features(network, images(), keep)
        finally:
            network.policy = agent
        if self.first:
            agent.set_feature_statistics(means, deviations)
        self.alpha = qlearning.reward_scale(torch.cat(losses))

    def arrange(self, batches: Iterable[Batch]) -> Iterator[tuple[Tensor, Tensor, Any]]:
        self.context.network.eval()
        return super().arrange(batches)

    def step(self, number: int, progress: float, images: Tensor, labels: Tensor, extra: Any) -> Tensor:
        config, agent = self.context.config, self.context.agent
        start = config.epsilon_start if self.first else min(config.epsilon_start, config.epsilon_restart)
        agent.epsilon = qlearning.epsilon(progress, start, config.epsilon_end, config.epsilon_fraction)
        greedy = config.target_speedup is not None and progress >= 0.1 and number % STEERING_STEPS == 0
        if greedy:
            agent.epsilon = 0.0
        for group in self.optimizer.param_groups:
            group["lr"] = config.agent_lr * (1 - (1 - config.agent_lr_end) * progress)
        teacher = self._teacher(images)
        total = torch.zeros((), device=images.device)
        rollouts = 1 if greedy else config.agent_rollouts  # greedy ones would be the same episode again
        for _ in range(rollouts):
            with torch.no_grad():
                logits, trace = self.context.network(images, return_trace="features")
            self.replay.add(trace.features, trace.actions, self._losses(logits, labels, teacher))
            if greedy:
                speedup = trace.dense_macs / float(trace.macs.double().mean())
                self.context.penalty = qlearning.steer_penalty(self.context.penalty, speedup, config.target_speedup)
            total += self._update()
        return total / max(rollouts * config.agent_updates, 1)

    def _update(self) -> Tensor:
        """The updates that follow a batch of episodes; returns the sum of their losses."""
        config = self.context.config
        total = torch.zeros((), device=self.replay.losses.device)
        for _ in range(config.agent_updates):
            episodes = self.replay.sample(config.agent_batch, self.context.generator)
            total += qlearning.update_agent(
                self.context.agent, self.optimizer, episodes, self.alpha, self.context.penalty, config.gamma,
                config.max_grad_norm,
            )  # fmt: skip
        return total

    @torch.no_grad()
    def _teacher(self, images: Tensor) -> Tensor | None:
        """What full width says of the images, where the reward asks for it."""
        network = self.context.network
        if self.context.config.agent_distillation == 0:
            return None
        policy, network.policy = network.policy, FullWidth()
        try:
            return network(images)
        finally:
            network.policy = policy

    def _losses(self, logits: Tensor, labels: Tensor, teacher: Tensor | None) -> Tensor:
        return qlearning.episode_losses(logits, labels, teacher, self.context.config.agent_distillation)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        return {f"replay.{name}": tensor for name, tensor in self.replay.state_dict().items()}, {"alpha": self.alpha}

    def load(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        prefix = "replay."
        self.replay.load_state_dict(
            {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
        )
        self.alpha = values["alpha"]
