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


def test_operator_check():
    torch.library.opcheck(OP, tensors("odd"))


def test_when_it_stands_in_for_the_module():
    module, x = nn.Linear(8, 4), torch.randn(2, 8)
    assert takes_linear(module, x)
    assert not takes_linear(module, x[None]) and not takes_linear(module, x.double())
    with torch.autocast("cpu", torch.bfloat16):
        assert not takes_linear(module, x)
    module.register_forward_hook(lambda *arguments: None)
    assert not takes_linear(module, x)


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
