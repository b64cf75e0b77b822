"""Policies: what each answers, and what the network asks of one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import rnp
from rnp.decider import Decider

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
    for wrong, what in (
        ([1, 2, 3], r"must be \(4,\)"),
        ([1, 2, 3, 5], "1…4"),
        ([[1, 2, 3, 4]] * 4, r"\(5, 4\)"),
        ([1, 2, 3, 2**32 + 4], "1…4, got 1…4294967300"),  # 4, were it cut to 32 bits first
    ):
        with pytest.raises(ValueError, match=what):
            actions_under(network, rnp.policies.Fixed(wrong))
    for wrong in ([1.5, 2.9, 3.0, 4.0], [True] * 4):
        with pytest.raises(TypeError, match=r"Fixed: actions must be integers, got torch\.(float32|bool)"):
            rnp.policies.Fixed(wrong)


def test_a_policy_is_checked_when_assigned(network):
    with pytest.raises(TypeError, match="has no `start`"):
        network.policy = object()
    assert isinstance(network.policy, rnp.policies.FullWidth)


class Answers:
    """A policy of one's own that answers what it was given, the same for every decision."""

    needs_features = False

    def __init__(self, answer) -> None:
        self.answer = answer

    def start(self, network, batch_size, device):
        return None

    def act(self, layer, features, state):
        return self.answer, state


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_a_policy_may_reuse_its_tensor(network, training, dtype):
    class Reuses:
        needs_features = False
        answer = torch.zeros(5, dtype=dtype)

        def start(self, *_):
            return None

        def act(self, decision, features, state):
            return self.answer.fill_(1 + decision % 3), state

    network.train(training)
    network.policy = Reuses()
    _, trace = network(images(5), return_trace=True)
    assert trace.actions[0].tolist() == [1 + decision % 3 for decision in range(len(network.layers))]


@pytest.mark.parametrize("cap", [None, 0.9], ids=["no cap", "cap"])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int16, torch.uint8], ids=str)
def test_any_integers_are_actions(network, dtype, training, cap):
    network.set_budget(max_macs=cap)
    network.train(training)
    actions = actions_under(network, Answers(torch.tensor([1, 2, 2, 1, 2], dtype=dtype)))
    assert actions.tolist() == [[a] * 4 for a in (1, 2, 2, 1, 2)]


WRONG = {
    "zero": (torch.tensor([1, 1, 0, 4, 4]), ValueError, "must lie in 1…4, got 0…4"),
    "more than k": (torch.tensor([1, 1, 5, 4, 4], dtype=torch.int32), ValueError, "must lie in 1…4, got 1…5"),
    "beyond 32 bits": (torch.tensor([1, 1, 2**32 + 1, 4, 4]), ValueError, "must lie in 1…4, got 1…4294967297"),
    "fractions": (torch.full((5,), 1.5), TypeError, "must be integers, got torch.float32"),
    "bools": (torch.ones(5, dtype=torch.bool), TypeError, "must be integers, got torch.bool"),
    "another batch": (torch.ones(4, dtype=torch.int32), ValueError, r"must have shape \(5,\) on cpu, got \(4,\)"),
    "a column": (torch.ones(5, 1, dtype=torch.int32), ValueError, r"must have shape \(5,\) on cpu, got \(5, 1\)"),
    "no tensor": ([1, 2, 3, 4, 4], TypeError, "must be a tensor, got list"),
}


@pytest.mark.parametrize("traced", [False, True], ids=["no trace", "trace"])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("wrong", WRONG)
def test_what_is_no_action_is_named(network, wrong, training, traced):
    answer, error, rule = WRONG[wrong]
    network.policy = Answers(answer)
    network.train(training)
    layer = network.layers[0].replace(".", r"\.")
    with pytest.raises(error, match=rf"actions of Answers for decision 0 \({layer}\) {rule}"), torch.no_grad():
        network(images(), return_trace=traced)


def test_values_on_another_device_are_not_waited_for(network):
    """They are clamped there; here, on a device whose values cannot be read at all, only that can be seen."""
    network.policy = Answers(torch.empty(5, dtype=torch.int64, device="meta"))
    action = Decider(network, torch.empty(5, 3, 16, 16, device="meta"), False)(0, None)
    assert (action.dtype, action.shape, action.device.type) == (torch.int32, (5,), "meta")
    with pytest.raises(ValueError, match=r"must have shape \(5,\) on cpu, got \(5,\) on meta"):
        network(images())


def test_macs_and_forward_path_take_actions_alone(network):
    for wrong, error, rule in ((0, ValueError, "1…4, got 0…0"), (5, ValueError, "1…4, got 5…5"), (1.0, TypeError, "")):
        with pytest.raises(error, match=f"macs: actions must .*{rule}"):
            network.macs(torch.full((2, 4), wrong))
    with pytest.raises(TypeError, match=r"forward_path: path must be integers, got \[1\.5, 2, 2, 2\]"):
        network.forward_path(images(), [1.5, 2, 2, 2])


def test_a_class_is_no_policy(network):
    with pytest.raises(TypeError, match=r"must be an instance, Uniform\(…\), got the class Uniform itself"):
        network.policy = rnp.policies.Uniform


@pytest.mark.parametrize(
    "sizes, groups",
    [((7, 7, 7), 4), ((7, 7, 7, 10, 10), 4), ((7, 7, 10, 7), 4), ((7, 7, 7, 10), 2), ((7, 7, 7, 10), 8)],
    ids=["fewer decisions", "more decisions", "other sizes", "fewer groups", "more groups"],
)
def test_an_agent_of_another_network_is_refused(network, sizes, groups):
    assert network.feature_sizes == [7, 7, 7, 10]
    what = "groups" if groups != K else "feature_sizes"
    own, wanted = (groups, K) if groups != K else (list(sizes), network.feature_sizes)
    with pytest.raises(ValueError) as raised:
        network.policy = rnp.Agent(sizes, groups)
    assert str(raised.value).endswith(f"the agent's {what} must be the network's, {wanted}, got {own}")
    assert isinstance(network.policy, rnp.policies.FullWidth)


@pytest.mark.parametrize("shift", [float("nan"), float("inf"), -float("inf")])
def test_a_penalty_shift_is_finite(network, shift):
    network.set_budget(-0.5, 0.75)
    with pytest.raises(ValueError, match=f"penalty_shift must be finite, got {shift}"):
        network.set_budget(shift)
    assert (network.penalty_shift, network.max_macs) == (-0.5, 0.75)


def test_an_agent_is_a_submodule_and_leaves_with_its_role(network):
    agent = rnp.Agent(network.feature_sizes, K)
    network.policy = agent
    assert network.policy is agent and any(key.startswith("agent.") for key in network.state_dict())
    network.double()
    assert agent.encoders[0].weight.dtype is torch.float64
    network.policy = rnp.policies.FullWidth()
    assert not any(key.startswith("agent.") for key in network.state_dict())
