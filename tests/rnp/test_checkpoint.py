"""rnp.save and rnp.load: the same network back, or a clear error and nothing changed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import rnp
from rnp import fileformat


def model(width: int = 8, depth: int = 2) -> nn.Sequential:
    layers: list[nn.Module] = [nn.Conv2d(3, width, 3, padding=1), nn.ReLU()]
    for _ in range(depth):
        layers += [nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 5))


def network(groups: int = 4, **agent: object) -> rnp.PrunedNetwork:
    """A network with an agent, every tensor of which is random."""
    torch.manual_seed(3)
    pruned = rnp.convert(model(), torch.zeros(2, 3, 10, 12), groups=groups)
    pruned.policy = rnp.Agent(pruned.feature_sizes, groups, **agent)
    for tensor in pruned.state_dict().values():
        if tensor.is_floating_point():
            tensor.uniform_(0.1, 1.0)
    pruned.set_budget(-0.07, 0.9)
    return pruned.eval()


def snapshot(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def assert_same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert set(first) == set(second)
    assert all(first[name].equal(second[name]) for name in first)


@pytest.mark.parametrize(
    "agent", [{}, {"cell": "lstm", "hidden": 12}, {"cell": "none", "shared_decoder": False, "code": 9}]
)
def test_round_trip(tmp_path: Path, agent: dict[str, object]) -> None:
    path = tmp_path / "network.safetensors"
    pruned = network(**agent)
    rnp.save(pruned, path)
    original = model()
    before = snapshot(original)
    state = torch.get_rng_state()
    loaded = rnp.load(path, original)
    assert_same(before, snapshot(original))
    assert_same(pruned.state_dict(), loaded.state_dict())
    assert (loaded.penalty_shift, loaded.max_macs) == (-0.07, 0.9)
    assert not loaded.training
    assert torch.get_rng_state().equal(state)
    images = torch.randn(5, 3, 10, 12)
    with torch.no_grad():
        logits, trace = pruned(images, return_trace=True)
        again, retrace = loaded(images, return_trace=True)
    assert logits.equal(again)
    assert trace.actions.equal(retrace.actions)
    assert trace.macs.equal(retrace.macs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_types_are_kept(tmp_path: Path, dtype: torch.dtype) -> None:
    pruned = network().to(dtype)
    rnp.save(pruned, tmp_path / "x")
    loaded = rnp.load(tmp_path / "x", model().to(dtype))
    assert_same(pruned.state_dict(), loaded.state_dict())
    assert loaded.policy.decoders[0].weight.dtype is dtype


def test_load_in_place(tmp_path: Path) -> None:
    path = tmp_path / "x"
    pruned = network()
    rnp.save(pruned, path)
    target = rnp.convert(model(), torch.zeros(1, 3, 10, 12))
    assert rnp.load(path, target) is target
    assert_same(pruned.state_dict(), target.state_dict())


@pytest.mark.parametrize("policy", [rnp.policies.FullWidth(), rnp.policies.Uniform(0.5)])
def test_static_policies(tmp_path: Path, policy: rnp.policies.Policy) -> None:
    pruned = network()
    pruned.policy = policy
    rnp.save(pruned, tmp_path / "x")
    assert repr(rnp.load(tmp_path / "x", model()).policy) == repr(policy)


def test_a_policy_without_a_stored_form_is_refused(tmp_path: Path) -> None:
    pruned = network()
    pruned.policy = rnp.policies.Random()
    with pytest.raises(ValueError, match=r"must be an Agent, FullWidth or Uniform to be stored, got Random\(\)"):
        rnp.save(pruned, tmp_path / "x")
    assert not list(tmp_path.iterdir())


def test_a_subclass_of_agent_is_refused(tmp_path: Path) -> None:
    """It would be read back as a plain Agent, which decides otherwise."""

    class Narrowest(rnp.Agent):
        def act(self, layer, features, state):
            return torch.ones(len(features), dtype=torch.int32), state

    pruned = network()
    pruned.policy = Narrowest(pruned.feature_sizes, 4)
    with pytest.raises(ValueError, match=r"must be an Agent, FullWidth or Uniform to be stored, got Narrowest$"):
        rnp.save(pruned, tmp_path / "x")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("state", [{"value": 1}, torch.ones(1)])
def test_extra_state_is_refused(tmp_path: Path, state: object) -> None:
    class Extra(nn.Sequential):
        def get_extra_state(self) -> object:
            return state

        def set_extra_state(self, state: object) -> None:
            pass

    pruned = rnp.convert(Extra(*model()), torch.zeros(1, 3, 10, 12))
    with pytest.raises(
        ValueError, match=r"must be parameters and buffers, and backbone\._extra_state is (dict|Tensor)"
    ):
        rnp.save(pruned, tmp_path / "x")
    assert not list(tmp_path.iterdir())


def rewritten(change: Callable[[dict[str, torch.Tensor], dict], object]) -> Callable[[Path], None]:
    def rewrite(path: Path) -> None:
        tensors, header = fileformat.read(path, "network")
        change(tensors, header)
        fileformat.write(path, "network", tensors, header)

    return rewrite


@pytest.mark.parametrize(
    ("damage", "target", "message"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-9]), model, "truncated or of another format"),
        (lambda path: path.write_bytes(b"PK\x03\x04" + bytes(99)), model, "truncated or of another format"),
        (lambda path: fileformat.write(path, "training", {}, {}), model, "kind must be 'network', got 'training'"),
        (lambda path: None, lambda: model(depth=3), r"of another network: layers is \['2', '5'\] in the file"),
        (lambda path: None, lambda: model(width=16), r"of another network: feature_sizes is \[8, 8\]"),
        (lambda path: None, lambda: nn.Linear(3, 4), r"cannot be converted for images of \[3, 10, 12\]"),
        (lambda path: None, lambda: network(groups=2), "groups is 4 in the file and 2 here"),
        (rewritten(lambda t, h: t.pop("backbone.10.bias")), model, r"the file lacks backbone.10.bias"),
        (rewritten(lambda t, h: t.update(other=torch.zeros(1))), model, r"holds, unknown to the model, other"),
        (
            rewritten(lambda t, h: t.update({"backbone.10.bias": torch.zeros(6)})),
            model,
            r"backbone.10.bias has shape \(6,\) in the file, \(5,\) in the model",
        ),
        (
            lambda path: None,
            lambda: model().bfloat16(),
            r"backbone.0.weight has type torch.float32 in the file, torch.bfloat16 in the model",
        ),
        (rewritten(lambda t, h: t.pop("agent.mean_0")), network, r"the file lacks agent.mean_0"),
        (rewritten(lambda t, h: h["policy"].update(kind="Oracle")), model, "got 'Oracle'"),
    ],
)
def test_errors_name_file_and_rule_and_change_nothing(
    tmp_path: Path, damage: Callable[[Path], object], target: Callable[[], nn.Module], message: str
) -> None:
    path = tmp_path / "mine.safetensors"
    rnp.save(network(), path)
    damage(path)
    goal = target()
    before = snapshot(goal)
    policy = getattr(goal, "policy", None)
    with pytest.raises(rnp.CheckpointError, match=message) as raised:
        rnp.load(path, goal)
    assert "mine.safetensors" in str(raised.value)
    assert_same(before, snapshot(goal))
    assert getattr(goal, "policy", None) is policy


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none.safetensors: no such file"):
        rnp.load(tmp_path / "none.safetensors", model())


def test_optimizer_state_takes_the_layout_of_its_parameter() -> None:
    """A fused step walks parameter and moments by address: channels_last weights need channels_last moments."""
    from rnp import checkpoint

    def make() -> tuple[nn.Parameter, torch.optim.Optimizer]:
        weight = torch.arange(48.0).reshape(4, 3, 2, 2).to(memory_format=torch.channels_last)
        parameter = nn.Parameter(weight)
        return parameter, torch.optim.AdamW([parameter], lr=0.1, fused=True)

    def step(parameter: nn.Parameter, optimizer: torch.optim.Optimizer, seed: int) -> None:
        parameter.grad = torch.randn(4, 3, 2, 2, generator=torch.Generator().manual_seed(seed))
        parameter.grad = parameter.grad.to(memory_format=torch.channels_last)
        optimizer.step()

    first, first_optimizer = make()
    step(first, first_optimizer, 0)
    saved = {name: t.contiguous() for name, t in checkpoint.optimizer_tensors(first_optimizer).items()}
    second, second_optimizer = make()
    second.data.copy_(first.data)
    checkpoint.load_optimizer("x", second_optimizer, saved)
    step(first, first_optimizer, 1)
    step(second, second_optimizer, 1)
    assert first.equal(second)
    with pytest.raises(rnp.CheckpointError, match=r"'0.exp_avg' must have shape \(4, 3, 2, 2\), got \(5,\)"):
        checkpoint.load_optimizer("x", second_optimizer, {"0.exp_avg": torch.zeros(5)})
    with pytest.raises(rnp.CheckpointError, match="belongs to none of 1 parameters"):
        checkpoint.load_optimizer("x", second_optimizer, {"3.exp_avg": torch.zeros(5)})
