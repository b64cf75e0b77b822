"""The demo's two networks, trained side by side: the pruned one here, its thin rival in a process of its own.

At this size a step of training is many small operators, and two threads take as long for it as one (on two cores of
Emerald Rapids, bfloat16: 25.5 and 24 to 28 ms; the thin network's 17 and 20 to 24). So each network has half of the
threads for all of the time, in place of all of them for half of it.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

import rnp
from rnp import data
from rnp.config import Length, TrainConfig
from rnp.demo_plan import GROUPS, MAIN_TARGET, Plan
from rnp.network import PrunedNetwork
from rnp.scene_net import scene_net
from rnp.training import NETWORK_FILE, describe

History = list[dict[str, Any]]


def say(message: str) -> None:
    """A line above the progress bars."""
    tqdm.write(message, file=sys.stderr)


def fast_bfloat16() -> bool:
    """Whether the processor multiplies bfloat16 natively; elsewhere float32 trains faster."""
    from rnp_kernels import _C

    features = _C.cpu_features()
    return any(present for name, present in features.items() if "bf16" in name)


def settings(arguments: argparse.Namespace, folder: Path, **options: Any) -> TrainConfig:
    """What both networks are trained with."""
    return TrainConfig(
        lr=8e-3,
        pretrain_narrow=0.3,
        sandwich=Length(steps=0),
        finetune_lr=4e-4,
        finetune_sandwich=0.2,
        label_smoothing=0.1,
        distillation=0.5,
        penalty=-0.06,
        agent_distillation=1.0,
        agent_rollouts=2,
        bfloat16=fast_bfloat16(),
        epoch_steps=500,
        validation_batches=4,
        seed=arguments.seed,
        checkpoint_dir=folder,
        resume=arguments.resume,
        **options,
    )


def loaders(plan: Plan, scenes: dict[str, data.Scenes]) -> tuple[data.SceneLoader, data.SceneLoader]:
    """Of training (shuffled) and validation batches."""
    return (
        data.SceneLoader(scenes["train"], plan.batch_size, shuffle=True),
        data.SceneLoader(scenes["validation"], 250),
    )


def train_both(
    plan: Plan, arguments: argparse.Namespace, scenes: dict[str, data.Scenes], out: Path
) -> tuple[PrunedNetwork, PrunedNetwork, History]:
    """The network with its agent, and the thin rival, trained at the same time on half of the threads each.

    Checkpoints of both lie under `out`. Whatever ends this process or is raised here ends the rival's training too.

    Returns:
        The two networks and one line of history for each phase, the thin network's last.
    """
    threads = torch.get_num_threads()
    torch.manual_seed(arguments.seed)
    example = scenes["train"].batch(slice(0, 1))[0]
    pruned = rnp.convert(scene_net(), example, groups=GROUPS)
    width, thin_macs = thin_width(pruned.dense_macs / MAIN_TARGET, example)
    say(
        f"training side by side, {half(threads)} of {threads} threads each: the network "
        f"({pruned.dense_macs / 1e6:.1f} million MACs an image) with its agent, {total(plan.lengths)}, and the thin "
        f"rival from scratch ({thin_macs / 1e6:.1f} million MACs), {plan.thin}"
    )
    folder = out / "checkpoint-thin"
    arrays = {name: arrays_of(scenes[name]) for name in ("train", "validation")}
    try:
        torch.set_num_threads(half(threads))
        with beside(train_thin, plan, arguments, arrays, folder, width, half(threads)) as rival:
            result = train_network(plan, arguments, scenes, out / "checkpoint", pruned)
            thin_history = rival.result()
    finally:
        torch.set_num_threads(threads)
    for row in thin_history:
        say(describe(row))
    return pruned, rnp.load(folder / NETWORK_FILE, scene_net(width)), result + thin_history


def half(threads: int) -> int:
    """The threads of one of two processes."""
    return max(1, threads // 2)


def train_network(
    plan: Plan, arguments: argparse.Namespace, scenes: dict[str, data.Scenes], folder: Path, pruned: PrunedNetwork
) -> History:
    """The backbone and its agent: Algorithm 1."""
    pretrain, agent, finetune, _ = plan.lengths
    config = settings(arguments, folder, rounds=1, pretrain=pretrain, agent=agent, finetune=finetune)
    return rnp.train(pruned, *loaders(plan, scenes), config).history


def thin_width(macs: float, example: torch.Tensor) -> tuple[float, int]:
    """The widest network of the same form within so many MACs: its share of the channels and its MACs."""

    def thinner(width: float) -> int:
        return rnp.convert(scene_net(width), example, groups=1).dense_macs

    low, high = 0.05, 1.0
    for _ in range(12):
        middle = (low + high) / 2
        low, high = (middle, high) if thinner(middle) <= macs else (low, middle)
    return low, thinner(low)


Arrays = tuple[np.ndarray, ...]


def arrays_of(scenes: data.Scenes) -> Arrays:
    """Scenes as another process is given them: shared memory, in which tensors would go, is small in containers."""
    return scenes.images.numpy(), scenes.labels.numpy(), scenes.difficulty.numpy()


def train_thin(
    plan: Plan, arguments: argparse.Namespace, arrays: dict[str, Arrays], folder: Path, width: float, threads: int
) -> History:
    """The rival: the same form with fewer channels, trained from scratch for the same time and in the same way."""
    torch.set_num_threads(threads)
    scenes = {name: data.Scenes(*map(torch.from_numpy, columns)) for name, columns in arrays.items()}
    torch.manual_seed(arguments.seed)
    thin = rnp.convert(scene_net(width), scenes["train"].batch(slice(0, 1))[0], groups=1)
    nothing = Length(steps=0)
    config = settings(
        arguments, folder, rounds=0, pretrain=plan.thin, agent=nothing, finetune=nothing, progress=False
    )  # fmt: skip
    result = rnp.train(thin, *loaders(plan, scenes), config)
    return [row | {"phase": "thin network"} for row in result.history]


@contextmanager
def beside(function: Any, *arguments: Any) -> Iterator[Future]:
    """A call of a module's function in a process of its own, which ends when this one does, however that ends.

    Raised in the block, an exception stops the call as SIGTERM does; raised in the call, it comes out of the future.
    """
    context = multiprocessing.get_context("spawn")  # a fork would inherit the locks of torch's threads
    others = set(multiprocessing.active_children())
    with ProcessPoolExecutor(1, mp_context=context, initializer=end_with_parent) as pool:
        try:
            yield pool.submit(function, *arguments)
        except BaseException:
            for child in set(multiprocessing.active_children()) - others:
                child.terminate()
            raise


def end_with_parent() -> None:
    """In a process begun by `beside`: leave Ctrl-C to the parent, and do not survive it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def total(lengths: tuple[Length, ...]) -> str:
    """The sum of several lengths in words."""
    seconds = [length.seconds for length in lengths]
    if all(value is not None for value in seconds):
        return f"{sum(seconds):g} s"
    return f"{sum(length.steps or 0 for length in lengths)} steps"
