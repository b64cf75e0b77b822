"""Statistics and rivals of the demo's comparison, against plain definitions."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import rnp
from rnp import comparison, data, stock
from rnp.scene_net import scene_net


def test_ranks_share_ties() -> None:
    assert comparison.ranks(torch.tensor([10.0, 30.0, 10.0, 20.0])).tolist() == [1.5, 4.0, 1.5, 3.0]


def test_rank_correlation_is_spearmans() -> None:
    from scipy.stats import spearmanr

    generator = torch.Generator().manual_seed(0)
    first = torch.randint(0, 6, (400,), generator=generator)
    second = first + 3 * torch.rand(400, generator=generator)
    found = comparison.rank_correlation(first, second, resamples=300)
    assert found["rank_correlation"] == pytest.approx(spearmanr(first, second)[0])
    low, high = found["interval"]
    assert low < found["rank_correlation"] < high and high - low < 0.15
    assert comparison.rank_correlation(first, -first, resamples=10)["rank_correlation"] == pytest.approx(-1)


def test_what_does_not_vary_does_not_correlate() -> None:
    found = comparison.rank_correlation(torch.ones(50), torch.rand(50), resamples=10)
    assert found == {"rank_correlation": 0.0, "interval": [0.0, 0.0]}


def test_bootstrap_of_a_mean_agrees_with_resampling_by_hand() -> None:
    values = torch.tensor([0.0, 0.25, 1.0])[torch.randint(0, 3, (300,), generator=torch.Generator().manual_seed(1))]
    low, high = comparison.bootstrap_mean(values)
    generator = np.random.default_rng(2)
    index = generator.integers(300, size=(20_000, 300))
    by_hand = np.percentile(values.numpy()[index].mean(1), [2.5, 97.5])
    assert (low, high) == pytest.approx(tuple(by_hand), abs=0.004)


def test_the_difference_is_paired() -> None:
    """Two policies that err on the same images but for five: the interval knows it."""
    first = (torch.arange(2000) % 2).double()
    second = first.clone()
    second[1:11:2] = 0
    found = comparison.difference(first, second)
    assert found["difference"] == pytest.approx(5 / 2000)
    low, high = found["interval"]
    assert 0 < low < 5 / 2000 < high < 0.006


def test_a_lottery_gives_the_share_it_promises_one_action_an_image() -> None:
    class Network:
        layers = ("a", "b")

    policy = comparison.Lottery(2, 3, 0.25, seed=4)
    state = policy.start(Network(), 20_000, torch.device("cpu"))
    first, state = policy.act(0, None, state)
    second, _ = policy.act(1, None, state)
    assert torch.equal(first, second) and first.dtype == torch.int32
    assert set(first.tolist()) == {2, 3}
    assert float((first == 3).double().mean()) == pytest.approx(0.25, abs=0.02)


@pytest.fixture
def compared() -> comparison.Comparison:
    """Untrained networks on noise."""
    torch.manual_seed(0)
    count = 2 * comparison.BATCH
    images = torch.randint(256, (count, 1, 32, 32), dtype=torch.uint8)
    scenes = data.Scenes(images, torch.randint(100, (count,)), torch.rand(count))
    pruned, thin = (
        rnp.convert(scene_net(width, widths=(16, 16)), scenes.batch(slice(0, 1))[0], groups=groups)
        for width, groups in ((1.0, 4), (0.5, 1))
    )
    for module in thin.modules():
        if isinstance(module, rnp.PrefixBatchNorm2d):  # so that nothing passes that leaves it out
            torch.nn.init.uniform_(module.running_var, 0.5, 2.0)
    pruned.policy = rnp.Agent(pruned.feature_sizes, 4)
    return comparison.Comparison(pruned, thin, scenes, scenes, timing_batches=2, rounds=3)


@pytest.mark.parametrize("ours, speedup, counts", [(2e-3, 3.0, "rnp"), (4e-3, 2.0, "stock")])
def test_the_thin_network_counts_on_its_faster_path(
    compared: comparison.Comparison, ours: float, speedup: float, counts: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The dense network takes 6 ms a batch, the thin one 3 in stock torch."""

    def in_turn(sides: dict, batches: list, rounds: int) -> dict:
        assert sides["rnp"] is compared.thin and isinstance(compared.thin.policy, rnp.policies.FullWidth)
        seconds = dict.fromkeys(sides, 3e-3) | {"dense": 6e-3, "rnp": ours}
        return {name: [[value] * rounds for _ in batches] for name, value in seconds.items()}

    monkeypatch.setattr(comparison, "in_turn", in_turn)
    row = compared.thin_row(3.0).to_dict()
    (stock_path,) = row["thin_ms"].keys() - {"rnp"}
    assert row["thin_path"] == (stock_path if counts == "stock" else "rnp")
    assert row["thin_ms"] == pytest.approx({stock_path: 3.0, "rnp": 1e3 * ours})
    assert (row["measured_speedup"], row["dense_ms"]) == pytest.approx((speedup, 6.0))
    assert row["pruned_ms"] == pytest.approx(6.0 / speedup)
    plain = stock.dense_model(compared.thin)
    with torch.no_grad():
        right = torch.cat([plain(images).argmax(1) == labels for images, labels in compared.loader])
    assert row["accuracy"] == pytest.approx(right.double().mean().item())


def test_paths_of_the_thin_network_that_disagree_are_not_timed(
    compared: comparison.Comparison, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = stock.dense_model
    monkeypatch.setattr(stock, "dense_model", lambda network: changed(whole(network)))
    monkeypatch.setattr(comparison, "in_turn", lambda *arguments: pytest.fail("it was timed"))

    def changed(model: torch.nn.Module) -> torch.nn.Module:
        with torch.no_grad():
            model[1].weight *= 2
        return model

    with pytest.raises(RuntimeError, match=r"two paths of one network differ by .*, allowed are"):
        compared.thin_row(3.0)
