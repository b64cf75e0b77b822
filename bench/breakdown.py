"""Where a converted network's time goes, layer by layer, at full width and under mixed actions, and what theory allows.

`bench/networks.py --parts breakdown` prints it. Each instruction of the network's plan runs by itself, one operator a
layer, on the data that the layers before it made (a convolution twice, the second time counts); the sides take turns.
Layers of one shape are added up. Of each:

* `share`: of the full-width time,
* `need`: its MACs under the mixed actions ÷ its MACs at full width,
* `keeps`: its time under the mixed actions ÷ its time at full width, and
* `realised`: need ÷ keeps.

The *bound* is what the network would realise if the time of every convolution fell exactly as its MACs do, while the
layers that pruning does not touch (first convolution, pooling, classifier) keep theirs: full time ÷ (Σ time × need +
theirs) ÷ theory. It is not 1 because theory counts all MACs alike, and those of a first convolution, of a classifier
that waits for memory or of a direct layer cost more than Winograd's.

In the network itself (`--parts pruned`) one operator runs many layers: a sum is written over its residual there, whose
pruned channels it leaves alone, and samples pass through the first layers in groups.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

import rnp
from rnp.bench import timing

OPERATOR: Callable[..., Any] = rnp.network.OPERATOR


def name_and_macs(arguments: tuple[Any, ...], output: Tensor) -> tuple[str, float]:
    """Of one call of the operator; MACs of the live prefixes, taps in the padding counted."""
    x, weight, (stride, _) = arguments[0], arguments[1], arguments[3]
    live = [
        torch.full((len(x),), c) if prefix is None else prefix.long()
        for prefix, c in ((arguments[7], x.shape[1]), (arguments[8], output.shape[1]))
    ]
    c_out, c_in, rows, cols = weight.shape
    name = f"{rows}x{cols} {c_in}->{c_out} at {output.shape[2]}" + (f", stride {stride}" if stride > 1 else "")
    return name, float((live[0] * live[1]).sum()) * rows * cols * output.shape[2] * output.shape[3]


class Side:
    """Runs a network's plan one instruction at a time; keeps names, MACs and seconds of each."""

    def __init__(self, network: rnp.PrunedNetwork, images: Tensor, clock: str) -> None:
        self.network, self.images, self.now = network, images, timing.CLOCKS[clock]
        self.names: list[str] = []
        self.macs: list[float] = []
        self.rounds: list[list[float]] = []
        self.called: tuple[Any, ...] | None = None
        self.began = 0.0

    def operator(self, *arguments: Any) -> Any:
        OPERATOR(*arguments)  # off the clock: where the output's pages are new, faults cost more than the layer
        self.began = self.now()
        result = OPERATOR(*arguments)
        self.called = (arguments, result[0])
        return result

    def __call__(self) -> None:
        full = isinstance(self.network.policy, rnp.policies.FullWidth)
        plan = self.network._plan(full=full, features=False)
        decider = None if full else rnp.decider.Decider(self.network, self.images, False)
        run = plan.start(self.images, self.operator, decider, 0.0)
        names, macs, seconds = [], [], []
        with torch._C._AutoDispatchBelowAutograd():
            for instruction in plan.instructions:
                self.called = None
                self.began = self.now()
                instruction.call(run)
                passed = self.now() - self.began
                if instruction.frees or instruction.call.__name__ in ("ask", "look_up", "maximum"):
                    continue  # Python that the segments do not run
                name, count = name_and_macs(*self.called) if self.called else (instruction.call.__name__, 0.0)
                names.append(name), macs.append(count), seconds.append(passed)
        self.names, self.macs = names, macs
        self.rounds.append(seconds)

    def by_name(self) -> dict[str, dict[str, float]]:
        """Median seconds, MACs and number of the layers of each name."""
        medians = [timing.median(column) for column in zip(*self.rounds, strict=True)]
        found: dict[str, dict[str, float]] = {}
        for name, macs, seconds in zip(self.names, self.macs, medians, strict=True):
            entry = found.setdefault(name, {"seconds": 0.0, "macs": 0.0, "count": 0})
            entry["seconds"] += seconds
            entry["macs"] += macs
            entry["count"] += 1
        return found


def breakdown(full: Side, mixed: Mapping[str, tuple[Side, float]], rounds: int) -> dict[str, Any]:
    """`mixed`: sides by name, each with its theoretical speed-up. Two rounds of warm-up are not counted."""
    sides = [full, *(side for side, _ in mixed.values())]
    for number in range(-2, rounds):
        for side in sides if number % 2 else reversed(sides):
            side()
            if number < 0:
                side.rounds.clear()
    whole = full.by_name()
    total = sum(entry["seconds"] for entry in whole.values())
    layers = {
        name: {"count": entry["count"], "ms": 1e3 * entry["seconds"], "share": entry["seconds"] / total}
        for name, entry in whole.items()
    }
    result: dict[str, Any] = {"ms": 1e3 * total, "layers": layers, "mixed": {}}
    for label, (side, theory) in mixed.items():
        parts, least, spent = {}, 0.0, 0.0
        for name, entry in side.by_name().items():
            keeps = entry["seconds"] / whole[name]["seconds"]
            need = entry["macs"] / whole[name]["macs"] if entry["macs"] else None
            parts[name] = {"need": need, "keeps": keeps, "realised": need / keeps if need else None}
            least += whole[name]["seconds"] * need if need else entry["seconds"]
            spent += entry["seconds"]
        result["mixed"][label] = {
            "theory": theory, "ms": 1e3 * spent, "realised": total / spent / theory, "bound": total / least / theory,
            "layers": parts,
        }  # fmt: skip
    return result


def lines(row: dict[str, Any]) -> list[str]:
    """The table of one network and batch."""
    mixed = row["mixed"]
    out = [f"{row['model']} batch {row['batch']}: {row['ms']:.1f} ms at full width, the sum of its layers"]
    out.append(f"{'layer':<30}{'ms':>8}{'share':>7}" + "".join(f" |{label:>5} need keeps real." for label in mixed))
    for name, entry in row["layers"].items():
        line = f"{int(entry['count'])} {name:<28}{entry['ms']:8.2f}{entry['share']:7.3f}"
        for side in mixed.values():
            part = side["layers"][name]
            need, realised = (f"{part[k]:.2f}" if part[k] is not None else "-" for k in ("need", "realised"))
            line += f" |{need:>10} {part['keeps']:5.2f} {realised:>5}"
        out.append(line)
    for label, side in mixed.items():
        out.append(
            f"{label}: theory {side['theory']:.2f}, {side['ms']:.1f} ms, realised {side['realised']:.2f}, "
            f"bound {side['bound']:.2f}, of it {side['realised'] / side['bound']:.2f}"
        )
    return out
