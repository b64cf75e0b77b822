"""``rnp.train``: Algorithm 1 of Runtime Neural Pruning (Lin et al., NIPS 2017), in epochs that survive a kill.

An *epoch* is one pass over the training loader, or ``TrainConfig.epoch_steps`` batches, in every phase. All randomness
is seeded anew at its start from (seed, phase, epoch), that of the loader at the start of a pass from (seed, phase,
pass), and the whole training state is written at the end of an epoch. So an interrupted run loses at most the current
epoch, and one resumed from the last file reads its pass again up to there and goes on as if nothing had happened.
"""

from __future__ import annotations

import math
import random
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from rnp import checkpoint, fileformat
from rnp.agent import Agent
from rnp.batches import Passes, images_and_labels
from rnp.config import Length, TrainConfig
from rnp.interruption import Interruption
from rnp.network import PrunedNetwork
from rnp.phases import Batch, Context, Phase, schedule
from rnp.policies import FullWidth, Policy, Uniform

STATE_FILE = "training.safetensors"
NETWORK_FILE = "network.safetensors"


@dataclass
class TrainResult:
    """What :func:`train` did: one row a phase (name, steps, seconds, loss of its last epoch, validation accuracies)."""

    history: list[dict[str, Any]] = field(default_factory=list)

    def __str__(self) -> str:
        return "\n".join(describe(row) for row in self.history)


def describe(row: dict[str, Any]) -> str:
    """One row of the history as a line of text."""
    text = f"{row['phase']}: {row['steps']} steps in {row['seconds']:.1f} s, loss {row['loss']:.4f}"
    accuracies = [f"{name} {value:.1%}" for name, value in row["validation"].items()]
    return text + (f"; validation accuracy: {', '.join(accuracies)}" if accuracies else "")


def train(
    pruned: PrunedNetwork,
    train_loader: Iterable[Batch],
    val_loader: Iterable[Batch] | None = None,
    config: TrainConfig | None = None,
) -> TrainResult:
    """Train a converted network and its agent: Algorithm 1 of RNP with the settings of ``config``.

    The agent is ``pruned.policy`` if that is an :class:`rnp.Agent` already, else a new one, which is left there. The
    budget (Δp and the cap) does not count during training and is put back after it. The network is left in eval mode,
    also after Ctrl-C or SIGTERM, which stop after the current batch, or the validation of the current phase once its
    state is saved, and raise ``KeyboardInterrupt`` or ``SystemExit``.

    Args:
        pruned: from :func:`rnp.convert`; trained in place.
        train_loader: yields (images (N, C, H, W) float, labels (N,) int64); iterated anew for every pass.
        val_loader: same form; looked at after each phase. None: no validation.
        config: see :class:`rnp.TrainConfig`.

    Raises:
        ValueError: nothing is trained yet: the network does not answer (N, classes), nothing in it requires gradients
            for a phase that trains it, its parameters were made under ``torch.inference_mode()``, or a checkpoint
            cannot hold its state; on the way: an empty loader or batch, images that are not floating point, labels
            that are not (N,).
        TypeError: the loader yields something else than pairs of tensors, or labels that are not integers.
        FloatingPointError: the loss is no longer finite.
        rnp.CheckpointError: ``resume`` found a training state that is damaged, or of another network or other settings.
    """
    config = TrainConfig() if config is None else config
    check(pruned, config)
    before = (pruned.penalty_shift, pruned.max_macs)
    states = (torch.get_rng_state(), np.random.get_state(), random.getstate())
    if not isinstance(pruned.policy, Agent):
        device = next(pruned.parameters()).device
        with torch.random.fork_rng(devices=[]), torch.inference_mode(False):
            torch.manual_seed(config.seed)
            pruned.policy = Agent(pruned.feature_sizes, pruned.groups, **config.agent_options).to(device)
    agent = pruned.policy
    epsilon, generator = agent.epsilon, agent.generator
    pruned.set_budget()
    interruption = Interruption()
    try:
        with interruption, torch.inference_mode(False), torch.enable_grad():
            pruned.backbone.to(memory_format=torch.channels_last)
            return Run(pruned, agent, train_loader, val_loader, config, interruption).run()
    finally:
        pruned.policy = agent
        agent.epsilon, agent.generator = epsilon, generator
        pruned.penalty_shift, pruned.max_macs = before
        pruned.eval()
        torch.set_rng_state(states[0])
        np.random.set_state(states[1])
        random.setstate(states[2])


def check(pruned: PrunedNetwork, config: TrainConfig) -> None:
    """Raise ValueError where the network cannot be trained under the settings."""
    shape = pruned._values[pruned._steps[-1].output].shape
    if shape is None or len(shape) != 2:
        got = "something else than one tensor" if shape is None else f"shape {shape} for the example"
        raise ValueError(f"train: the network must answer one tensor (N, classes), got {got}")
    parts: dict[str, tuple[nn.Module, list[tuple[str, Length]]]] = {
        "backbone": (pruned.backbone, [("pretrain", config.pretrain), ("sandwich", config.sandwich)])
    }
    if config.rounds:
        parts["backbone"][1].append(("finetune", config.finetune))
    if isinstance(pruned.policy, Agent):
        parts["agent"] = (pruned.policy, [("agent", config.agent)])
    for part, (module, phases) in parts.items():
        for name, parameter in module.named_parameters():
            if parameter.is_inference():
                raise ValueError(
                    f"train: parameters must not be made under torch.inference_mode(), and {part}.{name} was"
                )
        frozen = not any(parameter.requires_grad for parameter in module.parameters())
        for phase, length in phases:
            if frozen and length.progress(0, 0.0) < 1:
                raise ValueError(
                    f"train: phase {phase} trains the {part}, none of whose parameters requires gradients; its length "
                    f"must be 0, got {length}"
                )
    if config.checkpoint_dir is not None:
        checkpoint.require_plain_state(pruned)


class Run:
    """One run of the schedule; ``phase_index``, ``epoch``, ``steps`` and ``seconds`` say how far it is."""

    def __init__(
        self,
        network: PrunedNetwork,
        agent: Agent,
        train_loader: Iterable[Batch],
        val_loader: Iterable[Batch] | None,
        config: TrainConfig,
        interruption: Interruption,
    ) -> None:
        self.network, self.agent, self.config = network, agent, config
        self.train_loader, self.val_loader = train_loader, val_loader
        self.interruption = interruption
        self.device = next(network.parameters()).device
        self.generator = torch.Generator()
        agent.generator = self.generator
        self.context = Context(network, agent, config, self.generator, config.penalty)
        self.phases = schedule(self.context)
        self.phase_index = 0
        self.epoch = 0
        self.steps = 0
        self.seconds = 0.0
        self.loss = 0.0  # mean of the last epoch
        self.result = TrainResult()
        self.passes = self._passes(1)
        self.folder = None if config.checkpoint_dir is None else Path(config.checkpoint_dir)
        self.bars = config.progress and sys.stderr.isatty()

    # -- the loop ------------------------------------------------------------------------------------------------

    def run(self) -> TrainResult:
        """Every phase from where the run stands to the end."""
        phase = self._resume() if self.config.resume else None
        while self.phase_index < len(self.phases):
            self.interruption.check()  # what came while the phase before was finished and validated
            if phase is None:
                phase = self.phases[self.phase_index]()
                started = time.monotonic()
                self._seed(0)
                phase.begin(self._endless(0))
                self.seconds = time.monotonic() - started
            self._run_phase(phase)
            phase = None
        if self.folder is not None:
            self.agent.epsilon = 0.0
            if type(self.agent) is Agent:  # of a sub-class, rnp.save knows no form
                checkpoint.save(self.network, self.folder / NETWORK_FILE)
        return self.result

    def _run_phase(self, phase: Phase) -> None:
        by_time = phase.length.seconds is not None
        total = phase.length.seconds if by_time else phase.length.steps
        title = f"{self.phase_index + 1}/{len(self.phases)} {phase.name}"
        shape = "{l_bar}{bar}| {n:.0f}/{total:.0f} s{postfix}" if by_time else None
        with tqdm(total=total, desc=title, disable=not self.bars, bar_format=shape, leave=False) as bar:
            bar.update(self.seconds if by_time else self.steps)
            while not self._run_epoch(phase, bar):
                self.epoch += 1
                self._save(phase)
        self._seed(-1)
        phase.finish(self._endless(2))
        self._close_phase(phase)

    def _run_epoch(self, phase: Phase, bar: tqdm) -> bool:
        """One epoch; True if the phase ended in it."""
        self._seed(self.epoch + 1)
        before, started = self.seconds, time.monotonic()
        total, count = torch.zeros((), device=self.device), 0
        ended = phase.length.progress(self.steps, self.seconds) >= 1
        if not ended:
            for images, labels, extra in phase.arrange(self._epoch()):
                self.interruption.check()
                progress = phase.length.progress(self.steps, self.seconds)
                total += phase.step(self.steps, progress, images, labels, extra)
                count += 1
                self.steps += 1
                elapsed = before + time.monotonic() - started
                bar.update(elapsed - self.seconds if phase.length.seconds is not None else 1)
                self.seconds = elapsed
                if count % 20 == 0 and self.bars:
                    bar.set_postfix_str(f"loss {float(total) / count:.4f}", refresh=False)
                if phase.length.progress(self.steps, self.seconds) >= 1:
                    ended = True
                    break
            self.loss = float(total) / max(count, 1)
            if not math.isfinite(self.loss):
                raise FloatingPointError(
                    f"train: the loss of phase {phase.name} is {self.loss} in epoch {self.epoch}; the last checkpoint "
                    f"is older. A smaller learning rate may help; images must be finite"
                )
        return ended

    def _close_phase(self, phase: Phase) -> None:
        """Validate, report, and stand at the start of the next phase."""
        self.agent.epsilon = 0.0
        self.network.eval()
        row = {"phase": phase.name, "steps": self.steps, "seconds": self.seconds, "loss": self.loss}
        if phase.name == "agent":
            row["penalty"] = self.context.penalty
        row["validation"] = self._validate(phase)
        self.result.history.append(row)
        if self.config.progress:
            tqdm.write(describe(row), file=sys.stderr)
        self.phase_index += 1
        self.epoch, self.steps, self.seconds, self.loss = 0, 0, 0.0, 0.0
        self.passes = self._passes(1)
        self._save(None)

    @torch.no_grad()
    def _validate(self, phase: Phase) -> dict[str, float]:
        """Accuracy at full width, at the narrowest and, once trained, under the agent, on a few validation batches."""
        if self.val_loader is None or not self.config.validation_batches:
            return {}
        policies: dict[str, Policy] = {"full": FullWidth(), "narrowest": Uniform(1 / self.network.groups)}
        if any(row["phase"] == "agent" for row in self.result.history) or phase.name == "agent":
            policies["agent"] = self.agent
        hits = dict.fromkeys(policies, 0)
        count = 0
        for number, batch in enumerate(self.val_loader):
            if number == self.config.validation_batches:
                break
            images, labels = self._prepare(batch)
            count += len(labels)
            for name, policy in policies.items():
                self.network.policy = policy
                hits[name] += int((self.network(images).argmax(1) == labels).sum())
            self.network.policy = self.agent
        return {name: hit / count for name, hit in hits.items()} if count else {}

    # -- batches -------------------------------------------------------------------------------------------------

    def _prepare(self, batch: Any) -> Batch:
        images, labels = images_and_labels(batch, "train")
        if not images.is_floating_point():
            raise ValueError(f"train: images must be floating point, got {images.dtype}")
        if len(images) == 0:
            raise ValueError("train: a batch must hold at least one image, got 0")
        images = images.to(self.device, memory_format=torch.channels_last, non_blocking=True)
        return images, labels.to(self.device, torch.int64, non_blocking=True)

    def _passes(self, part: int, number: int = 0, read: int = 0) -> Passes:
        """Passes over the training loader for a part of the phase: 0 its beginning, 1 its epochs, 2 its end."""
        return Passes(self.train_loader, lambda number: self._words(part, number, 1)[1:], number, read)

    def _endless(self, part: int) -> Iterator[Batch]:
        return map(self._prepare, self._passes(part).endless())

    def _epoch(self) -> Iterator[Batch]:
        """`epoch_steps` batches, from where the epoch before left its pass; or what is left of the pass."""
        limit = self.config.epoch_steps
        batches = self.passes.rest() if limit is None else islice(self.passes.endless(), limit)
        return map(self._prepare, batches)

    def _words(self, *numbers: int) -> tuple[int, int, int, int]:
        """Four seeds of something of this phase that the numbers tell; the last of them is not 0."""
        sequence = np.random.SeedSequence([self.config.seed, self.phase_index, *numbers])
        return tuple(int(word) for word in sequence.generate_state(4))

    def _seed(self, epoch: int) -> None:
        """Seed everything for an epoch of the phase; 0 stands for its beginning, −1 for its end."""
        words = self._words(epoch + 1)
        self.generator.manual_seed(words[0])
        torch.manual_seed(words[1])
        np.random.seed(words[2])
        random.seed(words[3])

    # -- checkpoints ---------------------------------------------------------------------------------------------

    def _save(self, phase: Phase | None) -> None:
        """Write the training state; ``phase`` None between two phases."""
        if self.folder is None:
            return
        tensors: dict[str, Tensor] = {f"network.{name}": t for name, t in self.network.state_dict().items()}
        values: dict[str, Any] = {}
        if phase is not None:
            own, values = phase.state()
            tensors |= {f"phase.{name}": tensor for name, tensor in own.items()}
            tensors |= {f"optimizer.{name}": t for name, t in checkpoint.optimizer_tensors(phase.optimizer).items()}
        header = {
            "config": self.config.fingerprint(),
            "network": checkpoint.describe(self.network),
            "phase_index": self.phase_index,
            "inside": phase is not None,
            "epoch": self.epoch,
            "steps": self.steps,
            "pass": self.passes.number,
            "read": self.passes.read,
            "seconds": self.seconds,
            "loss": self.loss,
            "penalty": self.context.penalty,
            "values": values,
            "history": self.result.history,
        }
        fileformat.write(self.folder / STATE_FILE, "training", tensors, header)

    def _resume(self) -> Phase | None:
        """Take the state of the last checkpoint, if there is one; returns the phase that it stands in."""
        assert self.folder is not None
        path = self.folder / STATE_FILE
        fileformat.remove_unfinished(path)
        if not path.exists():
            return None
        tensors, header = fileformat.read(path, "training")
        checkpoint.require_equal(path, "setting", header["config"], self.config.fingerprint())
        checkpoint.require_equal(path, "network", header["network"], checkpoint.describe(self.network))
        part = checkpoint.parts(tensors)
        checkpoint.load_state(path, self.network, part["network"])
        self.phase_index = header["phase_index"]
        self.epoch, self.steps = header["epoch"], header["steps"]
        self.seconds, self.loss = header["seconds"], header["loss"]
        self.passes = self._passes(1, header.get("pass", 0), header.get("read", 0))
        self.context.penalty = header["penalty"]
        self.result.history = header["history"]
        if not header["inside"]:
            return None
        phase = self.phases[self.phase_index]()
        checkpoint.load_optimizer(path, phase.optimizer, part.get("optimizer", {}))  # without an update it has no state
        phase.load(part.get("phase", {}), header["values"])
        return phase
