"""Training steps, forward and backward: `prefix_conv2d` against torch's dense convolution, full, half and mixed width.

    python bench/training_step.py                                     # single layers and two stacks, one thread and all
    python bench/training_step.py --only r2_3x3 --threads 1 --clock cpu --json out.json

*Layers*: gradients of input and weight of one convolution, channels_last, its weights packed anew in every step as an
optimizer demands. *Stacks*: the 3x3 convolutions of VGG-16 and of ResNet-18 (behind their stem) in a chain with ReLU,
2x2 mean pooling where the map shrinks without a stride; gradients of all weights. Every side is checked against masked
dense torch before it is timed (without the ReLUs, which open on one side and not on the other where a value is nearly
0); all sides run in turn in one process. `full` is dense time / our time. The other columns are *realised fractions*:
(dense time / our time) / theoretical speed-up, with a first layer of few channels kept whole. `masked` is what masked
dense torch makes of half width.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import rnp_kernels
from rnp.bench.environment import environment
from rnp.bench.gate import require_close
from rnp.bench.timing import CLOCKS, keep_freed_memory, measure, summary
from rnp_kernels import reference

GROUPS = 4


@dataclass(frozen=True)
class Layer:
    """One 3x3 or 1x1 convolution; `pool`: its output is then averaged over 2x2 pixels."""

    c_in: int
    c_out: int
    kernel: int = 3
    stride: int = 1
    pool: bool = False


@dataclass(frozen=True)
class Subject:
    """Layers in a chain on a map of `size`; a single layer also gives the gradient of its input."""

    name: str
    size: int
    layers: tuple[Layer, ...]


def chain(widths: list[tuple[int, bool]], c_in: int, strided: bool) -> tuple[Layer, ...]:
    """Layers of (channels, the map shrinks here): by a stride in this layer, or by pooling behind it."""
    out = []
    for width, shrinks in widths:
        out.append(Layer(c_in, width, 3, 2 if shrinks and strided else 1, shrinks and not strided))
        c_in = width
    return tuple(out)


VGG = [(64, False), (64, True), (128, False), (128, True), (256, False), (256, False), (256, True),
       *[(512, False), (512, False), (512, True)] * 2]  # fmt: skip
RESNET = [(64, False)] * 4 + [(w, i == 0) for w in (128, 256, 512) for i in range(4)]
SUBJECTS = (
    Subject("vgg1_2", 224, (Layer(64, 64),)),
    Subject("vgg2_2", 112, (Layer(128, 128),)),
    Subject("vgg3_2", 56, (Layer(256, 256),)),
    Subject("vgg4_2", 28, (Layer(512, 512),)),
    Subject("vgg5", 14, (Layer(512, 512),)),
    Subject("r1_3x3", 56, (Layer(64, 64),)),
    Subject("r2_3x3s2", 56, (Layer(64, 128, stride=2),)),
    Subject("r2_3x3", 28, (Layer(128, 128),)),
    Subject("r3_3x3", 14, (Layer(256, 256),)),
    Subject("r4_3x3", 7, (Layer(512, 512),)),
    Subject("r1_1x1_up", 56, (Layer(64, 256, 1),)),
    Subject("r3_1x1_down", 14, (Layer(1024, 256, 1),)),
    Subject("r2_1x1s2", 56, (Layer(64, 128, 1, 2),)),
    Subject("stack_vgg", 112, chain(VGG, 3, strided=False)),
    Subject("stack_resnet", 56, chain(RESNET, 64, strided=True)),
)

Prefixes = list[Tensor | None]  # of the input and of every layer's output


def prefixes(subject: Subject, actions: Tensor) -> Prefixes:
    """ceil(a * C / GROUPS) for actions (layers + 1, batch); an input of fewer channels than GROUPS stays whole."""
    channels = [subject.layers[0].c_in, *(layer.c_out for layer in subject.layers)]
    return [
        None if count < GROUPS else (-(-row * count // GROUPS)).int()
        for row, count in zip(actions, channels, strict=True)
    ]


def theory(subject: Subject, widths: Prefixes, batch: int) -> float:
    """Dense MACs / MACs; a layer's positions weigh what its map has left of them."""
    size, dense, live = subject.size, 0.0, 0.0
    for i, layer in enumerate(subject.layers):
        size = (size - 1) // layer.stride + 1
        work = float(layer.kernel**2 * size * size)
        lanes = [torch.full((batch,), c) if p is None else p.long() for c, p in
                 ((layer.c_in, widths[i]), (layer.c_out, widths[i + 1]))]  # fmt: skip
        dense += work * batch * layer.c_in * layer.c_out
        live += work * float((lanes[0] * lanes[1]).sum())
        size //= 2 if layer.pool else 1
    return dense / live


class Step:
    """One subject's data; `run` makes a step and returns the gradients: of the input of a single layer, of weights."""

    def __init__(self, subject: Subject, batch: int) -> None:
        generator = torch.Generator().manual_seed(0)
        first, self.subject = subject.layers[0], subject
        x = torch.randn(batch, first.c_in, subject.size, subject.size, generator=generator)
        self.x = x.contiguous(memory_format=torch.channels_last)
        self.x.requires_grad_(len(subject.layers) == 1)
        self.weights = [
            (torch.randn(la.c_out, la.c_in, la.kernel, la.kernel, generator=generator)
             * (2 / (la.c_in * la.kernel**2)) ** 0.5).requires_grad_()
            for la in subject.layers
        ]  # fmt: skip
        shape = self._forward(lambda x, w, la, i, o: F.conv2d(x, w, None, la.stride, la.kernel // 2)).shape
        upstream = torch.randn(shape, generator=generator)
        self.upstream = upstream.contiguous(memory_format=torch.channels_last)

    def _forward(self, convolve: Callable[..., Tensor], widths: Prefixes | None = None, relu: bool = True) -> Tensor:
        x = self.x
        widths = [None] * (len(self.weights) + 1) if widths is None else widths
        for i, (layer, weight) in enumerate(zip(self.subject.layers, self.weights, strict=True)):
            x = convolve(x, weight, layer, widths[i], widths[i + 1])
            x = F.relu(x) if relu and len(self.weights) > 1 else x
            x = F.avg_pool2d(x, 2) if layer.pool else x
        return x

    def run(
        self, convolve: Callable[..., Tensor], widths: Prefixes | None = None, relu: bool = True
    ) -> tuple[Tensor, ...]:
        wanted = [*([self.x] if self.x.requires_grad else []), *self.weights]
        return torch.autograd.grad(self._forward(convolve, widths, relu), wanted, self.upstream)


def dense(x: Tensor, w: Tensor, layer: Layer, _in: Tensor | None, _out: Tensor | None) -> Tensor:
    return F.conv2d(x, w, None, layer.stride, layer.kernel // 2)


def masked(x: Tensor, w: Tensor, layer: Layer, live_in: Tensor | None, live_out: Tensor | None) -> Tensor:
    if live_in is not None:
        x = x * reference.live(x.shape[1], live_in, x)
    y = F.conv2d(x, w, None, layer.stride, layer.kernel // 2)
    return y if live_out is None else y * reference.live(y.shape[1], live_out, y)


def ours(x: Tensor, w: Tensor, layer: Layer, live_in: Tensor | None, live_out: Tensor | None) -> Tensor:
    return rnp_kernels.prefix_conv2d(
        x, w, None, layer.stride, layer.kernel // 2, in_prefix=live_in, out_prefix=live_out
    )


def row(subject: Subject, batch: int, seconds: float, clock: str) -> dict[str, Any]:
    step = Step(subject, batch)
    generator, count = torch.Generator().manual_seed(1), len(subject.layers) + 1
    widths = {
        "half": prefixes(subject, torch.full((count, batch), GROUPS // 2)),
        "mixed": prefixes(subject, torch.randint(1, GROUPS + 1, (count, batch), generator=generator)),
    }
    for name, some in {"full": None, **widths}.items():
        gradients = zip(step.run(ours, some, relu=False), step.run(masked, some, relu=False), strict=True)
        for index, (got, expected) in enumerate(gradients):
            require_close(f"{subject.name}, {name}, gradient {index}", got[None], expected[None])
    sides = {
        "dense": lambda: step.run(dense),
        "full": lambda: step.run(ours),
        "half": lambda: step.run(ours, widths["half"]),
        "mixed": lambda: step.run(ours, widths["mixed"]),
        "masked": lambda: step.run(masked, widths["half"]),
    }
    result = summary(measure(sides, "dense", seconds=seconds, clock=clock), "dense")
    speed = {name: value["median"] for name, value in result["speedup"].items()}
    expected = {name: theory(subject, some, batch) for name, some in widths.items()}
    result["theory"] = expected
    result["fraction"] = {name: speed[name] / expected[name] for name in expected}
    result["fraction"]["masked"] = speed["masked"] / expected["half"]
    return {"subject": subject.name, "batch": batch, "threads": torch.get_num_threads(), **result}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--only", default="", help="only subjects whose name contains this")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--threads", type=int, nargs="+", default=sorted({1, torch.get_num_threads()}))
    parser.add_argument("--seconds", type=float, default=2.0, help="per row, at least")
    parser.add_argument("--clock", choices=sorted(CLOCKS), default="wall")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    keep_freed_memory()
    env = environment() | {"clock": options.clock}
    print(" ".join(f"{key}={value}" for key, value in env.items()))
    print("subject       thr bat  dense ms noise |  full | realised fraction: half  mixed  masked")
    rows = []
    for threads in options.threads:
        torch.set_num_threads(threads)
        for subject in SUBJECTS:
            if options.only not in subject.name:
                continue
            r = row(subject, options.batch, options.seconds, options.clock)
            rows.append(r)
            full, part = r["speedup"]["full"]["median"], r["fraction"]
            print(
                f"{r['subject']:13s} {threads:3d} {r['batch']:3d} {r['ms']['dense']['median']:9.2f} "
                f"{r['noise']['median']:5.2f} | {full:5.2f} | {part['half']:23.2f} {part['mixed']:6.2f} "
                f"{part['masked']:7.2f}",
                flush=True,
            )
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps({"environment": env, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
