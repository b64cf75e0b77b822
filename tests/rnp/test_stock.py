"""The stock rivals compute what the model computes, and are really fused."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import rnp
from rnp import stock


def batchnorm(channels: int) -> nn.BatchNorm2d:
    """A BatchNorm whose statistics and affine are not the identity."""
    norm = nn.BatchNorm2d(channels)
    for tensor in (norm.weight, norm.bias, norm.running_mean):
        nn.init.uniform_(tensor, -1, 1)
    nn.init.uniform_(norm.running_var, 0.5, 2)
    return norm


class Residual(nn.Module):
    """Two blocks, with and without a downsample; functional and module ReLU; both orders of the add."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.stem_norm = batchnorm(8)
        self.first = nn.Conv2d(8, 8, 3, padding=1)
        self.first_norm = batchnorm(8)
        self.second = nn.Conv2d(8, 16, 3, stride=2, padding=1)
        self.short = nn.Conv2d(8, 16, 1, stride=2)
        self.relu = nn.ReLU(inplace=True)
        self.head = nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.relu(self.stem_norm(self.stem(x)))
        x = F.relu(x + self.first_norm(self.first(x)))
        x = self.short(x) + self.second(x)
        return self.head(x.mean((2, 3)))


class Branchy(nn.Module):
    """Control flow that torch.fx cannot trace."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.sum() > 0:
            x = x * 2
        return self.conv(x).mean((2, 3))


def chain() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [
        nn.Conv2d(3, 8, 3),
        batchnorm(8),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3),
        batchnorm(16),
        nn.ReLU(),
    ]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5))


@pytest.fixture(params=["chain", "residual"])
def model(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(0)
    return (chain() if request.param == "chain" else Residual()).eval()


def images(count: int = 2) -> torch.Tensor:
    return torch.randn(count, 3, 12, 12, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("count", [1, 2, 5])
def test_every_path_equals_the_model(model: nn.Module, count: int) -> None:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    x = images(count)
    with torch.no_grad():
        truth = model.double()(x.double())
        native = model.float()(x)
        tolerance = 4 * float((native - truth).abs().max()) + 1e-6
        for rival in (stock.eager(model), stock.folded(model), stock.prepacked(model, images(2))):
            assert float((rival(x.to(memory_format=torch.channels_last)) - truth).abs().max()) <= tolerance
    for name, tensor in model.state_dict().items():
        assert tensor.equal(before[name])


def test_prepacked_leaves_nothing_to_eager(model: nn.Module) -> None:
    kinds = [type(module).__name__ for module in stock.prepacked(model, images()).modules()]
    assert "PrepackedConv2d" in kinds
    assert not {"Conv2d", "BatchNorm2d", "ReLU"} & set(kinds)


def test_prepacked_fuses_the_residual_add() -> None:
    torch.manual_seed(0)
    graph = stock.prepacked(Residual().eval(), images()).graph
    packed = [node for node in graph.nodes if node.op == "call_module" and "prepacked" in node.target]
    assert [len(node.args) for node in packed] == [1, 2, 1, 2]
    assert not [node for node in graph.nodes if node.op == "call_function"]


def test_best_path_is_the_fastest_that_is_right(model: nn.Module) -> None:
    best = stock.best_stock_path(model, images(), rounds=3)
    assert not best.rejected
    assert set(best.seconds) == {"eager", "folded", "prepacked"}
    assert best.seconds[best.name] == min(best.seconds.values())
    torch.testing.assert_close(best.module(images()), model(images()))


def test_what_cannot_run_is_named() -> None:
    best = stock.best_stock_path(Branchy(), images(), rounds=1)
    assert best.name == "eager"
    assert set(best.rejected) == {"folded", "prepacked"}
    assert "TraceError" in best.rejected["folded"]


class Viewed(nn.Module):
    """Flattens by a view that a map in channels_last has not."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm, self.conv = nn.Conv2d(3, 8, 3, padding=1), batchnorm(8), nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8 * 36, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.max_pool2d(F.relu(self.conv(F.relu(self.norm(self.stem(x))))), 2)
        return self.head(x.view(x.size(0), -1))


class BranchyViewed(Viewed):
    """Neither can it be traced."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x * 2 if x.sum() > 0 else x)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    ("network", "candidates"),
    [(Viewed, {"contiguous", "folded", "prepacked"}), (BranchyViewed, {"contiguous"})],
)
def test_views_have_a_rival(network: type[Viewed], candidates: set[str], layout: torch.memory_format) -> None:
    torch.manual_seed(0)
    model = network().eval()
    best = stock.best_stock_path(model.to(memory_format=layout), images(), rounds=1)
    assert set(best.seconds) == candidates
    assert "view" in best.rejected["eager"]
    truth = model.to(memory_format=torch.contiguous_format)(images())
    torch.testing.assert_close(best.module(images().to(memory_format=torch.channels_last)), truth)


def test_evaluate_times_a_network_that_flattens_by_a_view() -> None:
    torch.manual_seed(0)
    pruned = rnp.convert(Viewed().eval(), images())
    report = rnp.evaluate(pruned, [(images(4), torch.zeros(4, dtype=torch.int64))], rounds=1)
    assert report.timing is not None
    assert report.timing.dense_path in ("contiguous", "folded", "prepacked")


def test_a_wrong_path_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(7)
    other = nn.Sequential(nn.Conv2d(3, 5, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    monkeypatch.setattr(stock, "folded", lambda model: stock.eager(other))
    best = stock.best_stock_path(chain(), images(), rounds=1)
    assert "differs from the eager model" in best.rejected["folded"]
    assert best.name == "eager"


def test_prepacked_refuses_what_onednn_does_not_do() -> None:
    with pytest.raises(ValueError, match="zero padding"):
        stock.PrepackedConv2d(nn.Conv2d(3, 4, 3, padding="same"), images().shape, relu=False)


def test_dense_model_is_the_original_at_full_width() -> None:
    torch.manual_seed(0)
    original = Residual().eval()
    pruned = rnp.convert(original, images())
    dense = stock.dense_model(pruned)
    assert type(dense) is Residual
    assert not [module for module in dense.modules() if isinstance(module, rnp.PrefixBatchNorm2d)]
    assert set(dense.state_dict()) == set(original.state_dict())
    torch.testing.assert_close(dense(images()), original(images()))


def test_dense_model_follows_training() -> None:
    """Full width's own BatchNorm, and weights as they are now; the converted network keeps its own."""
    torch.manual_seed(0)
    pruned = rnp.convert(chain().eval(), images())
    for tensor in pruned.state_dict().values():
        if tensor.is_floating_point():
            tensor.uniform_(0.2, 1.0)
    before = {name: tensor.clone() for name, tensor in pruned.state_dict().items()}
    dense = stock.dense_model(pruned)
    torch.testing.assert_close(dense(images()), pruned.forward_path(images(), [4] * len(pruned.layers)))
    with torch.no_grad():
        for parameter in dense.parameters():
            parameter.zero_()
    assert all(tensor.equal(before[name]) for name, tensor in pruned.state_dict().items())
