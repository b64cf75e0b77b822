"""rnp.train: the same run twice, killed and resumed, interrupted, every width usable, errors that change nothing."""

from __future__ import annotations

import importlib.util
import itertools
import math
import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import rnp
from rnp import agent_phase, backbone_phases, paths, phases, qlearning, training
from rnp.fileformat import CheckpointError

TOY = Path(__file__).with_name("toy_training.py")


def load_toy() -> ModuleType:
    specification = importlib.util.spec_from_file_location("toy_training", TOY)
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


toy = load_toy()


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def uninterrupted() -> dict[str, Tensor]:
    return toy.train(toy.Loader())


def assert_same(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert list(first) == list(second)
    different = [name for name in first if not first[name].equal(second[name])]
    assert not different


def test_seeds_give_the_same_run_twice(uninterrupted: dict[str, Tensor]) -> None:
    torch.manual_seed(123)  # whatever the caller's generators hold
    np.random.seed(5)
    torch.rand(7)
    assert_same(uninterrupted, toy.train(toy.Loader()))


def test_another_seed_gives_another_run(uninterrupted: dict[str, Tensor]) -> None:
    other = toy.train(toy.Loader(), seed=1)
    for part in ("backbone.3.weight", "agent.encoders.0.weight"):
        assert not uninterrupted[part].equal(other[part])


def test_training_moves_every_part(uninterrupted: dict[str, Tensor]) -> None:
    before = toy.network().state_dict()
    still = [name for name, tensor in before.items() if uninterrupted[name].equal(tensor)]
    assert not still
    assert uninterrupted["agent.decoders.0.weight"].abs().sum() > 0


# The batch before which the run is killed: inside each phase, after its first epoch.
KILLS = [13, 28, 36, 46]


@pytest.mark.parametrize("at", KILLS, ids=["sandwich", "agent", "finetune", "agent-again"])
def test_kill_9_then_resume_is_as_if_nothing_happened(
    at: int, tmp_path: Path, uninterrupted: dict[str, Tensor]
) -> None:
    folder = tmp_path / "run"
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join(path for path in sys.path if path))
    killed = subprocess.run([sys.executable, str(TOY), str(folder), str(at)], env=environment, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert (folder / training.STATE_FILE).exists()
    assert not (folder / training.NETWORK_FILE).exists()
    (folder / f".{training.STATE_FILE}.killed.tmp").write_bytes(b"half a state")  # a kill during the writing
    resumed = toy.Loader()
    assert_same(uninterrupted, toy.train(resumed, checkpoint_dir=folder, resume=True))
    assert resumed.served < 48  # it did not start anew
    assert {file.name for file in folder.iterdir()} == {training.STATE_FILE, training.NETWORK_FILE}
    assert_same(uninterrupted, rnp.load(folder / training.NETWORK_FILE, toy.model()).state_dict())


def test_the_kills_hit_the_phases_they_name(tmp_path: Path) -> None:
    phases_hit = []
    for at in KILLS:
        loader = toy.Loader(number=signal.SIGINT, at=at)
        folder = tmp_path / str(at)
        with pytest.raises(KeyboardInterrupt):
            toy.train(loader, checkpoint_dir=folder)
        _, header = rnp.fileformat.read(folder / training.STATE_FILE, "training")
        phases_hit.append((header["phase_index"], header["inside"]))
    assert phases_hit == [(1, True), (2, True), (3, True), (4, True)]


@pytest.mark.parametrize(("number", "exception"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)])
def test_a_signal_leaves_a_usable_state(number: int, exception: type[BaseException], tmp_path: Path) -> None:
    pruned = toy.network()
    pruned.set_budget(-0.1, 0.9)
    handlers = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(exception) as raised:
        rnp.train(pruned, toy.Loader(number=number, at=29), None, toy.config(checkpoint_dir=tmp_path))
    if exception is SystemExit:
        assert raised.value.code == 128 + signal.SIGTERM
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert not pruned.training
    assert isinstance(pruned.policy, rnp.Agent)
    assert (pruned.policy.epsilon, pruned.penalty_shift, pruned.max_macs) == (0.0, -0.1, 0.9)
    with torch.no_grad():
        assert pruned(toy.scenes(3, 4)[0]).isfinite().all()
    rnp.fileformat.read(tmp_path / training.STATE_FILE, "training")


@pytest.mark.parametrize(("number", "exception"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)])
@pytest.mark.parametrize("at", range(5), ids="after phase {}".format)
def test_a_signal_during_a_validation_stops_the_run_with_its_phase_saved(
    at: int, number: int, exception: type[BaseException], tmp_path: Path, uninterrupted: dict[str, Tensor]
) -> None:
    """Also during the last one, when no batch is left before which it could be looked at."""
    validation, settings = toy.Loader(16, number=number, at=at), {"validation_batches": 1, "checkpoint_dir": tmp_path}
    with pytest.raises(exception):
        rnp.train(toy.network(), toy.Loader(), validation, toy.config(**settings))
    assert validation.served == at + 1
    _, header = rnp.fileformat.read(tmp_path / training.STATE_FILE, "training")
    assert (header["phase_index"], header["inside"]) == (at + 1, False)
    assert (tmp_path / training.NETWORK_FILE).exists() == (at == 4)
    resumed = toy.Loader()
    assert_same(uninterrupted, toy.train(resumed, resume=True, **settings))
    assert (resumed.served == 0) == (at == 4)


def test_the_callers_generators_are_left_alone() -> None:
    pruned = toy.network()
    torch.manual_seed(1)
    np.random.seed(2)
    random.seed(3)
    expected = (torch.rand(1), np.random.rand(), random.random())
    torch.manual_seed(1)
    np.random.seed(2)
    random.seed(3)
    rnp.train(pruned, toy.Loader(), None, toy.config(rounds=0))
    assert (torch.rand(1), np.random.rand(), random.random()) == expected


def test_every_width_works_after_sandwich() -> None:
    images, labels = toy.scenes(256, 7)
    lengths = {"agent": rnp.Length(steps=0), "finetune": rnp.Length(steps=0), "recalibration_batches": 16}

    def accuracies(**changes: Any) -> dict[str, float]:
        pruned = toy.network()
        rnp.train(pruned, toy.Loader(512, 32), None, toy.config(**lengths, **changes))
        found = {}
        policies = {f"uniform {width}": rnp.policies.Uniform(width) for width in (0.25, 0.5, 0.75, 1.0)}
        for name, policy in {**policies, "random": rnp.policies.Random(torch.Generator().manual_seed(0))}.items():
            pruned.policy = policy
            with torch.no_grad():
                found[name] = float((pruned(images).argmax(1) == labels).float().mean())
        return found

    with_sandwich = accuracies(pretrain=rnp.Length(steps=40), sandwich=rnp.Length(steps=600))
    assert min(with_sandwich.values()) >= 0.95, with_sandwich
    nothing = rnp.Length(steps=0)
    full_width_only = accuracies(pretrain=rnp.Length(steps=640), sandwich=nothing)
    assert full_width_only["uniform 1.0"] >= 0.95
    assert full_width_only["uniform 0.25"] < 0.7
    narrow_in_between = accuracies(pretrain=rnp.Length(steps=640), sandwich=nothing, pretrain_narrow=0.5)
    assert min(narrow_in_between.values()) >= 0.95, narrow_in_between


def test_lengths_in_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that moves by one second whenever it is read."""
    clock = itertools.count()
    monkeypatch.setattr(training.time, "monotonic", lambda: float(next(clock)))
    pruned = toy.network()
    lengths = {"sandwich": rnp.Length(seconds=20.0), "agent": rnp.Length(seconds=5.0), "rounds": 0}
    result = rnp.train(pruned, toy.Loader(), None, toy.config(pretrain=rnp.Length(steps=0), **lengths))
    # begin takes 1 s; an epoch of 6 batches counts 6 s; its start is not counted twice
    assert [(row["phase"], row["steps"], row["seconds"]) for row in result.history] == [
        ("sandwich", 19, 20.0),
        ("agent", 4, 5.0),
    ]


def test_epoch_steps_may_exceed_the_loader(tmp_path: Path) -> None:
    pruned = toy.network()
    settings = {"sandwich": rnp.Length(steps=25), "agent": rnp.Length(steps=0), "rounds": 0}
    rnp.train(pruned, toy.Loader(), None, toy.config(epoch_steps=10, checkpoint_dir=tmp_path, **settings))
    assert pruned.backbone.get_submodule("4").num_batches_tracked.max() > 0


class Numbered:
    """Twelve batches of 8 in order, or drawn at random from the next three; ``read`` keeps their numbers."""

    def __init__(self, shuffle: bool = False, at: int = -1) -> None:
        self.images, self.labels = toy.scenes(96, 1)
        self.shuffle, self.at, self.read = shuffle, at, []

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        waiting = list(range(12))
        while waiting:
            draws = (int(torch.randint(3, ())), np.random.randint(3), random.randrange(3))
            number = waiting.pop(sum(draws) % min(3, len(waiting)) if self.shuffle else 0)
            if len(self.read) == self.at:
                os.kill(os.getpid(), signal.SIGINT)
            self.read.append(number)
            part = slice(8 * number, 8 * number + 8)
            yield self.images[part], self.labels[part]


def test_a_pass_goes_on_from_one_epoch_to_the_next() -> None:
    nothing, loader = rnp.Length(steps=0), Numbered()
    lengths = {"pretrain": rnp.Length(steps=30), "sandwich": nothing, "agent": nothing, "rounds": 0, "epoch_steps": 5}
    rnp.train(toy.network(), loader, None, toy.config(**lengths))
    assert loader.read == [*range(12), *range(12), *range(6)]


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("at", [13, 21, 37, 46])
def test_a_resumed_run_reads_on_in_its_pass(shuffle: bool, at: int, tmp_path: Path) -> None:
    """Also where the loader draws all along, from every generator, and dropout between its draws."""
    loader, first, second = Numbered(shuffle), Numbered(shuffle, at), Numbered(shuffle)
    whole = toy.train(loader, epoch_steps=5)
    with pytest.raises(KeyboardInterrupt):
        toy.train(first, epoch_steps=5, checkpoint_dir=tmp_path)
    _, header = rnp.fileformat.read(tmp_path / training.STATE_FILE, "training")
    resumed = toy.train(second, epoch_steps=5, checkpoint_dir=tmp_path, resume=True)
    assert_same(whole, resumed)
    if header["inside"]:  # what it skipped, and then the rest
        assert second.read[header["read"] :] == loader.read[len(loader.read) - len(second.read) + header["read"] :]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_data_loader_reads_on_in_its_pass(workers: int, tmp_path: Path) -> None:
    def loader() -> torch.utils.data.DataLoader:
        data = torch.utils.data.TensorDataset(*toy.scenes(96, 1))
        generator = torch.Generator()
        generator.seed()  # whatever it holds
        return torch.utils.data.DataLoader(data, 8, shuffle=True, num_workers=workers, generator=generator)

    class Stopped(training.Interruption):
        def check(self) -> None:
            stops.append(None)
            if len(stops) == 11:
                raise KeyboardInterrupt

    stops: list[None] = []
    nothing = rnp.Length(steps=0)
    settings = {"sandwich": rnp.Length(steps=17), "pretrain": nothing, "agent": nothing, "rounds": 0}
    whole = toy.train(loader(), **settings)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(training, "Interruption", Stopped)
        toy.train(loader(), checkpoint_dir=tmp_path, **settings)
    _, header = rnp.fileformat.read(tmp_path / training.STATE_FILE, "training")
    assert (header["pass"], header["read"]) == (0, 8)
    assert_same(whole, toy.train(loader(), checkpoint_dir=tmp_path, resume=True, **settings))


def test_a_run_without_updates_of_the_agent_can_be_resumed(tmp_path: Path) -> None:
    whole = toy.train(toy.Loader(), agent_updates=0)
    with pytest.raises(KeyboardInterrupt):
        toy.train(toy.Loader(number=signal.SIGINT, at=28), checkpoint_dir=tmp_path, agent_updates=0)
    _, header = rnp.fileformat.read(tmp_path / training.STATE_FILE, "training")
    assert (header["phase_index"], header["inside"]) == (2, True)
    assert_same(whole, toy.train(toy.Loader(), checkpoint_dir=tmp_path, agent_updates=0, resume=True))


def test_validation_is_reported() -> None:
    pruned = toy.network()
    result = rnp.train(pruned, toy.Loader(), toy.Loader(32, seed=2), toy.config(validation_batches=2, rounds=0))
    assert [row["phase"] for row in result.history] == ["pretrain", "sandwich", "agent"]
    assert [sorted(row["validation"]) for row in result.history] == [
        ["full", "narrowest"],
        ["full", "narrowest"],
        ["agent", "full", "narrowest"],
    ]
    assert all(0 <= value <= 1 for row in result.history for value in row["validation"].values())
    assert "agent: 7 steps" in str(result)


def test_lines_on_a_stream_that_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    rnp.train(toy.network(), toy.Loader(), None, toy.config(progress=True, rounds=0))
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(":")[0] for line in lines] == ["pretrain", "sandwich", "agent"]
    rnp.train(toy.network(), toy.Loader(), None, toy.config(rounds=0))
    assert capsys.readouterr().err == ""


def test_resume_refuses_another_schedule_or_network(tmp_path: Path) -> None:
    toy.train(toy.Loader(), checkpoint_dir=tmp_path, rounds=0)
    with pytest.raises(CheckpointError, match=r"another setting: lr is 0.004 in the file and 0.1 here"):
        toy.train(toy.Loader(), checkpoint_dir=tmp_path, resume=True, rounds=0, lr=0.1)
    other = rnp.convert(toy.model(), torch.zeros(2, 1, 8, 8), groups=2)
    before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    with pytest.raises(CheckpointError, match="another network: groups is 4 in the file and 2 here"):
        rnp.train(other, toy.Loader(), None, toy.config(checkpoint_dir=tmp_path, resume=True, rounds=0))
    assert_same(before, {name: other.state_dict()[name] for name in before})
    state = tmp_path / training.STATE_FILE
    state.write_bytes(state.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="truncated"):
        toy.train(toy.Loader(), checkpoint_dir=tmp_path, resume=True, rounds=0)


def test_resume_of_a_finished_run_changes_nothing(tmp_path: Path) -> None:
    first = toy.train(toy.Loader(), checkpoint_dir=tmp_path, rounds=0)
    loader = toy.Loader()
    assert_same(first, toy.train(loader, checkpoint_dir=tmp_path, resume=True, rounds=0))
    assert loader.served == 0


IMAGES, LABELS = toy.scenes(4, 0)


@pytest.mark.parametrize(
    ("loader", "error", "message"),
    [
        ([], ValueError, "train_loader yielded no batch"),
        ([(IMAGES.byte(), LABELS)], ValueError, r"images must be floating point, got torch.uint8"),
        ([{"x": IMAGES, "y": LABELS}], TypeError, r"train: loader must yield pairs of tensors, .* got dict"),
        ([(IMAGES, LABELS, LABELS)], TypeError, r"pairs of tensors, .* got tuple of Tensor, Tensor, Tensor"),
        ([IMAGES], TypeError, r"pairs of tensors, .* got Tensor"),
        ([(IMAGES, LABELS[:3])], ValueError, r"labels must have shape \(N,\) = \(4,\), got \(3,\)"),
        ([(IMAGES, LABELS.float())], TypeError, "labels must be integers, got torch.float32"),
        ([(IMAGES[:0], LABELS[:0])], ValueError, "a batch must hold at least one image, got 0"),
    ],
)
@pytest.mark.parametrize("first", ["pretrain", "agent"])
def test_what_cannot_be_trained_on_is_named(
    loader: list[Any], error: type[Exception], message: str, first: str, tmp_path: Path
) -> None:
    pruned = toy.network()
    before = {name: tensor.clone() for name, tensor in pruned.state_dict().items()}
    lengths = {"pretrain": rnp.Length(steps=0), "sandwich": rnp.Length(steps=0)} if first == "agent" else {}
    with pytest.raises(error, match=message):
        rnp.train(pruned, loader, None, toy.config(checkpoint_dir=tmp_path, **lengths))
    assert_same(before, {name: pruned.state_dict()[name] for name in before})
    assert not list(tmp_path.iterdir())


def answers_a_dict() -> rnp.PrunedNetwork:
    class Named(torch.nn.Sequential):
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"out": super().forward(x)}

    return rnp.convert(Named(*toy.model()), torch.zeros(2, 1, 8, 8))


def frozen(part: str) -> rnp.PrunedNetwork:
    pruned = toy.network()
    pruned.policy = rnp.Agent(pruned.feature_sizes, pruned.groups)
    getattr(pruned, part).requires_grad_(False)
    return pruned


def with_an_agent_for_inference() -> rnp.PrunedNetwork:
    pruned = toy.network()
    with torch.inference_mode():
        pruned.policy = rnp.Agent(pruned.feature_sizes, pruned.groups)
    return pruned


def with_extra_state() -> rnp.PrunedNetwork:
    class Extra(torch.nn.Sequential):
        def get_extra_state(self) -> dict[str, int]:
            return {"value": 1}

    return rnp.convert(Extra(*toy.model()), torch.zeros(2, 1, 8, 8))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (answers_a_dict, r"must answer one tensor \(N, classes\), got something else than one tensor"),
        (
            lambda: rnp.convert(toy.model()[:8], torch.zeros(2, 1, 8, 8)),
            r"must answer one tensor \(N, classes\), got shape \(2, 16, 4, 4\)",
        ),
        (lambda: frozen("backbone"), r"phase pretrain trains the backbone, none .* must be 0, got 4 steps"),
        (lambda: frozen("agent"), r"phase agent trains the agent, none .* must be 0, got 7 steps"),
        (with_an_agent_for_inference, r"made under torch.inference_mode\(\), and agent.encoders.0.weight was"),
        (with_extra_state, r"parameters and buffers, and backbone._extra_state is dict"),
    ],
)
def test_networks_that_cannot_be_trained_are_named_before_anything_is_done(
    make: Any, message: str, tmp_path: Path
) -> None:
    pruned, loader = make(), toy.Loader()
    policy = pruned.policy
    with pytest.raises(ValueError, match=message):
        rnp.train(pruned, loader, None, toy.config(checkpoint_dir=tmp_path))
    assert loader.served == 0
    assert pruned.policy is policy
    assert not list(tmp_path.iterdir())


def test_a_frozen_backbone_has_its_agent_trained() -> None:
    pruned, nothing = frozen("backbone"), rnp.Length(steps=0)
    before = {name: tensor.clone() for name, tensor in pruned.state_dict().items()}
    rnp.train(pruned, toy.Loader(), None, toy.config(pretrain=nothing, sandwich=nothing, rounds=0))
    after = pruned.state_dict()
    assert all(after[name].equal(tensor) for name, tensor in before.items() if name.startswith("backbone."))
    assert not after["agent.decoders.0.weight"].equal(before["agent.decoders.0.weight"])


def test_inference_mode_around_conversion_loading_and_training(
    tmp_path: Path, uninterrupted: dict[str, Tensor]
) -> None:
    with torch.inference_mode():
        pruned = toy.network()
        rnp.train(pruned, toy.Loader(), None, toy.config())
        rnp.save(pruned, tmp_path / "x")
        loaded = rnp.load(tmp_path / "x", toy.model())
    assert_same(uninterrupted, pruned.state_dict())
    rnp.train(loaded, toy.Loader(), None, toy.config())


def test_a_subclass_of_agent_can_be_trained_and_resumed(tmp_path: Path) -> None:
    """There is a training state, and no network file, which would be read back as a plain Agent."""

    class Other(rnp.Agent):
        pass

    def run(loader: Any, **settings: Any) -> dict[str, Tensor]:
        pruned = toy.network()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            pruned.policy = Other(pruned.feature_sizes, pruned.groups)
        rnp.train(pruned, loader, None, toy.config(**settings))
        return pruned.state_dict()

    whole = run(toy.Loader())
    with pytest.raises(KeyboardInterrupt):
        run(toy.Loader(number=signal.SIGINT, at=36), checkpoint_dir=tmp_path)
    assert_same(whole, run(toy.Loader(), checkpoint_dir=tmp_path, resume=True))
    assert [file.name for file in tmp_path.iterdir()] == [training.STATE_FILE]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"penalty": 0.1}, "penalty must not be positive"),
        ({"epsilon_end": 2.0}, "epsilon_end must lie in 0…1, got 2.0"),
        ({"seed": -1}, "seed must not be negative, got -1"),
        ({"replay": 0}, "replay must be at least 1"),
        ({"resume": True}, "resume needs checkpoint_dir"),
        ({"lr": 0.0}, "lr must be positive"),
        ({"distillation": 1.5}, "distillation must lie in 0…1, got 1.5"),
        ({"agent_distillation": -0.5}, "agent_distillation must lie in 0…1, got -0.5"),
        ({"agent_rollouts": 0}, "agent_rollouts must be at least 1, got 0"),
        ({"label_smoothing": -0.1}, "label_smoothing must lie in 0…1, got -0.1"),
    ],
)
def test_wrong_settings(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rnp.TrainConfig(**settings)


NEVER = (float("nan"), float("inf"))


@pytest.mark.parametrize(
    "lengths", [{}, {"steps": 1, "seconds": 1.0}, {"steps": -1}, *({"seconds": seconds} for seconds in NEVER)]
)
def test_wrong_lengths(lengths: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="Length"):
        rnp.Length(**lengths)


def test_one_cycle_is_torchs() -> None:
    steps, peak = 50, 3e-3
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, peak, steps, cycle_momentum=False)
    for step in range(steps):
        # torch puts the peak at 0.3·steps − 1 and the end at steps − 1: the same pieces, stretched
        rise = 0.3 * steps - 1
        progress = 0.3 * step / rise if step <= rise else 0.3 + 0.7 * (step - rise) / (steps - 1 - rise)
        assert phases.one_cycle(progress, peak) == pytest.approx(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()


def test_weight_decay_spares_norms_and_biases() -> None:
    pruned = toy.network()
    decayed, free = phases.backbone_parameters(pruned, 0.02)
    assert (decayed["weight_decay"], free["weight_decay"]) == (0.02, 0.0)
    assert [tuple(parameter.shape) for parameter in decayed["params"]] == [
        (8, 1, 3, 3),
        (8, 8, 3, 3),
        (16, 8, 3, 3),
        (4, 16),
    ]
    assert len(free["params"]) == 7  # three pairs of BatchNorm, and the bias of the linear layer
    assert len(list(pruned.backbone.parameters())) == 11


def test_sandwich_runs_full_narrowest_and_random_paths_in_turn() -> None:
    generator = torch.Generator().manual_seed(0)
    taken = [paths.sandwich_path(step, 6, 4, generator) for step in range(8)]
    assert taken[0] == taken[4] == [4] * 6
    assert taken[1] == taken[5] == [1] * 6
    assert len({tuple(taken[step]) for step in (2, 3, 6, 7)}) == 4


def test_the_narrow_share_of_pretrain() -> None:
    pruned = toy.network()
    agent = rnp.Agent(pruned.feature_sizes, pruned.groups)
    generator = torch.Generator().manual_seed(0)
    context = phases.Context(pruned, agent, toy.config(pretrain_narrow=0.25), generator, -0.05)
    phase = phases.Pretrain(context, rnp.Length(steps=2000))
    taken = [tuple(phase.paths(number, None)[0][0]) for number in range(2000)]
    others = sum(path != (4, 4) for path in taken)
    # Half of the narrow steps take the narrowest path, half a random one, and 1 of 16 of those is full width.
    assert abs(others / 2000 - 0.25 * (1 - 0.5 / 16)) < 5 * (0.25 * 0.75 / 2000) ** 0.5
    assert abs(taken.count((1, 1)) / 2000 - 0.25 * (0.5 + 0.5 / 16)) < 5 * (0.133 * 0.867 / 2000) ** 0.5
    assert len(set(taken)) == 16


def test_the_loss_of_a_path_by_hand() -> None:
    logits, teacher = torch.tensor([[0.0, math.log(3)]]), torch.tensor([[math.log(4), 0.0]])  # ¼ and ¾; ⅘ and ⅕
    label = torch.tensor([1])
    told, taught = -math.log(0.75), -0.8 * math.log(0.25) - 0.2 * math.log(0.75)
    for share, expected in ((0.0, told), (0.25, 0.75 * told + 0.25 * taught), (1.0, taught)):
        config = rnp.TrainConfig(distillation=share)
        assert backbone_phases.path_loss(logits, label, teacher, config).item() == pytest.approx(expected)
        assert backbone_phases.path_loss(logits, label, None, config).item() == pytest.approx(told)
    smooth = rnp.TrainConfig(label_smoothing=0.2)
    expected = -0.9 * math.log(0.75) - 0.1 * math.log(0.25)
    assert backbone_phases.path_loss(logits, label, None, smooth).item() == pytest.approx(expected)


def test_distilled_paths_learn_from_full_width_alone() -> None:
    images, labels = toy.scenes(8, 1)

    def after_a_step(path: list[int], labels: Tensor, share: float) -> list[Tensor]:
        pruned = toy.network()
        context = phases.Context(
            pruned,
            rnp.Agent(pruned.feature_sizes, pruned.groups),
            toy.config(distillation=share),
            torch.Generator(),
            -0.05,
        )
        phase = phases.Finetune(context, rnp.Length(steps=10))
        phase.paths = lambda number, extra: [(path, 1.0)]
        pruned.eval()  # no dropout
        phase.step(0, 0.5, images, labels, path)
        return [parameter.detach().clone() for parameter in pruned.backbone.parameters()]

    def same(first: list[Tensor], second: list[Tensor]) -> bool:
        return all(a.equal(b) for a, b in zip(first, second, strict=True))

    others = (labels + 1) % toy.CLASSES
    assert same(after_a_step([2, 3], labels, 1.0), after_a_step([2, 3], others, 1.0))
    assert not same(after_a_step([2, 3], labels, 0.5), after_a_step([2, 3], others, 0.5))
    assert not same(after_a_step([2, 3], labels, 0.5), after_a_step([2, 3], labels, 0.0))
    assert not same(after_a_step([4, 4], labels, 1.0), after_a_step([4, 4], others, 1.0))
    assert same(after_a_step([4, 4], labels, 1.0), after_a_step([4, 4], labels, 0.0))


def test_finetune_batches_are_alike_images_on_a_path_of_their_own() -> None:
    pruned = toy.network().eval()
    pruned.policy = agent = rnp.Agent(pruned.feature_sizes, pruned.groups)
    torch.nn.init.normal_(agent.decoders[0].weight, std=5.0, generator=torch.Generator().manual_seed(0))
    generator = agent.generator = torch.Generator().manual_seed(0)
    agent.set_feature_statistics(*paths.measure_features(pruned, [toy.scenes(64, 3)[0]]))
    context = phases.Context(pruned, agent, toy.config(finetune_epsilon=0.0), generator, -0.05)
    loader = toy.Loader(48, 16)
    batches = list(loader)
    pieces = list(phases.Finetune(context, rnp.Length(steps=9)).arrange(iter(batches)))
    everything = torch.cat([images for images, _ in batches])
    with torch.no_grad():
        _, trace = pruned(torch.cat([images for images, _, _ in pieces]), return_trace=True)
    assert [len(labels) for _, labels, _ in pieces] == [16, 16, 16]
    regrouped = torch.cat([images for images, _, _ in pieces])
    assert regrouped.flatten(1).sum(1).sort().values.equal(everything.flatten(1).sum(1).sort().values)
    spans = []
    for (_, _, path), macs, actions in zip(pieces, trace.macs.split(16), trace.actions.split(16), strict=True):
        assert path in actions.tolist()
        spans.append((int(macs.min()), int(macs.max())))
    spans.sort()
    assert all(before[1] <= after[0] for before, after in itertools.pairwise(spans))
    assert spans[0][0] < spans[-1][1]


def test_a_loss_that_is_not_finite_stops_the_run_before_it_is_saved(tmp_path: Path) -> None:
    loader = toy.Loader()
    loader.images[40:] = float("inf")
    with pytest.raises(FloatingPointError, match="the loss of phase pretrain is nan"):
        toy.train(loader, checkpoint_dir=tmp_path)
    assert not list(tmp_path.iterdir())


class SignalsItself(torch.utils.data.Dataset):
    """Its worker sends itself a signal at the first image."""

    def __init__(self, number: int) -> None:
        self.images, self.labels = toy.scenes(32, 1)
        self.number, self.parent = number, os.getpid()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        assert os.getpid() != self.parent
        if index == 0:
            os.kill(os.getpid(), self.number)
        return self.images[index], self.labels[index]


def test_workers_of_a_loader_leave_ctrl_c_to_the_run_and_can_be_terminated() -> None:
    lengths = {"sandwich": rnp.Length(steps=0), "agent": rnp.Length(steps=0), "rounds": 0}

    def run(number: int) -> training.TrainResult:
        loader = torch.utils.data.DataLoader(SignalsItself(number), 16, num_workers=1)
        return rnp.train(toy.network(), loader, None, toy.config(**lengths))

    assert run(signal.SIGINT).history[0]["steps"] == 4
    with pytest.raises(RuntimeError, match="DataLoader worker"):
        run(signal.SIGTERM)


def test_widening_keeps_what_the_network_computes() -> None:
    pruned = toy.network()
    torch.manual_seed(5)
    for module in pruned.backbone.modules():
        if isinstance(module, rnp.PrefixBatchNorm2d):  # sets that differ
            torch.nn.init.uniform_(module.weight, 0.5, 2.0)
            torch.nn.init.uniform_(module.bias, -0.5, 1.0)
    pruned.backbone[12].p = 0.0  # no dropout here
    pruned.train()
    images, labels = toy.scenes(64, 5)
    narrow = pruned.forward_path(images, [2, 2]).detach()
    assert (pruned.forward_path(images, [4, 4]) - narrow).abs().max() > 0.05
    before = {name: tensor.clone() for name, tensor in pruned.backbone.state_dict().items() if name.endswith("weight")}
    phases.widen(pruned, 2, images, labels)
    torch.testing.assert_close(pruned.forward_path(images, [2, 2]).detach(), narrow)
    torch.testing.assert_close(pruned.forward_path(images, [4, 4]).detach(), narrow)
    after = pruned.backbone.state_dict()
    assert after["7.weight"][8:].equal(before["7.weight"][8:])  # new outputs start as they were initialised
    assert after["7.weight"][:8, :4].equal(before["7.weight"][:8, :4])
    assert not after["7.weight"][:8, 4:].any()
    torch.nn.functional.cross_entropy(pruned.forward_path(images, [4, 4]), labels).backward()
    gradients = dict(pruned.backbone.named_parameters())
    assert gradients["7.weight"].grad[:8, 4:].abs().sum() > 0
    assert gradients["13.weight"].grad[:, 8:].abs().sum() > 0


def test_pretraining_that_grows(tmp_path: Path) -> None:
    settings = {"pretrain": rnp.Length(steps=60), "growth": 0.5, "sandwich": rnp.Length(steps=0), "rounds": 0}
    settings["agent"] = rnp.Length(steps=0)
    whole = toy.train(toy.Loader(), **settings)
    for at in (13, 37):  # before and after it was widened
        folder = tmp_path / str(at)
        with pytest.raises(KeyboardInterrupt):
            toy.train(toy.Loader(number=signal.SIGINT, at=at), checkpoint_dir=folder, **settings)
        _, header = rnp.fileformat.read(folder / training.STATE_FILE, "training")
        assert header["values"] == {"action": 2 if at == 13 else 4}
        assert_same(whole, toy.train(toy.Loader(), checkpoint_dir=folder, resume=True, **settings))
    pruned = toy.network()
    pruned.policy = rnp.Agent(pruned.feature_sizes, pruned.groups)
    pruned.load_state_dict(whole)
    images, labels = toy.scenes(256, 7)
    right = pruned.eval().forward_path(images, [4, 4]).argmax(1) == labels
    assert right.float().mean() >= 0.95


@pytest.mark.parametrize("mode", ["frozen", "train"])
def test_finetune_batchnorm(mode: str) -> None:
    """Frozen statistics stay to the bit, while weights and affine parameters move."""
    pruned = toy.network().eval()
    pruned.policy = agent = rnp.Agent(pruned.feature_sizes, pruned.groups)
    agent.generator = torch.Generator().manual_seed(0)
    settings = toy.config(finetune_batchnorm=mode, finetune_epsilon=1.0, finetune_sandwich=0.0)
    phase = phases.Finetune(phases.Context(pruned, agent, settings, agent.generator, -0.05), rnp.Length(steps=9))
    before = {name: tensor.clone() for name, tensor in pruned.backbone.state_dict().items()}
    for number, (images, labels, path) in enumerate(phase.arrange(iter(list(toy.Loader(96, 16))))):
        phase.step(number, 0.5, images, labels, path)
    after = pruned.backbone.state_dict()
    same = {name: before[name].equal(after[name]) for name in before}
    statistics = [name for name in before if "running" in name or "tracked" in name]
    assert all(same[name] == (mode == "frozen") for name in statistics)
    assert not any(same[name] for name in before if name not in statistics)


def test_the_agents_learning_rate_falls_linearly() -> None:
    pruned = toy.network().eval()
    pruned.policy = agent = rnp.Agent(pruned.feature_sizes, pruned.groups)
    settings = toy.config(agent_lr=0.01, agent_lr_end=0.1)
    context = phases.Context(pruned, agent, settings, torch.Generator(), -0.05)
    phase = phases.TrainAgent(context, rnp.Length(steps=9), first=True)
    images, labels = toy.scenes(16, 0)
    for progress, expected in [(0.0, 0.01), (0.5, 0.0055), (1.0, 0.001)]:
        phase.step(0, progress, images, labels, None)
        assert phase.optimizer.param_groups[0]["lr"] == pytest.approx(expected)


def test_full_width_judges_the_paths() -> None:
    """Each image is collected so many times, its loss is the divergence, and the agent is left deciding."""
    pruned = toy.network().eval()
    pruned.policy = agent = rnp.Agent(pruned.feature_sizes, pruned.groups)
    agent.generator = torch.Generator().manual_seed(0)
    settings = toy.config(agent_distillation=1.0, agent_rollouts=3, agent_updates=2, epsilon_start=1.0)
    phase = phases.TrainAgent(
        phases.Context(pruned, agent, settings, agent.generator, -0.05), rnp.Length(steps=9), True
    )
    phase.begin(iter([toy.scenes(16, 1)]))
    images, labels = toy.scenes(16, 0)
    updates: list[int] = []
    phase.optimizer.register_step_post_hook(lambda *_: updates.append(len(phase.replay)))
    phase.step(0, 0.0, images, labels, None)
    assert pruned.policy is agent
    assert updates == [16, 16, 32, 32, 48, 48]
    kept = phase.replay
    pruned.policy = rnp.policies.FullWidth()
    teacher = pruned(images)
    for rollout in range(3):
        part = slice(16 * rollout, 16 * rollout + 16)
        pruned.policy = rnp.policies.Fixed(kept.actions[part])
        expected = qlearning.episode_losses(pruned(images), labels, teacher, 1.0)
        torch.testing.assert_close(kept.losses[part], expected, atol=1e-5, rtol=1e-4)
    wide = (kept.actions[:48] == pruned.groups).all(1)
    assert wide.any()
    assert (kept.losses[:48][wide].abs() < 1e-5).all()
    assert (kept.losses[:48][~wide] > 0).all()


def test_a_greedy_batch_is_collected_and_steers_once() -> None:
    pruned = toy.network().eval()
    pruned.policy = agent = rnp.Agent(pruned.feature_sizes, pruned.groups)
    agent.generator = torch.Generator().manual_seed(0)
    settings = toy.config(agent_rollouts=3, target_speedup=2.0)
    context = phases.Context(pruned, agent, settings, agent.generator, -0.05)
    phase = phases.TrainAgent(context, rnp.Length(steps=9), first=True)
    images, labels = toy.scenes(16, 0)
    _, trace = pruned(images, return_trace=True)
    speedup = trace.dense_macs / float(trace.macs.double().mean())
    phase.step(0, 0.5, images, labels, None)
    assert len(phase.replay) == 16
    assert context.penalty == qlearning.steer_penalty(-0.05, speedup, 2.0)
    phase.step(1, 0.5, images, labels, None)
    assert len(phase.replay) == min(64, settings.replay)


def test_training_with_a_judge_survives_a_resume(tmp_path: Path) -> None:
    settings = {"agent_distillation": 0.5, "agent_rollouts": 2}
    whole = toy.train(toy.Loader(), **settings)
    with pytest.raises(KeyboardInterrupt):
        toy.train(toy.Loader(number=signal.SIGINT, at=46), checkpoint_dir=tmp_path, **settings)
    assert_same(whole, toy.train(toy.Loader(), checkpoint_dir=tmp_path, resume=True, **settings))


def test_progress_of_a_length() -> None:
    assert rnp.Length(steps=8).progress(2, 1e9) == 0.25
    assert rnp.Length(seconds=8.0).progress(10**9, 2.0) == 0.25
    assert rnp.Length(steps=0).progress(0, 0.0) == 1.0
    assert math.isclose(rnp.Length(steps=3).progress(4, 0.0), 1.0)


def steered(start: float) -> float:
    """p after a short run on the toy with a tiny agent and the target 2."""
    pruned = toy.network()
    lengths = {"sandwich": rnp.Length(steps=120), "agent": rnp.Length(steps=120), "rounds": 0}
    settings = {"agent_options": {"hidden": 4, "code": 4}, "penalty": start, "target_speedup": 2.0}
    result = rnp.train(pruned, toy.Loader(), None, toy.config(**lengths, **settings))
    return result.history[-1]["penalty"]


def test_a_target_steers_the_penalty_from_both_sides(monkeypatch: pytest.MonkeyPatch) -> None:
    """At −0.5 the toy's agent is faster than 2x, at −0.002 it is not pruned at all: in between lies what reaches it."""
    monkeypatch.setattr(agent_phase, "STEERING_STEPS", 3)
    cheaper, dearer = steered(-0.5), steered(-0.002)
    assert -0.5 < cheaper < -0.02
    assert -0.5 < dearer < -0.02
    assert 1 / 5 < cheaper / dearer < 5  # they started 250 times apart


def test_a_steered_penalty_survives_a_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agent_phase, "STEERING_STEPS", 2)
    whole = toy.train(toy.Loader(), target_speedup=2.0)
    with pytest.raises(KeyboardInterrupt):
        toy.train(toy.Loader(number=signal.SIGINT, at=46), target_speedup=2.0, checkpoint_dir=tmp_path)
    _, header = rnp.fileformat.read(tmp_path / training.STATE_FILE, "training")
    assert header["penalty"] != toy.config().penalty
    assert_same(whole, toy.train(toy.Loader(), target_speedup=2.0, checkpoint_dir=tmp_path, resume=True))
