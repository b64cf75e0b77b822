"""What others do with pruned layers, for whole networks: operators that take the place of `torch.ops.rnp.prefix_conv2d`
in a converted network's plan. BatchNorm, activation and residual are as cheap as each of them allows.

| name | a layer of a mixed batch |
|---|---|
| ``masked`` | all of it by prepacked oneDNN; scale, bias and mask in one pass behind it: what released systems do |
| ``slices`` | eager, sample by sample, on slices of input and weight |
| ``per width`` | samples of equal widths gathered, prepacked oneDNN for each pair of widths, and scattered again |

Inference on a CPU, float32, groups = 1, as the networks of :mod:`rnp.bench.models` need it; anything else raises.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rnp.decider import Decider
from rnp.network import PrunedNetwork
from rnp_kernels.reference import live

Call = dict[str, Any]  # the operator's arguments by name
ARGUMENTS = (
    "input", "weight", "bias", "stride", "padding", "dilation", "groups", "in_prefix", "out_prefix", "scale", "row",
    "residual", "activation", "tail", "pooled", "packed", "winograd",
)  # fmt: skip


def rival(network: PrunedNetwork, images: Tensor, name: str) -> Callable[[], Tensor]:
    """``network`` under its policy (one that needs no features), its convolutions done as ``name`` says."""
    layer = OPERATORS[name]()

    def operator(*arguments: Any) -> tuple[Tensor, Tensor | None]:
        call = dict(zip(ARGUMENTS, arguments, strict=False))
        even = call["padding"][0::2] == call["padding"][1::2]
        if call["groups"] != 1 or not even or call["input"].dtype is not torch.float32:
            raise ValueError(f"{name}: a convolution without groups, evenly padded, float32 is needed")
        output = layer(call)
        return output, output.mean((2, 3)) if call["pooled"] else None

    def run() -> Tensor:
        plan = network._plan(full=False, features=False)
        with torch.inference_mode():
            return plan.run(images, operator, Decider(network, images, False))

    return run


def finished(call: Call, y: Tensor) -> Tensor:
    """``y`` plus the residual, then the activation; in place."""
    if call["residual"] is not None:
        y += call["residual"]
    return y.relu_() if call["activation"] == "relu" else y


class Prepacked:
    """oneDNN's convolution, its weights cut, scaled and packed once for each (weight, widths, line of the tables)."""

    def __init__(self) -> None:
        self.kept: dict[tuple[Any, ...], tuple[Tensor, Tensor | None]] = {}

    def __call__(self, call: Call, x: Tensor, widths: tuple[int, int], row: int | None, tables: bool = True) -> Tensor:
        """x (N, widths[0], H, W) → (N, widths[1], OH, OW). ``tables``: scale and bias are in it."""
        pads = [call["padding"][0], call["padding"][2]]
        geometry = (pads, list(call["stride"]), list(call["dilation"]), 1)
        key = (call["weight"].data_ptr(), widths, row, len(x))
        if key not in self.kept:
            weight, bias = call["weight"][: widths[1], : widths[0]], None
            if tables:
                scale, bias = (_line(call[table], row, widths[1]) for table in ("scale", "bias"))
                weight = weight if scale is None else weight * scale[:, None, None, None]
            packed = torch.ops.mkldnn._reorder_convolution_weight(weight.contiguous(), *geometry, [*x.shape])
            self.kept[key] = packed, bias
        packed, bias = self.kept[key]
        return torch.ops.mkldnn._convolution_pointwise(x, packed, bias, *geometry, "none", [], "")


def _line(table: Tensor | None, row: int | None, channels: int) -> Tensor | None:
    """The first channels of a table's line; of a vector where there are no lines."""
    if table is None:
        return None
    return (table if table.dim() == 1 else table[row])[:channels].contiguous()


class Masked:
    def __init__(self) -> None:
        self.conv = Prepacked()

    def __call__(self, call: Call) -> Tensor:
        weight, row = call["weight"], call["row"]
        y = self.conv(call, call["input"], (weight.shape[1], weight.shape[0]), None, tables=False)
        mask = live(weight.shape[0], call["out_prefix"], y).float()
        scale, bias = (
            table if table is None or table.dim() == 1 else table[row.long()] for table in (call["scale"], call["bias"])
        )
        scale = mask if scale is None else mask * scale.view(-1, weight.shape[0], 1, 1)
        if bias is None:
            return finished(call, y.mul_(scale))
        return finished(call, torch.addcmul(mask * bias.view(-1, weight.shape[0], 1, 1), y, scale))


class Slices:
    def __call__(self, call: Call) -> Tensor:
        weight, pads = call["weight"], (call["padding"][0], call["padding"][2])
        out = None
        for n, (a, b, row) in enumerate(widths_of(call)):
            part, bias = weight[:b, :a], _line(call["bias"], row, b)
            scale = _line(call["scale"], row, b)
            x = call["input"][n : n + 1, :a]
            y = F.conv2d(x, part, bias if scale is None else None, call["stride"], pads, call["dilation"])[0]
            if scale is not None:
                y *= scale[:, None, None]
                y += 0 if bias is None else bias[:, None, None]
            if out is None:
                out = _output(call, y)
            out[n, :b] = y
        assert out is not None
        return finished(call, out)


class PerWidth:
    def __init__(self) -> None:
        self.conv = Prepacked()

    def __call__(self, call: Call) -> Tensor:
        samples: dict[tuple[int, int, int | None], list[int]] = {}
        for n, key in enumerate(widths_of(call)):
            samples.setdefault(key, []).append(n)
        out = None
        for (a, b, row), chosen in samples.items():
            x = call["input"][:, :a] if len(samples) == 1 else call["input"][chosen, :a]
            y = self.conv(call, x.contiguous(memory_format=torch.channels_last), (a, b), row)
            if len(samples) == 1 and b == len(call["weight"]):
                return finished(call, y)
            if out is None:
                out = _output(call, y[0])
            out[chosen, :b] = y
        assert out is not None
        return finished(call, out)


def widths_of(call: Call) -> list[tuple[int, int, int | None]]:
    """(in-prefix, out-prefix, line of the tables) of every sample."""
    count = len(call["input"])
    columns = (
        [channels] * count if prefix is None else prefix.tolist()
        for prefix, channels in (
            (call["in_prefix"], call["weight"].shape[1]), (call["out_prefix"], call["weight"].shape[0]),
            (call["row"], None),
        )
    )  # fmt: skip
    return list(zip(*columns, strict=True))


def _output(call: Call, like: Tensor) -> Tensor:
    """(N, C_out, OH, OW), channels_last; zeros, unless nobody reads the tail."""
    size = (len(call["input"]), len(call["weight"]), *like.shape[1:])
    out = torch.empty(size, dtype=like.dtype, memory_format=torch.channels_last)
    unread = call["tail"] == "skip" and call["residual"] is None and not call["pooled"]
    return out if unread else out.zero_()


OPERATORS: dict[str, Callable[[], Callable[[Call], Tensor]]] = {
    "masked": Masked,
    "slices": Slices,
    "per width": PerWidth,
}
