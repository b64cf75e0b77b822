"""`rnp demo`: train a network that spends less on easy images than on hard ones, measure it, and report.

Real handwritten digits in scenes whose difficulty is known (:mod:`rnp.data`), a VGG-like network
(:mod:`rnp.scene_net`), Algorithm 1 of RNP (:mod:`rnp.training`), static rivals (:mod:`rnp.comparison`), and a report
(:mod:`rnp.report`).
"""

from __future__ import annotations

import argparse
import os
import platform
import shlex
import sys
import time
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import rnp
from rnp import data, report
from rnp.comparison import BATCH, Comparison, Row, difference, rank_correlation
from rnp.config import Length, TrainConfig
from rnp.network import PrunedNetwork
from rnp.scene_net import scene_net

GROUPS = 4
PHASES = ("pretrain", "agent", "finetune", "agent")
# Shares of the training time; the thin network gets the whole of it again.
SHARES = {"pretrain": 0.61, "agent": 0.115, "finetune": 0.16}  # the agent twice
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
        """The same with phase lengths in steps: five numbers, PHASES and the thin network, separated by commas."""
        try:
            steps = [Length(steps=int(part)) for part in text.split(",")]
        except ValueError as error:
            raise SystemExit(f"rnp demo: --steps takes five numbers of steps, got {text!r} ({error})") from None
        if len(steps) != len(PHASES) + 1:
            raise SystemExit(f"rnp demo: --steps takes {len(PHASES) + 1} numbers, got {len(steps)}: {text!r}")
        return replace(self, lengths=tuple(steps[:-1]), thin=steps[-1])


def full_plan(minutes: float) -> Plan:
    """The plan that takes about so many minutes on two cores: half of the time trains the network and its agent, half
    the thin rival."""
    training = (60 * minutes - OTHER_SECONDS) / 2
    if training < 5:
        raise SystemExit(f"rnp demo: --minutes must leave time to train, at least 1.2, got {minutes:g}")
    return Plan(
        train_scenes=9_000,
        validation_scenes=4_000,
        test_scenes=10_000,
        lengths=tuple(Length(seconds=round(SHARES[phase] * training, 1)) for phase in PHASES),
        thin=Length(seconds=training),
        targets=(1.5, 2.0, MAIN_TARGET, 4.0, 5.0),
        timing_batches=16,
        rounds=5,
    )


def quick_plan() -> Plan:
    """Every part of the demo in seconds, in steps and so the same twice; the figures mean nothing."""
    lengths = tuple(Length(steps=steps) for steps in (48, 16, 16, 16))
    targets = (1.5, 2.0, MAIN_TARGET, 4.0, 5.0)
    return Plan(1500, 250, 300, lengths, Length(steps=32), targets, timing_batches=2, rounds=3)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `rnp demo`."""
    parser.add_argument("--out", default="rnp-demo", metavar="DIR", help="where the report goes (default: %(default)s)")
    parser.add_argument("--minutes", type=float, default=6.0, help="about how long it may take (default: %(default)g)")
    parser.add_argument("--quick", action="store_true", help="under a minute: shows that all of it works, no more")
    parser.add_argument("--seed", type=int, default=0, help="of everything random (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=None, help="processor threads (default: all cores)")
    parser.add_argument("--steps", default=None, metavar="A,B,C,D,E", help="lengths of the phases in steps, not time")
    parser.add_argument("--resume", action="store_true", help="go on with a run that was interrupted in --out")


def run(arguments: argparse.Namespace) -> int:
    """Run the demo; returns 0. Whether the targets were met is said in the report, not in the exit status."""
    started = time.monotonic()
    plan = quick_plan() if arguments.quick else full_plan(arguments.minutes)
    if arguments.steps is not None:
        plan = plan.with_steps(arguments.steps)
    threads_before = torch.get_num_threads()
    torch.set_num_threads(arguments.threads or len(os.sched_getaffinity(0)))
    out = Path(arguments.out)
    out.mkdir(parents=True, exist_ok=True)
    try:
        scenes = make_scenes(plan, arguments.seed)
        pruned, history = train_network(plan, arguments, scenes, out)
        thin, thin_history = train_thin(plan, arguments, scenes, out, pruned)
        findings = measure(plan, pruned, thin, scenes)
        findings["environment"] = environment()
        findings["seed"] = arguments.seed
        findings["quick"] = arguments.quick
        findings["training"] = history + thin_history
        findings["command"] = command(arguments, history + thin_history)
        findings["seconds"] = time.monotonic() - started
        findings["targets"] = report.targets(findings)
        report.write(findings, scenes["test"], out)
    except KeyboardInterrupt:
        say(f"stopped; `rnp demo --out {shlex.quote(str(out))} --resume` (with the same options) goes on from here")
        raise
    finally:
        torch.set_num_threads(threads_before)
    print(report.text(findings, out))
    return 0


def say(message: str) -> None:
    """A line above the progress bars."""
    tqdm.write(message, file=sys.stderr)


def make_scenes(plan: Plan, seed: int) -> dict[str, data.Scenes]:
    """Training, validation and test scenes; test digits occur in no other scene, validation scenes are new ones."""
    train, test = data.digit_sources(seed)
    say(f"composing {plan.train_scenes + plan.validation_scenes + plan.test_scenes:,} scenes of handwritten digits")
    return {
        "train": data.compose(train, plan.train_scenes, 3 * seed + 1),
        "validation": data.compose(train, plan.validation_scenes, 3 * seed + 2),
        "test": data.compose(test, plan.test_scenes, 3 * seed + 3),
    }


def settings(arguments: argparse.Namespace, folder: Path, **lengths: Any) -> TrainConfig:
    """What both networks are trained with."""
    return TrainConfig(
        lr=8e-3,
        pretrain_narrow=0.3,
        sandwich=Length(steps=0),
        finetune_lr=4e-4,
        finetune_sandwich=0.2,
        label_smoothing=0.1,
        distillation=0.5,
        penalty=-0.03,
        bfloat16=fast_bfloat16(),
        epoch_steps=500,
        validation_batches=4,
        seed=arguments.seed,
        checkpoint_dir=folder,
        resume=arguments.resume,
        **lengths,
    )


def train_network(
    plan: Plan, arguments: argparse.Namespace, scenes: dict[str, data.Scenes], out: Path
) -> tuple[PrunedNetwork, list[dict[str, Any]]]:
    """The backbone and its agent: Algorithm 1."""
    torch.manual_seed(arguments.seed)
    pruned = rnp.convert(scene_net(), scenes["train"].batch(slice(0, 1))[0], groups=GROUPS)
    size = f"{pruned.dense_macs / 1e6:.1f} million MACs an image"
    say(f"training the network ({size}) and its agent: {total(plan.lengths)}")
    pretrain, agent, finetune, _ = plan.lengths
    lengths = {"pretrain": pretrain, "agent": agent, "finetune": finetune}
    config = settings(arguments, out / "checkpoint", rounds=1, **lengths)
    result = rnp.train(pruned, *loaders(plan, scenes), config)
    return pruned, result.history


def train_thin(
    plan: Plan, arguments: argparse.Namespace, scenes: dict[str, data.Scenes], out: Path, pruned: PrunedNetwork
) -> tuple[PrunedNetwork, list[dict[str, Any]]]:
    """The rival: the same form with fewer channels, trained from scratch for the same time and in the same way."""
    example = scenes["train"].batch(slice(0, 1))[0]

    def thinner(width: float) -> PrunedNetwork:
        torch.manual_seed(arguments.seed)
        return rnp.convert(scene_net(width), example, groups=1)

    low, high = 0.05, 1.0
    for _ in range(12):
        middle = (low + high) / 2
        within = thinner(middle).dense_macs * MAIN_TARGET <= pruned.dense_macs
        low, high = (middle, high) if within else (low, middle)
    thin = thinner(low)
    say(f"training the thin rival from scratch ({thin.dense_macs / 1e6:.1f} million MACs): {plan.thin}")
    nothing = Length(steps=0)
    lengths = {"pretrain": plan.thin, "agent": nothing, "finetune": nothing}
    config = settings(arguments, out / "checkpoint-thin", rounds=0, **lengths)
    result = rnp.train(thin, *loaders(plan, scenes), config)
    return thin, [row | {"phase": "thin network"} for row in result.history]


def loaders(plan: Plan, scenes: dict[str, data.Scenes]) -> tuple[data.SceneLoader, data.SceneLoader]:
    """Of training (shuffled) and validation batches."""
    return (
        data.SceneLoader(scenes["train"], plan.batch_size, shuffle=True),
        data.SceneLoader(scenes["validation"], 250),
    )


def measure(plan: Plan, pruned: PrunedNetwork, thin: PrunedNetwork, scenes: dict[str, data.Scenes]) -> dict[str, Any]:
    """Everything that the report shows, on the test scenes, as JSON values; what plots need is under "plots"."""
    test = scenes["test"]
    comparison = Comparison(pruned, thin, scenes["validation"], test, plan.timing_batches, plan.rounds)
    bar = tqdm(total=2 * len(plan.targets) + 2, desc="measuring", disable=not sys.stderr.isatty(), leave=False)
    full = comparison.full_row()
    bar.update()
    rows: list[Row] = [full]
    main: dict[str, Any] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a budget that was not quite reached shows in the table
        for target in plan.targets:
            try:
                agent, evaluated = comparison.agent_row(target)
            except ValueError as error:  # out of the agent's range
                say(str(error))
                bar.update(2)
                continue
            bar.update()
            uniform = comparison.uniform_row(agent.mean_macs, target)
            bar.update()
            rows += [agent, uniform]
            if target == MAIN_TARGET or not main:
                main = {"agent": agent, "uniform": uniform, "report": evaluated}
    rows.append(comparison.thin_row(MAIN_TARGET))
    bar.close()
    agent, uniform, evaluated = main["agent"], main["uniform"], main["report"]
    shuffled = comparison.shuffled(evaluated.actions)
    share = evaluated.macs.double() / pruned.dense_macs
    return {
        "budgets": [row.to_dict() for row in rows],
        "main": {
            "target": agent.target,
            "agent_minus_full": difference(agent.right, full.right),
            "agent_minus_uniform": difference(agent.right, uniform.right),
            "agent_minus_thin": difference(agent.right, rows[-1].right),
            "agent_minus_shuffled": difference(agent.right, shuffled),
            "layers": evaluated.layers,
            "histogram": evaluated.histogram,
        },
        "difficulty": rank_correlation(evaluated.macs, test.difficulty),
        "agent_macs": int(pruned.policy.macs_per_image),
        "dense_macs": int(pruned.dense_macs),
        "thin_macs": int(thin.dense_macs),
        "scenes": {name: len(part) for name, part in scenes.items()},
        "batch_size": BATCH,
        "plots": {
            "difficulty": test.difficulty,
            "share": share,
            "right": {"agent": agent.right, "full width": full.right, "uniform width": uniform.right},
        },
    }


def fast_bfloat16() -> bool:
    """Whether the processor multiplies bfloat16 natively; elsewhere float32 trains faster."""
    from rnp_kernels import _C

    features = _C.cpu_features()
    return any(present for name, present in features.items() if "bf16" in name)


def environment() -> dict[str, Any]:
    """Where the figures come from."""
    from rnp_kernels import _C, __version__

    return {
        "rnp_kernels": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "processor": processor(),
        "instruction_set": _C.isa(),
        "threads": torch.get_num_threads(),
        "training_precision": "bfloat16 autocast" if fast_bfloat16() else "float32",
        "measured_precision": "float32",
    }


def processor() -> str:
    """The processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def command(arguments: argparse.Namespace, history: list[dict[str, Any]]) -> str:
    """The command that trains the same networks again: phases as long in steps as they came out in time."""
    words = ["rnp", "demo", "--seed", str(arguments.seed), "--threads", str(torch.get_num_threads())]
    if arguments.quick:
        words.append("--quick")
    steps = ",".join(str(row["steps"]) for row in history)
    return shlex.join([*words, "--steps", steps])


def total(lengths: tuple[Length, ...]) -> str:
    """The sum of several lengths in words."""
    seconds = [length.seconds for length in lengths]
    if all(value is not None for value in seconds):
        return f"{sum(seconds):g} s"
    return f"{sum(length.steps or 0 for length in lengths)} steps"
