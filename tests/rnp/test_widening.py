"""Growth: full width computes what the narrower width did, residual networks included, and all of it can learn."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rnp
from rnp.phases import widen

K = 4


def images(n: int = 6) -> Tensor:
    return torch.randn(n, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def labels(n: int = 6) -> Tensor:
    return torch.zeros(n, dtype=torch.int64)


def without_dropout(network: rnp.PrunedNetwork) -> rnp.PrunedNetwork:
    for module in network.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return network


NAMES = ["vgg", "vgg-fewer-channels-than-groups", "resnet-basic", "resnet-bottleneck", "pre-activation", "late-norm"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("action", [1, 2, 3])
def test_what_is_computed_stays_the_same(nets, name, training, action):
    network = nets.randomised(rnp.convert(nets.make(name), images(1), K), seed=3).train(training)
    without_dropout(network)
    depth = len(network.layers)
    with torch.no_grad():
        before = network.forward_path(images(), [action] * depth)
        assert not torch.allclose(network.forward_path(images(), [K] * depth), before, rtol=1e-2, atol=1e-2)
    widen(network, action, images(), labels())
    with torch.no_grad():
        torch.testing.assert_close(network.forward_path(images(), [K] * depth), before, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(network.forward_path(images(), [action] * depth), before, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_every_new_channel_can_learn(nets, name):
    """After some steps at full width every row of every weight has moved."""
    network = without_dropout(rnp.convert(nets.make(name), images(1), K)).train()
    widen(network, 2, images(), labels())
    before = {name: p.detach().clone() for name, p in network.backbone.named_parameters() if p.dim() > 2}
    optimizer = torch.optim.SGD(network.parameters(), 0.05)
    target = torch.randint(5, (16,), generator=torch.Generator().manual_seed(4))
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(network.forward_path(images(16), [K] * len(network.layers)), target).backward()
        optimizer.step()
    for key, weight in before.items():
        moved = (network.backbone.get_parameter(key) != weight).flatten(1).any(1)
        assert moved.float().mean() > 0.8, key  # a ReLU may be dead from the start


class Sums(nn.Module):
    """Sums of maps of several widths: without BatchNorm, with one that has no affine parameters, through pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b = (nn.Conv2d(i, 8, 3, 1, 1) for i in (3, 8, 8))
        self.plain, self.depthwise = nn.BatchNorm2d(8, affine=False), nn.Conv2d(8, 8, 3, 1, 1, groups=8)
        self.grouped, self.c, self.fc = nn.Conv2d(8, 8, 3, 1, 1, groups=2), nn.Conv2d(8, 8, 1), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = x + F.max_pool2d(F.relu(self.a(x)), 3, 1, 1)
        x = x + self.plain(self.b(x))
        x = F.relu(self.c(x) + x)
        y = self.a(F.leaky_relu(x, 0.1))
        x = x + self.depthwise(y)
        return self.fc(F.relu(self.c(F.relu(self.grouped(y))) + x).mean((2, 3)))


@pytest.mark.parametrize("training", [False, True])
def test_sums_without_batchnorm(nets, training):
    torch.manual_seed(0)
    network = rnp.convert(Sums().eval(), images(1), K).train(training)
    depth = len(network.layers)
    with torch.no_grad():
        before = network.forward_path(images(), [2] * depth)
    widen(network, 2, images(), labels())
    with torch.no_grad():
        torch.testing.assert_close(network.forward_path(images(), [K] * depth), before, rtol=1e-4, atol=1e-5)
