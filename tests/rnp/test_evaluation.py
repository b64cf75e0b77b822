"""rnp.evaluate against numbers worked out by hand, intervals against resampling, times against a fake clock."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import rnp
from rnp import evaluation, measure, stock


@pytest.fixture
def pruned() -> rnp.PrunedNetwork:
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Conv2d(3, 8, 3, padding=1), nn.ReLU()]
    for _ in range(2):
        layers += [nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))
    return rnp.convert(model.eval(), torch.zeros(1, 3, 6, 6))


def loader(count: int = 50, batch: int = 16) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(count, 3, 6, 6, generator=generator)
    labels = torch.randint(3, (count,), generator=generator)
    return list(zip(images.split(batch), labels.split(batch), strict=True))


def test_counts_by_hand(pruned: rnp.PrunedNetwork) -> None:
    pruned.policy = rnp.policies.Fixed([2, 4])
    report = rnp.evaluate(pruned, loader(), timing_batches=0)
    images = torch.cat([batch for batch, _ in loader()])
    labels = torch.cat([batch for _, batch in loader()])
    correct = pruned.forward_path(images, [2, 4]).argmax(1) == labels
    assert report.correct.equal(correct)
    assert report.accuracy == pytest.approx(correct.double().mean().item())
    area = 9 * 36
    spent = area * (3 * 8 + 8 * 4 + 4 * 8) + 8 * 3
    dense = area * (3 * 8 + 8 * 8 + 8 * 8) + 8 * 3
    assert (report.mean_macs, report.p50_macs, report.p99_macs, report.dense_macs) == (spent, spent, spent, dense)
    assert report.theoretical_speedup == pytest.approx(dense / spent)
    assert report.histogram == [[0, 1, 0, 0], [0, 0, 0, 1]]
    assert (report.images, report.policy, report.timing) == (50, "Fixed(actions of shape (2,))", None)


def test_the_agents_own_macs_count(pruned: rnp.PrunedNetwork) -> None:
    pruned.policy = agent = rnp.Agent(pruned.feature_sizes, 4)
    pruned.set_budget(100.0)
    report = rnp.evaluate(pruned, loader(), timing_batches=0)
    assert report.mean_macs == pruned.dense_macs + agent.macs_per_image
    assert report.theoretical_speedup < 1
    assert report.policy == "Agent(Δp=100)"


def test_percentiles_and_histogram_of_mixed_actions(pruned: rnp.PrunedNetwork) -> None:
    pruned.policy = rnp.policies.Random(torch.Generator().manual_seed(0))
    report = rnp.evaluate(pruned, loader(200), timing_batches=0)
    macs = pruned.macs(report.actions).double().numpy()
    assert (report.mean_macs, report.p50_macs, report.p99_macs) == pytest.approx(
        (macs.mean(), np.percentile(macs, 50), np.percentile(macs, 99))
    )
    for layer, shares in enumerate(report.histogram):
        expected = [(report.actions[:, layer] == action).double().mean().item() for action in range(1, 5)]
        assert shares == pytest.approx(expected)


def test_accuracy_interval_is_the_bootstraps() -> None:
    correct = torch.arange(400) % 10 < 8
    low, high = evaluation.accuracy_interval(correct)
    generator = np.random.default_rng(7)
    resampled = correct.numpy()[generator.integers(400, size=(10_000, 400))].mean(1)
    assert (low, high) == pytest.approx(tuple(np.percentile(resampled, [2.5, 97.5])), abs=0.004)
    assert low < 0.8 < high
    assert evaluation.accuracy_interval(torch.ones(9, dtype=torch.bool)) == (1.0, 1.0)


def test_compare_is_the_paired_bootstrap() -> None:
    generator = np.random.default_rng(3)
    first = torch.from_numpy(generator.random(500) < 0.8)
    second = first ^ torch.from_numpy(generator.random(500) < 0.1)
    result = rnp.compare(first, second)
    difference = first.numpy().astype(float) - second.numpy()
    assert result.difference == pytest.approx(difference.mean())
    resampled = difference[generator.integers(500, size=(10_000, 500))].mean(1)
    assert result.interval == pytest.approx(tuple(np.percentile(resampled, [2.5, 97.5])), abs=0.004)
    swapped = rnp.compare(second, first)
    assert swapped.difference == -result.difference
    with pytest.raises(ValueError, match="the same images"):
        rnp.compare(first, second[:-1])


def test_times_of_a_fake_clock(pruned: rnp.PrunedNetwork, monkeypatch: pytest.MonkeyPatch) -> None:
    """The dense side takes 6 ms a batch, the network 2 ms and in its last round 4 ms: medians decide."""
    calls: list[str] = []
    dense = stock.StockPath("eager", nn.Identity())

    def fake(call: object, device: torch.device) -> float:
        name = "dense" if call.__defaults__[0] is dense.module else "pruned"  # type: ignore[attr-defined]
        calls.append(name)
        if name == "dense":
            return 6e-3
        return 4e-3 if calls.count("pruned") > 3 * 5 else 2e-3

    monkeypatch.setattr(measure, "seconds_of", fake)
    pruned.policy = rnp.policies.Fixed([4, 2])
    report = rnp.evaluate(pruned, loader(), batch_size=10, timing_batches=3, rounds=5, stock_path=dense)
    timing = report.timing
    assert timing is not None
    assert timing.measured_speedup == pytest.approx(3.0)
    assert (timing.dense_ms, timing.pruned_ms) == pytest.approx((6.0, 2.0))
    assert (timing.measured_p20, timing.measured_p80) == pytest.approx((1.5 + 0.8 * 1.5, 3.0))
    assert timing.noise == 0.0
    assert timing.theoretical_speedup == pytest.approx(report.theoretical_speedup)
    assert timing.realised_fraction == pytest.approx(3.0 / report.theoretical_speedup)
    assert (timing.batch_size, timing.batches, timing.rounds, timing.dense_path) == (10, 3, 5, "eager")
    assert len(calls) == 3 * 3 * 6  # batches, sides, rounds with the one that warms up
    assert calls[:9] == ["dense"] * 3 + ["pruned"] * 3 + ["dense"] * 3  # each side all batches in a row


def test_the_report_as_json_and_text(pruned: rnp.PrunedNetwork) -> None:
    report = rnp.evaluate(pruned, loader(), timing_batches=2, rounds=2)
    values = json.loads(json.dumps(report.to_dict()))
    for name in ("policy", "accuracy", "accuracy_interval", "mean_macs", "theoretical_speedup", "measured_speedup"):
        assert name in values
    assert values["realised_fraction"] == pytest.approx(
        values["measured_speedup"] / values["timed_theoretical_speedup"]
    )
    assert values["dense_path"] in ("eager", "folded", "prepacked")
    text = str(report)
    for word in ("accuracy", "theoretical speed-up", "measured speed-up", "realised fraction", "FullWidth()"):
        assert word in text
    untimed = rnp.evaluate(pruned, loader(), timing_batches=0)
    assert untimed.to_dict()["measured_speedup"] is None
    assert "measured" not in str(untimed)


def test_the_network_is_left_as_it_was(pruned: rnp.PrunedNetwork) -> None:
    pruned.policy = agent = rnp.Agent(pruned.feature_sizes, 4)
    agent.epsilon = 0.5
    pruned.train()
    report = rnp.evaluate(pruned, loader(), timing_batches=0, max_images=20)
    assert report.images == 20
    assert (agent.epsilon, pruned.training) == (0.5, True)
    assert report.actions.unique().tolist() == [1]  # no exploration: a fresh agent ties, and takes the cheapest


def test_no_images(pruned: rnp.PrunedNetwork) -> None:
    with pytest.raises(ValueError, match="gave no images"):
        rnp.evaluate(pruned, [])


@pytest.mark.parametrize(
    ("settings", "rule"),
    [
        ({"max_images": 0}, "max_images must be at least 1, got 0"),
        ({"max_images": -1}, "max_images must be at least 1, got -1"),
        ({"rounds": 0}, "rounds must be at least 1, got 0"),
        ({"timing_batches": -1}, "timing_batches must be at least 0, got -1"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
    ],
)
def test_wrong_numbers_are_refused_before_the_loader_is_asked(
    pruned: rnp.PrunedNetwork, settings: dict[str, int], rule: str
) -> None:
    class Untouched:
        def __iter__(self) -> None:
            raise AssertionError("it was asked")

    with pytest.raises(ValueError, match=rule):
        rnp.evaluate(pruned, Untouched(), **settings)


@pytest.mark.parametrize(
    ("change", "error", "rule"),
    [
        (lambda x, y: (x, y[:, None]), ValueError, r"labels must have shape \(N,\) = \(16,\), got \(16, 1\)"),
        (lambda x, y: (x, y[:1]), ValueError, r"labels must have shape \(N,\) = \(16,\), got \(1,\)"),
        (lambda x, y: (x, y[0]), ValueError, r"labels must have shape \(N,\) = \(16,\), got \(\)"),
        (lambda x, y: (x, nn.functional.one_hot(y, 3)), ValueError, r"got \(16, 3\)"),
        (lambda x, y: (x, y.float()), TypeError, "labels must be integers, got torch.float32"),
        (lambda x, y: (x, y > 0), TypeError, "labels must be integers, got torch.bool"),
        (lambda x, y: x, TypeError, "must yield pairs of tensors, images and labels, got Tensor"),
        (lambda x, y: (x, y.tolist()), TypeError, "got tuple of Tensor, list"),
        (lambda x, y: {"images": x, "labels": y}, TypeError, "got dict"),
    ],
)
def test_labels_that_do_not_fit_are_named(
    pruned: rnp.PrunedNetwork, change: Any, error: type[Exception], rule: str
) -> None:
    pruned.policy = agent = rnp.Agent(pruned.feature_sizes, 4)
    agent.epsilon = 0.5
    pruned.train()
    with pytest.raises(error, match=rule):
        rnp.evaluate(pruned, [change(x, y) for x, y in loader(16)], timing_batches=0)
    assert (agent.epsilon, pruned.training) == (0.5, True)


def test_a_network_that_does_not_classify_is_named() -> None:
    layers = [nn.Conv2d(channels, 8, 3, padding=1) for channels in (3, 8, 8)]
    maps = rnp.convert(nn.Sequential(*layers).eval(), torch.zeros(1, 3, 6, 6))
    with pytest.raises(ValueError, match=r"must answer \(N, classes\), got \(16, 8, 6, 6\)"):
        rnp.evaluate(maps, loader(16), timing_batches=0)
