"""What a converted network does between its convolutions where each launch counts: seen on a CPU, without timing.

float64 takes the path of a GPU here: one operator a layer. On a GPU, tests/conformance/test_on_a_gpu.py captures whole
networks.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import rnp
import rnp_kernels
from rnp import graph
from rnp.fold import tables

K = 4
VIEWS = {"view", "expand", "t", "transpose", "select", "slice", "unbind", "unsqueeze", "squeeze", "detach", "permute"}


class Counted(TorchDispatchMode):
    """Names of the operators that run; views, which launch nothing, are left out."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.__name__.partition(".")[0]
        if name not in VIEWS:
            self.names.append(name)
        return func(*args, **(kwargs or {}))


class Launch:
    """`prefix_conv2d` without the work: what the network hands to it is kept."""

    def __init__(self) -> None:
        self.calls: list[tuple] = []
        self.operator = rnp.network.OPERATOR

    def __call__(self, *arguments):
        self.calls.append(arguments)
        return self.operator(*arguments)


def images(n: int = 6, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(n, 3, 16, 16, generator=torch.Generator().manual_seed(1)).to(dtype)


def make(nets, name: str, dtype: torch.dtype = torch.float64) -> rnp.PrunedNetwork:
    network = nets.randomised(rnp.convert(nets.make(name, dtype), images(1, dtype), K), seed=3).requires_grad_(False)
    return network.eval()


def drawn(network: rnp.PrunedNetwork, n: int = 6) -> Tensor:
    return torch.randint(1, K + 1, (n, len(network.layers)), generator=torch.Generator().manual_seed(2))


def policies(network: rnp.PrunedNetwork) -> dict[str, object]:
    actions = drawn(network)
    return {"each": rnp.policies.Fixed(actions), "all": rnp.policies.Fixed(actions[0]),
            "uniform": rnp.policies.Uniform(0.5)}  # fmt: skip


@pytest.mark.parametrize("which", ["each", "all", "uniform"])
def test_a_handful_of_operators_makes_all_prefixes(nets, name, which, monkeypatch):
    """However deep the network: stack, select, amax, cast, gather, and one for the policy's actions.

    A BatchNorm that no convolution takes in adds two look-ups of its own, the rows of scale and shift, and a sum where
    one group names the row and another the prefix.
    """
    network, x = make(nets, name), images()
    network.policy = policies(network)[which]
    launch = Launch()
    monkeypatch.setattr(rnp.network, "OPERATOR", launch)
    network(x)
    launch.calls.clear()
    with Counted() as counted:
        network(x)
    with_prefixes = list(counted.names)
    network.policy = rnp.policies.FullWidth()
    network(x)
    with Counted() as counted:
        network(x)
    norms = [step for step in network._steps if isinstance(step, graph.NormStep)]
    sums = sum(None not in (step.row_group, step.group) and step.row_group != step.group for step in norms)
    assert len(with_prefixes) - len(counted.names) <= 6 + 2 * len(norms) + sums, with_prefixes
    for arguments in launch.calls:
        for index in (arguments[7], arguments[8], arguments[10]):  # in_prefix, out_prefix, row
            assert index is None or (index.dtype is torch.int32 and index.is_contiguous())


def test_the_prefixes_are_those_of_the_actions(nets, name, monkeypatch):
    """float64 makes them all at once, float32 one after the other: the same ones reach every convolution."""
    found = {}
    for dtype in (torch.float64, torch.float32):
        network = make(nets, name, dtype)
        network.policy = rnp.policies.Fixed(drawn(network))
        launch = Launch()
        monkeypatch.setattr(rnp.network, "OPERATOR", launch)  # also keeps float32 out of the segments
        network(images(dtype=dtype))
        found[dtype] = [[index if index is None else index.tolist() for index in (a[7], a[8], a[10])]
                        for a in launch.calls]  # fmt: skip
    assert found[torch.float64] == found[torch.float32] and len(found[torch.float32]) > 3


def test_actions_out_of_range_raise(nets):
    class Wrong(rnp.policies.FullWidth):
        def start(self, network, batch_size, device):
            return torch.full((batch_size,), K + 1, dtype=torch.int32, device=device)

    network = make(nets, "vgg")
    network.policy = Wrong()
    with pytest.raises(ValueError, match=r"actions of Wrong for decision 0 .* must lie in 1…4, got 5…5"):
        network(images())


def test_one_static_graph_of_the_path_of_a_gpu(nets):
    network = make(nets, "resnet-basic")
    for policy in policies(network).values():
        network.policy = policy
        expected = network(images())
        torch._dynamo.reset()
        program = torch.compile(network, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(program(images()), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["vgg", "resnet-basic"])
def test_tables_in_float32_are_those_of_the_half_precision_parameters(nets, name):
    """What a GPU gets: folded in float32, so nearer to the truth than folded in bfloat16; float32 to the bit."""
    half, single = make(nets, name, torch.bfloat16), make(nets, name, torch.float32)
    for step in half._steps:
        if not hasattr(step, "conv"):
            continue
        conv, norm = half.backbone.get_submodule(step.conv), step.norm and half.backbone.get_submodule(step.norm)
        varies = bool(norm) and step.in_group is not None
        truth = tables(conv, norm or None, varies, torch.float64)
        for wide, narrow, right in zip(
            tables(conv, norm or None, varies, torch.float32), tables(conv, norm or None, varies), truth, strict=True
        ):
            assert (wide is None) == (narrow is None)
            if wide is not None:
                assert wide.dtype is torch.float32 and narrow.dtype is torch.bfloat16 and wide.shape == narrow.shape
                assert (wide - right).abs().max() <= (narrow - right).abs().max()
                torch.testing.assert_close(wide.double(), right.double(), rtol=1e-5, atol=1e-6)
        conv, norm = single.backbone.get_submodule(step.conv), step.norm and single.backbone.get_submodule(step.norm)
        for a, b in zip(
            tables(conv, norm or None, varies), tables(conv, norm or None, varies, torch.float32), strict=True
        ):
            assert (a is None and b is None) or torch.equal(a, b)
    parameter = next(half.parameters())
    assert parameter.dtype is torch.bfloat16  # the fold worked on copies


def test_float32_obeys_torchs_tf32_setting(nets, monkeypatch):
    told = []
    monkeypatch.setattr(rnp_kernels.cuda_library, "follow_tf32", lambda: told.append(True))
    monkeypatch.setattr(rnp.network.backends, "resolve", lambda _: "cuda")
    assert rnp.network.operator_for(images()) is rnp.network.OPERATOR and told == [True]
