"""The settings of :func:`rnp.train`, in one dataclass, each default with where it comes from.

Sources: *RNP* is Lin et al., *Runtime Neural Pruning*, NIPS 2017; *ours* is a choice of this project.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Length:
    """How long a phase lasts: a number of steps (batches), or seconds of wall-clock time. Give exactly one.

    Only a length in steps gives the same result in two runs. Time spent before an interruption counts after a resume.
    """

    steps: int | None = None
    seconds: float | None = None

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.seconds is None):
            raise ValueError(f"Length: give either steps or seconds, got steps={self.steps}, seconds={self.seconds}")
        value = self.seconds if self.steps is None else self.steps
        if not 0 <= value < math.inf:  # NaN would never end
            raise ValueError(f"Length: must be a number, not negative, got {value}")

    def progress(self, steps: int, seconds: float) -> float:
        """The share done, 0…1, after so many steps and seconds."""
        done, whole = (seconds, self.seconds) if self.steps is None else (steps, self.steps)
        return 1.0 if done >= whole else done / whole

    def __str__(self) -> str:
        return f"{self.seconds:g} s" if self.steps is None else f"{self.steps} steps"


@dataclass
class TrainConfig:
    """Settings of Algorithm 1 of RNP. A *step* is one batch of the training loader in every phase.

    The phases: ``pretrain`` (full width), ``sandwich`` (full, narrowest and random widths, then BatchNorm is
    recalibrated), then ``rounds`` times ``agent`` + ``finetune``, and a last ``agent``.
    """

    pretrain: Length = Length(steps=0)
    """Full-width training of the backbone; 0 steps for a network that is trained already."""
    sandwich: Length = Length(steps=3200)
    """Fine-tuning under random widths, so that every width works before the agent starts (*ours*)."""
    agent: Length = Length(steps=1000)
    """N1 of RNP: batches of episodes collected, in each round (the number is *ours*)."""
    finetune: Length = Length(steps=1000)
    """N2 of RNP: steps of the backbone under the agent's own paths, in each round (the number is *ours*)."""
    rounds: int = 1
    """M of RNP (the number is *ours*); 0 trains the agent once and leaves the backbone alone."""

    growth: float = 0.0
    """Share of pretrain that runs at action k / 2, a quarter of the work; the network is then widened so that what it
    computes stays the same (exceptions: :mod:`rnp.widening`), and goes on at full width. 0: full width throughout. For
    long pre-training on a tight budget; on the demo's scenes it brought nothing that could be told from noise
    (*ours*)."""
    pretrain_narrow: float = 0.0
    """Share of the pretrain steps that run on the narrowest path and random ones in turn: every width is trained along
    with full width from the start, and a sandwich phase is hardly needed (*ours*)."""
    lr: float = 4e-3
    """Peak learning rate of pretrain: AdamW under a one-cycle schedule (*ours*)."""
    sandwich_lr: float | None = None
    """Peak learning rate of sandwich; None: ``lr``. A lower one keeps more of a full width that is trained already."""
    accumulate_paths: bool = False
    """Sandwich: False runs one path a batch, in turn; True sums the gradients of all four on every batch."""
    finetune_lr: float = 1e-3
    """Peak learning rate of finetune (*ours*)."""
    weight_decay: float = 1e-2
    """Of AdamW, on weights of two and more dimensions; none on biases and BatchNorm (*ours*)."""
    label_smoothing: float = 0.0
    """Of the backbone's training loss; the agent's reward always uses the plain cross-entropy."""
    distillation: float = 0.0
    """Share of a narrow path's loss that is its cross-entropy with what full width says of the same batch, for the
    price of a forward pass (in-place distillation: Yu and Huang, *Universally Slimmable Networks*, ICCV 2019)."""
    max_grad_norm: float = 5.0
    """Gradient clipping of the backbone (*ours*)."""
    bfloat16: bool = False
    """Autocast the backbone's training to bfloat16; evaluation and the agent stay in float32."""

    recalibration_batches: int = 64
    """Batches that measure BatchNorm statistics for every width after sandwich; 0 keeps the running ones (*ours*)."""
    statistics_batches: int = 16
    """Batches of random widths that measure the mean and deviation of the agent's features, and α (*ours*)."""

    penalty: float = -0.05
    """p < 0, the reward for one more channel group (RNP recalls −0.1; −0.05 is *ours*, for networks of few layers)."""
    target_speedup: float | None = None
    """None: p stays as given (RNP). A number: p starts as given and is steered so that the greedy agent's theoretical
    speed-up comes to this; then Δp near 0 is where it was trained to be (*ours*)."""
    gamma: float = 1.0
    """Discount γ (*ours*: episodes are short)."""
    epsilon_start: float = 1.0
    """Exploration at the agent's start (RNP)."""
    epsilon_end: float = 0.1
    """Exploration after the fall (RNP)."""
    epsilon_fraction: float = 0.6
    """Share of an agent phase over which ε falls (*ours*)."""
    epsilon_restart: float = 0.5
    """ε at the start of every agent phase but the first: the agent continues on a changed backbone (*ours*)."""
    agent_lr: float = 3e-3
    """Learning rate of the agent, Adam (*ours*)."""
    agent_lr_end: float = 0.05
    """Share of ``agent_lr`` that is left at the end of an agent phase; it falls linearly (*ours*)."""
    agent_batch: int = 256
    """Episodes in one update (*ours*)."""
    agent_updates: int = 2
    """Updates after every batch collected (*ours*). More of them, or fewer distinct images, fit the chance in single
    losses: 500 batches of images seen once beat as many of a quarter of them seen four times by half a point."""
    replay: int = 4000
    """Episodes kept (*ours*; without replay the result was half a point worse)."""
    agent_distillation: float = 0.0
    """Share of an episode's loss that is its divergence from what full width says of the same image, in place of the
    label's cross-entropy, for the price of a full-width pass a batch (*ours*, 0 is RNP's). In the demo's networks it
    raised the rank correlation of MACs with difficulty from 0.6 to 0.7 in equal time."""
    agent_rollouts: int = 1
    """Episodes collected of each image of a batch, with updates after each; full width's answer serves all of them
    (*ours*). A greedy batch, see ``target_speedup``, is collected once."""
    agent_options: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of :class:`rnp.Agent`, for a network that has no agent yet."""

    finetune_batchnorm: str = "frozen"
    """In finetune. ``frozen``: statistics stay as they are (*ours*). ``train``: those of the batch are used, and every
    width is recalibrated afterwards."""
    finetune_epsilon: float = 0.05
    """Exploration while the paths for finetune are recorded (*ours*)."""
    finetune_sandwich: float = 0.25
    """Share of the finetune batches that run on sandwich paths, so that no width is unlearnt (*ours*)."""
    finetune_chunk: int = 8
    """Batches whose paths are recorded at once; sorted by MACs they are cut into batches of alike images (*ours*)."""

    epoch_steps: int | None = None
    """Batches in an epoch, the unit of checkpoints; None: one pass over the training loader. A pass goes on from one
    epoch to the next, and a new one begins where it ends, so that every batch of a longer loader is read; each phase
    begins with a pass of its own. A resumed run reads the pass again up to where it stood, without using it."""
    seed: int = 0
    """Of everything random here. A loader's order follows it too if it draws from torch's (CPU), numpy's or Python's
    global generator, which it has to itself while a batch is made, or has ``set_epoch``."""
    checkpoint_dir: str | Path | None = None
    """Where the training state goes after every epoch, and ``network.safetensors`` at the end (not for a sub-class of
    :class:`rnp.Agent`, which no such file can hold); None: nowhere."""
    resume: bool = False
    """Continue from ``checkpoint_dir`` if a training state is there; start anew if not."""
    progress: bool = True
    """Progress bars on a terminal, a line a phase elsewhere; False: quiet."""
    validation_batches: int = 8
    """Batches of the validation loader looked at after each phase; 0: none."""

    def __post_init__(self) -> None:
        rules = [
            ("rounds", self.rounds >= 0, "must not be negative"),
            ("growth", 0 <= self.growth <= 1, "must lie in 0…1"),
            ("pretrain_narrow", 0 <= self.pretrain_narrow < 1, "must lie in 0…1, below 1"),
            ("label_smoothing", 0 <= self.label_smoothing <= 1, "must lie in 0…1"),
            ("distillation", 0 <= self.distillation <= 1, "must lie in 0…1"),
            ("lr", self.lr > 0, "must be positive"),
            ("sandwich_lr", self.sandwich_lr is None or self.sandwich_lr > 0, "must be positive or None"),
            ("finetune_lr", self.finetune_lr > 0, "must be positive"),
            ("agent_lr", self.agent_lr > 0, "must be positive"),
            ("penalty", self.penalty <= 0, "must not be positive: it is a negative reward"),
            ("target_speedup", self.target_speedup is None or self.target_speedup > 0, "must be positive or None"),
            ("penalty", self.penalty < 0 or self.target_speedup is None, "must be negative to be steered"),
            ("gamma", 0 <= self.gamma <= 1, "must lie in 0…1"),
            ("epsilon_start", 0 <= self.epsilon_start <= 1, "must lie in 0…1"),
            ("epsilon_end", 0 <= self.epsilon_end <= 1, "must lie in 0…1"),
            ("epsilon_restart", 0 <= self.epsilon_restart <= 1, "must lie in 0…1"),
            ("finetune_epsilon", 0 <= self.finetune_epsilon <= 1, "must lie in 0…1"),
            ("finetune_sandwich", 0 <= self.finetune_sandwich <= 1, "must lie in 0…1"),
            ("replay", self.replay >= 1, "must be at least 1"),
            ("agent_batch", self.agent_batch >= 1, "must be at least 1"),
            ("agent_updates", self.agent_updates >= 0, "must not be negative"),
            ("agent_distillation", 0 <= self.agent_distillation <= 1, "must lie in 0…1"),
            ("agent_rollouts", self.agent_rollouts >= 1, "must be at least 1"),
            ("statistics_batches", self.statistics_batches >= 1, "must be at least 1"),
            ("recalibration_batches", self.recalibration_batches >= 0, "must not be negative"),
            ("finetune_chunk", self.finetune_chunk >= 1, "must be at least 1"),
            ("agent_lr_end", 0 <= self.agent_lr_end <= 1, "must lie in 0…1"),
            ("finetune_batchnorm", self.finetune_batchnorm in ("frozen", "train"), "must be 'frozen' or 'train'"),
            ("seed", self.seed >= 0, "must not be negative"),
            ("epoch_steps", self.epoch_steps is None or self.epoch_steps >= 1, "must be at least 1"),
        ]
        for name, holds, rule in rules:
            if not holds:
                raise ValueError(f"TrainConfig: {name} {rule}, got {getattr(self, name)}")
        if self.resume and self.checkpoint_dir is None:
            raise ValueError("TrainConfig: resume needs checkpoint_dir, got None")

    def fingerprint(self) -> dict[str, Any]:
        """Every setting that the result depends on, as JSON values: what a resumed run must share."""
        free = {"checkpoint_dir", "resume", "progress", "validation_batches"}
        return {name: value for name, value in asdict(self).items() if name not in free}
