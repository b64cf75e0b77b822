"""What the converter makes of the less usual: each network against itself with masks in its forward(), in all ways."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rnp

K = 4
TOLERANCE = {torch.float32: {"rtol": 1e-4, "atol": 1e-5}, torch.float64: {"rtol": 1e-10, "atol": 1e-10}}


class Masked(nn.Module):
    """A network that can mask itself: `keep` marks what a decision prunes, `norm` what has a row per in-prefix."""

    depth = 2

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.first, self.second = (nn.Conv2d(i, o, 3, 1, 1) for i, o in ((3, 8), (8, 8), (8, 6)))
        self.fc = nn.Linear(6, 5)
        self.actions: Tensor | None = None  # (N, L); None: full width

    def keep(self, x: Tensor, decision: int) -> Tensor:
        if self.actions is None:
            return x
        live = [math.ceil(int(a) * x.shape[1] / K) for a in self.actions[:, decision]]
        mask = torch.arange(x.shape[1]) < torch.tensor(live)[:, None]
        return x * mask[:, :, None, None]

    def masked(self, x: Tensor, actions: Tensor) -> Tensor:
        self.actions = actions
        try:
            return self(x)
        finally:
            self.actions = None


class SharedNorm(Masked):
    """One BatchNorm behind a concatenation, where all channels live, and behind two pruned uses of one convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.narrow, self.bn, self.rows = nn.Conv2d(3, 4, 3, 1, 1), nn.BatchNorm2d(8), None
        self.fc = nn.Linear(8, 5)

    def norm(self, x: Tensor, decision: int | None) -> Tensor:
        """Behind a convolution whose input that decision sets, None: full width."""
        if self.rows is None:
            return self.bn(x)
        rows = [K - 1] * len(x) if decision is None else [int(a) - 1 for a in self.actions[:, decision]]
        r = self.rows
        tables = (r.running_mean, r.running_var, r.weight, r.bias)
        return torch.cat([F.batch_norm(x[i : i + 1], *(t[row] for t in tables)) for i, row in enumerate(rows)])

    def forward(self, x: Tensor) -> Tensor:
        x = self.narrow(x)
        x = F.relu(self.norm(torch.cat([x, -x], 1), None))
        x = F.relu(self.keep(self.first(x), 0))
        return self.fc(F.relu(self.keep(self.norm(self.first(x), 0), 1)).mean((2, 3)))


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_a_shared_batchnorm_takes_full_width_where_nothing_is_pruned(nets, dtype):
    torch.manual_seed(0)
    model, x = nets.randomised(SharedNorm()).eval().to(dtype), torch.randn(6, 3, 10, 10, dtype=dtype)
    network = rnp.convert(model, x[:1], K)
    tolerance = TOLERANCE[dtype]
    with torch.no_grad():
        torch.testing.assert_close(network(x), model(x), **tolerance)
    model.rows = nets.randomised(network.backbone, seed=3).bn  # every row its own values
    path = [2, 3]
    drawn = torch.randint(1, K + 1, (6, 2), generator=torch.Generator().manual_seed(2))
    for actions in (torch.full((6, 2), K), torch.tensor([path] * 6), drawn):
        network.policy = rnp.policies.Fixed(actions)
        expected = model.masked(x, actions)
        with torch.no_grad():
            torch.testing.assert_close(network(x), expected, **tolerance)
        torch.testing.assert_close(network(x), expected, **tolerance)
    torch.testing.assert_close(network.forward_path(x, path), model.masked(x, torch.tensor([path] * 6)), **tolerance)


@pytest.mark.parametrize("path", [None, [K, K]])
def test_a_shared_batchnorm_trains_at_full_width_like_the_original(nets, path):
    torch.manual_seed(0)
    model, x = nets.randomised(SharedNorm()).double().train(), torch.randn(6, 3, 10, 10, dtype=torch.float64)
    network = rnp.convert(model, x[:1], K)
    out = network(x) if path is None else network.forward_path(x, path)
    torch.testing.assert_close(out, model(x), rtol=1e-9, atol=1e-9)
    for name in ("running_mean", "running_var"):
        torch.testing.assert_close(getattr(network.backbone.bn, name)[-1], getattr(model.bn, name))
