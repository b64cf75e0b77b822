"""A problem whose best policy is known: the agent has to find it, through the whole of rnp.train.

Of an image's four channels exactly one is bright. Channel 0 says "class 0, easy", 1 "class 1, easy", 2 "class 0, hard",
3 "class 1, hard". The network computes the evidence for class 0 in its first channel if the image is easy and in its
last if it is hard, and without evidence it says class 1: so only a hard image of class 0 needs full width. The features
of the first, dense layer show which image is which.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

import rnp
from rnp import qlearning

GROUPS, DECISIONS = 4, 2
NEEDS_WIDTH = 2  # the bright channel of a hard image of class 0


def scenes(count: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Images (count, 4, 4, 4), labels, and the bright channel of each."""
    generator = torch.Generator().manual_seed(seed)
    bright = torch.randint(4, (count,), generator=generator)
    images = 0.05 * torch.rand(count, 4, 4, 4, generator=generator)
    images[torch.arange(count), bright] += 1.0
    return images, bright % 2, bright


def network() -> rnp.PrunedNetwork:
    """Three 1×1 convolutions whose weights are set by hand; the two behind the first are prunable."""
    stem, second, third = (nn.Conv2d(4, 4, 1) for _ in range(3))
    head = nn.Linear(4, 2)
    with torch.no_grad():
        for layer in (stem, second, third, head):
            layer.weight.zero_()
            layer.bias.zero_()
        stem.weight[:, :, 0, 0] = third.weight[:, :, 0, 0] = torch.eye(4)
        second.weight[0, 0] = 1.0  # easy, class 0: the first channel
        second.weight[3, 2] = 1.0  # hard, class 0: the last one
        head.weight[0] = torch.tensor([8.0, 0.0, 0.0, 8.0])
        head.bias[1] = 4.0
    relu = nn.ReLU()
    model = nn.Sequential(stem, relu, second, nn.ReLU(), third, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), head)
    return rnp.convert(model.eval(), torch.zeros(1, 4, 4, 4), groups=GROUPS)


def returns(pruned: rnp.PrunedNetwork, images: Tensor, labels: Tensor, alpha: float, penalty: float) -> Tensor:
    """The sum of rewards of each image under the network's policy, (N,)."""
    with torch.no_grad():
        logits, trace = pruned(images, return_trace=True)
    losses = nn.functional.cross_entropy(logits, labels, reduction="none")
    return qlearning.rewards(trace.actions, losses, penalty, alpha).sum(1)


@pytest.fixture(scope="module")
def trained() -> rnp.PrunedNetwork:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    images, labels, _ = scenes(512, 1)
    loader = list(zip(images.split(64), labels.split(64), strict=True))
    nothing = rnp.Length(steps=0)
    config = rnp.TrainConfig(
        pretrain=nothing, sandwich=nothing, agent=rnp.Length(steps=250), rounds=0, progress=False, statistics_batches=8
    )
    pruned = network()
    rnp.train(pruned, loader, None, config)
    torch.set_num_threads(threads)
    return pruned


def test_only_hard_images_of_class_0_need_width() -> None:
    """The premise: which actions each kind of image needs, by trying them all."""
    pruned = network()
    images, labels, bright = scenes(64, 2)
    for actions in itertools.product(range(1, GROUPS + 1), repeat=DECISIONS):
        right = pruned.forward_path(images, actions).argmax(1) == labels
        assert right[bright != NEEDS_WIDTH].all()
        assert bool(right[bright == NEEDS_WIDTH].all()) == (actions == (4, 4))


def test_the_agent_spends_on_the_images_that_need_it(trained: rnp.PrunedNetwork) -> None:
    images, labels, bright = scenes(256, 3)
    with torch.no_grad():
        logits, trace = trained(images, return_trace=True)
    hard = bright == NEEDS_WIDTH
    assert (trace.actions[hard] == GROUPS).all()
    assert (trace.actions[~hard] == 1).all()
    assert (logits.argmax(1) == labels).all()
    assert trace.macs[hard].min() > trace.macs[~hard].max()


def test_the_agent_reaches_the_best_return_and_random_does_not(trained: rnp.PrunedNetwork) -> None:
    images, labels, _ = scenes(256, 3)
    alpha, penalty = 1.0, -0.05
    best = torch.full((len(images),), -float("inf"))
    agent = trained.policy
    try:
        for actions in itertools.product(range(1, GROUPS + 1), repeat=DECISIONS):
            trained.policy = rnp.policies.Fixed(list(actions))
            best = torch.maximum(best, returns(trained, images, labels, alpha, penalty))
        trained.policy = rnp.policies.Random(torch.Generator().manual_seed(0))
        at_random = returns(trained, images, labels, alpha, penalty)
    finally:
        trained.policy = agent
    learnt = returns(trained, images, labels, alpha, penalty)
    torch.testing.assert_close(learnt, best)
    assert at_random.mean() < learnt.mean() - 0.2


def test_the_run_time_shift_moves_the_whole_range(trained: rnp.PrunedNetwork) -> None:
    images, _, _ = scenes(256, 3)
    spent = []
    try:
        for shift in (-100.0, -0.1, 0.0, 100.0):
            trained.set_budget(shift)
            with torch.no_grad():
                spent.append(trained(images, return_trace=True)[1].actions.float().mean().item())
    finally:
        trained.set_budget()
    assert spent[0] == 1.0
    assert spent[-1] == GROUPS
    assert spent == sorted(spent)
