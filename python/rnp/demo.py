"""`rnp demo`: train a network that spends less on easy images than on hard ones, measure it, and report.

Real handwritten digits in scenes whose difficulty is known (:mod:`rnp.data`), a VGG-like network
(:mod:`rnp.scene_net`), Algorithm 1 of RNP (:mod:`rnp.training`, started by :mod:`rnp.demo_training`), static rivals
(:mod:`rnp.comparison`), and a report (:mod:`rnp.report`).
"""

from __future__ import annotations

import argparse
import math
import os
import shlex
import sys
import time
import warnings
from typing import Any

import torch
from tqdm import tqdm

from rnp import data, report
from rnp.bench.environment import environment
from rnp.comparison import BATCH, Comparison, Row, difference, rank_correlation
from rnp.demo_plan import MAIN_TARGET, Plan, full_plan, quick_plan
from rnp.demo_training import fast_bfloat16, say, train_both
from rnp.fileformat import CheckpointError
from rnp.network import PrunedNetwork
from rnp.usage import UsageError, require, writable_folder


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
    """Run the demo; returns 0. Whether the targets were met is said in the report, not in the exit status.

    Raises UsageError before any work for arguments that cannot be met, and for checkpoints that do not belong to them.
    """
    started = time.monotonic()
    check(arguments)
    plan = quick_plan() if arguments.quick else full_plan(arguments.minutes)
    if arguments.steps is not None:
        plan = plan.with_steps(arguments.steps)
    out = writable_folder(arguments.out, "--out")
    threads_before = torch.get_num_threads()
    torch.set_num_threads(arguments.threads or len(os.sched_getaffinity(0)))
    try:
        scenes = make_scenes(plan, arguments.seed)
        pruned, thin, history = train_both(plan, arguments, scenes, out)
        findings = measure(plan, pruned, thin, scenes)
        findings["environment"] = environment() | {
            "training_precision": "bfloat16 autocast" if fast_bfloat16() else "float32",
            "measured_precision": "float32",
        }
        findings["seed"] = arguments.seed
        findings["quick"] = arguments.quick
        findings["training"] = history
        findings["command"] = command(arguments, history)
        findings["seconds"] = time.monotonic() - started
        findings["targets"] = report.targets(findings)
        report.write(findings, scenes["test"], out)
    except KeyboardInterrupt:
        say(f"stopped; `rnp demo --out {shlex.quote(str(out))} --resume` (with the same options) goes on from here")
        raise
    except CheckpointError as error:
        if not arguments.resume:
            raise
        raise UsageError(f"--resume: {error}") from error
    finally:
        torch.set_num_threads(threads_before)
    print(report.text(findings, out))
    return 0


def check(arguments: argparse.Namespace) -> None:
    """Raise UsageError for a number out of its range."""
    threads, seed, minutes = arguments.threads, arguments.seed, arguments.minutes
    require(threads is None or threads >= 1, "--threads must be at least 1", threads)
    require(0 <= seed < 2**32, f"--seed must lie in 0…{2**32 - 1}", seed)
    require(0 < minutes < math.inf, "--minutes must be a positive number", minutes)


def make_scenes(plan: Plan, seed: int) -> dict[str, data.Scenes]:
    """Training, validation and test scenes; test digits occur in no other scene, validation scenes are new ones."""
    train, test = data.digit_sources(seed)
    say(f"composing {plan.train_scenes + plan.validation_scenes + plan.test_scenes:,} scenes of handwritten digits")
    return {
        "train": data.compose(train, plan.train_scenes, 3 * seed + 1),
        "validation": data.compose(train, plan.validation_scenes, 3 * seed + 2),
        "test": data.compose(test, plan.test_scenes, 3 * seed + 3),
    }


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


def command(arguments: argparse.Namespace, history: list[dict[str, Any]]) -> str:
    """The command that trains the same networks again: phases as long in steps as they came out in time."""
    words = ["rnp", "demo", "--seed", str(arguments.seed), "--threads", str(torch.get_num_threads())]
    if arguments.quick:
        words.append("--quick")
    steps = ",".join(str(row["steps"]) for row in history)
    return shlex.join([*words, "--steps", steps])
