"""torch.compile(fullgraph=True) and torch.export of a `PrunedNetwork` in eval mode: the claims of its docstring."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import rnp

K = 4


def images(n: int, seed: int = 1) -> Tensor:
    return torch.randn(n, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


def make(nets, name: str, policy: str) -> rnp.PrunedNetwork:
    network = rnp.convert(nets.make(name), images(1), K).requires_grad_(False)
    if policy == "fixed":
        network.policy = rnp.policies.Fixed([1 + i % K for i in range(len(network.layers))])
    if policy.startswith("agent"):
        torch.manual_seed(0)
        agent = rnp.Agent(network.feature_sizes, K).eval().requires_grad_(False)
        nn.init.normal_(agent.decoders[0].weight, std=3.0)
        features = network(images(16, 5), return_trace="features")[1].features
        agent.set_feature_statistics([f.mean(0) for f in features], [f.std(0) for f in features])
        network.policy = agent
        assert len(network(images(8), return_trace=True)[1].actions.unique()) > 1
        if policy == "agent-capped":
            network.set_budget(0.05, (agent.macs_per_image + network.counter.cheapest) / network.dense_macs + 0.2)
    return network


@pytest.mark.parametrize(
    "how, name, policy",
    [
        ("compile", "vgg", "agent-capped"),
        ("compile", "resnet-basic", "fixed"),
        ("export", "resnet-basic", "agent"),
        ("export", "vgg", "agent-capped"),
        ("export", "pre-activation", "full"),
    ],
)
def test_one_static_graph(nets, how, name, policy):
    """Other images, another batch size: other actions from the same graph."""
    network, first, second = make(nets, name, policy), images(4), images(7, 2)
    expected = [network(first), network(second)]
    if how == "compile":
        torch._dynamo.reset()
        program = torch.compile(network, fullgraph=True, backend="aot_eager")
    else:
        batch = torch.export.Dim("batch", min=1, max=64)
        program = torch.export.export(network, (first,), dynamic_shapes=({0: batch},)).module()
    for x, y in zip((first, second), expected, strict=True):
        torch.testing.assert_close(program(x), y, rtol=1e-5, atol=1e-6)


def test_a_network_that_never_ran_says_so(nets):
    network = rnp.convert(nets.make("vgg"), images(1), K).requires_grad_(False)
    with pytest.raises(RuntimeError, match="run it once in eval mode before"):
        torch.export.export(network, (images(2),))
