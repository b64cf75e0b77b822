"""The agent: its Q-values, its choice, its options; in plain torch and through the operator."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

import rnp
from rnp.agent import AgentState, greedy_actions, invariant_linear

K = 4
OPTIONS = [
    {},
    {"cell": "lstm"},
    {"cell": "none"},
    {"shared_decoder": False},
    {"previous_action": False},
    {"cell": "lstm", "shared_decoder": False, "previous_action": False},
    {"cell": "none", "shared_decoder": False},
    {"hidden": 20, "code": 7},
]
SIZES = [6, 9, 9, 17]


def make(options: dict, seed: int = 0) -> rnp.Agent:
    torch.manual_seed(seed)
    agent = rnp.Agent(SIZES, K, **options)
    for decoder in agent.decoders:
        nn.init.normal_(decoder.weight, std=3.0)
        nn.init.normal_(decoder.bias, std=0.1)
    agent.set_feature_statistics([torch.randn(s) for s in SIZES], [torch.rand(s) + 0.5 for s in SIZES])
    return agent.eval()


def features(n: int, seed: int = 1) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(n, size, generator=g) for size in SIZES]


class Network:
    """What an agent asks of its network."""

    groups, penalty_shift, decision_channels = K, 0.0, [8, 8, 12, 10]


def roll(agent: rnp.Agent, x: list[Tensor], shift: float = 0.0) -> Tensor:
    network = Network()
    network.penalty_shift = shift
    state, actions = agent.start(network, len(x[0]), x[0].device), []
    for layer, f in enumerate(x):
        action, state = agent.act(layer, f, state)
        actions.append(action)
    return torch.stack(actions, 1)


def by_modules(agent: rnp.Agent, x: list[Tensor], actions: Tensor) -> Tensor:
    """The same Q-values from torch's own cells."""
    hidden = cell = torch.zeros(len(actions), agent.hidden)
    out = []
    for layer, f in enumerate(x):
        f = (f - agent.get_buffer(f"mean_{layer}")) * agent.get_buffer(f"inv_std_{layer}")
        code = torch.relu(agent.encoders[layer](f))
        if agent.previous_action:
            before = torch.zeros(len(actions), K)
            if layer:
                before[torch.arange(len(actions)), actions[:, layer - 1].long() - 1] = 1
            code = torch.cat([code, before], 1)
        if agent.cell == "gru":
            hidden = agent.rnn(code, hidden)
        elif agent.cell == "lstm":
            hidden, cell = agent.rnn(code, (hidden, cell))
        else:
            hidden = code
        out.append(agent.decoders[layer if len(agent.decoders) > 1 else 0](hidden))
    return torch.stack(out, 1)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("training", [False, True])
def test_q_values_are_those_of_torchs_cells(options, training):
    agent, x = make(options).train(training), features(5)
    actions = torch.randint(1, K + 1, (5, 4))
    torch.testing.assert_close(agent.q_values(x, actions), by_modules(agent, x, actions), rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(agent.q_values(x, actions), by_modules(agent, x, actions), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", OPTIONS)
def test_acting_is_the_greedy_choice_of_the_q_values(options):
    agent, x = make(options), features(64)
    for shift in (0.0, -0.2, 0.2):
        actions = roll(agent, x, shift)
        q = by_modules(agent, x, actions) + shift * torch.arange(K)
        taken = q.gather(2, actions.long()[:, :, None] - 1)[:, :, 0]
        assert bool((taken >= q.amax(2) - 1e-3).all())
        assert actions.dtype is torch.int32 and len(actions.unique()) > 1, shift


@pytest.mark.parametrize("options", OPTIONS)
def test_a_sample_decides_alone_as_in_any_batch(options):
    agent, x = make(options), features(70)
    together = roll(agent, x)
    network = Network()
    for i in (0, 1, 37, 69):
        assert roll(agent, [f[i : i + 1] for f in x]).tolist() == together[i : i + 1].tolist()
        for n in (1, 3, 70):  # the Q-values to the bit
            rows = [f[i:][:n] if i + n <= 70 else f[-n:] for f in x]
            at = 0 if i + n <= 70 else i - 70 + n
            state, alone = (agent.start(network, n, x[0].device) for _ in range(2))
            for layer in range(4):
                if state.fused is not None:
                    agent.act(layer, rows[layer], state)
                    agent.act(layer, x[layer][i : i + 1], alone)
                    assert torch.equal(state.hidden[at : at + 1], alone.hidden)
                else:
                    with torch.no_grad():
                        a, b = agent.step(layer, rows[layer], state), agent.step(layer, x[layer][i : i + 1], alone)
                    assert torch.equal(a[at : at + 1], b)


def test_a_network_with_an_agent_decides_alone_as_in_any_batch(nets, name):
    x = torch.randn(9, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    network = rnp.convert(nets.make(name), x[:1], K)
    torch.manual_seed(0)
    agent = rnp.Agent(network.feature_sizes, K).eval()
    nn.init.normal_(agent.decoders[0].weight)
    network.policy = rnp.policies.Random(torch.Generator().manual_seed(2))
    with torch.no_grad():
        seen = network(torch.cat([x, -x]), return_trace="features")[1].features
        agent.set_feature_statistics([f.mean(0) for f in seen], [f.std(0) for f in seen])
        network.policy = agent
        together = network(x, return_trace="features")[1]
        assert len(together.actions.unique()) > 1
        for i in range(9):
            alone = network(x[i : i + 1], return_trace="features")[1]
            assert torch.equal(alone.actions[0], together.actions[i]) and alone.macs[0] == together.macs[i]
            for a, b in zip(alone.features, together.features, strict=True):
                assert torch.equal(a[0], b[i])


def test_teacher_forcing_follows_the_episode_that_was_played():
    agent, x = make({}), features(16)
    agent.epsilon, agent.generator = 0.5, torch.Generator().manual_seed(3)
    state = agent.start(Network(), 16, x[0].device)
    q, actions = [], []
    for layer, f in enumerate(x):
        with torch.no_grad():
            copy_ = AgentState(0.0, state.hidden, state.cell, state.previous)
            q.append(agent.step(layer, f, copy_))
        action, state = agent.act(layer, f, state)
        actions.append(action)
    torch.testing.assert_close(
        agent.q_values(x, torch.stack(actions, 1)), torch.stack(q, 1), rtol=1e-4, atol=1e-5
    )  # explored actions are what the next decision saw


def test_a_capped_action_is_what_the_next_decision_sees(nets):
    x = torch.randn(8, 3, 16, 16)
    network = rnp.convert(nets.make("resnet-basic"), x[:1], K)
    agent = rnp.Agent(network.feature_sizes, K, hidden=8, code=8).eval()
    agent.decoders[0].bias.data[-1] = 1.0
    network.policy = agent
    network.set_budget(max_macs=0.7)
    seen = []
    took = agent.took
    agent.took = lambda layer, actions, state: (took(layer, actions, state), seen.append(state.previous.tolist()))
    with torch.no_grad():
        trace = network(x, return_trace=True)[1]
    assert seen == trace.actions.t().tolist() and trace.actions.min() < K


def test_ties_go_to_the_smaller_action():
    q = torch.tensor([[0.0, 0.0, 0.0, 0.0], [1.0, 2.0, 2.0, 0.0], [0.0, 0.0, 0.0, 3.0]])
    assert greedy_actions(q, 0.0).tolist() == [1, 2, 4]
    assert greedy_actions(q, -1.0).tolist() == [1, 1, 1]  # row 1: 1, 1, 0, −3; row 2: 0, −1, −2, 0
    assert greedy_actions(q, 2.0).tolist() == [4, 3, 4]
    assert greedy_actions(q, 0.5).dtype is torch.int32


def test_an_untrained_agent_asks_for_the_least():
    agent = rnp.Agent(SIZES, K).eval()
    assert roll(agent, features(5)).unique().tolist() == [1]
    assert roll(agent, features(5), shift=0.01).unique().tolist() == [K]


def test_exploration_is_seeded_and_as_frequent_as_asked():
    agent, x = make({}), features(2000)
    greedy = roll(agent, x)[:, 0]
    agent.epsilon = 0.4
    runs = []
    for _ in range(2):
        agent.generator = torch.Generator().manual_seed(5)
        runs.append(roll(agent, x))
    assert torch.equal(*runs)
    changed = float((runs[0][:, 0] != greedy).double().mean())
    assert abs(changed - 0.4 * 3 / 4) < 4 * (0.3 * 0.7 / 2000) ** 0.5  # a random action is the greedy one 1 time in 4


def test_macs_per_image():
    agent = rnp.Agent([10, 20], 4, hidden=8, code=6)
    assert agent.macs_per_image == (10 + 20) * 6 + 2 * (3 * 8 * (6 + 4) + 3 * 8 * 8 + 8 * 4)
    agent = rnp.Agent([10, 20], 4, hidden=8, code=6, cell="lstm", previous_action=False)
    assert agent.macs_per_image == (10 + 20) * 6 + 2 * (4 * 8 * 6 + 4 * 8 * 8 + 8 * 4)
    agent = rnp.Agent([10, 20], 4, hidden=8, code=6, cell="none")
    assert agent.macs_per_image == (10 + 20) * 6 + 2 * 6 * 4


def test_feature_statistics():
    agent = rnp.Agent([3], 2)
    agent.set_feature_statistics([torch.tensor([1.0, 2.0, 3.0])], [torch.tensor([2.0, 0.0, 0.5])])
    assert agent.mean_0.tolist() == [1.0, 2.0, 3.0] and agent.inv_std_0.tolist() == [0.5, 1.0, 2.0]
    assert {"mean_0", "inv_std_0"} <= set(agent.state_dict())
    with pytest.raises(ValueError, match="1 means and stds"):
        agent.set_feature_statistics([], [])


def test_changes_of_the_parameters_are_noticed():
    """Whatever the operator's arguments are kept for, they follow the module."""
    agent, x = make({}), features(32)
    before = roll(agent, x)
    other = make({}, seed=7)
    expected = roll(other, x)
    assert not torch.equal(before, expected)
    agent.load_state_dict(other.state_dict())
    assert torch.equal(roll(agent, x), expected)
    agent = make({})
    roll(agent, x)
    agent.load_state_dict(other.state_dict(), assign=True)
    assert torch.equal(roll(agent, x), expected)
    agent = make({})
    roll(agent, x)
    for mine, theirs in zip(agent.parameters(), other.parameters(), strict=True):
        mine.data = theirs.data.clone()
    for mine, theirs in zip(agent.buffers(), other.buffers(), strict=True):
        mine.copy_(theirs)
    assert torch.equal(roll(agent, x), expected)
    agent = make({})
    roll(agent, x)
    agent.decoders[0] = copy.deepcopy(other.decoders[0])
    state = {k: v for k, v in other.state_dict().items() if not k.startswith("decoders")}
    agent.load_state_dict(state, strict=False)
    assert torch.equal(roll(agent, x), expected)


def test_other_dtypes_and_copies():
    agent, x = make({}), features(32)
    expected = roll(agent, x)
    for other in (copy.deepcopy(agent), pickle.loads(pickle.dumps(agent))):
        assert torch.equal(roll(other, x), expected)
    double = copy.deepcopy(agent).double()
    assert (roll(double, [f.double() for f in x]) == expected).double().mean() > 0.95


def test_invariant_linear():
    torch.manual_seed(0)
    x, layer = torch.randn(7, 33), nn.Linear(33, 5)
    torch.testing.assert_close(invariant_linear(x, layer.weight, layer.bias), layer(x))


def test_errors():
    with pytest.raises(ValueError, match="cell must be one of"):
        rnp.Agent([3], 4, cell="rnn")
    with pytest.raises(ValueError, match="at least one decision"):
        rnp.Agent([], 4)
