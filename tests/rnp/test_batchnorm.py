"""BatchNorm per in-prefix: k sets, over live samples and channels only; and their recalibration."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rnp

K = 4


def norm(momentum: float | None = 0.1) -> rnp.PrefixBatchNorm2d:
    torch.manual_seed(0)
    plain = nn.BatchNorm2d(6, momentum=momentum).double()
    nn.init.normal_(plain.weight)
    nn.init.normal_(plain.bias)
    new = rnp.PrefixBatchNorm2d.from_batchnorm(plain, K)
    with torch.no_grad():
        new.weight.normal_()
        new.bias.normal_()
    return new


def batch(n: int = 7) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    x = torch.randn(n, 6, 3, 5, dtype=torch.float64, generator=g)
    row = torch.tensor([0, 3, 1, 0, 3, 3, 1])[:n]
    live = torch.arange(6) < torch.tensor([2, 6, 3, 5, 6, 2, 3])[:n, None]
    return x, row, live


@pytest.mark.parametrize("momentum", [0.1, None])
def test_train_mode_over_live_samples_only(momentum):
    """By hand, row by row and channel by channel: F.batch_norm over the samples in which the channel lives."""
    layer = norm(momentum)
    x, row, live = batch()
    x.requires_grad_()
    before_mean, before_var = layer.running_mean.clone(), layer.running_var.clone()
    y = layer(x, row, live)
    expected = torch.zeros_like(x)
    for r in range(K):
        for c in range(6):
            members = [n for n in range(len(x)) if row[n] == r and live[n, c]]
            if not members:
                torch.testing.assert_close(layer.running_mean[r, c], before_mean[r, c], rtol=0, atol=0)
                assert layer.num_batches_tracked[r, c] == 0
                continue
            mean, var = before_mean[r, c : c + 1].clone(), before_var[r, c : c + 1].clone()
            weight, bias = layer.weight[r, c : c + 1], layer.bias[r, c : c + 1]
            share = 1.0 if momentum is None else momentum
            out = F.batch_norm(x[members, c : c + 1], mean, var, weight, bias, True, share, layer.eps)
            for i, n in enumerate(members):
                expected[n, c] = out[i, 0]
            torch.testing.assert_close(layer.running_mean[r, c], mean[0])
            torch.testing.assert_close(layer.running_var[r, c], var[0])
            assert layer.num_batches_tracked[r, c] == 1
    torch.testing.assert_close(y, expected)
    weights = torch.randn(y.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    names, inputs = ("x", "weight", "bias"), (x, layer.weight, layer.bias)
    got = torch.autograd.grad((y * weights).sum(), inputs)
    want = torch.autograd.grad((expected * weights).sum(), inputs)
    for key, a, b in zip(names, got, want, strict=True):
        torch.testing.assert_close(a, b, msg=lambda text, key=key: f"{key}: {text}")


def test_eval_mode_takes_the_rows_statistics():
    layer = norm().eval()
    with torch.no_grad():
        layer.running_mean.normal_()
        layer.running_var.uniform_(0.5, 2)
    x, row, live = batch()
    y = layer(x, row, live)
    for n in range(len(x)):
        r = row[n]
        one = F.batch_norm(x[n : n + 1], layer.running_mean[r], layer.running_var[r], layer.weight[r], layer.bias[r])
        torch.testing.assert_close(y[n], one[0] * live[n, :, None, None])
        if bool(live[n].all()):
            torch.testing.assert_close(layer.forward_slice(x[n : n + 1], int(r))[0], one[0])


@pytest.mark.parametrize("momentum", [0.1, None])
def test_a_slice_updates_its_row_and_its_live_channels(momentum):
    layer, plain = norm(momentum), nn.BatchNorm2d(3, momentum=momentum).double()
    before = layer.running_mean.clone()
    for i in range(3):
        x = batch()[0][:, :3] + i
        torch.testing.assert_close(
            layer.forward_slice(x, 1), plain(x) * layer.weight[1, :3, None, None] + layer.bias[1, :3, None, None]
        )
    torch.testing.assert_close(layer.running_mean[1, :3], plain.running_mean)
    torch.testing.assert_close(layer.running_var[1, :3], plain.running_var)
    assert layer.num_batches_tracked.sum() == 9
    before[1, :3] = layer.running_mean[1, :3]
    torch.testing.assert_close(layer.running_mean, before, rtol=0, atol=0)


def test_the_table_folds():
    layer = norm().eval()
    with torch.no_grad():
        layer.running_mean.normal_()
    scale, shift = layer.table()
    x, row, live = batch()
    y = x * scale[row][:, :, None, None] + shift[row][:, :, None, None]
    torch.testing.assert_close(y * live[:, :, None, None], layer(x, row, live))


def test_without_affine_and_without_statistics():
    plain = nn.BatchNorm2d(6, affine=False).double().eval()
    layer = rnp.PrefixBatchNorm2d.from_batchnorm(plain, K)
    x, row, _ = batch()
    torch.testing.assert_close(layer(x, row, torch.ones(7, 6, dtype=torch.bool)), plain(x))
    with pytest.raises(ValueError, match="must track running statistics"):
        rnp.PrefixBatchNorm2d.from_batchnorm(nn.BatchNorm2d(6, track_running_stats=False), K)


def images(n: int, seed: int) -> Tensor:
    return torch.randn(n, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_recalibration_is_the_cumulative_average(nets):
    network = rnp.convert(nets.make("vgg", torch.float64), images(1, 0), K)
    loader = [(images(4, i), torch.zeros(4)) for i in range(5)]
    path = [2, 3, 1]
    assert rnp.recalibrate(network, loader, paths=[path], batches=3) == 3
    seen = []
    with torch.no_grad():
        backbone = network.backbone
        stem, bn = backbone.get_submodule("features.0"), backbone.get_submodule("features.1")
        for x, _ in loader[:3]:
            seen.append(stem(x).mean((0, 2, 3)))
    torch.testing.assert_close(bn.running_mean, torch.stack(seen).mean(0))
    middle = network.backbone.get_submodule("features.8")  # its convolution reads group 2
    assert middle.num_batches_tracked[1].tolist() == [3] * 8 + [0] * 2  # 8 = ceil(3 · 10 / 4)
    assert int(middle.num_batches_tracked.sum()) == 3 * 8


@pytest.mark.parametrize("how", ["paths", "policy", "default"])
def test_recalibration_leaves_everything_else_alone(nets, how):
    network = rnp.convert(nets.make("resnet-basic"), images(1, 0).float(), K)
    network.train()
    network.get_submodule("backbone.layer1").eval()
    network.set_budget(-0.1, 0.9)
    policy = network.policy
    modes = [m.training for m in network.modules()]
    weights = {k: v.clone() for k, v in network.named_parameters()}
    means = {k: v.clone() for k, v in network.named_buffers() if "running_mean" in k}
    options = {"paths": {"paths": [[1, 2, 3, 4]]}, "policy": {"policy": rnp.policies.Random()}, "default": {}}[how]
    rnp.recalibrate(network, (images(4, i).float() for i in range(3)), **options)
    assert [m.training for m in network.modules()] == modes and network.policy is policy
    assert (network.penalty_shift, network.max_macs) == (-0.1, 0.9)
    assert all(torch.equal(v, weights[k]) for k, v in network.named_parameters())
    assert all(m.momentum == 0.1 for m in network.modules() if hasattr(m, "momentum"))
    moved = [not torch.equal(v, means[k]) for k, v in network.named_buffers() if "running_mean" in k]
    assert all(moved)


def test_recalibration_by_policy_matches_its_paths(nets):
    """One path as a policy's mixed batch and as slices: the same statistics."""
    a = rnp.convert(nets.make("resnet-bottleneck", torch.float64), images(1, 0), K)
    b = rnp.convert(nets.make("resnet-bottleneck", torch.float64), images(1, 0), K)
    loader = [images(4, i) for i in range(3)]
    rnp.recalibrate(a, loader, paths=[[3, 1, 2, 4]])
    rnp.recalibrate(b, loader, policy=rnp.policies.Fixed([3, 1, 2, 4]))
    for (key, p), q in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
        torch.testing.assert_close(p, q, msg=lambda text, key=key: f"{key}: {text}")


def test_recalibration_errors(nets):
    network = rnp.convert(nets.make("vgg"), images(1, 0).float(), K)
    with pytest.raises(ValueError, match="gave no batch"):
        rnp.recalibrate(network, [])
    with pytest.raises(ValueError, match="paths or a policy"):
        rnp.recalibrate(network, [], paths=[[1, 1, 1]], policy=rnp.policies.FullWidth())
