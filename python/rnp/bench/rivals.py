"""One convolution by ours and by everybody else: the sides of a case, checked against one another.

Sides that know no prefix compute the whole layer; what they are called says which work they do:

| side | what runs |
|---|---|
| ``prepacked`` | oneDNN, weights packed once (what Inductor's freezing does): the honest dense rival, the baseline |
| ``eager`` | ``F.conv2d``, channels_last |
| ``onnxruntime``, ``openvino`` | the layer alone in these runtimes, in and out in NCHW, which is what they take |
| ``full`` | ours, full width: what a module runs, Winograd and stock paths included |
| ``3/4`` … ``mixed`` | ours, with prefixes, tails skipped as inside a converted network |
| ``direct W`` | ours without Winograd, where the rule would use it |
| ``own`` | in bfloat16: our own kernels at full width, where the rule may name a stock path; with a ReLU, which keeps the operator from it |
| ``float32 own`` | in bfloat16: the same of our direct float32 kernels, on the same numbers |
| ``masked W`` | eager, then both masks: what released systems do with widths W |
| ``slices W`` | eager, sample by sample, on slices of input and weight |
| ``per width W`` | prepacked oneDNN for every pair of widths; the samples of each pair lie ready side by side, in dense tensors of their width: the grouping is not in its time |
"""  # noqa: E501 (a table)

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rnp_kernels
from rnp.bench import runtimes
from rnp.bench.gate import LIMITS, require_close
from rnp.bench.layers import Layer
from rnp_kernels import _C

BASELINE = "prepacked"


@dataclass
class Side:
    """One way to do the work: call it; ``theory`` is its theoretical speed-up over the dense layer."""

    run: Callable[[], Any]
    theory: float = 1.0


@dataclass
class Case:
    """What is timed together: sides that compute the same thing; and why the rivals that are missing cannot run."""

    name: str
    baseline: str
    sides: dict[str, Side]
    facts: dict[str, Any] = field(default_factory=dict)  # what a row of the report says of the case
    missing: dict[str, str] = field(default_factory=dict)


def prepacked(layer: Layer, x: Tensor, w: Tensor) -> Callable[[], Tensor]:
    """oneDNN with its weight packed once. ``x`` may have fewer channels than the layer, with ``w`` cut to match."""
    pads, strides, ones = [layer.padding] * 2, [layer.stride] * 2, [1, 1]
    packed = torch.ops.mkldnn._reorder_convolution_weight(w.contiguous(), pads, strides, ones, layer.groups, [*x.shape])
    operator = torch.ops.mkldnn._convolution_pointwise
    return lambda: operator(x, packed, None, pads, strides, ones, layer.groups, "none", [], "")


def eager(layer: Layer, x: Tensor, w: Tensor) -> Callable[[], Tensor]:
    """``F.conv2d`` with everything channels_last."""
    weight = w.contiguous(memory_format=torch.channels_last)
    return lambda: F.conv2d(x, weight, None, layer.stride, layer.padding, 1, layer.groups)


def ours(
    layer: Layer, x: Tensor, w: Tensor, i: Tensor | None = None, o: Tensor | None = None, direct: bool = False,
    activation: str = "none",
) -> Callable[[], Tensor]:  # fmt: skip
    """The operator with its weights packed once, and transformed where the rule may ask for it; tails are skipped.

    ``direct``: without Winograd, whose weights the operator would otherwise transform in the call where nobody kept
    them. ``activation``: "relu" also keeps the operator from a stock path.
    """
    packed, tile = rnp_kernels.pack_weight(w, layer.groups), 0 if direct else winograd_tile(layer, w.dtype)
    transformed = torch.ops.rnp.pack_winograd(w, tile) if tile else None
    operator, strides, pads = torch.ops.rnp.prefix_conv2d, [layer.stride] * 2, [layer.padding] * 4
    tail = "zero" if o is None else "skip"

    def call() -> Tensor:
        return operator(
            x, w, None, strides, pads, [1, 1], layer.groups, i, o, None, None, None, activation, tail, False, packed,
            transformed,
        )[0]  # fmt: skip

    return directly(call) if direct else call


def directly(call: Callable[[], Any]) -> Callable[[], Any]:
    """``call`` without Winograd."""

    def run() -> Any:
        with rnp_kernels.algorithm("direct"):
            return call()

    return run


def winograd_tile(layer: Layer, dtype: torch.dtype) -> int:
    """The Winograd tile that the rule uses for this layer, at full width or below it; 0 for none."""
    return _C.winograd_tile(
        (layer.c_in, layer.size, layer.size), (layer.c_out, layer.c_in // layer.groups, layer.kernel, layer.kernel),
        [layer.stride] * 2, [layer.padding] * 4, [1, 1], layer.groups, str(dtype).removeprefix("torch."),
    )  # fmt: skip


def masked(layer: Layer, x: Tensor, w: Tensor, i: Tensor, o: Tensor) -> Callable[[], Tensor]:
    """All of the layer between two masks."""
    live_in, live_out = live(i, layer.c_in).to(x.dtype), live(o, layer.c_out).to(x.dtype)
    weight = w.contiguous(memory_format=torch.channels_last)
    return lambda: F.conv2d(x * live_in, weight, None, layer.stride, layer.padding, 1, layer.groups) * live_out


def slices(layer: Layer, x: Tensor, w: Tensor, i: Tensor, o: Tensor) -> Callable[[], Tensor]:
    """Sample by sample, on slices, into an output of the whole layer's size. Without groups only."""
    weight = w.contiguous(memory_format=torch.channels_last)
    widths = list(zip(i.tolist(), o.tolist(), strict=True))
    shape = (len(x), layer.c_out, layer.out_size, layer.out_size)

    def run() -> Tensor:
        out = torch.empty(shape, dtype=x.dtype, memory_format=torch.channels_last)
        for n, (a, b) in enumerate(widths):
            out[n, :b] = F.conv2d(x[n : n + 1, :a], weight[:b, :a], None, layer.stride, layer.padding)[0]
        return out

    return run


def per_width(layer: Layer, x: Tensor, w: Tensor, i: Tensor, o: Tensor) -> Callable[[], Tensor]:
    """Prepacked oneDNN, once for each pair of widths. The last call's output comes back, the others are dropped."""
    pairs: dict[tuple[int, int], list[int]] = {}
    for n, pair in enumerate(zip(i.tolist(), o.tolist(), strict=True)):
        pairs.setdefault(pair, []).append(n)
    calls = []
    for (a, b), samples in pairs.items():
        group = x[samples, :a].contiguous(memory_format=torch.channels_last)
        calls.append(prepacked(layer, group, w[:b, :a]))

    def run() -> Tensor:
        for call in calls:
            out = call()
        return out

    return run


def live(prefix: Tensor, channels: int) -> Tensor:
    """(N, C, 1, 1) bool: which channels are live."""
    return (torch.arange(channels) < prefix[:, None])[:, :, None, None]


def convolution(
    layer: Layer,
    batch: int,
    *,
    dtype: torch.dtype = torch.float32,
    widths: Iterable[str] = ("3/4", "1/2", "1/4", "mixed"),
    rival_widths: Iterable[str] = (),
    direct: bool = True,
    dense: bool = True,
    threads: int | None = None,
) -> Case:
    """The case of a layer: ours and its rivals, checked.

    Args:
        layer, batch, dtype: what is computed.
        widths: of :meth:`Layer.widths`, those that ours is timed at.
        rival_widths: those at which the rivals for pruned work are timed too.
        direct: with ours without Winograd too, where the rule would use it.
        dense: with ONNX Runtime and OpenVINO (float32 only).
        threads: for these two; None for torch's number.

    Raises:
        WrongResult: a side computes something else. A NaN lies beyond every prefix when ours is checked.
    """
    x, w = layer.tensors(batch, dtype)
    case = Case(f"{layer.name} b{batch}", BASELINE, {})
    case.sides = {
        BASELINE: Side(prepacked(layer, x, w)),
        "eager": Side(eager(layer, x, w)),
        "full": Side(ours(layer, x, w)),
    }
    direct = direct and winograd_tile(layer, dtype) > 0
    if direct:
        case.sides["direct full"] = Side(ours(layer, x, w, direct=True))
    truth = case.sides[BASELINE].run()
    for name in list(case.sides)[1:]:
        require_close(f"{case.name}, {name}", case.sides[name].run(), truth)
    if dtype is torch.bfloat16:
        for name, to in (("own", dtype), ("float32 own", torch.float32)):
            side = ours(layer, x.to(to), w.to(to), direct=True, activation="relu")
            require_close(f"{case.name}, {name}", side(), truth.relu(), LIMITS[dtype])
            case.sides[name] = Side(side)
    if dense and dtype is torch.float32:
        conv = nn.Conv2d(layer.c_in, layer.c_out, layer.kernel, layer.stride, layer.padding, 1, layer.groups, False)
        conv.weight.data = w
        plain = x.contiguous()
        ready, case.missing = runtimes.runtimes(conv.eval(), plain, threads or torch.get_num_threads())
        for name, run in ready.items():
            require_close(f"{case.name}, {name}", run(plain), truth)
            case.sides[name] = Side(lambda run=run: run(plain))
    available = layer.widths(batch)
    for width in (width for width in widths if width in available):
        _add_width(case, layer, x, w, width, available[width], width in rival_widths, direct)
    return case


def _add_width(
    case: Case, layer: Layer, x: Tensor, w: Tensor, width: str, prefixes: tuple[Tensor, Tensor], rivals: bool,
    direct: bool,
) -> None:  # fmt: skip
    i, o = prefixes
    live_in, live_out = live(i, layer.c_in), live(o, layer.c_out)
    clean = torch.where(live_in, x, 0).contiguous(memory_format=torch.channels_last)
    expected = torch.where(live_out, prepacked(layer, clean, w)(), 0)
    poisoned = torch.where(live_in, x, torch.nan).contiguous(memory_format=torch.channels_last)
    theory = layer.theory(i, o)
    for side, only_direct in [(width, False)] + [(f"direct {width}", True)] * direct:
        got = torch.where(live_out, ours(layer, poisoned, w, i, o, only_direct)(), 0)
        require_close(f"{case.name}, {side}", got, expected)
        case.sides[side] = Side(ours(layer, x, w, i, o, only_direct), theory)
    if not rivals:
        return
    makers = {"masked": masked}
    if layer.groups == 1:
        makers |= {"slices": slices, "per width": per_width}
    for name, make in makers.items():
        side = f"{name} {width}"
        got = make(layer, x, w, i, o)()
        if name == "per width":  # the samples of one pair of widths, the last
            last = [n for n in range(len(x)) if (i[n], o[n]) == (i[-1], o[-1])]
            if len({*zip(i.tolist(), o.tolist(), strict=True)}) == 1:
                require_close(f"{case.name}, {side}", got, expected[last, : int(o[-1])])
        else:
            require_close(f"{case.name}, {side}", torch.where(live_out, got, 0), expected)
        case.sides[side] = Side(make(layer, x, w, i, o), theory)
