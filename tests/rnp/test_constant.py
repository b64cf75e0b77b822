"""Constants of policies and budgets on a device: copied at the first batch, not at every one.

The meta device stands in for a GPU; on one, tests/conformance/test_on_a_gpu.py captures whole networks.
"""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import rnp
from rnp.constant import Constant
from rnp.macs import Cap

K = 4
META = torch.device("meta")


class Copies(TorchDispatchMode):
    """How many operators bring something to another device, or to another dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.__name__.partition(".")[0] in ("_to_copy", "copy_")
        return func(*args, **(kwargs or {}))


def copies(call) -> int:
    with Copies() as counted:
        call()
    return counted.count


@pytest.fixture
def network(nets):
    return nets.randomised(rnp.convert(nets.make("resnet-basic"), images(1), K), seed=3).requires_grad_(False)


def images(n: int = 6) -> Tensor:
    return torch.randn(n, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def drawn(network: rnp.PrunedNetwork, n: int = 6) -> Tensor:
    return torch.randint(1, K + 1, (n, len(network.layers)), generator=torch.Generator().manual_seed(2))


def test_a_constant_is_copied_once_a_device():
    constant = Constant(torch.arange(6).view(2, 3).t())
    assert constant.on(torch.device("cpu")) is constant.tensor
    assert copies(lambda: constant.on(META)) and not copies(lambda: constant.on(META))
    kept = constant.on(META)
    assert kept.shape == (3, 2) and kept.is_contiguous()
    constant.tensor.add_(1)
    assert copies(lambda: constant.on(META)) and constant.on(META) is not kept
    for other in (copy.deepcopy(constant), pickle.loads(pickle.dumps(constant))):
        assert torch.equal(other.tensor, constant.tensor) and copies(lambda other=other: other.on(META))


def test_a_copy_made_in_inference_mode_serves_outside():
    constant = Constant(torch.arange(3))
    with torch.inference_mode():
        kept = constant.on(META)
    assert not kept.is_inference() and constant.on(META) is kept


@pytest.mark.parametrize("which", ["each", "all", "uniform", "full"])
def test_policies_copy_at_the_first_batch_alone(network, which):
    actions = drawn(network)
    policy = {"each": rnp.policies.Fixed(actions), "all": rnp.policies.Fixed(actions[0]),
              "uniform": rnp.policies.Uniform(0.5), "full": rnp.policies.FullWidth()}[which]  # fmt: skip
    first = policy.start(network, 6, META)
    assert first.device == META
    assert not copies(lambda: policy.start(network, 6, META))


def test_fixed_follows_its_actions(network):
    """Assigned, or changed in place; a copy of the policy has its own."""
    x, actions = images(), drawn(network).int()
    policy = network.policy = rnp.policies.Fixed(actions)
    policy.start(network, 6, META)
    before = network(x)
    actions.copy_(5 - actions)
    after = network(x)
    assert not torch.equal(before, after) and copies(lambda: policy.start(network, 6, META))
    network.policy = rnp.policies.Fixed(actions.clone())
    assert torch.equal(network(x), after)
    network.policy = policy
    for other in (copy.deepcopy(policy), pickle.loads(pickle.dumps(policy))):
        assert torch.equal(other.actions, policy.actions) and repr(other) == repr(policy)
    policy.actions = [K] * len(network.layers)
    assert network(x, return_trace=True)[1].actions.unique().tolist() == [K]
    assert copies(lambda: policy.start(network, 6, META))
    actions[0, 0] = K + 1
    policy.actions = actions
    with pytest.raises(ValueError, match="1…4"):
        network(x)
    actions[0, 0] = K
    network(x)
    with pytest.raises(ValueError, match=r"\(L,\) or \(N, L\)"):
        policy.actions = torch.ones(1, 2, 3)
    assert policy.actions is actions


def test_budgets_and_traces_copy_their_tables_once(network):
    counter, n = network.counter, 6
    cap = Cap(counter)

    def all_of_it() -> None:
        actions = torch.ones((n, len(network.layers)), dtype=torch.int64, device=META)
        counter.count(actions)
        taken: list[Tensor] = []
        spent = torch.full((n,), cap.cheapest, device=META)
        for decision in range(len(network.layers)):
            taken.append(cap.lower(decision, actions[:, decision], taken, spent, 1 << 40))

    all_of_it()
    assert copies(all_of_it) == len(network.layers)  # `spent`, written in place once a decision
