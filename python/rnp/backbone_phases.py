"""The phases of Algorithm 1 of RNP that train the backbone: at full width, at every width, under the agent's own paths.

Source: Lin, Rao, Lu, Zhou, *Runtime Neural Pruning*, NIPS 2017 (RNP);
the sandwich phase, growth and the sliced form of fine-tuning are *ours*.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rnp.batchnorm import PrefixBatchNorm2d
from rnp.config import Length, TrainConfig
from rnp.network import PrunedNetwork
from rnp.paths import Path, sandwich_path
from rnp.phase import Batch, Context, Phase
from rnp.recalibrate import recalibrate
from rnp.widening import widen


def one_cycle(progress: float, peak: float, rise: float = 0.3, start: float = 25.0, end: float = 1e4) -> float:
    """Learning rate at ``progress`` (0…1): a cosine from peak/start up over ``rise``, then one down to peak/start/end.

    The curve of ``torch.optim.lr_scheduler.OneCycleLR`` with its defaults, as a function of the share done, so that a
    phase may be measured in seconds too.
    """
    low = peak / start
    if progress < rise:
        return low + (peak - low) * (1 - math.cos(math.pi * progress / rise)) / 2
    return low / end + (peak - low / end) * (1 + math.cos(math.pi * (progress - rise) / (1 - rise))) / 2


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


def path_loss(logits: Tensor, labels: Tensor, teacher: Tensor | None, config: TrainConfig) -> Tensor:
    """Loss of logits (N, K) for labels (N,); a teacher's logits (N, K) get the share ``config.distillation`` of it."""
    loss = F.cross_entropy(logits.float(), labels, label_smoothing=config.label_smoothing)
    if teacher is None:
        return loss
    taught = F.cross_entropy(logits.float(), teacher.float().softmax(1))
    return (1 - config.distillation) * loss + config.distillation * taught


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
        full = [network.groups] * len(network.layers)
        for path, weight in self.paths(number, extra):
            with torch.autocast(images.device.type, torch.bfloat16, enabled=config.bfloat16):
                logits = network.forward_path(images, path)
                teacher = None
                if config.distillation > 0 and path != full:
                    with torch.no_grad():
                        teacher = network.forward_path(images, full)
            loss = path_loss(logits, labels, teacher, config)
            (loss * weight).backward()
            total += loss.detach() * weight
        nn.utils.clip_grad_norm_(self.parameters, config.max_grad_norm)
        self.optimizer.step()
        return total


class Pretrain(BackbonePhase):
    """Full width; with ``growth`` the first part runs at half width, a quarter of the work, and is then widened."""

    name = "pretrain"

    def __init__(self, context: Context, length: Length) -> None:
        super().__init__(context, length)
        self.peak = context.config.lr
        grows = context.config.growth > 0 and context.network.groups > 1
        self.action = context.network.groups // 2 if grows else context.network.groups

    def paths(self, number: int, extra: Any) -> list[tuple[Path, float]]:
        network, generator = self.context.network, self.context.generator
        layers, share = len(network.layers), self.context.config.pretrain_narrow
        if share > 0 and self.action == network.groups and torch.rand((), generator=generator).item() < share:
            return [(sandwich_path(1 + number % 2, layers, network.groups, generator), 1.0)]
        return [([self.action] * layers, 1.0)]

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
        """Every in-prefix starts the next phase with what full width has learnt about BatchNorm, if it learnt nothing
        itself; else statistics are measured anew for every width."""
        if self.context.config.pretrain_narrow > 0:
            self.recalibrate(batches)
            return
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
        config = context.config
        self.peak = config.lr if config.sandwich_lr is None else config.sandwich_lr

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
