"""Statistics and rivals of the demo's comparison, against plain definitions."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rnp import comparison


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
