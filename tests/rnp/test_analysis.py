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


class Embedded(Masked):
    """A map that is the same for all images, added to a pruned one, to a full one and to the images."""

    def __init__(self) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.randn(1, 8, 10, 10))
        self.register_buffer("offset", torch.randn(1, 3, 10, 10))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x + self.offset) + self.position
        x = F.relu(self.keep(self.first(x), 0) + self.position)
        return self.fc(F.relu(self.keep(self.second(x), 1)).mean((2, 3)))


class Expanded(Embedded):
    """The same map, given to each image."""

    def forward(self, x: Tensor) -> Tensor:
        every = self.position.expand(x.size(0), -1, -1, -1)
        x = F.relu(self.keep(self.first(F.relu(self.stem(x))), 0) + every)
        return self.fc(F.relu(self.keep(self.second(x), 1)).mean((2, 3)))


class BatchMean(Masked):
    """A map of the whole batch: one for all images, although it comes from them."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = self.keep(self.first(x), 0) + x.mean(0, keepdim=True)
        return self.fc(F.relu(self.keep(self.second(x), 1)).mean((2, 3)))


class FunctionalHead(Masked):
    """A linear layer and a convolution called by function."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(8, 4, 3, 3) * 0.2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = F.conv2d(self.keep(self.first(x), 0), self.kernel, padding=1, groups=2)
        x = self.keep(self.second(F.relu(x)), 1).relu()
        return F.linear(x.mean((2, 3)), self.fc.weight, bias=self.fc.bias)


class Viewed(Masked):
    """Views that a map in channels_last has not."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6 * 25, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x)).view(x.size(0), -1).view(-1, 8, 10, 10)
        x = self.keep(self.first(x), 0).relu()
        x = x.view(x.shape[0], 2, 4, 10, 10).transpose(1, 2).contiguous().view_as(x)
        x = F.max_pool2d(self.keep(self.second(x), 1).relu(), 2)
        return self.fc(x.view(-1, 6 * 5 * 5))


CASES: dict[str, tuple[type[Masked], int]] = {  # the network, and the images in the example
    "views": (Viewed, 1),
    "embedding": (Embedded, 1),
    "embedding, two images": (Embedded, 2),
    "expanded embedding": (Expanded, 1),
    "expanded embedding, two images": (Expanded, 2),
    "batch mean": (BatchMean, 1),
    "batch mean, two images": (BatchMean, 2),
    "functional head": (FunctionalHead, 1),
}


def equals_the_masked_network(network: rnp.PrunedNetwork, model: Masked, x: Tensor) -> None:
    """At full width, on one path and under mixed actions, with gradients and without, and by forward_path."""
    tolerance, path = TOLERANCE[x.dtype], [2, 3]
    drawn = torch.randint(1, K + 1, (6, 2), generator=torch.Generator().manual_seed(2))
    for actions in (torch.full((6, 2), K), torch.tensor([path] * 6), drawn):
        network.policy = rnp.policies.Fixed(actions)
        expected = model.masked(x, actions)
        with torch.no_grad():
            torch.testing.assert_close(network(x), expected, **tolerance)
        torch.testing.assert_close(network(x), expected, **tolerance)
    torch.testing.assert_close(network.forward_path(x, path), model.masked(x, torch.tensor([path] * 6)), **tolerance)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_networks_are_themselves_with_masks(case, dtype):
    torch.manual_seed(0)
    kind, examples = CASES[case]
    model, x = kind().eval().to(dtype), torch.randn(6, 3, 10, 10, dtype=dtype)
    network = rnp.convert(model, x[:examples], K)
    assert len(network.layers) == model.depth
    equals_the_masked_network(network, model, x)
    network.policy = rnp.policies.FullWidth()
    with torch.no_grad():
        torch.testing.assert_close(network(x), model(x), **TOLERANCE[dtype])


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
    with torch.no_grad():
        torch.testing.assert_close(network(x), model(x), **TOLERANCE[dtype])
    model.rows = nets.randomised(network.backbone, seed=3).bn  # every row its own values
    equals_the_masked_network(network, model, x)


@pytest.mark.parametrize("path", [None, [K, K]])
def test_a_shared_batchnorm_trains_at_full_width_like_the_original(nets, path):
    torch.manual_seed(0)
    model, x = nets.randomised(SharedNorm()).double().train(), torch.randn(6, 3, 10, 10, dtype=torch.float64)
    network = rnp.convert(model, x[:1], K)
    out = network(x) if path is None else network.forward_path(x, path)
    torch.testing.assert_close(out, model(x), rtol=1e-9, atol=1e-9)
    for name in ("running_mean", "running_var"):
        torch.testing.assert_close(getattr(network.backbone.bn, name)[-1], getattr(model.bn, name))


def test_macs_of_functional_layers_count():
    model = FunctionalHead().eval()
    network = rnp.convert(model, torch.randn(2, 3, 10, 10), K)
    fixed = 100 * 8 * 4 * 9 + 6 * 5
    assert network.dense_macs == 100 * 9 * (3 * 8 + 8 * 8 + 8 * 6) + fixed
    least = network.macs(torch.ones(1, 2, dtype=torch.int64))
    assert int(least) == 100 * 9 * (3 * 8 + 8 * 2 + 8 * 2) + fixed
    rows = {row.name: row for row in network.report.rows if row.action == "dense"}
    assert set(rows) == {"stem", "conv2d", "linear"}
    assert "conv2d() in forward() is not followed" in rows["conv2d"].reason


class Functions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv, self.fc = nn.Conv2d(3, 8, 3, 1, 1), nn.Conv2d(8, 8, 3, 1, 1), nn.Linear(4, 5)
        self.up, self.line = nn.Parameter(torch.randn(8, 4, 2, 2)), nn.Parameter(torch.randn(4, 4, 3))
        self.frames = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.conv_transpose2d(self.conv(self.stem(x)), weight=self.up, stride=2).mean(2)
        x = torch.conv1d(x, self.line, padding=1)
        x = self.frames(x.transpose(1, 2).reshape(-1, 4)).view(x.size(0), -1, 4)
        return self.fc(x.mean(1))


@pytest.mark.parametrize("images", [1, 3])
def test_macs_of_transposed_and_of_folded_batches(images):
    network = rnp.convert(Functions().eval(), torch.randn(images, 3, 10, 10), K)
    fixed = 8 * 100 * 4 * 4 + 4 * 20 * 4 * 3 + 20 * 4 * 4 + 4 * 5
    assert network.dense_macs == 100 * 9 * (3 * 8 + 8 * 8) + fixed


def attention(q: Tensor) -> Tensor:
    """(N, T, C) → the same: 2 · T · T · C MACs an image."""
    return F.scaled_dot_product_attention(q, q, q)


PRODUCTS = {  # of q (N, 25, 6), weight (6, 6): what forward() does with them, and its MACs an image
    "matmul": (lambda q, w: torch.matmul(q, w), 25 * 6 * 6),
    "@": (lambda q, w: (q @ q.transpose(1, 2)) @ q, 2 * 25 * 25 * 6),
    "method": (lambda q, w: q.matmul(w), 25 * 6 * 6),
    "bmm": (lambda q, w: torch.bmm(q, q.mT).bmm(q), 2 * 25 * 25 * 6),
    "baddbmm": (lambda q, w: torch.baddbmm(q, q @ w, w.expand(q.size(0), 6, 6)), 2 * 25 * 6 * 6),
    "einsum": (lambda q, w: torch.einsum("ntc,ndc->ntd", q, q).matmul(q), 2 * 25 * 25 * 6),
    "matrix by vector": (lambda q, w: q + (q @ w[0])[:, :, None], 25 * 6),
    "attention": (lambda q, w: attention(q), 2 * 25 * 25 * 6),
    "sequence first": (lambda q, w: F.linear(q.transpose(0, 1), w).transpose(0, 1), 25 * 6 * 6),
    "of the model alone": (lambda q, w: q * (w @ w)[0], 6 * 6 * 6),
}


class Products(Masked):
    def __init__(self, spelled) -> None:
        super().__init__()
        self.spelled, self.weight = spelled, nn.Parameter(torch.randn(6, 6))

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(self.second(self.first(self.stem(x))), 2)
        return self.fc(self.spelled(x.flatten(2).transpose(1, 2), self.weight).mean(1))


@pytest.mark.parametrize("images", [1, 2, 3])
@pytest.mark.parametrize("spelled", PRODUCTS)
def test_products_that_forward_spells_count(spelled, images):
    function, macs = PRODUCTS[spelled]
    network = rnp.convert(Products(function).eval(), torch.randn(images, 3, 10, 10), K)
    assert network.dense_macs == 100 * 9 * (3 * 8 + 8 * 8 + 8 * 6) + macs + 6 * 5
    assert any("() in forward() is not followed" in row.reason for row in network.report.rows)


class Modules(Masked):
    """Products inside of modules; a linear layer over sequences that have the images second."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.recurrent = nn.MultiheadAttention(6, 2, batch_first=True), nn.GRU(6, 6, batch_first=True)
        self.bilinear, self.sequence = nn.Bilinear(6, 6, 6), nn.Linear(10, 5)

    def forward(self, x: Tensor) -> Tensor:
        q = F.max_pool2d(self.second(self.first(self.stem(x))), 2).flatten(2).transpose(1, 2)
        q = self.bilinear(q, q) + self.attention(q, q, q)[0] + self.recurrent(q)[0]
        return self.fc(q.mean(1)) + self.sequence(x.mean(3).transpose(0, 1)).mean(0)


def test_modules_of_products_count_and_what_has_no_formula_is_said():
    network = rnp.convert(Modules().eval(), torch.randn(2, 3, 10, 10), K)
    of_attention, of_recurrent = 25 * 6 * 4 * 6 + 2 * 25 * 25 * 6, 25 * 2 * 3 * 6 * 6
    of_convolutions = 100 * 9 * (3 * 8 + 8 * 8 + 8 * 6)
    assert network.dense_macs == of_convolutions + of_attention + of_recurrent + 3 * 10 * 5 + 6 * 5
    rows = {row.name: row for row in network.report.rows}
    assert rows["attention"].reason == "MultiheadAttention is not followed"
    assert rows["bilinear"].action == "not counted" and "aten::_trilinear" in rows["bilinear"].reason
    assert torch.backends.mha.get_fastpath_enabled()


def test_a_convolution_over_another_batch_stays_dense():
    class Frames(Masked):
        def forward(self, x: Tensor) -> Tensor:
            x = self.keep(self.first(F.relu(self.stem(x))), 0)
            parts = self.second(torch.cat(x.chunk(2, 2))).relu()
            return self.fc(torch.cat(parts.chunk(2), 2).mean((2, 3)))

    torch.manual_seed(0)
    model, x = Frames().eval(), torch.randn(4, 3, 10, 10)
    network = rnp.convert(model, x[:1], K)
    row = next(row for row in network.report.rows if row.name == "second")
    assert row.action == "dense" and "its batch is not that of the images" in row.reason
    assert network.dense_macs == 100 * 9 * (3 * 8 + 8 * 8 + 8 * 6) + 6 * 5
    actions = torch.tensor([[1], [3], [4], [2]])
    network.policy = rnp.policies.Fixed(actions)
    with torch.no_grad():
        torch.testing.assert_close(network(x), model.masked(x, actions), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(network(x), model.masked(x, actions), rtol=1e-4, atol=1e-5)


HOOKED = ["0", "2", "3", "4", "5", "6", "8"]  # names in the network below


@pytest.mark.parametrize("name", HOOKED)
@pytest.mark.parametrize("before", [False, True])
def test_a_module_with_a_hook_is_called(name, before):
    """The hook may change what the module reads or gives, beyond the prefix too."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, 1, 1), nn.ReLU(),
        nn.Conv2d(8, 8, 3, 1, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.Dropout(),
        nn.Conv2d(8, 6, 3, 1, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5),
    ).eval()  # fmt: skip
    x, calls, hooked = torch.randn(4, 3, 10, 10), [], model.get_submodule(name)
    if before:
        hooked.register_forward_pre_hook(lambda module, inputs: (calls.append(name), (inputs[0] + 0.5,))[1])
    else:
        hooked.register_forward_hook(lambda module, inputs, output: (calls.append(name), output + 0.5)[1])
    network = rnp.convert(model, x[:1], K)
    expected = model(x)
    for run in (network, lambda images: network.forward_path(images, [K] * len(network.layers))):
        for gradients in (False, True):
            calls.clear()
            with torch.set_grad_enabled(gradients):
                torch.testing.assert_close(run(x), expected, rtol=1e-4, atol=1e-5)
            assert calls == [name]
    actions = torch.randint(1, K + 1, (4, len(network.layers)))
    network.policy = rnp.policies.Fixed(actions)
    with torch.no_grad():
        mixed = network(x)
        for i, path in enumerate(actions.tolist()):
            torch.testing.assert_close(network.forward_path(x[i : i + 1], path)[0], mixed[i], rtol=1e-4, atol=1e-5)
    assert any("forward hooks" in row.reason for row in network.report.rows)


def test_hooks_of_the_model_itself_are_refused():
    model = Embedded().eval()
    model.register_forward_hook(lambda module, inputs, output: None)
    with pytest.raises(ValueError, match="the model must have no forward hooks of its own, and Embedded has"):
        rnp.convert(model, torch.randn(1, 3, 10, 10), K)


def test_a_network_for_one_image_at_a_time():
    class One(Masked):
        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            x = F.relu(self.keep(self.first(x), 0) + x)
            return self.fc(self.keep(self.second(x), 1).view(1, 6, -1).mean(2))

    torch.manual_seed(0)
    model, x = One().eval(), torch.randn(1, 3, 10, 10)
    network, actions = rnp.convert(model, x, K), torch.tensor([[2, 3]])
    assert network.layers == ["first", "second"]
    network.policy = rnp.policies.Fixed(actions)
    with torch.no_grad():
        torch.testing.assert_close(network(x), model.masked(x, actions), rtol=1e-4, atol=1e-5)
