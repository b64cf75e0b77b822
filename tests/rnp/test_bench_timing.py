"""rnp.bench: what measures (turns, clocks, ratios) and what is measured (every side computes the same thing)."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

import pytest
import torch

import rnp_kernels
from rnp.bench import environment, gate, layers, rivals, runtimes, timing


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For tests that count calls: on several threads a turn begins with uncounted ones, as many as 10 ms hold."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def counted(log: list[str], name: str):
    return lambda: log.append(name)


@pytest.mark.usefixtures("one_thread")
def test_sides_take_turns_and_the_baseline_two(monkeypatch: pytest.MonkeyPatch):
    log: list[str] = []
    ticks = iter(range(10**6))
    monkeypatch.setitem(timing.CLOCKS, "wall", lambda: float(next(ticks)))  # every call takes a second
    times = timing.measure({"a": counted(log, "a"), "b": counted(log, "b")}, "b", seconds=0, rounds=3)
    assert log[:6] == ["a", "a", "b", "b", "b", "b"]  # once to warm up, once to see how long it takes
    assert log[6:] == ["a", "b", "b", "b", "b", "a", "a", "b", "b"]
    assert {name: len(values) for name, values in times.items()} == {"a": 3, "b": 3, timing.AGAIN: 3}


@pytest.mark.usefixtures("one_thread")
def test_short_calls_are_repeated_within_a_turn_and_one_is_not_counted(monkeypatch: pytest.MonkeyPatch):
    log: list[str] = []
    now = [0.0]

    def call() -> None:
        log.append("a")
        now[0] += 1e-4

    monkeypatch.setitem(timing.CLOCKS, "wall", lambda: now[0])
    times = timing.measure({"a": call}, "a", seconds=0, rounds=1)
    assert times["a"] == [pytest.approx(1e-4)]
    assert len(log) in (2 + 2 + 2 * (1 + 10), 2 + 2 + 2 * (1 + 9))  # 1e-3 / 1e-4 may round down


@pytest.mark.usefixtures("one_thread")
def test_cold_calls_follow_an_eviction(monkeypatch: pytest.MonkeyPatch):
    log: list[str] = []
    timing.measure({"a": counted(log, "a")}, "a", seconds=0, rounds=2, cold=counted(log, "evict"))
    assert log[4:] == ["evict", "a"] * 4


@pytest.mark.parametrize("count", [1, 2])
def test_turns_on_several_threads_begin_with_a_pause_and_calls_that_do_not_count(
    count: int, monkeypatch: pytest.MonkeyPatch
):
    pauses: list[float] = []
    monkeypatch.setattr(timing.time, "sleep", pauses.append)
    monkeypatch.setattr(timing, "_LONG", 0.0)  # as of long calls: one a turn that counts
    calls = {"a": 0, "b": 0}
    sides = {name: (lambda name=name: calls.update({name: calls[name] + 1})) for name in calls}
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        times = timing.measure(sides, "a", seconds=0, rounds=3)
    finally:
        torch.set_num_threads(before)
    assert {name: len(values) for name, values in times.items()} == {"a": 3, "b": 3, timing.AGAIN: 3}
    assert len(pauses) == (9 if count > 1 else 0)
    assert calls["b"] > 2 + 2 * 3 if count > 1 else calls["b"] == 2 + 3


def test_eviction_covers_its_buffer():
    evict = timing.Eviction(megabytes=2)
    assert evict.buffer.nbytes == 2 << 20
    evict()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"baseline": "b"}, "baseline must be a side"),
        ({"baseline": "a", "clock": "sun"}, "clock must be one of wall, cpu, got 'sun'"),
    ],
)
def test_measure_refuses(arguments: dict[str, str], message: str):
    with pytest.raises(ValueError, match=message):
        timing.measure({"a": lambda: None}, **arguments)


def test_the_cpu_clock_is_for_one_thread():
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        with pytest.raises(ValueError, match="one thread, got 2"):
            timing.measure({"a": lambda: None}, "a", clock="cpu")
    finally:
        torch.set_num_threads(threads)


def test_summary_is_of_quotients_round_by_round():
    times = {"slow": [2.0, 4.0, 6.0], "fast": [1.0, 1.0, 3.0], timing.AGAIN: [2.0, 2.0, 6.0]}
    summary = timing.summary(times, "slow")
    assert summary["speedup"]["fast"] == {"median": 2.0, "p20": 2.0, "p80": pytest.approx(3.2)}
    assert summary["noise"]["median"] == 1.0
    assert summary["ms"]["slow"]["median"] == 4000.0
    assert summary["rounds"] == 3


def test_the_gate_tells_right_from_wrong():
    x = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0))
    assert gate.require_close("same", x, x) == 0.0
    assert gate.require_close("empty", x[:0], x[:0]) == 0.0
    assert 0 < gate.require_close("rounded", x * (1 + 1e-6), x) < 1e-5
    for wrong, message in (
        (x * (1 + 1e-4), "relative L2 error must be at most 1e-05"),
        (torch.where(torch.arange(3)[:, None, None] == 1, torch.nan, x), "got nan"),
        (x[:2], r"shape must be \(3, 4, 5\), got \(2, 4, 5\)"),
    ):
        with pytest.raises(gate.WrongResult, match=message):
            gate.require_close("wrong", wrong, x)
    zero = torch.zeros_like(x)
    gate.require_close("nothing live", zero, zero)
    with pytest.raises(gate.WrongResult):
        gate.require_close("something where nothing is live", zero + 1e-20, zero)


def test_layers_count_their_work():
    layer = layers.Layer("l", 8, 6, 16, 3)
    assert layer.valid_macs() == 8 * 16 * (6 * 3 - 2) ** 2  # an edge row or column lacks one tap
    i, o = layer.widths(1)["1/2"]
    assert (i.tolist(), o.tolist(), layer.theory(i, o)) == ([4], [8], 4.0)
    assert "mixed" not in layer.widths(1) and len(layer.widths(2)["mixed"][0]) == 2
    assert layers.Layer("rgb", 3, 6, 16, 3).widths(1)["1/4"][0].tolist() == [3]
    assert layer.bytes(2) == 4 * (2 * 36 * 24 + 8 * 16 * 9)


@pytest.mark.parametrize("layer", [layers.Layer("dense", 16, 6, 32, 3), layers.Layer("grouped", 16, 6, 16, 3, 2, 4)])
def test_every_side_of_a_case_is_checked_and_runs(layer: layers.Layer):
    case = rivals.convolution(layer, 3, rival_widths=("1/2", "mixed"), dense=False)
    expected = {"prepacked", "eager", "full", "3/4", "1/2", "1/4", "mixed", "masked 1/2", "masked mixed"}
    if layer.groups == 1:
        expected |= {"slices 1/2", "slices mixed", "per width 1/2", "per width mixed"}
        # Winograd is the rule there, so direct is timed too.
        expected |= {"direct full", "direct 3/4", "direct 1/2", "direct 1/4", "direct mixed"}
    assert set(case.sides) == expected
    for side in case.sides.values():
        side.run()
    assert case.sides["1/2"].theory == (4.0 if layer.groups == 1 else 2.0)  # half the groups do half the work


def test_direct_sides_do_without_winograd():
    """Large enough a map for the operator to transform weights in the call, where nobody kept transformed ones."""
    layer = layers.Layer("layer", 32, 28, 32, 3)
    torch.manual_seed(0)
    x = torch.randn(1, 32, 28, 28).to(memory_format=torch.channels_last)
    w = torch.randn(32, 32, 3, 3)
    with rnp_kernels.algorithm("direct"):
        expected = rivals.ours(layer, x, w)()
    direct = rivals.ours(layer, x, w, direct=True)()
    assert rnp_kernels.get_algorithm() == "auto"
    assert torch.equal(direct, expected)
    assert not torch.equal(direct, rivals.ours(layer, x, w)())


def test_a_wrong_side_stops_the_case(monkeypatch: pytest.MonkeyPatch):
    right = rivals.ours
    monkeypatch.setattr(rivals, "ours", lambda *a, **k: lambda: right(*a, **k)() * 1.001)
    with pytest.raises(gate.WrongResult, match="dense b1, full"):
        rivals.convolution(layers.Layer("dense", 16, 6, 32, 3), 1, dense=False)


def test_a_rival_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    case = rivals.convolution(layers.Layer("dense", 4, 6, 8, 3), 1, widths=())
    assert set(case.missing) == {"onnxruntime", "openvino"}
    assert "not installed: onnxruntime, onnx" in case.missing["onnxruntime"]
    assert "rnp-kernels[bench]" in case.missing["openvino"]


@pytest.mark.parametrize("name", runtimes.RUNTIMES)
def test_a_runtime_computes_what_the_model_does(name: str):
    for package in ("onnx", "onnxruntime") if name == "onnxruntime" else ("openvino",):
        pytest.importorskip(package)
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU()).eval()
    x = torch.randn(2, 3, 7, 7)
    run = runtimes.RUNTIMES[name](model, x, 1)
    with torch.no_grad():
        gate.require_close(name, run(x), model(x))
        gate.require_close(name, run(-x), model(-x))  # nothing was frozen into the graph


def test_the_environment_names_what_is_needed_to_repeat():
    found = environment.environment()
    assert found["torch"] == torch.__version__ and found["threads"] == torch.get_num_threads()
    assert {"processor", "cores", "instruction_set", "onnxruntime", "openvino", "commit", "rnp_kernels"} <= set(found)
