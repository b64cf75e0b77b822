"""rnp.calibrate reaches its target or says why not, and leaves the budget alone when it fails."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import rnp
from rnp import paths

SIZE = 8


def make_network() -> rnp.PrunedNetwork:
    """A network whose agent is random but decides differently from image to image."""
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Conv2d(3, 16, 3, padding=1), nn.ReLU()]
    for _ in range(4):
        layers += [nn.Conv2d(16, 16, 3, padding=1), nn.ReLU()]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4)).eval()
    pruned = rnp.convert(model, torch.zeros(1, 3, SIZE, SIZE))
    pruned.policy = agent = rnp.Agent(pruned.feature_sizes, pruned.groups, hidden=8, code=8).eval()
    nn.init.normal_(agent.decoders[0].weight, std=0.3)
    agent.set_feature_statistics(*paths.measure_features(pruned, loader()[0][:1]))
    return pruned


def loader(count: int = 192) -> list[tuple[Tensor, Tensor]]:
    images = torch.randn(count, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))
    return [(batch, torch.zeros(len(batch), dtype=torch.int64)) for batch in images.split(64)]


@pytest.fixture
def pruned() -> rnp.PrunedNetwork:
    return make_network()


def speedup(pruned: rnp.PrunedNetwork) -> float:
    """Dense MACs ÷ mean MACs, counted here from the actions."""
    total, count = 0.0, 0
    for images, _ in loader():
        with torch.no_grad():
            _, trace = pruned(images, return_trace=True)
        total += float((pruned.macs(trace.actions) + pruned.policy.macs_per_image).sum())
        count += len(images)
    return pruned.dense_macs * count / total


@pytest.mark.parametrize("target", [1.5, 2.0, 3.0, 5.0])
def test_the_target_is_reached(pruned: rnp.PrunedNetwork, target: float) -> None:
    result = rnp.calibrate(pruned, loader(), speedup=target, tolerance=0.02)
    assert result.speedup == pytest.approx(speedup(pruned), rel=1e-9)
    assert abs(result.speedup / target - 1) <= 0.02
    assert pruned.penalty_shift == result.penalty_shift
    assert result.images == 192
    assert (result.penalty_shift, result.speedup) in result.probes
    assert len(result.probes) <= 24


def test_faster_needs_a_smaller_shift(pruned: rnp.PrunedNetwork) -> None:
    shifts = [rnp.calibrate(pruned, loader(), speedup=target).penalty_shift for target in (1.5, 2.5, 5.0)]
    assert shifts == sorted(shifts, reverse=True)


def test_the_cap_stays_in_force(pruned: rnp.PrunedNetwork) -> None:
    pruned.set_budget(0.0, 0.6)
    rnp.calibrate(pruned, loader(), speedup=2.5, tolerance=0.02)
    assert pruned.max_macs == 0.6
    assert abs(speedup(pruned) / 2.5 - 1) <= 0.02
    with pytest.raises(ValueError, match="out of range"):
        rnp.calibrate(pruned, loader(), speedup=1.2)  # the cap forbids it


@pytest.mark.parametrize("target", [100.0, 0.5])
def test_out_of_range_names_the_range_and_changes_nothing(pruned: rnp.PrunedNetwork, target: float) -> None:
    pruned.set_budget(-0.03, 0.9)
    with pytest.raises(ValueError, match="out of range") as raised:
        rnp.calibrate(pruned, loader(), speedup=target)
    assert (pruned.penalty_shift, pruned.max_macs) == (-0.03, 0.9)
    narrowest = torch.ones(1, len(pruned.layers), dtype=torch.int64)
    fastest = pruned.dense_macs / float(pruned.macs(narrowest) + pruned.policy.macs_per_image)
    assert f"to {fastest:.3f}" in str(raised.value)


def test_only_an_agent_can_be_calibrated(pruned: rnp.PrunedNetwork) -> None:
    pruned.policy = rnp.policies.Uniform(0.5)
    with pytest.raises(ValueError, match=r"steers an Agent, but the network's policy is Uniform\(0.5\)"):
        rnp.calibrate(pruned, loader())


def test_wrong_input(pruned: rnp.PrunedNetwork) -> None:
    with pytest.raises(ValueError, match="gave no images"):
        rnp.calibrate(pruned, [])
    with pytest.raises(ValueError, match="must be positive, got -1"):
        rnp.calibrate(pruned, loader(), speedup=-1)


@pytest.mark.parametrize(
    ("settings", "rule"),
    [
        ({"max_probes": 0}, "max_probes must be at least 3, got 0"),
        ({"max_probes": 2}, "max_probes must be at least 3, got 2"),
        ({"max_images": 0}, "max_images must be at least 1, got 0"),
        ({"max_images": -1}, "max_images must be at least 1, got -1"),
        ({"tolerance": -0.01}, "tolerance must not be negative, got -0.01"),
        ({"tolerance": float("nan")}, "tolerance must not be negative, got nan"),
        ({"speedup": float("nan")}, "speedup must be positive, got nan"),
    ],
)
def test_wrong_numbers_leave_the_budget_alone(pruned: rnp.PrunedNetwork, settings: dict, rule: str) -> None:
    pruned.set_budget(-0.03, 0.9)
    with pytest.raises(ValueError, match=f"calibrate: {rule}"):
        rnp.calibrate(pruned, loader(), **settings)
    assert (pruned.penalty_shift, pruned.max_macs) == (-0.03, 0.9)


def test_few_probes_are_kept_to(pruned: rnp.PrunedNetwork) -> None:
    with pytest.warns(UserWarning, match="nearest to"):
        result = rnp.calibrate(pruned, loader(), speedup=2.0, tolerance=1e-6, max_probes=3)
    assert len(result.probes) == 3 and abs(result.penalty_shift) < 1


def test_a_jump_sets_the_nearest_and_warns(pruned: rnp.PrunedNetwork) -> None:
    """Equal images leave the agent only a few averages."""
    same = [torch.ones(8, 3, SIZE, SIZE)]
    with pytest.warns(UserWarning, match="the agent's choices jump there"):
        result = rnp.calibrate(pruned, same, speedup=2.345, tolerance=1e-6)
    reached = [probe[1] for probe in result.probes]
    assert abs(result.speedup - 2.345) == min(abs(each - 2.345) for each in reached)


def test_exploration_and_mode_are_put_back(pruned: rnp.PrunedNetwork) -> None:
    pruned.policy.epsilon = 0.7
    pruned.train()
    result = rnp.calibrate(pruned, loader(), speedup=2.0, tolerance=0.02, max_images=100)
    assert result.images == 100
    assert pruned.policy.epsilon == 0.7
    assert pruned.training
