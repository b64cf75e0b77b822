"""Single layers of VGG-16 and ResNet-18/50: `prefix_conv2d` against prepacked oneDNN and eager `nn.Conv2d`.

    python bench/layers.py                          # every layer, one thread and all threads, batch 1 and 8
    python bench/layers.py --layers r2 --batch 8 --threads 1 --seconds 2 --json out.json

Every row is checked against torch before it is timed. All variants of a row run interleaved in one process; times are
medians (p20, p80 in the JSON). `full` is the speed relative to prepacked oneDNN at full width, `eager` relative to
eager torch. The other columns are the *realised fraction*: (oneDNN's dense time / our time) / theoretical speed-up, for
uniform widths and for a mixed batch in which every sample draws its input and output width from 1/4 … 4/4. `noise`
compares oneDNN with itself: smaller differences say nothing. Widths below full run with tail="skip", as inside a
converted network.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import rnp_kernels
from rnp_kernels import _C

GROUPS = 4


@dataclass(frozen=True)
class Layer:
    name: str
    c_in: int
    size: int
    c_out: int
    kernel: int
    stride: int = 1
    groups: int = 1

    @property
    def padding(self) -> int:
        return self.kernel // 2

    @property
    def out_size(self) -> int:
        return (self.size + 2 * self.padding - self.kernel) // self.stride + 1

    def valid_macs(self) -> int:
        """MACs of one image at full width, taps in the padding left out."""
        taps = sum(
            0 <= o * self.stride - self.padding + k < self.size
            for o in range(self.out_size)
            for k in range(self.kernel)
        )
        return self.c_in // self.groups * self.c_out * taps * taps


LAYERS = [
    Layer("vgg1_1", 3, 224, 64, 3),
    Layer("vgg1_2", 64, 224, 64, 3),
    Layer("vgg2_1", 64, 112, 128, 3),
    Layer("vgg2_2", 128, 112, 128, 3),
    Layer("vgg3_1", 128, 56, 256, 3),
    Layer("vgg3_2", 256, 56, 256, 3),
    Layer("vgg4_1", 256, 28, 512, 3),
    Layer("vgg4_2", 512, 28, 512, 3),
    Layer("vgg5", 512, 14, 512, 3),
    Layer("stem", 3, 224, 64, 7, 2),
    Layer("r1_3x3", 64, 56, 64, 3),
    Layer("r2_3x3s2", 64, 56, 128, 3, 2),
    Layer("r2_3x3", 128, 28, 128, 3),
    Layer("r3_3x3s2", 128, 28, 256, 3, 2),
    Layer("r3_3x3", 256, 14, 256, 3),
    Layer("r4_3x3s2", 256, 14, 512, 3, 2),
    Layer("r4_3x3", 512, 7, 512, 3),
    Layer("r1_1x1", 64, 56, 64, 1),
    Layer("r1_1x1_up", 64, 56, 256, 1),
    Layer("r1_1x1_down", 256, 56, 64, 1),
    Layer("r2_1x1_up", 128, 28, 512, 1),
    Layer("r2_1x1_down", 512, 28, 128, 1),
    Layer("r3_1x1_up", 256, 14, 1024, 1),
    Layer("r3_1x1_down", 1024, 14, 256, 1),
    Layer("r4_1x1_up", 512, 7, 2048, 1),
    Layer("r4_1x1_down", 2048, 7, 512, 1),
    Layer("r2_1x1s2", 64, 56, 128, 1, 2),
    Layer("r50_1x1s2", 512, 28, 1024, 1, 2),
    Layer("tiny_8x8", 64, 8, 64, 3),
    Layer("tiny_4x4", 128, 4, 128, 3),
    Layer("tiny_2x2", 256, 2, 256, 3),
    Layer("digits_1", 1, 32, 16, 3),
    Layer("digits_2", 16, 32, 32, 3),
    Layer("grouped", 128, 28, 128, 3, 1, 4),
    Layer("depthwise", 128, 56, 128, 3, 1, 128),
    Layer("depthwise_s2", 256, 28, 256, 3, 2, 256),
]


def keep_freed_memory() -> None:
    """Large outputs are otherwise given back to the system and faulted in again at every call, on both sides alike."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD
        libc.mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD


def environment() -> dict[str, Any]:
    def first_line(path: str, key: str) -> str:
        try:
            return next(line.split(":")[1].strip() for line in Path(path).read_text().splitlines() if key in line)
        except (OSError, StopIteration):
            return "unknown"

    command = ["git", "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent)
    return {
        "cpu": first_line("/proc/cpuinfo", "model name"),
        "cores": os.cpu_count(),
        "isa": _C.isa(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit.stdout.strip() or "unknown",
        "load": os.getloadavg()[0],
    }


@dataclass
class Variant:
    """One thing to time; `theory` is its theoretical speed-up over the dense layer."""

    run: Callable[[], Any]
    theory: float = 1.0


def widths(layer: Layer, batch: int, generator: torch.Generator) -> dict[str, tuple[Tensor, Tensor]]:
    """(in_prefix, out_prefix) of each variant; an input of fewer than 4 channels stays whole."""

    def channels(actions: Tensor, count: int) -> Tensor:
        return -(-actions * count // GROUPS) if count >= GROUPS else torch.full_like(actions, count)

    chosen = {str(Fraction(a, GROUPS)): (torch.full((batch,), a), torch.full((batch,), a)) for a in (3, 2, 1)}
    if batch > 1:
        draw = torch.randint(1, GROUPS + 1, (2, batch), generator=generator)
        chosen["mixed"] = (draw[0], draw[1])
    return {k: (channels(i, layer.c_in).int(), channels(o, layer.c_out).int()) for k, (i, o) in chosen.items()}


def variants(layer: Layer, batch: int) -> dict[str, Variant]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, layer.c_in, layer.size, layer.size, generator=generator)
    x = x.contiguous(memory_format=torch.channels_last)
    fan_in = layer.c_in // layer.groups * layer.kernel**2
    size = (layer.c_out, layer.c_in // layer.groups, layer.kernel, layer.kernel)
    w = torch.randn(size, generator=generator) / fan_in**0.5
    pads, strides, ones = [layer.padding] * 2, [layer.stride] * 2, [1, 1]
    prepacked = torch.ops.mkldnn._reorder_convolution_weight(w, pads, strides, ones, layer.groups, list(x.shape))
    packed = rnp_kernels.pack_weight(w, layer.groups)
    eager_weight = w.contiguous(memory_format=torch.channels_last)

    def onednn(of: Tensor = x) -> Tensor:
        return torch.ops.mkldnn._convolution_pointwise(
            of, prepacked, None, pads, strides, ones, layer.groups, "none", [], ""
        )

    def eager() -> Tensor:
        return F.conv2d(x, eager_weight, None, strides, pads, ones, layer.groups)

    def ours(of: Tensor = x, in_prefix: Tensor | None = None, out_prefix: Tensor | None = None) -> Tensor:
        tail = "zero" if out_prefix is None else "skip"
        return torch.ops.rnp.prefix_conv2d(
            of, w, None, strides, pads * 2, ones, layer.groups, in_prefix, out_prefix, None, None, None, "none", tail,
            False, packed,
        )[0]  # fmt: skip

    out = {"onednn": Variant(onednn), "again": Variant(onednn), "eager": Variant(eager), "full": Variant(ours)}
    check(layer, "full", ours(), onednn())
    dense = batch * layer.c_in * layer.c_out
    for name, (i, o) in widths(layer, batch, generator).items():
        if layer.groups > 1:
            macs = _C.macs(
                i.tolist(), o.tolist(), in_channels=layer.c_in, out_channels=layer.c_out, kernel_size=[1, 1],
                output_size=[1, 1], groups=layer.groups,
            )  # fmt: skip
            theory = dense / layer.groups / max(1, sum(macs))
        else:
            theory = dense / int((i.long() * o.long()).sum())
        out[name] = Variant(lambda i=i, o=o: ours(x, i, o), theory)
        live_in = (torch.arange(layer.c_in) < i[:, None])[:, :, None, None]
        live_out = (torch.arange(layer.c_out) < o[:, None])[:, :, None, None]
        poisoned = torch.where(live_in, x, torch.nan).contiguous(memory_format=torch.channels_last)
        masked = torch.where(live_in, x, 0).contiguous(memory_format=torch.channels_last)
        expected = torch.where(live_out, onednn(masked), 0)
        check(layer, name, torch.where(live_out, ours(poisoned, i, o), 0), expected)
    return out


def check(layer: Layer, name: str, ours: Tensor, expected: Tensor) -> None:
    error = (ours - expected).abs().max().item()
    if not error <= 2e-5 * max(1.0, expected.abs().max().item()):
        raise SystemExit(f"{layer.name}, {name}: wrong result, largest error {error:.3g}")


def measure(runs: dict[str, Variant], seconds: float, clock: Callable[[], float]) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in runs}
    start = time.perf_counter()
    while time.perf_counter() - start < seconds or len(times["onednn"]) < 7:
        for name, variant in runs.items():
            before = clock()
            variant.run()
            times[name].append(clock() - before)
    return times


def row(layer: Layer, batch: int, threads: int, seconds: float, clock: Callable[[], float]) -> dict[str, Any]:
    torch.set_num_threads(threads)
    runs = variants(layer, batch)
    times = measure(runs, seconds, clock)
    middle = {name: statistics.median(t) for name, t in times.items()}
    deciles = {name: statistics.quantiles(t, n=10) for name, t in times.items()}
    flops = 2 * batch * layer.valid_macs()
    result: dict[str, Any] = {
        **asdict(layer), "batch": batch, "threads": threads, "samples": len(times["onednn"]),
        "ms": {name: 1e3 * t for name, t in middle.items()},
        "ms_p20": {name: 1e3 * d[1] for name, d in deciles.items()},
        "ms_p80": {name: 1e3 * d[7] for name, d in deciles.items()},
        "noise": middle["onednn"] / middle["again"],
        "gflops_onednn": flops / middle["onednn"] / 1e9, "gflops_ours": flops / middle["full"] / 1e9,
        "full": middle["onednn"] / middle["full"], "full_vs_eager": middle["eager"] / middle["full"],
        "theory": {name: v.theory for name, v in runs.items() if name not in ("onednn", "again", "eager", "full")},
    }  # fmt: skip
    result["fraction"] = {name: middle["onednn"] / middle[name] / theory for name, theory in result["theory"].items()}
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", default="", help="only layers whose name contains this")
    parser.add_argument("--batch", type=int, nargs="*", default=[1, 8])
    parser.add_argument("--threads", type=int, nargs="*", default=sorted({1, torch.get_num_threads()}))
    parser.add_argument("--seconds", type=float, default=1.0, help="time spent on each row")
    parser.add_argument(
        "--clock",
        choices=["wall", "cpu"],
        default="wall",
        help="cpu: this thread's CPU time, for a busy machine (one thread)",
    )
    parser.add_argument("--json", type=Path, help="write environment and rows there")
    options = parser.parse_args()
    if options.clock == "cpu" and options.threads != [1]:
        parser.error("--clock cpu needs --threads 1")
    clock = time.thread_time if options.clock == "cpu" else time.perf_counter
    keep_freed_memory()
    env = environment() | {"clock": options.clock}
    print(" ".join(f"{k}={v}" for k, v in env.items()))
    print(f"{'layer':13s} {'shape':24s} thr bat oneDNN ms   GF/s   ours noise | full eager | realised fraction")
    rows = []
    for threads in options.threads:
        for batch in options.batch:
            for layer in LAYERS:
                if options.layers not in layer.name:
                    continue
                r = row(layer, batch, threads, options.seconds, clock)
                rows.append(r)
                ms, gflops, own = r["ms"]["onednn"], r["gflops_onednn"], r["gflops_ours"]
                shape = f"{layer.c_in}x{layer.size}->{layer.c_out} k{layer.kernel}s{layer.stride}g{layer.groups}"
                fractions = "  ".join(f"{name} {value:.2f}" for name, value in r["fraction"].items())
                print(
                    f"{layer.name:13s} {shape:24s} {threads:3d} {batch:3d} {ms:9.3f} {gflops:6.1f} {own:6.1f} "
                    f"{r['noise']:5.2f} | {r['full']:.2f} {r['full_vs_eager']:5.2f} | {fractions}",
                    flush=True,
                )
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps({"environment": env, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
