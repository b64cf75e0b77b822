"""`torch.ops.rnp.linear` against torch's own in float64: every remainder, bits in any batch, what it refuses."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import rnp
import rnp_kernels.linear  # noqa: F401 (registers the fake kernel)
from rnp.plan_builder import takes_linear
from rnp_kernels import _C

OP = torch.ops.rnp.linear.default
SHAPES = {  # samples, inputs, outputs
    "whole": (8, 2048, 64),
    "odd": (7, 1237, 45),
    "one of each": (1, 1, 1),
    "fewer inputs than lanes": (3, 5, 9),
    "more samples than a block": (131, 70, 33),
    "one group, long rows": (5, 17000, 6),
    "no inputs": (2, 0, 3),
    "no samples": (0, 8, 4),
}


@pytest.fixture(params=["portable", "avx2", "avx512"])
def isa(request: pytest.FixtureRequest):
    before = _C.isa()
    try:
        _C.set_isa(request.param)
    except RuntimeError as error:
        pytest.skip(str(error))
    yield request.param
    _C.set_isa(before)


def tensors(shape: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    samples, inputs, outputs = SHAPES[shape]
    g = torch.Generator().manual_seed(0)
    return tuple(torch.randn(s, generator=g) for s in ((samples, inputs), (outputs, inputs), (outputs,)))


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_error_is_at_most_twice_torchs(isa, shape, with_bias):
    x, w, bias = tensors(shape)
    bias = bias if with_bias else None
    truth = F.linear(x.double(), w.double(), None if bias is None else bias.double())
    ours, torchs = OP(x, w, bias), F.linear(x, w, bias)
    assert ours.shape == torchs.shape
    tiny = 1e-6 * (truth.norm() + 1e-30)
    assert (ours - truth).norm() <= 2 * (torchs - truth).norm() + tiny


@pytest.mark.parametrize("shape", SHAPES)
def test_the_same_bits_alone_and_in_any_batch(isa, shape, threads):
    x, w, bias = tensors(shape)
    torch.set_num_threads(1)
    whole = OP(x, w, bias)
    for count in (1, 2):
        torch.set_num_threads(count)
        assert torch.equal(OP(x.flip(0), w, bias).flip(0), whole)
        for samples in range(1, min(14, len(x))):
            assert torch.equal(OP(x[:samples], w, bias), whole[:samples]), f"{samples} samples"


PREFIXES = {  # inputs, inputs of a channel, samples
    "runs of 49": (10 * 49, 49, 9),
    "single inputs": (67, 1, 23),
    "wide": (3 * 700, 700, 70),
}


def prefixed(case: str) -> tuple[torch.Tensor, ...]:
    """x with NaN beyond the prefixes, weight, bias, prefixes (0, all and everything between), x with zeros there."""
    inputs, run, samples = PREFIXES[case]
    g = torch.Generator().manual_seed(0)
    x, w, bias = (torch.randn(size, generator=g) for size in ((samples, inputs), (37, inputs), (37,)))
    prefix = torch.randint(0, inputs // run + 1, (samples,), generator=g, dtype=torch.int32)
    prefix[:2] = torch.tensor([0, inputs // run])
    dead = torch.arange(inputs) >= run * prefix[:, None]
    return x.masked_fill(dead, torch.nan), w, bias, prefix, x.masked_fill(dead, 0)


@pytest.mark.parametrize("case", PREFIXES)
def test_prefixes_leave_the_rest_unread(isa, case):
    x, w, bias, prefix, zeroed = prefixed(case)
    ours = OP(x, w, bias, prefix, PREFIXES[case][1])
    truth, torchs = F.linear(zeroed.double(), w.double(), bias.double()), F.linear(zeroed, w, bias)
    assert (ours - truth).norm() <= 2 * (torchs - truth).norm() + 1e-6 * truth.norm()
    assert torch.equal(ours[0], bias)
    full = torch.full_like(prefix, x.shape[1] // PREFIXES[case][1])
    assert torch.equal(OP(zeroed, w, bias, full, PREFIXES[case][1]), OP(zeroed, w, bias))


@pytest.mark.parametrize("case", PREFIXES)
def test_prefixes_do_not_depend_on_the_company(isa, case, threads):
    x, w, bias, prefix, _ = prefixed(case)
    w[:, -1] = torch.inf  # what a sample does not reach must not meet its sums as 0 * infinity either
    run = PREFIXES[case][1]
    torch.set_num_threads(1)
    alone = torch.cat([OP(x[n : n + 1], w, bias, prefix[n : n + 1], run) for n in range(len(x))])
    for count in (1, 2):
        torch.set_num_threads(count)
        torch.testing.assert_close(OP(x, w, bias, prefix, run), alone, rtol=0, atol=0, equal_nan=True)
        backwards = OP(x.flip(0), w, bias, prefix.flip(0), run).flip(0)
        torch.testing.assert_close(backwards, alone, rtol=0, atol=0, equal_nan=True)


def test_strided_operands_and_nan():
    x, w, bias = tensors("odd")
    wide = torch.randn(2 * x.shape[0], x.shape[1])
    wide[::2] = x
    columns = w.t().contiguous().t()
    assert torch.equal(OP(wide[::2], columns, bias), OP(x, w, bias))
    x[3, 1236] = torch.nan
    y = OP(x, w, bias)
    assert y[3].isnan().all() and y[:3].isfinite().all() and y[4:].isfinite().all()


def test_what_it_refuses():
    x, w, bias = tensors("odd")
    with pytest.raises(RuntimeError, match=r"linear: input and weight must be \(N, C\) and \(K, C\)"):
        OP(x[:, :-1], w, bias)
    with pytest.raises(RuntimeError, match="linear: input and weight must be Float; got Double"):
        OP(x.double(), w, bias)
    with pytest.raises(RuntimeError, match="linear: bias must be Float of shape"):
        OP(x, w, bias[:-1])
    prefix = torch.full((7,), 1237, dtype=torch.int32)
    with pytest.raises(RuntimeError, match="linear: in_prefix must be int32; got Long"):
        OP(x, w, bias, prefix.long())
    with pytest.raises(RuntimeError, match="linear: in_prefix must lie in 0…1237; got 1238 for sample 2"):
        OP(x, w, bias, prefix.index_fill(0, torch.tensor([2]), 1238))
    with pytest.raises(RuntimeError, match=r"linear: in_prefix must have shape \(7,\)"):
        OP(x, w, bias, prefix[1:])
    with pytest.raises(
        RuntimeError, match="linear: channel_inputs must be positive and divide the inputs; got 2 and 1237"
    ):
        OP(x, w, bias, prefix, 2)


def test_operator_check():
    torch.library.opcheck(OP, tensors("odd"))
    x, w, bias, prefix, _ = prefixed("runs of 49")
    torch.library.opcheck(OP, (x.nan_to_num(), w, bias, prefix, 49))


def test_when_it_stands_in_for_the_module():
    module, x = nn.Linear(8, 4), torch.randn(2, 8)
    assert takes_linear(module, x)
    assert not takes_linear(module, x[None]) and not takes_linear(module, x.double())
    with torch.autocast("cpu", torch.bfloat16):
        assert not takes_linear(module, x)
    module.register_forward_hook(lambda *arguments: None)
    assert not takes_linear(module, x)


FLATTEN = ["module", "function", "view", "view of a size", "reshape, dropout and relu", "mean"]


@pytest.mark.parametrize("flatten", FLATTEN)
def test_a_converted_network_reads_live_channels_only(flatten):
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.drop = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Dropout(0.5)
            self.flat, self.fc = nn.Flatten(), nn.Linear(8 if flatten == "mean" else 8 * 16, 5)

        def forward(self, x):
            x = self.second(self.first(x).relu()).relu()
            if flatten == "reshape, dropout and relu":
                return self.fc(self.drop(x.reshape(x.shape[0], -1)).relu())
            if flatten == "mean":
                return self.fc(x.mean((2, 3)))
            if flatten == "view":
                return self.fc(x.view(x.size(0), -1))
            if flatten == "view of a size":
                return self.fc(x.view(size=(-1, 8 * 16)))
            return self.fc(self.flat(x) if flatten == "module" else torch.flatten(x, 1))

    torch.manual_seed(0)
    model, x = Net().eval(), torch.randn(4, 3, 8, 8)
    network = rnp.convert(model, x[:1], 4)
    assert any((row.name, row.action) == ("fc", "reads the prefix") for row in network.report.rows)
    with torch.no_grad():
        whole = model(x)
        torch.testing.assert_close(network(x), whole, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(network(x), whole, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(network.forward_path(x, [4]), whole, rtol=1e-4, atol=1e-5)
    actions = torch.tensor([[1], [2], [4], [3]], dtype=torch.int32)
    network.policy = rnp.policies.Fixed(actions)
    positions = network.backbone.get_submodule("fc").in_features // 8
    fewer = (8 - 2 * actions[:, 0]) * (9 * 8 * 16 + positions * 5)  # dead channels of the second layer, and behind it
    assert (network.dense_macs - network.macs(actions)).tolist() == fewer.tolist()
    with torch.no_grad():
        expected = network(x)
        for n, path in enumerate(actions.tolist()):
            torch.testing.assert_close(network.forward_path(x, path)[n], expected[n], rtol=1e-4, atol=1e-5)
        weight = network.backbone.get_submodule("fc").weight
        weight[:, 2 * positions :] = torch.nan  # of channels that the first sample has not
        found = network(x)
    assert torch.equal(found[0], expected[0]) and found[1:].isnan().all()


def test_a_converted_network_keeps_its_hooks_and_its_logits():
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 16, 10)
    ).eval()
    x, seen = torch.randn(3, 3, 8, 8), []
    network = rnp.convert(model, x[:1], 4)
    with torch.no_grad():
        whole = network(x)
        torch.testing.assert_close(whole, model(x), rtol=1e-4, atol=1e-5)
        assert torch.equal(torch.cat([network(x[n : n + 1]) for n in range(3)]), whole), "logits depend on the company"
        network.backbone.get_submodule("5").register_forward_hook(lambda *arguments: seen.append(1))
        torch.testing.assert_close(network(x), whole, rtol=1e-4, atol=1e-5)
    assert seen == [1]
