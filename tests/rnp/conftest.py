"""Small networks, and each of them once more as a plain masked computation, written by hand and not by the converter.

An oracle gets the state dict of the converted backbone, images, and actions (N, L) in 1…k. It computes everything
densely in plain torch and multiplies by masks; it returns the logits, the MACs of each image counted on the way, and
the state that each decision should have seen.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Masked:
    """Plain-torch building blocks of the oracles; `macs` adds up per image."""

    def __init__(self, state: dict[str, Tensor], n: int, k: int) -> None:
        self.state, self.k = state, k
        self.macs = torch.zeros(n, dtype=torch.int64)
        self.features: list[Tensor] = []

    def see(self, x: Tensor) -> None:
        self.features.append(x.mean((2, 3)))

    def mask(self, channels: int, action: Tensor | None, n: int) -> Tensor:
        """(N, C) of 0 and 1."""
        live = [channels if action is None else math.ceil(int(action[i]) * channels / self.k) for i in range(n)]
        return torch.tensor([[float(c < r) for c in range(channels)] for r in live], dtype=torch.float64)

    def conv(self, name: str, x: Tensor, stride: int, padding: int, in_: Tensor | None, out: Tensor | None,
             norm: str | None = None, groups: int = 1) -> Tensor:  # fmt: skip
        """Convolution, BatchNorm of the in-prefix's row, mask. `in_`, `out`: groups (N,), None is full width."""
        weight, bias = self.state[name + ".weight"], self.state.get(name + ".bias")
        y = F.conv2d(x, weight, bias, stride, padding, 1, groups)
        if norm is not None:
            y = self.norm(norm, y, in_)
        live_in, live_out = (
            self.mask(channels, action, len(x)) for channels, action in ((x.shape[1], in_), (y.shape[1], out))
        )
        area = weight.shape[2] * weight.shape[3] * y.shape[2] * y.shape[3]
        for g in range(groups):
            a, b = x.shape[1] // groups, y.shape[1] // groups
            pairs = live_in[:, g * a : (g + 1) * a].sum(1) * live_out[:, g * b : (g + 1) * b].sum(1)
            self.macs += (pairs * area).long()
        return y * live_out[:, :, None, None].to(y.dtype)

    def norm(self, name: str, y: Tensor, in_: Tensor | None) -> Tensor:
        mean, var, weight, bias = (
            self.state[f"{name}.{key}"] for key in ("running_mean", "running_var", "weight", "bias")
        )
        samples = []
        for i, one in enumerate(y):
            if mean.dim() == 1:
                row: Any = ...
            else:
                row = min(mean.shape[0] - 1, (self.k if in_ is None else int(in_[i])) - 1)
            samples.append(F.batch_norm(one[None], mean[row], var[row], weight[row], bias[row]))
        return torch.cat(samples)

    def live_norm(self, name: str, y: Tensor, in_: Tensor | None, out: Tensor) -> Tensor:
        """A BatchNorm on its own: the in-prefix's row, then the mask again."""
        return self.norm(name, y, in_) * self.mask(y.shape[1], out, len(y))[:, :, None, None].to(y.dtype)

    def linear(self, name: str, x: Tensor, in_: Tensor | None = None, positions: int = 1) -> Tensor:
        """`in_`: groups (N,) of the channels, each with its `positions`, that x is made of."""
        weight = self.state[name + ".weight"]
        live = self.mask(x.shape[1] // positions, in_, len(x)).sum(1).long()
        self.macs += live * positions * weight.shape[0]
        return F.linear(x, weight, self.state[name + ".bias"])


def larger(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return None if a is None or b is None else torch.maximum(a, b)


class Vgg(nn.Module):
    """Convolutions with and without BatchNorm and bias, pooling, dropout, two linear layers."""

    def __init__(self, widths: tuple[int, ...] = (6, 7, 10, 9), classes: int = 5) -> None:
        super().__init__()
        a, b, c, d = widths
        self.features = nn.Sequential(
            nn.Conv2d(3, a, 3, padding=1, bias=False), nn.BatchNorm2d(a), nn.ReLU(inplace=True),
            nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU(inplace=True),
            nn.MaxPool2d(2),
            nn.Conv2d(b, c, 3, padding=1, bias=False), nn.BatchNorm2d(c), nn.ReLU(inplace=True), nn.Dropout(0.25),
            nn.Conv2d(c, d, 3, padding=1), nn.ReLU(inplace=True),
            nn.MaxPool2d(2),
        )  # fmt: skip
        self.classifier = nn.Sequential(nn.Linear(d * 16, 11), nn.ReLU(inplace=True), nn.Linear(11, classes))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(torch.flatten(self.features(x), 1))

    @staticmethod
    def masked(m: Masked, x: Tensor, actions: Tensor) -> Tensor:
        a, b, c = actions.t()
        x = F.relu(m.conv("features.0", x, 1, 1, None, None, "features.1"))
        m.see(x)
        x = F.relu(m.conv("features.3", x, 1, 1, None, a, "features.4"))
        m.see(x)
        x = F.max_pool2d(x, 2)
        x = F.relu(m.conv("features.7", x, 1, 1, a, b, "features.8"))
        m.see(x)
        x = F.max_pool2d(F.relu(m.conv("features.11", x, 1, 1, b, c)), 2)
        return m.linear("classifier.2", F.relu(m.linear("classifier.0", x.flatten(1), c, 16)))


class Basic(nn.Module):
    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(c_out)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = None
        if stride != 1 or c_in != c_out:
            self.downsample = nn.Sequential(nn.Conv2d(c_in, c_out, 1, stride, bias=False), nn.BatchNorm2d(c_out))

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += identity
        return self.relu(out)

    @staticmethod
    def masked(m: Masked, name: str, x: Tensor, in_: Tensor | None, a: Tensor, stride: int) -> tuple[Tensor, Any]:
        m.see(x)
        identity, out = x, in_
        if name + ".downsample.0.weight" in m.state:
            identity, out = m.conv(f"{name}.downsample.0", x, stride, 0, in_, a, f"{name}.downsample.1"), a
        y = F.relu(m.conv(f"{name}.conv1", x, stride, 1, in_, a, f"{name}.bn1"))
        y = m.conv(f"{name}.conv2", y, 1, 1, a, a, f"{name}.bn2")
        return F.relu(y + identity), larger(out, a)


class Bottleneck(nn.Module):
    def __init__(self, c_in: int, width: int, c_out: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(c_in, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = nn.Conv2d(width, c_out, 1, bias=False), nn.BatchNorm2d(c_out)
        self.downsample = None
        if stride != 1 or c_in != c_out:
            self.downsample = nn.Sequential(nn.Conv2d(c_in, c_out, 1, stride, bias=False), nn.BatchNorm2d(c_out))

    def forward(self, x: Tensor) -> Tensor:
        out = torch.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out)).relu()
        out = self.bn3(self.conv3(out))
        identity = x if self.downsample is None else self.downsample(x)
        return F.relu(identity + out, inplace=True)

    @staticmethod
    def masked(m: Masked, name: str, x: Tensor, in_: Tensor | None, a: Tensor, stride: int) -> tuple[Tensor, Any]:
        m.see(x)
        identity, out = x, in_
        if name + ".downsample.0.weight" in m.state:
            identity, out = m.conv(f"{name}.downsample.0", x, stride, 0, in_, a, f"{name}.downsample.1"), a
        y = F.relu(m.conv(f"{name}.conv1", x, 1, 0, in_, a, f"{name}.bn1"))
        y = F.relu(m.conv(f"{name}.conv2", y, stride, 1, a, a, f"{name}.bn2"))
        y = m.conv(f"{name}.conv3", y, 1, 0, a, a, f"{name}.bn3")
        return F.relu(y + identity), larger(out, a)


class ResNet(nn.Module):
    """A stem with max-pooling, four blocks in two stages, global pooling."""

    def __init__(self, block: str = "basic", widths: tuple[int, int] = (7, 10), classes: int = 5) -> None:
        super().__init__()
        a, b = widths
        self.conv1, self.bn1 = nn.Conv2d(3, a, 3, 1, 1, bias=False), nn.BatchNorm2d(a)
        self.relu, self.maxpool = nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)
        if block == "basic":
            blocks = [Basic(a, a, 1), Basic(a, a, 1), Basic(a, b, 2), Basic(b, b, 1)]
        else:
            blocks = [Bottleneck(a, 5, b, 1), Bottleneck(b, 5, b, 1), Bottleneck(b, 6, 13, 2), Bottleneck(13, 6, 13, 1)]
            b = 13
        self.layer1, self.layer2 = nn.Sequential(*blocks[:2]), nn.Sequential(*blocks[2:])
        self.avgpool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(b, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer2(self.layer1(x))
        return self.fc(torch.flatten(self.avgpool(x), 1))

    @staticmethod
    def masked(m: Masked, x: Tensor, actions: Tensor) -> Tensor:
        block = Bottleneck if "layer1.0.conv3.weight" in m.state else Basic
        x = F.relu(m.conv("conv1", x, 1, 1, None, None, "bn1"))
        first = x.mean((2, 3))
        x = F.max_pool2d(x, 3, 2, 1)
        group: Tensor | None = None
        for i, name in enumerate(("layer1.0", "layer1.1", "layer2.0", "layer2.1")):
            x, group = block.masked(m, name, x, group, actions[:, i], 2 if name == "layer2.0" else 1)
        m.features[0] = first  # the state is taken before pooling
        return m.linear("fc", x.mean((2, 3)), group)


class PreActivation(nn.Module):
    """BatchNorm and ReLU before the convolutions; the residual stream itself is never normalised."""

    def __init__(self, width: int = 9, classes: int = 5) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, 1, 1)
        self.down = nn.Conv2d(6, width, 3, 2, 1)
        self.bn1, self.conv1 = nn.BatchNorm2d(width), nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2, self.conv2 = nn.BatchNorm2d(width), nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn3, self.fc = nn.BatchNorm2d(width), nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.down(self.stem(x))
        x = x + self.conv2(F.relu(self.bn2(self.conv1(F.relu(self.bn1(x))))))
        return self.fc(F.adaptive_avg_pool2d(self.bn3(x).relu(), 1).flatten(1))

    @staticmethod
    def masked(m: Masked, x: Tensor, actions: Tensor) -> Tensor:
        a, b = actions.t()
        x = m.conv("stem", x, 1, 1, None, None)
        m.see(x)
        x = m.conv("down", x, 2, 1, None, a)
        y = F.relu(m.live_norm("bn1", x, None, a))  # `down` reads all channels
        m.see(y)
        y = F.relu(m.conv("conv1", y, 1, 1, a, b, "bn2"))
        x = x + m.conv("conv2", y, 1, 1, b, b)
        both = torch.maximum(a, b)
        return m.linear("fc", F.relu(m.live_norm("bn3", x, both, both)).mean((2, 3)), both)


class LateNorm(nn.Module):
    """BatchNorm behind an activation, behind pooling, and on a value that is read twice."""

    def __init__(self, classes: int = 5) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, 2, 1)
        self.first, self.bn1 = nn.Conv2d(6, 9, 3, 1, 1), nn.BatchNorm2d(9)
        self.second, self.bn2 = nn.Conv2d(9, 8, 3, 1, 1), nn.BatchNorm2d(8)
        self.grouped, self.bn3 = nn.Conv2d(8, 6, 3, 1, 1, groups=2), nn.BatchNorm2d(6)
        self.last, self.fc = nn.Conv2d(6, 7, 1), nn.Linear(7, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn1(F.relu(self.first(self.stem(x))))
        x = self.second(x)
        x = F.relu(self.bn2(x)) + x
        x = self.bn3(F.max_pool2d(F.relu(self.grouped(x)), 2))
        return self.fc(F.relu(self.last(x)).mean((2, 3)))

    @staticmethod
    def masked(m: Masked, x: Tensor, actions: Tensor) -> Tensor:
        a, b, c = actions.t()
        x = m.conv("stem", x, 2, 1, None, None)
        m.see(x)
        x = m.live_norm("bn1", F.relu(m.conv("first", x, 1, 1, None, a)), None, a)
        m.see(x)
        x = m.conv("second", x, 1, 1, a, b)
        x = F.relu(m.live_norm("bn2", x, a, b)) + x
        x = m.norm("bn3", F.max_pool2d(F.relu(m.conv("grouped", x, 1, 1, b, None, groups=2)), 2), b)
        m.see(x)
        return m.linear("fc", F.relu(m.conv("last", x, 1, 0, None, c)).mean((2, 3)), c)


class Inverted(nn.Module):
    """An inverted residual (depthwise), a grouped convolution, a concatenation, a convolution used twice."""

    def __init__(self, classes: int = 5) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, 2, 1)
        self.expand, self.bn1 = nn.Conv2d(6, 10, 1, bias=False), nn.BatchNorm2d(10)
        self.depthwise, self.bn2 = nn.Conv2d(10, 10, 3, 1, 1, groups=10, bias=False), nn.BatchNorm2d(10)
        self.project, self.bn3 = nn.Conv2d(10, 6, 1, bias=False), nn.BatchNorm2d(6)
        self.shared = nn.Conv2d(6, 6, 3, 1, 1)
        self.grouped = nn.Conv2d(6, 4, 3, 1, 1, groups=2)
        self.last = nn.Conv2d(10, 7, 1)
        self.act, self.fc = nn.ReLU6(inplace=True), nn.Linear(7, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.act(self.bn1(self.expand(x)))
        y = self.act(self.bn2(self.depthwise(y)))
        x = x + self.bn3(self.project(y))
        x = self.shared(F.leaky_relu(self.shared(x), 0.1))
        x = torch.cat([x, self.grouped(x)], 1)
        return self.fc(self.last(x).relu().mean((2, 3)))

    @staticmethod
    def masked(m: Masked, x: Tensor, actions: Tensor) -> Tensor:
        a, b, c, d = actions.t()
        x = m.conv("stem", x, 2, 1, None, None)
        m.see(x)
        y = F.relu6(m.conv("expand", x, 1, 0, None, a, "bn1"))
        y = F.relu6(m.conv("depthwise", y, 1, 1, a, a, "bn2", groups=10))
        x = x + m.conv("project", y, 1, 0, a, a, "bn3")
        m.see(x)
        x = F.leaky_relu(m.conv("shared", x, 1, 1, None, b), 0.1)
        m.see(x)
        x = m.conv("shared", x, 1, 1, b, c)
        x = torch.cat([x, m.conv("grouped", x, 1, 1, c, None, groups=2)], 1)
        m.see(x)
        return m.linear("fc", F.relu(m.conv("last", x, 1, 0, None, d)).mean((2, 3)), d)


NETWORKS: dict[str, tuple[Callable[[], nn.Module], int]] = {  # constructor, number of decisions
    "vgg": (Vgg, 3),
    "vgg-fewer-channels-than-groups": (lambda: Vgg((3, 2, 3, 5)), 3),
    "resnet-basic": (ResNet, 4),
    "resnet-bottleneck": (lambda: ResNet("bottleneck"), 4),
    "pre-activation": (PreActivation, 2),
    "late-norm": (LateNorm, 3),
    "inverted-residual": (Inverted, 4),
}


def randomised(model: nn.Module, seed: int = 0) -> nn.Module:
    """Every BatchNorm parameter and statistic random, so that a wrong row or a missing fold shows."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if getattr(module, "running_var", None) is not None:
                module.running_mean.copy_(torch.randn(module.running_mean.shape, generator=generator) * 0.3)
                module.running_var.copy_(torch.rand(module.running_var.shape, generator=generator) + 0.5)
                module.weight.copy_(torch.rand(module.weight.shape, generator=generator) + 0.5)
                module.bias.copy_(torch.randn(module.bias.shape, generator=generator) * 0.3)
    return model


def oracle(name: str, network: Any, images: Tensor, actions: Tensor) -> SimpleNamespace:
    """What the converted `network` should give for `images` under `actions` (N, L)."""
    m = Masked(network.backbone.state_dict(), len(images), network.groups)
    model = type(NETWORKS[name][0]())
    logits = model.masked(m, images, actions)
    return SimpleNamespace(logits=logits, macs=m.macs, features=m.features)


@pytest.fixture(params=list(NETWORKS))
def name(request: pytest.FixtureRequest) -> str:
    """Every network in turn."""
    return request.param


@pytest.fixture
def nets() -> SimpleNamespace:
    """The helpers of this file, for tests that import nothing from their own folder."""

    def make(name: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Module:
        torch.manual_seed(seed)
        return randomised(NETWORKS[name][0](), seed).to(dtype).eval()

    def decisions(name: str) -> int:
        return NETWORKS[name][1]

    return SimpleNamespace(make=make, decisions=decisions, randomised=randomised, oracle=oracle)
