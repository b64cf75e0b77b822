"""`rnp.convert`: equal to the original at full width, to a hand-masked network elsewhere, and open about it."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rnp
import rnp_kernels

K = 4


def images(n: int = 5, size: int = 16, dtype: torch.dtype = torch.float32, seed: int = 1) -> Tensor:
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(seed)).to(dtype)


def random_actions(n: int, depth: int, seed: int = 2, k: int = K) -> Tensor:
    return torch.randint(1, k + 1, (n, depth), generator=torch.Generator().manual_seed(seed))


def test_full_width_is_the_original(nets, name):
    model, x = nets.make(name), images()
    network = rnp.convert(model, x[:1], K)
    assert not network.training and len(network.layers) == nets.decisions(name)
    with torch.no_grad():
        torch.testing.assert_close(network(x), model(x), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(network.forward_path(x, [K] * len(network.layers)), model(x), rtol=1e-4, atol=1e-5)


def test_full_width_is_the_original_in_double(nets, name):
    model, x = nets.make(name, torch.float64), images(dtype=torch.float64)
    network = rnp.convert(model, x[:1], K)
    with torch.no_grad():
        torch.testing.assert_close(network(x), model(x), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("k", [4, 3, 8])
def test_mixed_actions_are_the_masked_network(nets, name, k):
    x = images(7, dtype=torch.float64)
    network = nets.randomised(rnp.convert(nets.make(name, torch.float64), x[:1], k), seed=3)  # every row its own values
    actions = random_actions(7, len(network.layers), k=k)
    expected = nets.oracle(name, network, x, actions)
    network.policy = rnp.policies.Fixed(actions)
    with torch.no_grad():
        logits, trace = network(x, return_trace="features")
    torch.testing.assert_close(logits, expected.logits, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(trace.actions.long(), actions)
    torch.testing.assert_close(trace.macs, expected.macs)
    torch.testing.assert_close(network.macs(actions), expected.macs)
    assert [f.shape[1] for f in trace.features] == network.feature_sizes
    for got, want in zip(trace.features, expected.features, strict=True):
        assert got.dtype is torch.float32
        torch.testing.assert_close(got, want.float(), rtol=1e-5, atol=1e-6)


def test_mixed_actions_with_gradients_are_the_masked_network(nets, name):
    """Eval mode with autograd (BatchNorm frozen): values and the gradient of every parameter."""
    x = images(4, dtype=torch.float64)
    network = nets.randomised(rnp.convert(nets.make(name, torch.float64), x[:1], K), seed=3)
    actions = random_actions(4, len(network.layers))
    network.policy = rnp.policies.Fixed(actions)
    parameters = dict(network.backbone.named_parameters())
    logits = network(x)
    got = torch.autograd.grad(logits.square().sum(), list(parameters.values()), allow_unused=True)
    state = {**network.backbone.state_dict(), **parameters}
    network.backbone.state_dict = lambda: state
    expected = nets.oracle(name, network, x, actions)
    want = torch.autograd.grad(expected.logits.square().sum(), list(parameters.values()), allow_unused=True)
    torch.testing.assert_close(logits, expected.logits, rtol=1e-11, atol=1e-11)
    for key, a, b in zip(parameters, got, want, strict=True):
        assert (a is None) == (b is None), key
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11, msg=lambda text, key=key: f"{key}: {text}")


def test_a_path_is_the_masked_network(nets, name):
    x = images(3, dtype=torch.float64)
    network = nets.randomised(rnp.convert(nets.make(name, torch.float64), x[:1], K), seed=3)
    for path in random_actions(4, len(network.layers), seed=5).tolist():
        expected = nets.oracle(name, network, x, torch.tensor([path] * 3))
        torch.testing.assert_close(network.forward_path(x, path), expected.logits, rtol=1e-11, atol=1e-11)


def test_train_mode_at_full_width_is_the_original(nets, name):
    """Batch statistics, running statistics and gradients, both through mixed batches and through a path."""
    x = images(6, dtype=torch.float64)
    model = nets.make(name, torch.float64)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    model.train()
    for path in (None, [K] * nets.decisions(name)):
        original, network = copy.deepcopy(model), rnp.convert(model, x[:1], K)
        assert network.training
        out = network(x) if path is None else network.forward_path(x, path)
        torch.testing.assert_close(out, original(x), rtol=1e-9, atol=1e-9)
        out.square().sum().backward()
        original(x)  # a second batch, so that the statistics have moved twice …
        with torch.no_grad():
            network(x) if path is None else network.forward_path(x, path)
        for key, module in original.named_modules():
            if isinstance(module, nn.BatchNorm2d):
                got = network.backbone.get_submodule(key)
                mean, var = got.running_mean, got.running_var
                torch.testing.assert_close(mean[-1] if mean.dim() == 2 else mean, module.running_mean)
                torch.testing.assert_close(var[-1] if var.dim() == 2 else var, module.running_var)
        assert all(p.grad is not None for p in network.backbone.parameters())


def test_a_mixed_batch_of_one_path_trains_like_the_path(nets, name):
    x = images(6, dtype=torch.float64)
    model = nets.make(name, torch.float64).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    a = rnp.convert(model, x[:1], K)
    b = copy.deepcopy(a)
    for path in random_actions(3, len(a.layers), seed=8).tolist():
        a.policy = rnp.policies.Fixed(path)
        torch.testing.assert_close(a(x), b.forward_path(x, path), rtol=1e-8, atol=1e-8)
        for (key, p), q in zip(a.backbone.state_dict().items(), b.backbone.state_dict().values(), strict=True):
            torch.testing.assert_close(p, q, msg=lambda text, key=key: f"{key}: {text}")


def test_the_original_is_untouched_and_not_shared(nets, name):
    model, x = nets.make(name), images()
    before = copy.deepcopy(model.state_dict())
    flags = {key: getattr(module, "inplace", None) for key, module in model.named_modules()}
    network = rnp.convert(model, x[:1], K)
    network.train()
    network(x).sum().backward()
    with torch.no_grad():
        for p in network.parameters():
            p.add_(1)
    for key, value in model.state_dict().items():
        torch.testing.assert_close(value, before[key], rtol=0, atol=0)
    assert {key: getattr(module, "inplace", None) for key, module in model.named_modules()} == flags
    assert all(p.grad is None for p in model.parameters())


def test_copies_and_pickles(nets, name):
    x = images()
    network = rnp.convert(nets.make(name), x[:1], K)
    network.policy = rnp.policies.Fixed(random_actions(5, len(network.layers)))
    with torch.no_grad():
        expected = network(x)
        for other in (copy.deepcopy(network), pickle.loads(pickle.dumps(network))):
            torch.testing.assert_close(other(x), expected, rtol=0, atol=0)


def test_report_of_a_residual_network(nets):
    network = rnp.convert(nets.make("resnet-basic"), images(1), K)
    assert network.layers == ["layer1.0", "layer1.1", "layer2.0", "layer2.1"]
    rows = {row.name: row for row in network.report.rows}
    assert rows["conv1"].action == "dense" and "first convolution" in rows["conv1"].reason
    for conv in ("conv1", "conv2", "downsample.0"):
        assert rows[f"layer2.0.{conv}"].action == "pruned" and "decision 2" in rows[f"layer2.0.{conv}"].reason
    assert rows["layer1.0.bn1"].action == "one set" and rows["layer1.0.bn2"].action == "per in-prefix"
    assert any(row.action == "ends the prefix" for row in network.report.rows)
    assert "layer2.0.downsample.0" in str(network.report)


def test_report_of_what_is_not_followed(nets):
    network = rnp.convert(nets.make("inverted-residual"), images(1), K)
    rows = {row.name: row for row in network.report.rows}
    assert rows["depthwise"].action == "followed"
    assert rows["grouped"].action == "dense" and "groups=2" in rows["grouped"].reason
    assert network.layers == ["expand", "shared", "shared#2", "last"]


class FullyConvolutional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.adaptive_avg_pool2d(self.head(F.relu(self.b(F.relu(self.a(x))))), 1).flatten(1)


def test_a_convolution_that_is_the_output_stays_dense():
    network = rnp.convert(FullyConvolutional(), images(1), K)
    assert network.layers == ["b"]
    row = next(row for row in network.report.rows if row.name == "head")
    assert row.action == "dense" and "output" in row.reason


def test_a_convolution_before_a_depthwise_one_that_is_the_output_stays_dense():
    """The depthwise one would follow it, and channels of the network's output be zeros."""
    layers = [nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 1)]
    model = nn.Sequential(*layers, nn.Conv2d(8, 8, 3, groups=8)).eval()
    network = rnp.convert(model, images(1), K)
    assert network.layers == ["2"]
    actions = {row.name: (row.action, row.reason) for row in network.report.rows}
    assert actions["4"] == ("dense", "its channels are the network's output")
    assert actions["5"][0] == "dense"
    network.policy = rnp.policies.Uniform(0.25)
    with torch.no_grad():
        assert bool((network(images(2)).abs().amax((2, 3)) > 0).all())


class InPlace(nn.Module):
    """relu_ changes what the later readers of its argument see; the shortcut here is the rectified map."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 6, 3, 1, 1), nn.Conv2d(6, 6, 3, 1, 1), nn.Conv2d(6, 6, 3, 1, 1)
        self.relu, self.identity, self.fc = nn.ReLU(inplace=True), nn.Identity(), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.b(self.a(x))
        y = self.c(self.relu(self.identity(x)))
        y += x
        z = y * 2
        y.relu_()
        return self.fc((z + y).mean([2, 3]))


def test_in_place_operations_keep_their_meaning():
    torch.manual_seed(0)
    model, x = InPlace().eval(), images()
    network = rnp.convert(model, x[:1], K)
    with torch.no_grad():
        torch.testing.assert_close(network(x), model(x), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(network.forward_path(x, [K, K]), model(x), rtol=1e-5, atol=1e-6)


def test_padding_modes_strides_and_dilation():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 6, (3, 1), padding="same"), nn.ReLU(),
        nn.Conv2d(6, 7, 3, padding=2, padding_mode="reflect"), nn.SiLU(), nn.AvgPool2d(2),
        nn.Conv2d(7, 6, (1, 3), (2, 1), (0, 2), 2), nn.ZeroPad2d(1),
        nn.Conv2d(6, 5, 3, padding=1, padding_mode="circular"), nn.Flatten(), nn.LazyLinear(3),
    )  # fmt: skip
    x = images(4)
    model(x)
    network = rnp.convert(model.eval(), x[:1], K)
    network.policy = rnp.policies.Fixed(random_actions(4, 3))
    with torch.no_grad():
        mixed = network(x)
        for i, path in enumerate(network.policy.actions.tolist()):
            torch.testing.assert_close(network.forward_path(x[i : i + 1], path)[0], mixed[i], rtol=1e-5, atol=1e-6)
        network.policy = rnp.policies.FullWidth()
        torch.testing.assert_close(network(x), model(x), rtol=1e-5, atol=1e-6)


def test_dilated_layers_by_winograd_and_pooling_behind_them():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(),
        nn.Conv2d(32, 32, 3, padding=2, dilation=2), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(32, 48, 3, padding=2, dilation=2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(48, 3),
    ).eval()  # fmt: skip
    x = torch.randn(4, 3, 24, 24)
    network = rnp.convert(model, x[:1], 4)
    network.policy = rnp.policies.Fixed(random_actions(4, 2))
    found = []
    for algorithm in ("auto", "direct"):
        with rnp_kernels.algorithm(algorithm), torch.no_grad():
            mixed = network(x)
            for i, path in enumerate(network.policy.actions.tolist()):
                torch.testing.assert_close(network.forward_path(x[i : i + 1], path)[0], mixed[i], rtol=1e-5, atol=1e-5)
            found.append(mixed)
    assert not torch.equal(*found), "no layer went through Winograd"
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


class Functional(nn.Module):
    """Pooling, dropout, interpolation and scaling by function and method."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(i, o, 3, 1, 1) for i, o in ((3, 6), (6, 9), (9, 7)))
        self.fc = nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(self.a(x).relu(), 3, stride=2, padding=1)
        x = F.dropout(torch.max_pool2d(F.silu(self.b(x)), 2), 0.5, self.training)
        x = F.interpolate(F.max_pool2d(self.c(x), 2, ceil_mode=True) * 0.5, scale_factor=2)
        x = F.adaptive_max_pool2d(x, 2)
        return self.fc(torch.mean(x, dim=(-1, 2)))


def test_functional_spellings():
    torch.manual_seed(0)
    model, x = Functional().eval(), images(4, 24)
    network = rnp.convert(model, x[:1], K)
    actions = random_actions(4, 2)
    with torch.no_grad():
        torch.testing.assert_close(network(x), model(x), rtol=1e-5, atol=1e-6)
        network.policy = rnp.policies.Fixed(actions)
        mixed = network(x)
        for i, path in enumerate(actions.tolist()):
            torch.testing.assert_close(network.forward_path(x[i : i + 1], path)[0], mixed[i], rtol=1e-5, atol=1e-6)
        assert torch.equal(pickle.loads(pickle.dumps(network))(x), mixed)
    assert not any(row.action == "ends the prefix" and "pool" in row.name for row in network.report.rows)
    network.train()
    assert not torch.equal(network.forward_path(x, [K, K]), network.forward_path(x, [K, K]))  # dropout is on


class DataDependent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) if x.sum() > 0 else x


def test_errors_name_the_rule():
    with pytest.raises(ValueError, match=r"torch\.fx must be able to trace the model, and DataDependent"):
        rnp.convert(DataDependent(), images(1))
    with pytest.raises(ValueError, match="no convolution can be pruned"):
        rnp.convert(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.LazyLinear(2)), images(1))
    with pytest.raises(ValueError, match="example_input must be one tensor"):
        rnp.convert(nn.Conv2d(3, 4, 3), torch.zeros(3, 8, 8))
    with pytest.raises(ValueError, match="groups must be at least 1"):
        rnp.convert(nn.Conv2d(3, 4, 3), images(1), groups=0)


def test_a_failed_conversion_leaves_the_model_alone():
    model = DataDependent().train()
    with pytest.raises(ValueError):
        rnp.convert(model, images(1))
    assert model.training and type(model.conv) is nn.Conv2d


def test_paths_over_large_maps_train_through_winograd():
    """The same to rounding as direct convolution, gradients too; autocast keeps torch's convolution."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 48, 3, padding=1), nn.ReLU()]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(48, 5)).eval()
    x = torch.randn(2, 3, 24, 24).contiguous(memory_format=torch.channels_last)
    network = rnp.convert(model, x, groups=4)
    weights = [conv.weight for conv in network.backbone.modules() if isinstance(conv, nn.Conv2d)]
    assert len(network.layers) == 1
    for path in ([4], [2]):
        results = []
        for algorithm in ("auto", "direct"):
            with rnp_kernels.algorithm(algorithm):
                y = network.forward_path(x, path)
                results.append((y.detach(), *torch.autograd.grad(y.square().sum(), weights)))
        for winograd, direct in zip(*results, strict=True):
            assert (winograd - direct).norm() <= 1e-5 * direct.norm()
        assert not torch.equal(results[0][-1], results[1][-1]), "Winograd was not used"
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(network.forward_path(x, path).float(), results[0][0], rtol=0.05, atol=0.05)


def test_forward_path_checks_its_path(nets):
    network = rnp.convert(nets.make("vgg"), images(1), K)
    for path in ([1, 2], [0, 1, 1], [1, 1, 5]):
        with pytest.raises(ValueError, match="path must be 3 actions"):
            network.forward_path(images(1), path)
