"""MACs, and the cap that no image exceeds."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import rnp
from rnp.macs import Cap, ConvCost, MacCounter

K = 4


def images(n: int) -> torch.Tensor:
    return torch.randn(n, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def test_dense_macs_are_those_of_full_width(nets, name):
    network = rnp.convert(nets.make(name), images(1), K)
    full = torch.full((1, len(network.layers)), K)
    assert network.dense_macs == int(network.macs(full)[0]) == int(nets.oracle(name, network, images(1), full).macs[0])


def test_groups_of_a_convolution_fill_in_order():
    cost = ConvCost("conv", None, None, in_channels=6, out_channels=4, conv_groups=2, per_pair=10)
    assert cost.macs(6, 4) == 10 * (3 * 2 + 3 * 2)
    assert cost.macs(4, 4) == 10 * (3 * 2 + 1 * 2)
    assert cost.macs(4, 1) == 10 * (3 * 1)
    assert cost.macs(3, 2) == 10 * (3 * 2)


def test_macs_checks_the_shape(nets):
    network = rnp.convert(nets.make("vgg"), images(1), K)
    with pytest.raises(ValueError, match=r"actions must be \(N, 3\)"):
        network.macs(torch.ones(2, 4))


def test_the_cheapest_completion_is_exact(nets, name):
    """What the cap assumes for the remaining decisions is the least over all of them, tried one by one."""
    network = rnp.convert(nets.make(name), images(1), 3)
    depth = len(network.layers)
    every = torch.tensor(list(itertools.product(range(1, 4), repeat=depth)))
    macs = network.macs(every)
    cap = network._cap
    assert cap.cheapest == int(macs.min())
    for decision in range(depth):
        histories = torch.tensor(list(itertools.product(range(1, 4), repeat=decision))).view(3**decision, decision)
        taken = [column.to(torch.int32) for column in histories.t()]
        spent = torch.full((len(histories),), cap.cheapest, dtype=torch.int64)
        for earlier in range(decision):
            cap.lower(earlier, taken[earlier], taken[:earlier], spent, 2**60)
        for action in range(1, 4):
            least = [
                int(macs[(every[:, :decision] == h).all(1) & (every[:, decision] == action)].min()) for h in histories
            ]
            after = spent.clone()
            asked = torch.full((len(histories),), action, dtype=torch.int32)
            torch.testing.assert_close(cap.lower(decision, asked, taken, after, 2**60), asked)
            assert after.tolist() == least


@pytest.mark.parametrize("share", [0.2, 0.35, 0.5, 0.8, 1.0])
@pytest.mark.parametrize("training", [False, True])
def test_no_image_exceeds_the_cap(nets, name, share, training):
    x = images(32)
    network = rnp.convert(nets.make(name), x[:1], K)
    if network.counter.cheapest > share * network.dense_macs:
        with pytest.raises(ValueError, match="below the least possible"):
            network.set_budget(max_macs=share)
        assert network.max_macs is None
        return
    network.train(training)
    network.set_budget(max_macs=share)
    for policy in (rnp.policies.FullWidth(), rnp.policies.Random(torch.Generator().manual_seed(3))):
        network.policy = policy
        asked = policy.start(network, 32, x.device)
        with torch.no_grad():
            logits, trace = network(x, return_trace=True)
        assert bool((trace.macs <= share * network.dense_macs).all())
        torch.testing.assert_close(trace.macs, network.macs(trace.actions))
        if share == 1.0 and isinstance(policy, rnp.policies.FullWidth):
            assert bool((trace.actions == asked[:, None]).all())  # a cap that binds nobody changes nothing
        network.policy = rnp.policies.Fixed(trace.actions)  # the actions of the trace are those that ran
        if not training:
            with torch.no_grad():
                torch.testing.assert_close(network(x), logits, rtol=0, atol=0)


def test_an_action_is_lowered_no_further_than_needed(nets, name):
    x = images(24)
    network = rnp.convert(nets.make(name), x[:1], K)
    share = 0.5 * (1 + network.counter.cheapest / network.dense_macs)
    allowance = int(share * network.dense_macs)
    asked = torch.randint(1, K + 1, (24, len(network.layers)), generator=torch.Generator().manual_seed(5))
    network.policy = rnp.policies.Fixed(asked)
    network.set_budget(max_macs=share)
    with torch.no_grad():
        taken = network(x, return_trace=True)[1].actions.long()
    for n, (want, got) in enumerate(zip(asked.tolist(), taken.tolist(), strict=True)):
        for decision, (a, b) in enumerate(zip(want, got, strict=True)):
            assert b <= a
            if b < a:
                more = torch.tensor([[*got[:decision], b + 1] + [1] * (len(got) - decision - 1)])
                assert int(network.macs(more)[0]) > allowance, (n, decision)


def test_the_agents_own_macs_count(nets):
    x = images(8)
    network = rnp.convert(nets.make("resnet-basic"), x[:1], K)
    agent = rnp.Agent(network.feature_sizes, K, hidden=4, code=4).eval()
    torch.nn.init.constant_(agent.decoders[0].bias, 0.0)
    agent.decoders[0].bias.data[-1] = 1.0  # always asks for full width
    network.policy = agent
    own = agent.macs_per_image
    with pytest.raises(ValueError, match="below the least possible"):
        network.set_budget(max_macs=(network.counter.cheapest + own - 1) / network.dense_macs)
    network.set_budget(max_macs=0.6)
    with torch.no_grad():
        trace = network(x, return_trace=True)[1]
    assert bool((trace.macs <= 0.6 * network.dense_macs).all())
    torch.testing.assert_close(trace.macs, network.macs(trace.actions) + own)


def test_budget_errors(nets):
    network = rnp.convert(nets.make("vgg"), images(1), K)
    for share in (0.0, -1.0, 1.5):
        with pytest.raises(ValueError, match=r"max_macs must lie in \(0, 1\]"):
            network.set_budget(max_macs=share)
    network.set_budget(penalty_shift=-0.1)
    assert network.penalty_shift == -0.1 and network.max_macs is None


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_the_cap_holds_for_any_dependence_of_costs_on_actions(data):
    """Costs whose groups are maxima of any earlier decisions, not only those of the networks above."""
    k, depth = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 4))
    group = st.one_of(st.none(), st.frozensets(st.integers(0, depth - 1), min_size=1))
    sizes = st.integers(1, 9)
    costs = [
        ConvCost("", data.draw(group), data.draw(group), data.draw(sizes), data.draw(sizes), 1, data.draw(sizes))
        for _ in range(data.draw(st.integers(1, 5)))
    ]
    counter = MacCounter(costs, data.draw(st.integers(0, 50)), k, depth)
    every = torch.tensor(list(itertools.product(range(1, k + 1), repeat=depth)), dtype=torch.int32)
    macs = counter.count(every)
    assert counter.cheapest == int(macs.min()) and counter.dense == int(macs.max())
    allowance = data.draw(st.integers(counter.cheapest, counter.dense))
    cap, taken = Cap(counter), []
    spent = torch.full((len(every),), cap.cheapest, dtype=torch.int64)
    for decision in range(depth):
        taken.append(cap.lower(decision, every[:, decision], taken, spent, allowance))
    actions = torch.stack(taken, 1)
    assert bool((counter.count(actions) <= allowance).all())
    torch.testing.assert_close(counter.count(actions), spent)
    fits = macs <= allowance
    assert bool((actions[fits] == every[fits]).all())
