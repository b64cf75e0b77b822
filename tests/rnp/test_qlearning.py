"""The equations of RNP.md against numbers worked out by hand, and the replay buffer."""

from __future__ import annotations

import math

import pytest
import torch

from rnp import qlearning


class TableAgent(torch.nn.Module):
    """Q-values that are parameters: the same table (L, k) for every episode."""

    def __init__(self, table: list[list[float]]) -> None:
        super().__init__()
        self.table = torch.nn.Parameter(torch.tensor(table))

    def q_values(self, features: list[torch.Tensor], actions: torch.Tensor) -> torch.Tensor:
        return self.table.expand(actions.shape[0], -1, -1)


@pytest.mark.parametrize(
    ("progress", "value"), [(0.0, 1.0), (0.3, 0.55), (0.6, 0.1), (1.0, 0.1), (-1.0, 1.0), (0.15, 0.775)]
)
def test_epsilon_falls_linearly_then_stays(progress: float, value: float) -> None:
    assert qlearning.epsilon(progress) == pytest.approx(value)


def test_epsilon_with_no_fall() -> None:
    assert qlearning.epsilon(0.0, fraction=0.0) == 0.1


def test_rewards_by_hand() -> None:
    actions = torch.tensor([[1, 4, 2], [3, 1, 1]], dtype=torch.int32)
    losses = torch.tensor([0.5, 2.0])
    reward = qlearning.rewards(actions, losses, penalty=-0.1, alpha=2.0)
    # p·(a − 1) everywhere, and −2·L at the end: −0.1 − 1.0 and 0 − 4.0
    expected = torch.tensor([[0.0, -0.3, -1.1], [-0.2, 0.0, -4.0]])
    torch.testing.assert_close(reward, expected)
    assert (reward <= 0).all()


def test_td_targets_by_hand() -> None:
    reward = torch.tensor([[0.0, -0.3, -1.1]])
    q_values = torch.tensor([[[9.0, 9.0], [-1.0, -2.0], [-0.4, -0.2]]])
    # 0 + 0.5·max(−1, −2), −0.3 + 0.5·max(−0.4, −0.2), and the end as it is; Q(s_1, ·) is never used
    torch.testing.assert_close(qlearning.td_targets(reward, q_values, gamma=0.5), torch.tensor([[-0.5, -0.4, -1.1]]))


def test_td_targets_leave_the_rewards_alone() -> None:
    reward = torch.zeros(1, 2)
    qlearning.td_targets(reward, torch.ones(1, 2, 2))
    assert (reward == 0).all()


def test_episode_losses_by_hand() -> None:
    logits = torch.tensor([[math.log(3.0), 0.0], [0.0, 0.0]])  # 3/4 and 1/4; 1/2 and 1/2
    teacher = torch.tensor([[0.0, 0.0], [0.0, 0.0]])
    labels = torch.tensor([1, 0])
    cross_entropy = torch.tensor([math.log(4.0), math.log(2.0)])
    divergence = torch.tensor([0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25), 0.0])
    torch.testing.assert_close(qlearning.episode_losses(logits, labels), cross_entropy)
    torch.testing.assert_close(qlearning.episode_losses(logits, labels, teacher, 1.0), divergence)
    mixed = 0.75 * cross_entropy + 0.25 * divergence
    torch.testing.assert_close(qlearning.episode_losses(logits, labels, teacher, 0.25), mixed)


def test_the_divergence_is_the_mean_loss_over_the_teachers_labels_but_for_a_constant() -> None:
    teacher = torch.randn(1, 5, generator=torch.Generator().manual_seed(0))
    paths = torch.randn(3, 5, generator=torch.Generator().manual_seed(1))
    share = teacher.softmax(1)[0]
    means, divergences = [], []
    for logits in paths:
        rows, labels = logits.expand(5, 5), torch.arange(5)
        means.append((share * qlearning.episode_losses(rows, labels)).sum())
        divergences.append(qlearning.episode_losses(logits[None], labels[:1], teacher, 1.0)[0])
    constant = torch.stack(means) - torch.stack(divergences)
    torch.testing.assert_close(constant, constant[0].expand(3))


def test_episode_losses_want_the_teacher() -> None:
    with pytest.raises(ValueError, match=r"share of 0\.5 needs the teacher"):
        qlearning.episode_losses(torch.zeros(1, 2), torch.zeros(1, dtype=torch.int64), share=0.5)


def test_reward_scale_makes_the_mean_loss_one() -> None:
    losses = torch.tensor([0.25, 0.75])
    assert qlearning.reward_scale(losses) == 2.0


@pytest.mark.parametrize("losses", [[0.0, 0.0], [float("nan"), 1.0], [float("inf"), 1.0]])
def test_reward_scale_refuses(losses: list[float]) -> None:
    with pytest.raises(ValueError, match="positive and finite"):
        qlearning.reward_scale(torch.tensor(losses))


def test_greedy_with_the_run_time_shift() -> None:
    q_values = torch.tensor([[-1.0, -0.9, -0.95, -0.8]])
    assert qlearning.greedy(q_values).tolist() == [4]
    # −1, −1.01, −1.17, −1.13 after a shift of −0.11; −1, −0.96, −1.07, −0.98 after one of −0.06
    assert qlearning.greedy(q_values, -0.11).tolist() == [1]
    assert qlearning.greedy(q_values, -0.06).tolist() == [2]


def test_q_loss_by_hand() -> None:
    agent = TableAgent([[-1.0, -2.0], [-0.5, -3.0]])
    episodes = qlearning.Episodes([], torch.tensor([[2, 1]], dtype=torch.int32), torch.tensor([1.0]))
    # rewards: −0.1 and −1; targets: −0.1 − 0.5 = −0.6 and −1; taken: −2 and −0.5; errors: −1.4 and 0.5
    loss = qlearning.q_loss(agent, episodes, alpha=1.0, penalty=-0.1)
    assert loss.item() == pytest.approx((1.4**2 + 0.5**2) / 2)
    loss.backward()
    # only the actions taken get a gradient, none flows through the target: 2·error / 2
    torch.testing.assert_close(agent.table.grad, torch.tensor([[0.0, -1.4], [0.5, 0.0]]))


def test_update_agent_converges_to_the_values() -> None:
    torch.manual_seed(0)
    agent = TableAgent([[0.0, 0.0], [0.0, 0.0]])
    optimizer = torch.optim.Adam(agent.parameters(), lr=0.05)
    # the loss depends on the last action alone: 2.0 when narrow, 0.2 when wide
    actions = torch.tensor([[1, 1], [1, 2], [2, 1], [2, 2]], dtype=torch.int32)
    losses = torch.tensor([2.0, 0.2, 2.0, 0.2])
    for _ in range(400):
        qlearning.update_agent(agent, optimizer, qlearning.Episodes([], actions, losses), 1.0, -0.1)
    # Q_2 = (−2, −0.1 − 0.2), Q_1 = (max Q_2, −0.1 + max Q_2)
    torch.testing.assert_close(agent.table.data, torch.tensor([[-0.3, -0.4], [-2.0, -0.3]]), atol=1e-2, rtol=0)


def fill(buffer: qlearning.ReplayBuffer, values: list[int]) -> None:
    value = torch.tensor(values, dtype=torch.float32)
    buffer.add([value[:, None].expand(-1, 2), value[:, None]], value[:, None].expand(-1, 2).int(), value)


def test_replay_buffer_keeps_the_last_episodes() -> None:
    buffer = qlearning.ReplayBuffer([2, 1], capacity=5)
    fill(buffer, [1, 2, 3])
    assert len(buffer) == 3
    fill(buffer, [4, 5, 6, 7])
    assert len(buffer) == 5
    assert sorted(buffer.losses.tolist()) == [3, 4, 5, 6, 7]
    fill(buffer, list(range(10, 22)))
    assert sorted(buffer.losses.tolist()) == [17, 18, 19, 20, 21]


def test_replay_buffer_samples_whole_episodes() -> None:
    buffer = qlearning.ReplayBuffer([2, 1], capacity=5)
    with pytest.raises(ValueError, match="empty"):
        buffer.sample(1)
    fill(buffer, [1, 2, 3])
    episodes = buffer.sample(200, torch.Generator().manual_seed(0))
    assert set(episodes.losses.tolist()) == {1, 2, 3}
    for feature in episodes.features:
        assert (feature == episodes.losses[:, None]).all()
    assert (episodes.actions == episodes.losses[:, None]).all()


def test_replay_buffer_state_continues_the_ring() -> None:
    first, second = qlearning.ReplayBuffer([2, 1], 5), qlearning.ReplayBuffer([2, 1], 5)
    fill(first, [1, 2, 3, 4, 5, 6, 7])
    second.load_state_dict(first.state_dict())
    fill(first, [8, 9, 10, 11])
    fill(second, [8, 9, 10, 11])
    assert first.losses.equal(second.losses)
    assert first.features[0].equal(second.features[0])
    assert first.actions.equal(second.actions)


def test_steer_penalty_by_hand() -> None:
    # twice too fast: p · 0.5^0.5; twice too slow: p · 2^0.5; on target: as it is
    assert qlearning.steer_penalty(-0.1, 6.0, 3.0, rate=0.5) == pytest.approx(-0.1 * 0.5**0.5)
    assert qlearning.steer_penalty(-0.1, 1.5, 3.0, rate=0.5) == pytest.approx(-0.1 * 2**0.5)
    assert qlearning.steer_penalty(-0.1, 3.0, 3.0) == pytest.approx(-0.1)
    assert qlearning.steer_penalty(-0.9, 0.1, 3.0) == -1.0
    assert qlearning.steer_penalty(-2e-4, 1e6, 1.0) == -1e-4
