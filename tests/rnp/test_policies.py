"""Policies: what each answers, and what the network asks of one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import rnp

K = 4


def images(n: int = 5) -> Tensor:
    return torch.randn(n, 3, 16, 16, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def network(nets):
    return rnp.convert(nets.make("resnet-basic"), images(1), K)


def actions_under(network, policy, n: int = 5) -> Tensor:
    network.policy = policy
    with torch.no_grad():
        trace = network(images(n), return_trace=True)[1]
    assert trace.actions.dtype is torch.int32 and trace.macs.dtype is torch.int64
    assert trace.layers == network.layers and trace.dense_macs == network.dense_macs
    return trace.actions


@pytest.mark.parametrize("width, action", [(1.0, 4), (0.75, 3), (0.5, 2), (0.51, 3), (0.25, 1), (0.01, 1)])
def test_uniform(network, width, action):
    assert actions_under(network, rnp.policies.Uniform(width)).unique().tolist() == [action]


def test_full_width_and_fixed(network):
    assert actions_under(network, rnp.policies.FullWidth()).unique().tolist() == [K]
    one = [1, 4, 2, 3]
    assert actions_under(network, rnp.policies.Fixed(one)).tolist() == [one] * 5
    each = torch.randint(1, 5, (5, 4))
    assert actions_under(network, rnp.policies.Fixed(each)).tolist() == each.tolist()


def test_random_is_seeded_and_covers_every_action(network):
    a, b = (actions_under(network, rnp.policies.Random(torch.Generator().manual_seed(s)), 64) for s in (1, 1))
    assert a.tolist() == b.tolist()
    assert a.unique().tolist() == [1, 2, 3, 4]
    assert (a[0] != a).any()


def test_features_are_not_computed_for_a_policy_that_needs_none(network):
    class Watching(rnp.policies.FullWidth):
        def act(self, layer, features, state):
            assert features is None
            return super().act(layer, features, state)

    actions_under(network, Watching())


def test_a_policy_of_ones_own(network):
    """One small class: as wide as the mean activation is high."""

    class Threshold:
        needs_features = True

        def start(self, network, batch_size, device):
            return []

        def act(self, layer, features, state):
            assert features.shape == (5, network.feature_sizes[layer]) and features.dtype is torch.float32
            state.append(layer)
            return torch.where(features.mean(1) > 0.3, 4, 1).to(torch.int32), state

    assert isinstance(Threshold(), rnp.policies.Policy)
    assert set(actions_under(network, Threshold()).unique().tolist()) <= {1, 4}


@pytest.mark.parametrize("width", [0.0, -1.0, 1.01])
def test_uniform_rejects(width):
    with pytest.raises(ValueError, match=r"width must lie in \(0, 1\]"):
        rnp.policies.Uniform(width)


def test_fixed_rejects(network):
    with pytest.raises(ValueError, match=r"\(L,\) or \(N, L\)"):
        rnp.policies.Fixed(torch.ones(1, 2, 3))
    for wrong, what in (([1, 2, 3], r"must be \(4,\)"), ([1, 2, 3, 5], "1…4"), ([[1, 2, 3, 4]] * 4, r"\(5, 4\)")):
        with pytest.raises(ValueError, match=what):
            actions_under(network, rnp.policies.Fixed(wrong))


def test_a_policy_is_checked_when_assigned(network):
    with pytest.raises(TypeError, match="has no `start`"):
        network.policy = object()
    assert isinstance(network.policy, rnp.policies.FullWidth)


def test_an_agent_is_a_submodule_and_leaves_with_its_role(network):
    agent = rnp.Agent(network.feature_sizes, K)
    network.policy = agent
    assert network.policy is agent and any(key.startswith("agent.") for key in network.state_dict())
    network.double()
    assert agent.encoders[0].weight.dtype is torch.float64
    network.policy = rnp.policies.FullWidth()
    assert not any(key.startswith("agent.") for key in network.state_dict())
