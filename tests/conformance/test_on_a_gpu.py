"""What only a GPU can show: streams, devices, graphs, no synchronisation, 64-bit offsets, torch.compile around it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

import rnp
import rnp_kernels
from rnp_kernels import backends, conformance, reference, testing
from rnp_kernels.max_pool2d import runs_on, takes


@pytest.fixture(params=["cuda", "triton", "reference"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each backend that runs on CUDA tensors, in force; skipped with the reason where it cannot."""
    name: str = request.param
    why_not = rnp_kernels.available_backends()[name]
    if not torch.cuda.is_available():
        why_not = why_not or "no CUDA device is visible"
    elif backends.device_of(name) == "cpu":
        why_not = "its kernels are interpreted in this process"
    if why_not is not None:
        pytest.skip(f"{name}: {why_not}")
    with rnp_kernels.backend(name), conformance.float32_products("ieee"):
        yield name


def arguments_of(name: str, dtype: torch.dtype = torch.float16, device: str = "cuda") -> testing.Tensors:
    return testing.make(testing.case(name), dtype, device)


def outputs(case: str, arguments: testing.Tensors) -> list[Tensor]:
    output, means = conformance.call(testing.case(case), arguments)
    return [conformance.defined(testing.case(case), output)] + ([] if means is None else [means])


@pytest.mark.parametrize("case", ["everything", "prefix, depthwise", "skipped tail, pooled"])
def test_a_side_stream(backend: str, case: str) -> None:
    """The kernels wait for what the current stream does before, and are seen by what it does after."""
    arguments = arguments_of(case)
    expected = outputs(case, arguments)
    clean = arguments["input"].clone()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        arguments["input"] = torch.full_like(clean, torch.nan)
        torch.cuda._sleep(20_000_000)  # about ten milliseconds
        arguments["input"].copy_(clean)
        found = outputs(case, arguments)
        copies = [tensor.clone() for tensor in found]
    stream.synchronize()
    for tensor, right in zip(copies, expected, strict=True):
        assert torch.equal(tensor, right)


def test_a_second_device(backend: str) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("there is one device")
    expected = outputs("everything", arguments_of("everything"))
    found = outputs("everything", arguments_of("everything", device="cuda:1"))  # the current device stays cuda:0
    for tensor, right in zip(found, expected, strict=True):
        assert tensor.device == torch.device("cuda:1") and torch.equal(tensor.cpu(), right.cpu())


@pytest.mark.parametrize("name", ["everything", "mixed prefixes", "prefix across groups", "skipped tail, pooled"])
def test_a_graph_replays_with_other_images_and_prefixes(backend: str, name: str) -> None:
    case = testing.case(name)
    arguments = arguments_of(name)
    conformance.call(case, arguments)  # kernels compile before the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = conformance.call(case, arguments)
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        arguments["input"].copy_(torch.randn(case.input, generator=generator))
        for prefix, limit in (("in_prefix", case.input[1]), ("out_prefix", case.out)):
            arguments[prefix].copy_(torch.randint(0, limit + 1, (case.input[0],), generator=generator))
        graph.replay()
        expected = conformance.call(case, arguments)
        live = reference.live(case.out, arguments["out_prefix"], expected[0])
        for tensor, right in zip(captured, expected, strict=True):
            if right is not None and right.dim() == 4 and case.tail == "skip":
                tensor, right = torch.where(live, tensor, 0), torch.where(live, right, 0)
            assert right is None or torch.equal(tensor, right)


def test_nothing_waits_for_the_device(backend: str) -> None:
    if backend == "reference":
        pytest.skip("plain torch")
    arguments = arguments_of("everything")
    outputs("everything", arguments)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        rnp_kernels.prefix_conv2d(**arguments)
    finally:
        torch.cuda.set_sync_debug_mode("default")


class Residual(nn.Module):
    """A stem, two residual blocks, a classifier: maxima of several actions, and two channel counts."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.convs = nn.ModuleList(nn.Conv2d(16, 16, 3, padding=1, bias=False) for _ in range(4))
        self.norms = nn.ModuleList(nn.BatchNorm2d(16) for _ in range(4))
        self.last, self.head = nn.Conv2d(16, 24, 1), nn.Linear(24, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        for i in (0, 2):
            y = torch.relu(self.norms[i](self.convs[i](x)))
            x = torch.relu(self.norms[i + 1](self.convs[i + 1](y)) + x)
        return self.head(torch.relu(self.last(x)).mean((2, 3)))


def converted(policy: str, batch: int) -> rnp.PrunedNetwork:
    torch.manual_seed(0)
    network = rnp.convert(Residual().eval(), torch.randn(1, 3, 16, 16), groups=4).eval().requires_grad_(False)
    network = network.to("cuda", torch.float16)
    actions = torch.randint(1, 5, (batch, len(network.layers)))
    if policy.startswith("agent"):
        agent = rnp.Agent(network.feature_sizes, 4).eval().requires_grad_(False)
        nn.init.normal_(agent.decoders[0].weight, std=3.0)
        network.policy = agent.cuda()
        if policy == "agent, capped":
            network.set_budget(max_macs=0.9)
    else:
        static = {"full": rnp.policies.FullWidth(), "uniform": rnp.policies.Uniform(0.5),
                  "fixed": rnp.policies.Fixed(actions[0]), "fixed, each": rnp.policies.Fixed(actions)}  # fmt: skip
        network.policy = static[policy]
    return network


@pytest.mark.parametrize("traced", [False, True], ids=["", "traced"])
@pytest.mark.parametrize("policy", ["full", "uniform", "fixed", "fixed, each", "agent", "agent, capped"])
def test_a_converted_network_is_one_graph(backend: str, policy: str, traced: bool) -> None:
    """After its first call nothing waits for the device, and a captured forward follows other images."""
    if backend == "reference":
        pytest.skip("plain torch")
    network, x = converted(policy, 6), torch.randn(6, 3, 16, 16, device="cuda", dtype=torch.float16)

    def call() -> list[Tensor]:
        if not traced:
            return [network(x)]
        logits, trace = network(x, return_trace=True)
        return [logits, trace.actions, trace.macs]

    with torch.no_grad():
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            call()
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            call()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = call()
        for seed in range(3):
            x.copy_(torch.randn(x.shape, generator=torch.Generator().manual_seed(seed)))
            graph.replay()
            for tensor, right in zip(captured, call(), strict=True):
                assert torch.equal(tensor, right)


def test_actions_out_of_range_are_clamped(backend: str) -> None:
    """Of Fixed as of a policy of one's own; looking at them would wait for the device."""
    wild = torch.tensor([-3, 0, 1, 4, 5, 2**40], device="cuda")
    network, x = converted("uniform", 6), torch.randn(6, 3, 16, 16, device="cuda", dtype=torch.float16)

    class Wild(rnp.policies.FullWidth):
        def act(self, layer: int, features: Tensor | None, state: Tensor) -> tuple[Tensor, Tensor]:
            return wild, state

    fixed = rnp.policies.Fixed(torch.ones(6, len(network.layers), device="cuda", dtype=torch.int32))
    fixed.actions.copy_(wild.clamp(-9, 9)[:, None])
    for policy in (Wild(), fixed):
        network.policy = policy
        with torch.no_grad():
            actions = network(x, return_trace=True)[1].actions
        assert actions.tolist() == [[a] * len(network.layers) for a in (1, 1, 1, 4, 4, 4)]


def test_the_same_bits_at_every_call(backend: str) -> None:
    arguments = arguments_of("everything", torch.bfloat16)
    first = outputs("everything", arguments)
    for _ in range(20):
        for tensor, again in zip(first, outputs("everything", arguments), strict=True):
            assert torch.equal(tensor, again)


def test_a_large_batch_of_arbitrary_prefixes(backend: str) -> None:
    """More samples than one program sorts, and nearly as many classes as samples."""
    generator = torch.Generator().manual_seed(0)
    ins, outs = (tuple(torch.randint(0, limit, (700,), generator=generator).tolist()) for limit in (41, 73))
    case = testing.Case("a large batch", (700, 40, 5, 5), 72, in_prefix=ins, out_prefix=outs)
    arguments = testing.make(case, device="cuda")
    whole, means = conformance.call(case, arguments)
    conformance.check_output(case, arguments, whole, means)
    if backend != "reference":
        for n in (0, 350, 699):
            one = conformance.pick(arguments, slice(n, n + 1))
            assert torch.equal(conformance.call(case, one)[0], whole[n : n + 1])


TF32 = ("3x3", "1x1 stride 2", "7x7 stem", "groups", "mixed prefixes", "everything", "prefix, unaligned channels")


@pytest.mark.parametrize("name", TF32)
def test_float32_products_may_be_rounded_to_tf32(backend: str, name: str) -> None:
    conformance.check_tf32(testing.case(name), "cuda")


@pytest.mark.large
def test_offsets_beyond_32_bits(backend: str) -> None:
    """Input and output each have more than 2^31 elements, and the last sample alone is not zero."""
    free, _ = torch.cuda.mem_get_info()
    batch, side = 5, 4096
    need = 3 * 2 * batch * 32 * side * side
    if free < need:
        pytest.skip(f"needs {need / 2**30:.0f} GiB of device memory, {free / 2**30:.0f} are free")
    size = (batch, 32, side, side)
    x = torch.empty(size, dtype=torch.float16, device="cuda", memory_format=torch.channels_last).zero_()
    assert x.numel() > 2**31
    x[-1, :, -3:, -3:] = 1
    w = torch.ones(32, 32, 1, 1, dtype=torch.float16, device="cuda")
    out = torch.tensor([32, 32, 32, 32, 17], dtype=torch.int32, device="cuda")
    y = rnp_kernels.prefix_conv2d(x, w, out_prefix=out)
    assert (y[-1, :17, -3:, -3:] == 32).all() and (y[-1, 17:, -3:, -3:] == 0).all()
    assert (y[-1, :, -4, :] == 0).all() and (y[0, :, -8:, -8:] == 0).all()


def test_inside_torch_compile(backend: str) -> None:
    if backend == "reference":
        pytest.skip("plain torch")
    case = testing.case("everything")
    arguments = arguments_of("everything")

    def step(x: Tensor) -> Tensor:
        output, _ = rnp_kernels.prefix_conv2d(**(arguments | {"input": x}))
        return output * 2

    expected = outputs("everything", arguments)[0] * 2
    assert case.pooled
    assert torch.equal(torch.compile(step, fullgraph=True, backend="aot_eager")(arguments["input"]), expected)


# What the sm_90a kernel does on a Hopper GPU; elsewhere these are cases like others.
WGMMA = (
    testing.Case("a tile inside one sample", (3, 64, 24, 24), 64, in_prefix=(64, 32, 16), out_prefix=(64, 48, 16)),
    testing.Case("the wide tile", (256, 64, 18, 18), 256, kernel=(1, 1), padding=0, in_prefix=(64, 24) * 128,
                 out_prefix=(256, 192, 128, 17) * 64),
    testing.Case("the wide tile at full width", (256, 72, 18, 18), 256, stride=(1, 2)),
    testing.Case("a split K", (4, 512, 7, 7), 512, in_prefix=(512, 384, 200, 0), out_prefix=(512, 128, 300, 512),
                 residual=True, activation="relu"),
    testing.Case("a split K, skipped tail", (2, 1088, 7, 7), 64, kernel=(1, 1), padding=0, tail="skip",
                 in_prefix=(1088, 500), out_prefix=(64, 9), scale="table", bias="table", row=(1, 0)),
    # Few channels: a copy of the input whose pixels overlap in the copy engine's eyes.
    testing.Case("unfolded, a stem", (5, 3, 62, 61), 64, kernel=(7, 7), stride=2, padding=3, activation="relu"),
    testing.Case("unfolded, 3x3", (4, 3, 40, 41), 72, layout="contiguous", in_prefix=(3, 1, 0, 2),
                 out_prefix=(72, 9, 64, 0), tail="skip"),
    testing.Case("unfolded, windows", (3, 7, 33, 30), 64, kernel=(3, 2), stride=(1, 3), dilation=(2, 1),
                 padding=(3, 0, 2, 1), in_prefix=(7, 5, 4), out_prefix=(64, 64, 20), residual=True),
    testing.Case("unfolded, patches", (2, 3, 64, 96), 136, kernel=(16, 16), stride=16, padding=0),
)  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", WGMMA, ids=str)
def test_wgmma(backend: str, case: testing.Case, dtype: torch.dtype) -> None:
    arguments = testing.make(case, dtype, "cuda")
    output, means = conformance.call(case, arguments)
    conformance.check_output(case, arguments, output, means)


@pytest.mark.parametrize("case", WGMMA, ids=str)
def test_wgmma_of_tf32(backend: str, case: testing.Case) -> None:
    conformance.check_tf32(case, "cuda")


@pytest.mark.parametrize("channels", [64, 19])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(("kernel", "stride", "padding"), [(2, 2, 0), (3, 2, 1), (3, 1, 1)])
def test_max_pooling(backend: str, channels: int, dtype: torch.dtype, kernel: int, stride: int, padding: int) -> None:
    """Whole pieces of 16 bytes, prefixes that end inside one, and single elements; NaN wins, and none is read."""
    if backend != "cuda":
        pytest.skip("an operator of the CUDA library")
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(6, channels, 29, 34, generator=generator).to("cuda", dtype)
    x[1, 2, 3, 4], x[2, 0] = torch.nan, -torch.inf
    x = x.contiguous(memory_format=torch.channels_last)
    prefix = torch.tensor([channels, 5, 16, 0, 1, channels - 8], dtype=torch.int32, device="cuda")
    live = reference.live(channels, prefix, x)
    window = [[size, size] for size in (kernel, stride, padding)]
    expected = torch.nn.functional.max_pool2d(x, kernel, stride, padding)
    assert takes(x) and runs_on(x.device)
    pool = torch.ops.rnp.max_pool2d
    torch.testing.assert_close(pool(x, None, *window, "zero"), expected, rtol=0, atol=0, equal_nan=True)
    poisoned = torch.where(live, x, torch.nan).contiguous(memory_format=torch.channels_last)
    zeroed = pool(poisoned, prefix, *window, "zero")
    torch.testing.assert_close(zeroed, torch.where(live, expected, 0), rtol=0, atol=0, equal_nan=True)
    skipped = torch.where(live, pool(poisoned, prefix, *window, "skip"), 0)
    torch.testing.assert_close(skipped, zeroed, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_split_k_gives_the_bits_of_a_large_batch(backend: str, dtype: torch.dtype) -> None:
    """A sample alone has its K split over blocks; in this batch nothing is."""
    if backend == "reference":
        pytest.skip("plain torch")
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(600, 192, 7, 7, generator=generator).to("cuda", dtype)
    x = x.contiguous(memory_format=torch.channels_last)
    w = (torch.randn(128, 192, 3, 3, generator=generator) / 40).to("cuda", dtype)
    prefixes = [torch.randint(0, limit + 1, (600,), generator=generator).int().cuda() for limit in (192, 128)]
    with conformance.float32_products("tf32"):
        whole = rnp_kernels.prefix_conv2d(x, w, padding=1, in_prefix=prefixes[0], out_prefix=prefixes[1])
        for n in (0, 1, 77, 599):
            one = [prefix[n : n + 1] for prefix in prefixes]
            alone = rnp_kernels.prefix_conv2d(x[n : n + 1], w, padding=1, in_prefix=one[0], out_prefix=one[1])
            assert torch.equal(alone, whole[n : n + 1]), f"sample {n}"
