"""How long each part of `rnp demo` takes, and how much of what it looks at."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from rnp.config import Length
from rnp.usage import require

GROUPS = 4
PHASES = ("pretrain", "agent", "finetune", "agent")
# Shares of the training time; the thin network has all of it, at the same time on cores of its own.
SHARES = {"pretrain": 0.46, "agent": 0.11, "finetune": 0.32}  # the agent twice
OTHER_SECONDS = 60.0  # scenes, measurements and the report, about, on two cores
MAIN_TARGET = 3.0


@dataclass(frozen=True)
class Plan:
    """What a run does: numbers of scenes, the length of each phase, and which budgets are measured."""

    train_scenes: int
    validation_scenes: int
    test_scenes: int
    lengths: tuple[Length, ...]  # of PHASES
    thin: Length
    targets: tuple[float, ...]  # theoretical speed-ups
    timing_batches: int
    rounds: int
    batch_size: int = 32

    def with_steps(self, text: str) -> Plan:
        """The same with phase lengths in steps: five numbers, PHASES and the thin network, separated by commas.

        Raises UsageError for anything else, and for a phase of no steps: there is something to report of each.
        """
        parts = [part.strip() for part in text.split(",")]
        right = len(parts) == len(PHASES) + 1 and all(part.isdecimal() and int(part) > 0 for part in parts)
        require(right, f"--steps takes {len(PHASES) + 1} numbers of steps, each at least 1", repr(text))
        steps = [Length(steps=int(part)) for part in parts]
        return replace(self, lengths=tuple(steps[:-1]), thin=steps[-1])


def full_plan(minutes: float) -> Plan:
    """The plan that takes about so many minutes on two cores; UsageError where they leave no time to train."""
    training = 60 * minutes - OTHER_SECONDS
    require(math.isfinite(training) and training >= 5, "--minutes must leave time to train, at least 1.2", minutes)
    return Plan(
        train_scenes=9_000,
        validation_scenes=4_000,
        test_scenes=10_000,
        lengths=tuple(Length(seconds=round(SHARES[phase] * training, 1)) for phase in PHASES),
        thin=Length(seconds=training),
        targets=(1.5, 2.0, MAIN_TARGET, 4.0, 5.0),
        timing_batches=12,
        rounds=9,
    )


def quick_plan() -> Plan:
    """Every part of the demo in seconds, in steps and so the same twice; the figures mean nothing."""
    lengths = tuple(Length(steps=steps) for steps in (48, 16, 16, 16))
    targets = (1.5, 2.0, MAIN_TARGET, 4.0, 5.0)
    return Plan(1500, 250, 300, lengths, Length(steps=32), targets, timing_batches=2, rounds=3)
