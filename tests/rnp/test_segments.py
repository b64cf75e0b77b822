"""Runs of layers in one operator, `torch.ops.rnp.run_segment`: the same bits as one operator a layer."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import Tensor, nn

import rnp
import rnp.network
import rnp_kernels.segment

K = 4
OP = torch.ops.rnp.run_segment.default


def images(n: int = 6, seed: int = 1) -> Tensor:
    return torch.randn(n, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


def make(nets, name: str, policy: str) -> rnp.PrunedNetwork:
    network = nets.randomised(rnp.convert(nets.make(name), images(1), K), seed=3).requires_grad_(False)
    if policy == "fixed":
        actions = torch.randint(1, K + 1, (6, len(network.layers)), generator=torch.Generator().manual_seed(2))
        network.policy = rnp.policies.Fixed(actions)
    if policy == "agent":
        torch.manual_seed(0)
        agent = rnp.Agent(network.feature_sizes, K).eval().requires_grad_(False)
        nn.init.normal_(agent.decoders[0].weight, std=3.0)
        features = network(images(16, 5), return_trace="features")[1].features
        agent.set_feature_statistics([f.mean(0) for f in features], [f.std(0) for f in features])
        network.policy = agent
        network.set_budget(0.1)
    return network


def by_layers(network: rnp.PrunedNetwork, x: Tensor, monkeypatch) -> tuple[Tensor, Tensor]:
    """The output and the actions with one operator a layer."""
    with monkeypatch.context() as patch:
        patch.setattr(rnp.network, "OPERATOR", lambda *arguments: rnp.network._OPERATOR(*arguments))
        output, trace = network(x, return_trace=True)
    return output, trace.actions


def count_calls(monkeypatch) -> list[str]:
    """The programs of the calls from now on."""
    programs: list[str] = []

    def counted(program: str, *arguments):
        programs.append(program)
        return OP(program, *arguments)

    monkeypatch.setattr(rnp.segments, "RUN_SEGMENT", counted)
    return programs


@pytest.mark.parametrize("policy", ["full", "fixed", "agent"])
def test_same_bits_as_one_operator_a_layer(nets, name, policy, monkeypatch):
    x, network = images(), make(nets, name, policy)
    expected, actions = by_layers(network, x, monkeypatch)
    programs = count_calls(monkeypatch)
    output, trace = network(x, return_trace=True)
    assert programs and torch.equal(output, expected) and torch.equal(trace.actions, actions)
    assert trace.macs.tolist() == (network.macs(actions) + getattr(network.policy, "macs_per_image", 0)).tolist()
    assert torch.equal(network(x), expected)
    if policy == "agent":
        assert len(actions.unique()) > 1 and any("decide" in program for program in programs)


@pytest.mark.parametrize("name", ["vgg", "resnet-basic", "resnet-bottleneck"])
def test_all_layers_are_one_call(nets, name, monkeypatch):
    """Decisions included; only the classifier is left to Python."""
    x, network = images(), make(nets, name, "agent")
    network(x)
    programs = count_calls(monkeypatch)
    network(x)
    assert len(programs) == 1
    decisions = [line for line in programs[0].splitlines() if line.startswith("decide")]
    assert len(decisions) == len(network.layers)


def test_stale_memory_is_never_read(nets, name):
    """The buffer of activations is full of NaN when narrow samples use it again."""
    x, network = images(), make(nets, name, "fixed")
    expected = network(x)
    wide, network.policy = network.policy, rnp.policies.Fixed([K] * len(network.layers))
    assert network(torch.full_like(x, float("nan"))).isnan().all()
    network.policy = wide
    assert torch.equal(network(x), expected)


def test_two_threads(nets):
    """Each with images of its own, at once: the same bits as one after the other."""
    network = make(nets, "resnet-basic", "agent")
    batches = [images(6, seed) for seed in range(4)]
    expected = [network(x) for x in batches]
    wrong: list[int] = []

    def work(index: int) -> None:
        for _ in range(20):
            if not torch.equal(network(batches[index]), expected[index]):
                wrong.append(index)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(batches))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_memory_does_not_grow(nets):
    """After some calls, hundreds more leave the process as large as it was, whatever the threads that make them."""
    network, x = make(nets, "resnet-basic", "agent"), images(64)

    def resident() -> int:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * 4096

    def work(calls: int) -> None:
        for _ in range(calls):
            network(x)
        for _ in range(20):
            thread = threading.Thread(target=network, args=(x,))
            thread.start()
            thread.join()

    work(20)
    before = resident()
    work(300)
    grown = resident() - before
    assert grown < 2**21, f"{grown} bytes more than before; an activation has 458,752"


def test_memory_can_be_given_back(nets):
    network, x = make(nets, "vgg", "fixed"), images()
    expected = network(x)
    rnp_kernels.segment.release_memory()
    assert torch.equal(network(x), expected)


def test_packed_weights_are_shared_by_all_plans(nets):
    network = make(nets, "vgg", "agent")
    network(images())
    packed = {name: pack[0].data.data_ptr() for name, pack in network._packs.items()}
    network.policy = rnp.policies.FullWidth()
    network(images())
    network(images(), return_trace=True)
    assert len(packed) == 4 and packed == {name: pack[0].data.data_ptr() for name, pack in network._packs.items()}


def test_a_changed_agent_is_noticed(nets, monkeypatch):
    """In place, by assignment, and by assignment of data."""
    network, x = make(nets, "vgg", "agent"), images()
    before = network(x)
    agent = network.policy
    with torch.no_grad():
        agent.decoders[0].bias += torch.tensor([50.0, 0, 0, 0])
    assert not torch.equal(network(x), before)
    assert network(x, return_trace=True)[1].actions.eq(1).all()
    agent.decoders[0].bias = nn.Parameter(torch.tensor([0.0, 0, 0, 50]), requires_grad=False)
    assert network(x, return_trace=True)[1].actions.eq(4).all()
    agent.decoders[0].bias.data = torch.tensor([0.0, 50, 0, 0])
    assert network(x, return_trace=True)[1].actions.eq(2).all()


PROGRAM = """slots 3 2 2
in map 0
in index 0 4
prefix 0 1 8 4
conv 0 -1 1 -1 1 -1 0 1 -1 0 8 0 3 8 1 3 3 1 1 1 1 1 1 1 1 1 0
max_pool 1 2 1 2 2 2 2 0 0 0
out map 2
out index 1
out vector 0"""


def arguments() -> tuple[str, list[Tensor], list[Tensor], float]:
    weight = torch.randn(8, 3, 3, 3, generator=torch.Generator().manual_seed(0))
    tables = torch.cat([torch.ones(8), torch.zeros(8)])
    return PROGRAM, [images(3), torch.tensor([1, 4, 2]).int()], [tables, rnp_kernels.ops.pack_weight(weight)], 0.0


def test_opcheck_and_the_fake_kernel(nets):
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_static")
    torch.library.opcheck(OP, arguments(), test_utils=tests)
    pooled, prefix, mean = OP(*arguments())
    assert pooled.shape == (3, 8, 8, 8) and prefix.tolist() == [2, 8, 4] and mean.shape == (3, 8)


@pytest.mark.parametrize(
    "old, new, text",
    [
        ("slots 3", "slots -3", "slots needs"),
        ("conv 0", "convolve 0", "one of the known ones"),
        ("max_pool 1 2", "max_pool 2 2", "written before it is read"),
        ("max_pool 1 2", "max_pool 1 1", "written once"),
        ("max_pool 1 2", "max_pool 1 9", "below the number of slots"),
        ("prefix 0 1 8 4", "prefix 0 1 9 4", "prefix must not exceed"),
        ("prefix 0 1 8 4", "prefix 0 1 8 3", "group up to k"),
        ("1 1 1 1 1 0\n", "1 1 1 1 1\n", "27 operands"),
        ("8 0 3 8 1 3 3", "9 0 3 8 1 3 3", "table must lie"),
        ("8 0 3 8 1 3 3", "8 0 3 8 1 5 5", "packed weights do not belong"),
        ("8 0 3 8 1 3 3", "8 0 4 8 1 3 3", "needs 4 input channels; got 3"),
        ("2 2 2 2 0 0 0", "99 99 2 2 0 0 0", "window must fit"),
        ("out map 2", "out map 0", "written by a step"),
    ],
)
def test_a_wrong_program_is_refused(old, new, text):
    program, *rest = arguments()
    assert old in program
    with pytest.raises(RuntimeError, match=text):
        OP(program.replace(old, new), *rest)


def test_wrong_tensors_are_refused():
    program, (x, group), constants, shift = arguments()
    for inputs, given, text in (
        ([x], constants, "needs 2 inputs; got 1"),
        ([x.double(), group], constants, "must be Float"),
        ([x, group[:2]], constants, r"shape \(3,\); got \(2\)"),
        ([x, group.long()], constants, "must be Int"),
        ([x, group + 1], constants, "must lie in 0…4; got 5 for sample 1"),
        ([x, group], constants[:1], "constant is missing"),
        ([x, group], [constants[0].double(), constants[1]], "a constant must be Float"),
    ):
        with pytest.raises(RuntimeError, match=text):
            OP(program, inputs, given, shift)
