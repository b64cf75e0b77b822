"""Packed weights beside the parameters: rebuilt after every kind of change, never in vain, in any thread."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch
from torch import nn

import rnp_kernels
from rnp_kernels import PrefixConv2d


def close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def optimizer_step(conv: PrefixConv2d) -> None:
    optimizer = torch.optim.SGD(conv.parameters(), lr=0.5)
    conv.weight.grad = torch.randn_like(conv.weight)
    optimizer.step()


def single_element(conv: PrefixConv2d) -> None:
    with torch.no_grad():
        conv.weight[5, 3, 2, 1] += 10


def inside_inference_mode(conv: PrefixConv2d) -> None:
    with torch.inference_mode():
        conv.weight.mul_(3)


def new_parameter(conv: PrefixConv2d) -> None:
    conv.weight = nn.Parameter(torch.randn_like(conv.weight))


def freed_and_reused(conv: PrefixConv2d) -> None:
    """The allocator likes to hand the same address out again."""
    shape = conv.weight.shape
    conv.weight = None
    conv.weight = nn.Parameter(torch.randn(shape))


def data_transposed(conv: PrefixConv2d) -> None:
    conv.weight.data = conv.weight.data.transpose(2, 3)


CHANGES: dict[str, Callable[[PrefixConv2d], object]] = {
    "optimizer step": optimizer_step,
    "in place": lambda c: nn.init.ones_(c.weight),
    "one element": single_element,
    "in inference mode": inside_inference_mode,
    "load_state_dict": lambda c: c.load_state_dict({k: torch.randn_like(v) for k, v in c.state_dict().items()}),
    "load_state_dict, assign": lambda c: c.load_state_dict(
        {k: torch.randn_like(v) for k, v in c.state_dict().items()}, assign=True
    ),
    "a new parameter": new_parameter,
    "freed and reused": freed_and_reused,
    ".data assigned": lambda c: setattr(c.weight, "data", torch.randn_like(c.weight)),
    ".data transposed": data_transposed,
    ".data written": lambda c: c.weight.data.mul_(2),
    ".data copied": lambda c: c.weight.data.copy_(torch.randn_like(c.weight)),
    "half and back": lambda c: c.half().float(),
    "double and back": lambda c: c.double().float(),
    "to channels_last": lambda c: c.to(memory_format=torch.channels_last),
    "vector_to_parameters": lambda c: nn.utils.vector_to_parameters(
        torch.randn(sum(p.numel() for p in c.parameters())), c.parameters()
    ),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_a_changed_weight_is_packed_again(change: Callable[[PrefixConv2d], object], isa: str) -> None:
    torch.manual_seed(0)
    conv = PrefixConv2d(20, 24, 3, padding=1)
    x = torch.randn(2, 20, 6, 6).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        conv(x), conv(x)
    for _ in range(2):
        before = conv.packed_weight()
        change(conv)
        with torch.no_grad():
            for _ in range(4):
                close(conv(x), nn.functional.conv2d(x, conv.weight, conv.bias, padding=1))
        after = conv.packed_weight()
        assert torch.equal(after, rnp_kernels.pack_weight(conv.weight))
        assert after is not before or torch.equal(before, after)


def test_training_never_packs_in_vain(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    real = rnp_kernels.packing.pack_weight
    monkeypatch.setattr(rnp_kernels.packing, "pack_weight", lambda *a: made.append(1) or real(*a))
    conv = PrefixConv2d(8, 8, 3)
    optimizer = torch.optim.SGD(conv.parameters(), lr=0.1)
    x = torch.randn(1, 8, 5, 5)
    for _ in range(4):
        conv(x).sum().backward()
        optimizer.step()
    assert made == []
    with torch.no_grad():
        for _ in range(4):
            conv(x)
    assert made == [1]


def test_inference_tensors_are_never_packed() -> None:
    with torch.inference_mode():
        conv = PrefixConv2d(8, 8, 3)
        x = torch.randn(1, 8, 5, 5)
        for _ in range(3):
            close(conv(x), nn.functional.conv2d(x, conv.weight, conv.bias))
            conv.weight[0, 0, 0, 0] += 5
        assert conv.packed_weight() is None


def test_two_threads_and_a_writer() -> None:
    conv = PrefixConv2d(32, 32, 3)
    x = torch.randn(1, 32, 6, 6)
    weights = [torch.full_like(conv.weight, value) for value in (1.0, 2.0)]
    answers = [nn.functional.conv2d(x, w, conv.bias) for w in weights]
    failures: list[str] = []

    def read() -> None:
        with torch.no_grad():
            for _ in range(200):
                y = conv(x)
                if not torch.isfinite(y).all():
                    failures.append("not finite")

    threads = [threading.Thread(target=read) for _ in range(2)]
    for thread in threads:
        thread.start()
    for step in range(20):
        conv.weight = nn.Parameter(weights[step % 2].clone())
    for thread in threads:
        thread.join()
    assert failures == []
    with torch.no_grad():
        close(conv(x), answers[1])
        close(conv(x), answers[1])


@pytest.mark.skipif("avx512bf16" not in rnp_kernels._C.available_isas(), reason="one layout for all instruction sets")
def test_a_pack_made_under_another_instruction_set_is_not_used() -> None:
    before = rnp_kernels._C.isa()
    torch.manual_seed(0)
    conv = PrefixConv2d(21, 24, 3, padding=1, dtype=torch.bfloat16)
    x = torch.randn(2, 21, 6, 6, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
    half = torch.tensor([11, 20], dtype=torch.int32)
    results: dict[str, torch.Tensor] = {}
    try:
        for isa in (*(i for i in ("avx512amx", "avx512bf16") if i in rnp_kernels._C.available_isas()), "avx512") * 2:
            rnp_kernels._C.set_isa(isa)
            with torch.no_grad():
                for _ in range(3):  # with a pack of the other kind, without one, with its own
                    y = conv(x, half)
                    assert torch.equal(y, results.setdefault(isa, y))
            assert torch.equal(conv.packed_weight(), rnp_kernels.pack_weight(conv.weight))
    finally:
        rnp_kernels._C.set_isa(before)
    torch.testing.assert_close(results["avx512"], results["avx512bf16"], rtol=2**-7, atol=1e-3)


def test_on_a_gpu_a_pack_is_for_the_stream_that_made_it_and_never_for_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rule of `PackCache` for CUDA, with a stand-in for the device: streams are numbers, None is a capture."""
    made = []

    def pack(weight: torch.Tensor, groups: int) -> torch.Tensor:
        made.append(stream)
        return torch.empty(0)

    class OnGpu(nn.Parameter):
        is_cpu = False

    stream: int | None = 3
    weight = OnGpu(torch.randn(4, 4, 3, 3))
    monkeypatch.setattr(rnp_kernels.packing, "_stream_of", lambda _: stream)
    monkeypatch.setattr(rnp_kernels.packing, "pack_weight", pack)
    monkeypatch.setattr(rnp_kernels.packing.nn, "Parameter", OnGpu)
    cache = rnp_kernels.packing.PackCache()
    assert cache.get(weight, 1) is None  # the first call: it may be a training step
    kept = cache.get(weight, 1)
    assert kept is not None and cache.get(weight, 1) is kept and made == [3]
    stream = None
    assert cache.get(weight, 1) is None and made == [3]
    stream = 4
    other = cache.get(weight, 1)
    assert other is not None and other is not kept and made == [3, 4]
    with torch.no_grad():
        weight.mul_(2)
    assert cache.get(weight, 1) is None and cache.get(weight, 1) is not None and made == [3, 4, 4]


def test_a_weight_without_values_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"pack_weight: weight must hold values.*meta"):
        rnp_kernels.pack_weight(torch.empty(4, 3, 3, 3, device="meta"))
