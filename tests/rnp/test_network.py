"""`PrunedNetwork` in eval mode: the flat plan, what it depends on, and that a sample does not see its batch."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import weight_norm

import rnp
import rnp_kernels

K = 4


def images(n: int = 6, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(n, 3, 16, 16, generator=torch.Generator().manual_seed(1)).to(dtype)


def make(nets, name: str, dtype: torch.dtype = torch.float32) -> rnp.PrunedNetwork:
    network = nets.randomised(rnp.convert(nets.make(name, dtype), images(1, dtype), K), seed=3).requires_grad_(False)
    actions = torch.randint(1, K + 1, (6, len(network.layers)), generator=torch.Generator().manual_seed(2))
    network.policy = rnp.policies.Fixed(actions)
    return network


def test_a_sample_is_the_same_bits_alone_and_in_any_batch(nets, name):
    """Features at every decision; and what the linear layers read (their own products depend on the batch size)."""
    x, network = images(), make(nets, name)
    actions = network.policy.actions
    for module in network.modules():
        if isinstance(module, nn.Linear):
            module.forward = lambda y: y
    logits, trace = network(x, return_trace="features")
    for part in (slice(0, 1), slice(2, 5), slice(5, 6)):
        network.policy = rnp.policies.Fixed(actions[part])
        alone, own = network(x[part], return_trace="features")
        assert torch.equal(alone, logits[part])
        for a, b in zip(own.features, trace.features, strict=True):
            assert torch.equal(a, b[part])


def test_undefined_tails_never_reach_a_live_channel(nets, name, monkeypatch):
    """Every channel that a layer may leave undefined is filled with NaN: nothing changes."""
    x, network = images(), make(nets, name)
    expected, trace = network(x, return_trace="features")
    operator, poisoned = rnp.network.OPERATOR, []

    def poison(*args):
        output, mean = operator(*args)
        out_prefix, tail = args[8], args[13]
        if tail == "skip":
            dead = torch.arange(output.shape[1]) >= out_prefix[:, None]
            poisoned.append(int(dead.sum()))
            output.masked_fill_(dead[:, :, None, None], float("nan"))
        return output, mean

    monkeypatch.setattr(rnp.network, "OPERATOR", poison)
    got, own = network(x, return_trace="features")
    assert torch.equal(got, expected) and sum(poisoned) > 0
    assert all(torch.equal(a, b) for a, b in zip(own.features, trace.features, strict=True))


def test_the_reference_backend_agrees(nets, name):
    x, network = images(dtype=torch.float64), make(nets, name, torch.float64)
    expected = network(x)
    with rnp_kernels.backend("reference"):
        torch.testing.assert_close(network(x), expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(nets, name, dtype):
    network = make(nets, name)
    expected = network(images())
    got = network.to(dtype)(images().to(dtype))
    assert got.dtype is dtype
    error = (got.float() - expected).norm() / expected.norm()
    assert error < (0.05 if dtype is torch.bfloat16 else 0.01)


def test_the_plan_with_gradients_enabled_is_the_plan_without(nets, name):
    """Frozen parameters need no no_grad(); parameters that ask for gradients get them."""
    x, network = images(), make(nets, name)
    expected = network(x)
    assert not expected.requires_grad
    with torch.inference_mode():
        assert torch.equal(network(x), expected)
    network.requires_grad_(True)
    with torch.no_grad():
        assert torch.equal(network(x), expected)
    out = network(x)
    assert out.requires_grad
    torch.testing.assert_close(out.detach(), expected, rtol=1e-4, atol=1e-5)


def test_images_of_any_layout_and_size(nets, name):
    network = make(nets, name)
    x = images()
    expected = network(x)
    assert torch.equal(network(x.contiguous(memory_format=torch.channels_last)), expected)
    assert torch.equal(network(torch.cat([x, x], 3)[..., :16]), expected)
    if "vgg" not in name:
        assert network(torch.randn(6, 3, 24, 20)).shape == expected.shape
    network.policy = rnp.policies.Uniform(0.5)
    assert network(x[:0]).shape == (0, 5)
    with pytest.raises(ValueError, match=r"images must be \(N, C, H, W\)"):
        network(x[0])


def changed_in_place(network: nn.Module) -> None:
    for p in network.backbone.parameters():
        p.mul_(1.5)


def changed_by_assignment(network: nn.Module) -> None:
    for module in network.backbone.modules():
        if isinstance(module, nn.Conv2d):
            module.weight = nn.Parameter(module.weight * 1.5, requires_grad=False)


def changed_data(network: nn.Module) -> None:
    for p in network.backbone.parameters():
        p.data = p.data * 1.5


def changed_statistics(network: nn.Module) -> None:
    for name, buffer in network.backbone.named_buffers():
        if "running" in name:
            buffer.add_(0.5)


def changed_by_loading(network: nn.Module) -> None:
    network.load_state_dict({k: v * 1.25 if v.is_floating_point() else v for k, v in network.state_dict().items()})


def changed_by_replacing(network: nn.Module) -> None:
    for parent in list(network.backbone.modules()):
        for key, child in list(parent.named_children()):
            if isinstance(child, nn.Conv2d):
                new = copy.deepcopy(child)
                new.weight.mul_(1.5)
                setattr(parent, key, new)


def changed_linear(network: nn.Module) -> None:
    for parent in list(network.backbone.modules()):
        for key, child in list(parent.named_children()):
            if isinstance(child, nn.Linear):
                setattr(parent, key, nn.Linear(child.in_features, child.out_features).requires_grad_(False))


def changed_by_training(network: nn.Module) -> None:
    network.requires_grad_(True).train()
    optimizer = torch.optim.SGD(network.parameters(), 0.1)
    network(images()).square().mean().backward()
    optimizer.step()
    network.requires_grad_(False).eval()


CHANGES = [
    changed_in_place, changed_by_assignment, changed_data, changed_statistics, changed_by_loading,
    changed_by_replacing, changed_linear, changed_by_training,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", ["vgg", "resnet-basic"])
def test_the_plan_follows_the_parameters(nets, name, change):
    x, network = images(), make(nets, name)
    for policy in (network.policy, rnp.policies.FullWidth()):
        network.policy = policy
        before = network(x)
        change(network)
        after = network(x)
        assert not torch.allclose(before, after)
        assert torch.equal(after, copy.deepcopy(network)(x))  # a copy starts without a plan


def test_the_plan_follows_parametrizations():
    """Of a convolution: the parameters that its weight is computed from, and one that is registered or removed."""
    x = images()

    def make(seed: int) -> rnp.PrunedNetwork:
        torch.manual_seed(seed)
        layers = [nn.Conv2d(3, 16, 3), nn.ReLU(), weight_norm(nn.Conv2d(16, 24, 3)), nn.ReLU(), nn.Conv2d(24, 8, 3)]
        model = nn.Sequential(*layers, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))
        network = rnp.convert(model.eval(), x[:1], K).requires_grad_(False)
        network.policy = rnp.policies.Uniform(0.5)
        return network

    network, other = make(0), make(1)
    conv = network.backbone[2]
    changes = [
        lambda: network.load_state_dict(other.state_dict()),
        lambda: conv.parametrizations.weight.original0.mul_(2),
        lambda: setattr(conv.parametrizations.weight.original1, "data", torch.randn(24, 16, 3, 3)),
        lambda: setattr(conv.parametrizations.weight, "original0", nn.Parameter(torch.ones(24, 1, 1, 1))),
        lambda: parametrize.register_parametrization(conv, "bias", nn.Tanh()),
        lambda: parametrize.register_parametrization(network.backbone[4], "weight", nn.Tanh()),
        lambda: parametrize.remove_parametrizations(conv, "weight").weight.mul_(2),
    ]
    for change in changes:
        before = network(x)
        with torch.no_grad():
            change()
        network.requires_grad_(False)
        after = network(x)
        assert not torch.equal(before, after)
        assert torch.equal(after, copy.deepcopy(network)(x))


def test_a_change_behind_torchs_back_needs_refresh(nets):
    x, network = images(), make(nets, "vgg")
    network(x)
    for p in network.parameters():
        p.data.mul_(1.5)
    network.refresh()
    assert torch.equal(network(x), copy.deepcopy(network)(x))


def test_two_threads(nets):
    x, network = images(), make(nets, "resnet-basic")
    expected, results = network(x), []
    network.refresh()
    threads = [
        threading.Thread(target=lambda: results.extend(torch.equal(network(x), expected) for _ in range(10)))
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [True] * 20


def test_features_are_returned_for_any_policy(nets, name):
    x, network = images(), make(nets, name)
    expected, trace = network(x, return_trace="features")
    assert torch.equal(network(x), expected)
    plain = network(x, return_trace=True)[1]
    assert plain.features is None and torch.equal(plain.macs, trace.macs)
    network.train()
    assert [f.shape for f in network(x, return_trace="features")[1].features] == [f.shape for f in trace.features]
