"""Direct against Winograd F(2x2,3x3) and F(4x4,3x3), layer by layer, beside prepacked oneDNN: the rule's figures.

    python bench/winograd.py                                # VGG-16's and ResNet-18's 3x3 layers, full and half width
    python bench/winograd.py --layers stem stem_32 stem_8   # folded 7x7 stems, F(4x4,4x4); they have no F2
    python bench/winograd.py --layers vgg5 --batch 1 8 --widths 1 1/2 1/4 --threads 1 --clock cpu --json out.json

Each row is checked against float64 first (relative L2 error at most 1e-5), then all algorithms run in turn in one
process; times are medians. `direct`, `F2`, `F4` and `auto` are speeds relative to oneDNN with prepacked weights at FULL
width; `auto` is the one of them that the rule in csrc/core/algorithm.cpp names. All sides apply a ReLU. Stack totals
weigh each layer by how often the network has it, from these medians; layers with strides are in `resnet18, all 3x3`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rnp.bench.environment import environment
from rnp.bench.layers import LAYERS, Layer
from rnp.bench.timing import CLOCKS, keep_freed_memory, measure, median
from rnp_kernels import _C

OPERATOR = torch.ops.rnp.prefix_conv2d.default
ALGORITHMS = ("direct", "winograd2", "winograd4")
TITLES = {"direct": "direct", "winograd2": "F2", "winograd4": "F4", "auto": "auto"}
OF_TILE = {0: "direct", 2: "winograd2", 4: "winograd4"}
STACKS = {
    "vgg16": {
        "vgg1_1": 1, "vgg1_2": 1, "vgg2_1": 1, "vgg2_2": 1, "vgg3_1": 1, "vgg3_2": 2, "vgg4_1": 1, "vgg4_2": 2,
        "vgg5": 3,
    },
    "resnet18, stride 1": {"r1_3x3": 4, "r2_3x3": 3, "r3_3x3": 3, "r4_3x3": 3},
    "resnet18, all 3x3": {
        "r1_3x3": 4, "r2_3x3s2": 1, "r2_3x3": 3, "r3_3x3s2": 1, "r3_3x3": 3, "r4_3x3s2": 1, "r4_3x3": 3,
    },
}  # fmt: skip
MORE = [
    Layer("scene_16a", 16, 16, 64, 3),
    Layer("scene_8a", 64, 8, 128, 3),
    Layer("scene_8b", 128, 8, 128, 3),
    Layer("r50_2", 128, 28, 128, 3),
    Layer("odd_13", 96, 13, 80, 3),
    Layer("tiny_6x6", 256, 6, 256, 3),
    Layer("stem_32", 3, 64, 64, 7, 2),
    Layer("stem_8", 3, 16, 64, 7, 2),
    Layer("stem_16out", 3, 224, 16, 7, 2),
    Layer("stem_2in", 2, 224, 64, 7, 2),
]
ALL = {layer.name: layer for layer in [*LAYERS, *MORE]}


def live(layer: Layer, width: Fraction) -> tuple[int, int]:
    """Prefixes of a width; an input of fewer than 4 channels stays whole."""
    c_in = layer.c_in if layer.c_in < 4 else -(-layer.c_in * width.numerator // width.denominator)
    return c_in, -(-layer.c_out * width.numerator // width.denominator)


def rule(layer: Layer, width: Fraction) -> str:
    """The algorithm that the rule names for samples of this width."""
    _C.set_algorithm("auto")
    kernel, padding = layer.kernel, layer.kernel // 2
    weight = (layer.c_out, layer.c_in, kernel, kernel)
    shape = ((layer.c_in, layer.size, layer.size), weight, [layer.stride] * 2, [padding] * 4, [1, 1])
    return OF_TILE[_C.choose_algorithm(*shape, 1, "float32", *live(layer, width))]


def algorithms(layer: Layer) -> tuple[str, ...]:
    """What can compute the layer: tiles of 2x2 are for 3x3 kernels."""
    return tuple(a for a in ALGORITHMS if layer.kernel == 3 or a != "winograd2")


def calls(layer: Layer, batch: int, widths: list[Fraction]) -> dict[str, Callable[[], Any]]:
    """What is timed, by name: "onednn", and "width algorithm" for each of both; all of them checked."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, layer.c_in, layer.size, layer.size, generator=generator)
    x = x.contiguous(memory_format=torch.channels_last)
    kernel = layer.kernel
    w = torch.randn(layer.c_out, layer.c_in, kernel, kernel, generator=generator) / (kernel**2 * layer.c_in) ** 0.5
    pads, strides, ones = [kernel // 2] * 2, [layer.stride] * 2, [1, 1]
    prepacked = torch.ops.mkldnn._reorder_convolution_weight(w, pads, strides, ones, 1, list(x.shape))
    packed = torch.ops.rnp.pack_weight(w, 1)
    shapes = ((layer.c_in, layer.size, layer.size), tuple(w.shape), strides, pads * 2, ones, 1, "float32")

    def onednn() -> Tensor:
        return torch.ops.mkldnn._convolution_pointwise(x, prepacked, None, pads, strides, ones, 1, "relu", [], "")

    def ours(algorithm: str, transformed: Tensor | None, i: Tensor, o: Tensor) -> Tensor:
        _C.set_algorithm(algorithm)
        return OPERATOR(x, w, None, strides, pads * 2, ones, 1, i, o, None, None, None, "relu", "skip", False, packed,
                        transformed)[0]  # fmt: skip

    runs: dict[str, Callable[[], Any]] = {"onednn": onednn}
    transformed: dict[int, Tensor | None] = {0: None}
    for width in widths:
        c_in, c_out = live(layer, width)
        i, o = (torch.full((batch,), c, dtype=torch.int32) for c in (c_in, c_out))
        truth = F.conv2d(x[:, :c_in].double(), w[:c_out, :c_in].double(), None, strides, pads).relu()
        for algorithm in algorithms(layer):
            _C.set_algorithm(algorithm)
            tile = _C.winograd_tile(*shapes)
            if tile not in transformed:
                transformed[tile] = torch.ops.rnp.pack_winograd(w, tile)
            run = lambda a=algorithm, u=transformed[tile], i=i, o=o: ours(a, u, i, o)  # noqa: E731
            error = ((run()[:, :c_out] - truth).norm() / truth.norm()).item()
            if not error <= 1e-5:
                raise SystemExit(f"{layer.name}, {algorithm}, width {width}: relative error {error:.3g}")
            runs[f"{width} {algorithm}"] = run
    return runs


def stacks(rows: list[dict[str, Any]], widths: list[Fraction]) -> list[dict[str, Any]]:
    """Totals of the stacks of which every layer was measured."""
    out = []
    for threads, batch in dict.fromkeys((r["threads"], r["batch"]) for r in rows):
        ms = {r["name"]: r["ms"] for r in rows if (r["threads"], r["batch"]) == (threads, batch)}
        for name, layers in STACKS.items():
            if not ms.keys() >= layers.keys():
                continue
            total = {key: sum(ms[layer][key] * count for layer, count in layers.items()) for key in ms[next(iter(ms))]}
            out.append({
                "stack": name, "threads": threads, "batch": batch, "ms": total,
                "speed": {k: total["onednn"] / t for k, t in total.items()},
            })  # fmt: skip
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    needed = dict.fromkeys(name for stack in STACKS.values() for name in stack)
    parser.add_argument("--layers", nargs="*", default=list(needed), help=f"of {', '.join(ALL)}")
    parser.add_argument("--batch", type=int, nargs="*", default=[1, 8])
    parser.add_argument("--widths", type=Fraction, nargs="*", default=[Fraction(1), Fraction(1, 2)])
    parser.add_argument("--threads", type=int, nargs="*", default=sorted({1, torch.get_num_threads()}))
    parser.add_argument("--seconds", type=float, default=1.0, help="time spent on each row")
    parser.add_argument("--clock", choices=sorted(CLOCKS), default="wall", help="cpu: this thread's, one thread")
    parser.add_argument("--json", type=Path, help="write environment, rows and stacks there")
    options = parser.parse_args()
    unknown = [name for name in options.layers if name not in ALL]
    if unknown:
        parser.error(f"no layer {unknown[0]!r}; there are {', '.join(ALL)}")
    if options.clock == "cpu" and options.threads != [1]:
        parser.error("--clock cpu needs --threads 1")
    keep_freed_memory()
    env = environment() | {"clock": options.clock}
    print(" ".join(f"{k}={v}" for k, v in env.items()))
    rows: list[dict[str, Any]] = []
    for threads in options.threads:
        torch.set_num_threads(threads)
        for batch in options.batch:
            for name in options.layers:
                runs, tried = calls(ALL[name], batch, options.widths), algorithms(ALL[name])
                times = measure(runs, "onednn", seconds=options.seconds, clock=options.clock)
                ms = {k: 1e3 * median(t) for k, t in times.items()}
                ms |= {f"{width} auto": ms[f"{width} {rule(ALL[name], width)}"] for width in options.widths}
                rows.append({"name": name, "threads": threads, "batch": batch, "ms": ms})
                line = "".join(
                    f" | {width}:"
                    + "".join(f" {TITLES[a]} {ms['onednn'] / ms[f'{width} {a}']:.2f}" for a in (*tried, "auto"))
                    for width in options.widths
                )
                print(f"{name:10s} thr {threads} batch {batch:3d} oneDNN {ms['onednn']:8.3f} ms "
                      f"noise {ms['onednn'] / ms['again']:.2f}{line}", flush=True)  # fmt: skip
    _C.set_algorithm("auto")
    totals = stacks(rows, options.widths)
    for total in totals:
        speeds = "  ".join(f"{k}: {v:.2f}" for k, v in total["speed"].items() if k not in ("onednn",))
        print(f"{total['stack']}, thr {total['threads']}, batch {total['batch']}: {speeds}")
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        found = {"command": sys.argv, "environment": env, "rows": rows, "stacks": totals}
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
