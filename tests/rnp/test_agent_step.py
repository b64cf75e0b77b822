"""`torch.ops.rnp.agent_step` against the agent in plain torch, in float64 and float32."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import rnp
from rnp.agent import AgentState, greedy_actions
from rnp_kernels import _C

OP = torch.ops.rnp.agent_step.default

CASES = {  # channels, hidden, code, actions, samples
    "default": (64, 32, 32, 4, 33),
    "one-sample": (64, 32, 32, 4, 1),
    "odd-sizes": (13, 21, 11, 3, 5),
    "one-of-each": (1, 1, 1, 1, 2),
    "long-rows": (513, 32, 32, 8, 70),
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


def make(case: str, previous_action: bool = True) -> tuple[rnp.Agent, Tensor, Tensor, Tensor]:
    channels, hidden, code, k, n = CASES[case]
    torch.manual_seed(0)
    agent = rnp.Agent([channels], k, hidden, code, previous_action=previous_action)
    for p in agent.parameters():
        nn.init.normal_(p, std=0.5)
    agent.set_feature_statistics([torch.randn(channels)], [torch.rand(channels) + 0.5])
    x, h = torch.randn(n, channels), torch.randn(n, hidden)
    return agent.requires_grad_(False).eval(), x, h, torch.randint(1, k + 1, (n,), dtype=torch.int32)


def arguments(agent: rnp.Agent) -> tuple[Tensor, ...]:
    rnn, decoder, encoder = agent.rnn, agent.decoders[0], agent.encoders[0]
    return (
        agent.mean_0, agent.inv_std_0, encoder.weight, encoder.bias, rnn.weight_ih, rnn.weight_hh, rnn.bias_ih,
        rnn.bias_hh, decoder.weight, decoder.bias,
    )  # fmt: skip


def plain(agent: rnp.Agent, x: Tensor, h: Tensor | None, previous: Tensor | None) -> tuple[Tensor, Tensor]:
    state = AgentState(0.0, hidden=h, previous=previous)
    q = agent.step(0, x, state)
    return state.hidden, q


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("first", [False, True])
def test_matches_plain_torch(isa, case, first):
    agent, x, h, previous = make(case)
    if first:
        h = previous = None
    shift, channels = -0.2, 37
    hidden, q, action, out_prefix = OP(x, h, previous, *arguments(agent), shift, channels)
    native = plain(agent, x, h, previous)
    truth = plain(agent.double(), x.double(), None if h is None else h.double(), previous)
    for name, ours, theirs, exact in zip(("hidden", "q"), (hidden, q), native, truth, strict=True):
        error, allowed = (ours - exact).abs().max(), 2 * (theirs - exact).abs().max() + 2e-6
        assert error <= allowed, f"{name}: {error} > {allowed}"
    k = q.shape[1]
    assert torch.equal(action, greedy_actions(q, shift)) and action.dtype is torch.int32
    assert out_prefix.tolist() == [-(-a * channels // k) for a in action.tolist()] and out_prefix.dtype is torch.int32


@pytest.mark.parametrize("case", CASES)
def test_the_same_bits_alone_and_in_any_batch(isa, case):
    agent, x, h, previous = make(case)
    together = OP(x, h, previous, *arguments(agent), 0.1, 8)
    for i in range(0, len(x), 7):
        part = slice(i, i + 3)
        for a, b in zip(OP(x[part], h[part], previous[part], *arguments(agent), 0.1, 8), together, strict=True):
            assert torch.equal(a, b[part])


def test_threads_change_nothing():
    agent, x, h, previous = make("long-rows")
    x, h, previous = x.repeat(8, 1), h.repeat(8, 1), previous.repeat(8)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(OP(x, h, previous, *arguments(agent), 0.1, 8))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_without_the_previous_action():
    agent, x, h, _ = make("default", previous_action=False)
    hidden, q, _, _ = OP(x, h, None, *arguments(agent), 0.0, 8)
    expected = plain(agent, x, h, None)
    torch.testing.assert_close((hidden, q), expected, rtol=1e-4, atol=1e-5)


def test_ties_go_to_the_smaller_action_and_nan_stays_in_its_sample():
    agent, x, h, previous = make("default")
    nn.init.zeros_(agent.decoders[0].weight)
    nn.init.zeros_(agent.decoders[0].bias)
    assert OP(x, h, previous, *arguments(agent), 0.0, 8)[2].unique().tolist() == [1]
    assert OP(x, h, previous, *arguments(agent), 1e-6, 8)[2].unique().tolist() == [4]
    agent, x, h, previous = make("default")
    clean = OP(x, h, previous, *arguments(agent), 0.0, 8)
    x = x.clone()
    x[3] = float("nan")
    dirty = OP(x, h, previous, *arguments(agent), 0.0, 8)
    others = torch.arange(len(x)) != 3
    assert all(torch.equal(a[others], b[others]) for a, b in zip(clean, dirty, strict=True))
    assert dirty[1][3].isnan().all() and 1 <= dirty[2][3] <= 4


def test_large_values_saturate():
    agent, x, h, previous = make("default")
    hidden, q, _, _ = OP(x * 1e4, h, previous, *arguments(agent), 0.0, 8)
    expected = plain(agent, x * 1e4, h, previous)
    assert hidden.isfinite().all()
    torch.testing.assert_close((hidden, q), expected, rtol=1e-3, atol=1e-3)


def test_strided_arguments_and_an_empty_batch():
    agent, x, h, previous = make("default")
    expected = OP(x, h, previous, *arguments(agent), 0.0, 8)
    wide = torch.zeros(len(x), 2 * x.shape[1])
    wide[:, ::2] = x
    got = OP(wide[:, ::2], h.t().contiguous().t(), previous, *arguments(agent), 0.0, 8)
    assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))
    empty = OP(x[:0], h[:0], previous[:0], *arguments(agent), 0.0, 8)
    assert [tuple(t.shape) for t in empty] == [(0, 32), (0, 4), (0,), (0,)]


def test_errors_name_the_argument():
    agent, x, h, previous = make("default")
    rest = (*arguments(agent), 0.0, 8)
    with pytest.raises(RuntimeError, match=r"agent_step: hidden must have shape \(33, 32\); got \(33, 31\)"):
        OP(x, h[:, 1:], previous, *rest)
    with pytest.raises(RuntimeError, match="agent_step: pooled must be Float"):
        OP(x.double(), h, previous, *rest)
    with pytest.raises(RuntimeError, match=r"previous_action must lie in 1\.\.\.4; got 0 at sample 32"):
        previous[-1] = 0
        OP(x, h, previous, *rest)
    lean, x, h, previous = make("default", previous_action=False)
    with pytest.raises(RuntimeError, match="previous_action needs its k columns"):
        OP(x, h, previous, *arguments(lean), 0.0, 8)


def test_opcheck():
    agent, x, h, previous = make("odd-sizes")
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_static", "test_aot_dispatch_dynamic")
    torch.library.opcheck(OP, (x, h, previous, *arguments(agent), 0.1, 8), test_utils=tests)
    torch.library.opcheck(OP, (x, None, None, *arguments(agent), 0.1, 8), test_utils=tests)
