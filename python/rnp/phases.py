"""The phases of Algorithm 1 of RNP: what one step of each does. :mod:`rnp.training` runs them.

Source: Lin, Rao, Lu, Zhou, *Runtime Neural Pruning*, NIPS 2017; the sandwich phase and the sliced form of fine-tuning
are *ours*.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rnp import qlearning
from rnp.agent import Agent
from rnp.batchnorm import PrefixBatchNorm2d
from rnp.config import Length, TrainConfig
from rnp.network import PrunedNetwork
from rnp.paths import Path, measure_features, sandwich_path
from rnp.policies import Random
from rnp.recalibrate import recalibrate

STEERING_STEPS = 12  # of so many batches of episodes one is greedy and steers the penalty, if there is a target
Batch = tuple[Tensor, Tensor]  # images (N, C, H, W) channels_last float, labels (N,) int64


def one_cycle(progress: float, peak: float, rise: float = 0.3, start: float = 25.0, end: float = 1e4) -> float:
    """Learning rate at ``progress`` (0…1): a cosine from peak/start up over ``rise``, then one down to peak/start/end.

    The curve of ``torch.optim.lr_scheduler.OneCycleLR`` with its defaults, as a function of the share done, so that a
    phase may be measured in seconds too.
    """
    low = peak / start
    if progress < rise:
        return low + (peak - low) * (1 - math.cos(math.pi * progress / rise)) / 2
    return low / end + (peak - low / end) * (1 + math.cos(math.pi * (progress - rise) / (1 - rise))) / 2


@dataclass
class Context:
    """What the phases share."""

    network: PrunedNetwork
    agent: Agent
    config: TrainConfig
    generator: torch.Generator  # on the CPU; seeded anew at every epoch
    penalty: float  # p as it stands: config.penalty, or steered since


class Phase:
    """One phase. ``optimizer`` is made by ``begin``; ``state`` and ``load`` carry what else a resumed run needs."""

    name: str
    optimizer: torch.optim.Optimizer

    def __init__(self, context: Context, length: Length) -> None:
        self.context = context
        self.length = length

    def begin(self, batches: Iterable[Batch]) -> None:
        """Prepare; called once, not after a resume. ``batches`` is endless."""

    def arrange(self, batches: Iterable[Batch]) -> Iterator[tuple[Tensor, Tensor, Any]]:
        """The batches as ``step`` wants them: images, labels and something of the phase's own."""
        for images, labels in batches:
            yield images, labels, None

    def step(self, number: int, progress: float, images: Tensor, labels: Tensor, extra: Any) -> Tensor:
        """One step at ``progress`` (0…1); returns the loss, detached."""
        raise NotImplementedError

    def finish(self, batches: Iterable[Batch]) -> None:
        """After the last step."""

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        return {}, {}

    def load(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        """Restore what ``state`` gave."""


def backbone_parameters(network: PrunedNetwork, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups for AdamW: weights with decay; biases and all parameters of BatchNorm without."""
    norms = (PrefixBatchNorm2d, nn.modules.batchnorm._NormBase)
    decayed, free = [], []
    for module in network.backbone.modules():
        for parameter in module.parameters(recurse=False):
            if parameter.requires_grad:
                (free if isinstance(module, norms) or parameter.dim() < 2 else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": free, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


class BackbonePhase(Phase):
    """Steps of AdamW on the backbone, each batch on paths that the sub-class names."""

    peak: float

    def __init__(self, context: Context, length: Length) -> None:
        super().__init__(context, length)
        groups = backbone_parameters(context.network, context.config.weight_decay)
        self.parameters = [parameter for group in groups for parameter in group["params"]]
        fused = all(parameter.is_floating_point() for parameter in self.parameters)
        self.optimizer = torch.optim.AdamW(groups, lr=1.0, fused=fused)

    def paths(self, number: int, extra: Any) -> list[tuple[Path, float]]:
        """The paths of a step, and the weight of each one's loss."""
        raise NotImplementedError

    def recalibrate(self, batches: Iterable[Batch]) -> None:
        """Measure BatchNorm's statistics anew for every width, if the settings say so."""
        context, count = self.context, self.context.config.recalibration_batches
        if count:
            recalibrate(context.network, batches, batches=count, generator=context.generator)

    def step(self, number: int, progress: float, images: Tensor, labels: Tensor, extra: Any) -> Tensor:
        config, network = self.context.config, self.context.network
        for group in self.optimizer.param_groups:
            group["lr"] = one_cycle(progress, self.peak)
        self.optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), device=images.device)
        for path, weight in self.paths(number, extra):
            with torch.autocast(images.device.type, torch.bfloat16, enabled=config.bfloat16):
                logits = network.forward_path(images, path)
            loss = F.cross_entropy(logits.float(), labels, label_smoothing=config.label_smoothing)
            (loss * weight).backward()
            total += loss.detach() * weight
        nn.utils.clip_grad_norm_(self.parameters, config.max_grad_norm)
        self.optimizer.step()
        return total


def widen(network: PrunedNetwork, action: int, images: Tensor, labels: Tensor) -> None:
    """Make full width compute what the uniform ``action`` computes, as the start for training full width.

    Weights from channels beyond the prefix into live outputs become 0, wherever they are; those of the new outputs keep
    their initial values, so that gradients reach both. Which channels are live is told by the gradient of one batch:
    what was not computed has none. BatchNorm of every wider in-prefix takes over the set of this one.
    """
    network.zero_grad(set_to_none=True)
    logits = network.forward_path(images, [action] * len(network.layers))
    F.cross_entropy(logits.float(), labels).backward()
    with torch.no_grad():
        for module in network.backbone.modules():
            if isinstance(module, PrefixBatchNorm2d):
                for tensor in (module.weight, module.bias, module.running_mean, module.running_var):
                    if tensor is not None and len(tensor) > action:  # one set where the in-prefix never changes
                        tensor[action:] = tensor[action - 1]
            elif isinstance(module, (nn.Conv2d, nn.Linear)) and getattr(module, "groups", 1) == 1:
                gradient = module.weight.grad
                if gradient is not None:
                    used = (gradient != 0).flatten(2).any(2) if gradient.dim() > 2 else gradient != 0  # (out, in)
                    module.weight[used.any(1)[:, None] & ~used.any(0)[None, :]] = 0
    network.zero_grad(set_to_none=True)


class Pretrain(BackbonePhase):
    """Full width; with ``growth`` the first part runs at half width, a quarter of the work, and is then widened."""

    name = "pretrain"

    def __init__(self, context: Context, length: Length) -> None:
        super().__init__(context, length)
        self.peak = context.config.lr
        grows = context.config.growth > 0 and context.network.groups > 1
        self.action = context.network.groups // 2 if grows else context.network.groups

    def paths(self, number: int, extra: Any) -> list[tuple[Path, float]]:
        return [([self.action] * len(self.context.network.layers), 1.0)]

    def step(self, number: int, progress: float, images: Tensor, labels: Tensor, extra: Any) -> Tensor:
        network = self.context.network
        if self.action < network.groups and progress >= self.context.config.growth:
            widen(network, self.action, images, labels)
            self.action = network.groups
        return super().step(number, progress, images, labels, extra)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        return {}, {"action": self.action}

    def load(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        self.action = values["action"]

    def arrange(self, batches: Iterable[Batch]) -> Iterator[tuple[Tensor, Tensor, Any]]:
        self.context.network.train()
        return super().arrange(batches)

    def finish(self, batches: Iterable[Batch]) -> None:
        """Every in-prefix starts the next phase with what full width has learnt about BatchNorm."""
        with torch.no_grad():
            for module in self.context.network.modules():
                if isinstance(module, PrefixBatchNorm2d):
                    for tensor in (module.weight, module.bias, module.running_mean, module.running_var):
                        if tensor is not None:
                            tensor.copy_(tensor[-1].clone().expand_as(tensor))


class Sandwich(BackbonePhase):
    """Full, narrowest and random widths, so that every width works; then BatchNorm is recalibrated."""

    name = "sandwich"

    def __init__(self, context: Context, length: Length) -> None:
        super().__init__(context, length)
        self.peak = context.config.lr

    def paths(self, number: int, extra: Any) -> list[tuple[Path, float]]:
        network, config = self.context.network, self.context.config
        size = (len(network.layers), network.groups, self.context.generator)
        if not config.accumulate_paths:
            return [(sandwich_path(number, *size), 1.0)]
        return [(sandwich_path(turn, *size), 0.5) for turn in range(4)]

    def arrange(self, batches: Iterable[Batch]) -> Iterator[tuple[Tensor, Tensor, Any]]:
        self.context.network.train()
        return super().arrange(batches)

    def finish(self, batches: Iterable[Batch]) -> None:
        self.recalibrate(batches)


class Finetune(BackbonePhase):
    """The backbone under the agent's own paths (RNP: D fixed, greedy; ε is *ours*).

    A mixed batch is not sliced, so ``finetune_chunk`` batches are recorded at once with the real kernels, sorted by the
    MACs their images got and cut again into batches of alike images; each runs on the path of one of its own, but for a
    share ``finetune_sandwich`` that runs on sandwich paths (*ours*).
    """

    name = "finetune"

    def __init__(self, context: Context, length: Length) -> None:
        super().__init__(context, length)
        self.peak = context.config.finetune_lr

    def paths(self, number: int, extra: Any) -> list[tuple[Path, float]]:
        network, generator = self.context.network, self.context.generator
        if torch.rand((), generator=generator).item() < self.context.config.finetune_sandwich:
            turn = int(torch.randint(4, (), generator=generator))
            return [(sandwich_path(turn, len(network.layers), network.groups, generator), 1.0)]
        return [(extra, 1.0)]

    def arrange(self, batches: Iterable[Batch]) -> Iterator[tuple[Tensor, Tensor, Any]]:
        chunk: list[Batch] = []
        for batch in batches:
            chunk.append(batch)
            if len(chunk) == self.context.config.finetune_chunk:
                yield from self.regroup(chunk)
                chunk = []
        if chunk:
            yield from self.regroup(chunk)

    def regroup(self, chunk: list[Batch]) -> Iterator[tuple[Tensor, Tensor, Path]]:
        """The images of a chunk in batches of alike MACs, in random order, each with the path of one of its images."""
        agent, generator = self.context.agent, self.context.generator
        agent.epsilon = self.context.config.finetune_epsilon
        self.context.network.eval()
        traces = []
        with torch.no_grad():
            for images, _ in chunk:
                traces.append(self.context.network(images, return_trace=True)[1])
        macs = torch.cat([trace.macs for trace in traces])
        actions = torch.cat([trace.actions for trace in traces])
        images = torch.cat([images for images, _ in chunk])
        labels = torch.cat([labels for _, labels in chunk])
        # In eval mode the steps use the frozen statistics; gradients flow all the same.
        self.context.network.train(self.context.config.finetune_batchnorm == "train")
        pieces = macs.argsort(stable=True).tensor_split(len(chunk))
        for turn in torch.randperm(len(pieces), generator=generator).tolist():
            piece = pieces[turn]
            member = piece[torch.randint(len(piece), (), generator=generator)]
            yield images[piece], labels[piece], actions[member].tolist()

    def finish(self, batches: Iterable[Batch]) -> None:
        if self.context.config.finetune_batchnorm == "train":
            self.recalibrate(batches)


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
        labels_seen: list[Tensor] = []
        losses: list[Tensor] = []

        def images() -> Iterator[Tensor]:
            for (images, labels), _ in zip(batches, range(config.statistics_batches), strict=False):
                labels_seen.append(labels)
                yield images

        def keep(logits: Tensor) -> None:
            losses.append(F.cross_entropy(logits.float(), labels_seen[-1], reduction="none"))

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
        with torch.no_grad():
            logits, trace = self.context.network(images, return_trace="features")
            losses = F.cross_entropy(logits.float(), labels, reduction="none")
        self.replay.add(trace.features, trace.actions, losses)
        if greedy:
            speedup = trace.dense_macs / float(trace.macs.double().mean())
            self.context.penalty = qlearning.steer_penalty(self.context.penalty, speedup, config.target_speedup)
        total = torch.zeros((), device=images.device)
        for _ in range(config.agent_updates):
            episodes = self.replay.sample(config.agent_batch, self.context.generator)
            total += qlearning.update_agent(
                agent, self.optimizer, episodes, self.alpha, self.context.penalty, config.gamma, config.max_grad_norm
            )
        return total / max(config.agent_updates, 1)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        return {f"replay.{name}": tensor for name, tensor in self.replay.state_dict().items()}, {"alpha": self.alpha}

    def load(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        prefix = "replay."
        self.replay.load_state_dict(
            {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
        )
        self.alpha = values["alpha"]


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
