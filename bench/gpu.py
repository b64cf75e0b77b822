"""`prefix_conv2d` on a GPU: layers against cuDNN and against what a user does with a mixed batch, and whole networks.

    python bench/gpu.py --json gpu.json                     # everything, about four minutes
    python bench/gpu.py --part layers --batch 32 --layers r3_3x3 vgg5 --backend triton
    python bench/gpu.py --part tune --json tiles.json       # tiles.json is what RNP_TRITON_TILES takes
    python bench/gpu.py --dtype float32 --part layers       # TF32 on every side, cuDNN's included

Every row is checked before it is timed. The sides of a row run in turn, in one process; each is one CUDA graph where it
can be captured (`eager` names those that cannot, as they wait for the device), timed with events, the L2 cache flushed
before every replay; figures are medians with p20 and p80. Widths below full run with tail="skip", as inside a converted
network. `realised` is (own full width / time) / theoretical speed-up; `roofline` the share of the bound
max(FLOPs / rate, bytes / bandwidth) with both ceilings measured in the same run. Rows that the time limit or an error
left out are listed with the reason; nothing is estimated.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import rnp
import rnp_kernels
from rnp.bench.environment import environment
from rnp.bench.gate import require_close
from rnp.bench.layers import BY_NAME, Layer

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
DTYPE = torch.bfloat16  # --dtype sets it, once
# float32 products are TF32: operands with ten bits behind the point, rounded by one side and cut off by the other, so
# results differ by some 2^-11 of each operand; None is the gate's own.
LIMITS = {torch.bfloat16: None, torch.float32: 3e-3}
LAYERS = ("vgg1_2", "vgg2_2", "vgg3_2", "vgg4_2", "vgg5", "r1_3x3", "r2_3x3", "r3_3x3", "r4_3x3", "r2_3x3s2",
          "r1_1x1_up", "r2_1x1_down", "r3_1x1_up", "r4_1x1_up", "stem", "grouped", "depthwise")  # fmt: skip
BATCHES = (8, 32, 256)
TARGETS = (1, 3, 4, 5, 10)  # theoretical speed-up of whole networks
ROUNDS = 15
_FLUSH_BYTES = 256 << 20  # larger than any L2


def _graph(call: Callable[[], object]) -> Callable[[], object] | None:
    """The call as a graph; None where it cannot be captured."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            call()
    except RuntimeError:
        torch.cuda.synchronize()
        return None
    return graph.replay


def measure(sides: dict[str, Callable[[], object]], eager: tuple[str, ...] = ()) -> dict[str, Any]:
    """Milliseconds of every side: {"ms": {name: {median, p20, p80}}, "eager": names that run without a graph}."""
    flush = torch.empty(_FLUSH_BYTES, dtype=torch.uint8, device="cuda")
    calls, plain = {}, []
    for name, call in sides.items():
        graph = None if name in eager else _graph(call)
        if graph is None:
            plain.append(name)
        calls[name] = graph or call
        calls[name]()
    times: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(ROUNDS):
        for name in calls if number % 2 == 0 else reversed(calls):
            flush.fill_(number)
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            begin.record()
            calls[name]()
            end.record()
            end.synchronize()
            times[name].append(begin.elapsed_time(end))
    spread = {}
    for name, values in times.items():
        ordered = sorted(values)
        spread[name] = {"median": ordered[ROUNDS // 2], "p20": ordered[ROUNDS // 5], "p80": ordered[-1 - ROUNDS // 5]}
    return {"ms": spread, "eager": plain}


def ceilings() -> dict[str, float]:
    """What this GPU reaches: FLOP/s of a large product of random data, bytes/s of a large copy, both ways."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=DTYPE) for _ in range(2))
    source = torch.randn(1 << 30, device="cuda")
    target = torch.empty_like(source)
    ms = measure({"product": lambda: a @ b, "copy": lambda: target.copy_(source)})["ms"]
    rate = 2 * 8192**3 / ms["product"]["median"] * 1e3
    return {"flops": rate, "bytes": 2 * source.nbytes / ms["copy"]["median"] * 1e3}


def tensors(layer: Layer, batch: int) -> tuple[Tensor, Tensor]:
    """As Layer.tensors, made on the device: a batch of 256 at 224x224 takes a CPU longer than all its rows."""
    generator = torch.Generator("cuda").manual_seed(0)

    def values(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device="cuda", dtype=DTYPE)

    x = values(batch, layer.size, layer.size, layer.c_in).permute(0, 3, 1, 2)
    inner = layer.c_in // layer.groups
    w = values(layer.c_out, layer.kernel, layer.kernel, inner).permute(0, 3, 1, 2)
    return x, w / (inner * layer.kernel**2) ** 0.5


def slices(x: Tensor, w: Tensor, layer: Layer, ins: list[int], outs: list[int]) -> Tensor:
    """A dense convolution for each sample; the widths are known to the host, which favours it."""
    size = (x.shape[0], layer.c_out, layer.out_size, layer.out_size)
    y = torch.zeros(size, dtype=x.dtype, device="cuda").contiguous(memory_format=torch.channels_last)
    for n, (i, o) in enumerate(zip(ins, outs, strict=True)):
        y[n : n + 1, :o] = F.conv2d(x[n : n + 1, :i], w[:o, :i], None, layer.stride, layer.padding)
    return y


def by_action(x: Tensor, w: Tensor, layer: Layer, in_prefix: Tensor, out_prefix: Tensor) -> Tensor:
    """One dense convolution for each pair of widths that occurs; the pairs are read back from the device."""
    size = (x.shape[0], layer.c_out, layer.out_size, layer.out_size)
    y = torch.zeros(size, dtype=x.dtype, device="cuda").contiguous(memory_format=torch.channels_last)
    pairs, which = torch.stack([in_prefix, out_prefix], 1).unique(dim=0, return_inverse=True)
    for index, (i, o) in enumerate(pairs.tolist()):
        samples = (which == index).nonzero().squeeze(1)
        y[samples, :o] = F.conv2d(x[samples, :i], w[:o, :i], None, layer.stride, layer.padding)
    return y


def _bound(layer: Layer, batch: int, share_in: float, share_out: float, theory: float, top: dict[str, float]) -> float:
    """The roofline's milliseconds for live inputs read, live outputs written and the weight read once."""
    flops = 2 * layer.valid_macs() * batch / theory
    moved = batch * (layer.c_in * layer.size**2 * share_in + layer.c_out * layer.out_size**2 * share_out)
    moved += layer.c_in // layer.groups * layer.c_out * layer.kernel**2
    return 1e3 * max(flops / top["flops"], DTYPE.itemsize * moved / top["bytes"])


def layer_row(layer: Layer, batch: int, top: dict[str, float]) -> dict[str, Any]:
    """One layer at one batch: full width beside cuDNN, then widths drawn at random beside every rival."""
    x, w = tensors(layer, batch)
    geometry = (layer.stride, layer.padding, 1, layer.groups)
    ins, outs = (t.cuda() for t in layer.widths(batch)["mixed"])
    masked = torch.where(rnp_kernels.reference.live(layer.c_in, ins, x), x, 0)
    out_mask = rnp_kernels.reference.live(layer.c_out, outs, x).to(DTYPE)
    # As inside a network, where the pack is kept: in a graph a call without one packs at every replay.
    packed = rnp_kernels.pack_weight(w, layer.groups) if rnp_kernels.get_backend() == "cuda" else None

    def full() -> Tensor:
        return rnp_kernels.prefix_conv2d(x, w, None, *geometry, packed=packed)

    def mixed(tail: str = "skip") -> Tensor:
        return rnp_kernels.prefix_conv2d(
            x, w, None, *geometry, in_prefix=ins, out_prefix=outs, tail=tail, packed=packed
        )

    expected = F.conv2d(masked, w, None, *geometry) * out_mask
    require_close("full width", full(), F.conv2d(x, w, None, *geometry), LIMITS[DTYPE])
    require_close("mixed widths", mixed("zero"), expected, LIMITS[DTYPE])
    sides: dict[str, Callable[[], object]] = {
        "full": full, "full again": full, "mixed": mixed, "cudnn": lambda: F.conv2d(x, w, None, *geometry),
        "dense + mask": lambda: F.conv2d(masked, w, None, *geometry) * out_mask,
    }  # fmt: skip
    if layer.groups == 1:
        i_list, o_list = ins.tolist(), outs.tolist()
        require_close("slices", slices(masked, w, layer, i_list, o_list), expected, LIMITS[DTYPE])
        require_close("by action", by_action(masked, w, layer, ins, outs), expected, LIMITS[DTYPE])
        sides["slices"] = lambda: slices(masked, w, layer, i_list, o_list)
        sides["group by action"] = lambda: by_action(masked, w, layer, ins, outs)
    found = measure(sides, eager=("slices", "group by action"))
    ms = {name: spread["median"] for name, spread in found["ms"].items()}
    theory = layer.theory(ins.cpu(), outs.cpu())
    shares = float(ins.float().mean() / layer.c_in), float(outs.float().mean() / layer.c_out)
    rivals = {name: ms[name] / ms["mixed"] for name in ms if name not in ("full", "full again", "mixed", "cudnn")}
    return found | {
        "layer": layer.name, "shape": layer.shape, "batch": batch, "theory": theory,
        "full_over_cudnn": ms["cudnn"] / ms["full"], "noise": ms["full"] / ms["full again"],
        "realised": ms["full"] / ms["mixed"] / theory, "faster_than": rivals,
        "roofline": {"full": _bound(layer, batch, 1, 1, 1, top) / ms["full"],
                     "mixed": _bound(layer, batch, *shares, theory, top) / ms["mixed"]},
        "tflops": 2 * layer.valid_macs() * batch / ms["full"] / 1e9,
    }  # fmt: skip


def actions_for(network: Any, target: float, batch: int) -> Tensor:
    """Random actions (N, L), drawn with the odds that bring their theoretical speed-up nearest to `target`."""
    generator = torch.Generator().manual_seed(0)
    k, layers = network.groups, len(network.layers)
    if target == 1:
        return torch.full((batch, layers), k)
    best, miss = None, float("inf")
    for power in torch.linspace(-6, 6, 241):
        odds = torch.arange(1, k + 1).float().pow(float(power))
        drawn = torch.multinomial(odds, batch * layers, True, generator=generator).view(batch, layers) + 1
        speedup = network.dense_macs / float(network.macs(drawn).double().mean())
        if abs(speedup - target) < miss:
            best, miss = drawn, abs(speedup - target)
    assert best is not None
    return best


def network_row(name: str, batch: int) -> dict[str, Any]:
    """A whole converted network as one CUDA graph, at each theoretical speed-up, against its own full width."""
    import torchvision

    torch.manual_seed(0)
    images = torch.randn(batch, 3, 224, 224).contiguous(memory_format=torch.channels_last)
    dense = getattr(torchvision.models, name)().eval().to(memory_format=torch.channels_last)
    networks, theory = {}, {}
    converted = rnp.convert(dense, images[:1])
    for target in TARGETS:
        pruned = copy.deepcopy(converted)
        actions = actions_for(pruned, target, batch)
        theory[str(target)] = pruned.dense_macs / float(pruned.macs(actions).double().mean())
        pruned.policy = rnp.policies.Fixed(actions)
        networks[str(target)] = pruned.eval().to("cuda", DTYPE)
    images, dense = images.to("cuda", DTYPE), dense.to("cuda", DTYPE)
    sides: dict[str, Callable[[], object]] = {key: lambda net=net: net(images) for key, net in networks.items()}
    sides["dense"] = lambda: dense(images)
    with torch.no_grad():
        require_close("full width", networks["1"](images), dense(images), 5e-2)
        found = measure(sides)
    ms = {key: spread["median"] for key, spread in found["ms"].items()}
    realised = {key: ms["1"] / ms[key] / (theory[key] / theory["1"]) for key in networks if key != "1"}
    return found | {"network": name, "batch": batch, "theory": theory, "realised": realised,
                    "full_over_dense": ms["dense"] / ms["1"]}  # fmt: skip


def tune(layers: list[Layer]) -> dict[str, list[int]]:
    """For each line of the tile table that these layers use, the fastest of tiles.CANDIDATES at batch 64."""
    from rnp_kernels.triton import tiles

    totals: dict[str, dict[tuple[int, ...], float]] = {}
    for layer in layers:
        x, w = tensors(layer, 64)
        key = tiles.key_of(DTYPE, "tf32", False, layer.out_size**2, layer.c_out // layer.groups)
        if tiles.is_direct(DTYPE, layer.groups, layer.c_in // layer.groups, layer.c_out // layer.groups):
            continue
        sides = {}
        for tile in {tiles.TILES[key], *tiles.CANDIDATES}:
            tiles.override({key: tile})
            values = (tile.rows, tile.columns, tile.depth, tile.warps, tile.stages)
            call = partial(rnp_kernels.prefix_conv2d, x, w, None, layer.stride, layer.padding)
            graph = _graph(call)
            if graph is not None:
                sides[str(values)] = graph
        tiles.override({})
        for values, spread in measure(sides, eager=tuple(sides))["ms"].items():
            total = totals.setdefault(key, {})
            total[values] = total.get(values, 0.0) + spread["median"]
    return {key: json.loads(min(total, key=total.__getitem__).replace("(", "[").replace(")", "]"))
            for key, total in totals.items()}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=("all", "layers", "networks", "tune"), default="all")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="bfloat16", help="float32 with TF32 on every side")
    parser.add_argument("--backend", default=None, help="cuda or triton; both where they run if not given")
    parser.add_argument("--layers", nargs="+", default=LAYERS, choices=sorted(BY_NAME))
    parser.add_argument("--batch", nargs="+", type=int, default=BATCHES)
    parser.add_argument("--limit", type=float, default=240.0, help="seconds after which no new row is begun")
    parser.add_argument("--json", type=Path, default=None)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("bench/gpu.py: torch sees no CUDA device; nothing was measured")
    global DTYPE
    DTYPE = DTYPES[options.dtype]
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.conv.fp32_precision = torch.backends.cuda.matmul.fp32_precision = "tf32"
    begin = time.monotonic()
    if options.part == "tune":
        with rnp_kernels.backend("triton"):
            chosen = tune([BY_NAME[name] for name in options.layers])
        text = json.dumps(chosen, indent=2)
        print(text)
        if options.json is not None:
            options.json.write_text(text + "\n", encoding="utf-8")
        return
    reasons = rnp_kernels.available_backends()
    names = [options.backend] if options.backend else [name for name in ("cuda", "triton") if reasons[name] is None]
    report: dict[str, Any] = {
        "dtype": options.dtype,
        "environment": environment() | {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda},
        "backends": reasons, "ceilings": ceilings(), "rows": [], "not_measured": [],
    }  # fmt: skip
    jobs: list[tuple[str, str, Callable[[], dict[str, Any]]]] = []
    for name in names:
        if options.part != "layers":
            jobs += [(name, f"{net} batch 64", lambda net=net: network_row(net, 64)) for net in ("vgg16", "resnet50")]
        if options.part != "networks":
            for batch in options.batch:
                jobs += [
                    (name, f"{key} batch {batch}",
                     lambda key=key, batch=batch: layer_row(BY_NAME[key], batch, report["ceilings"]))
                    for key in options.layers
                ]  # fmt: skip
    for name, what, job in jobs:
        why = "the time limit was reached" if time.monotonic() - begin > options.limit else None
        if why is None:
            try:
                with rnp_kernels.backend(name):
                    row = {"backend": name, **job()}
                report["rows"].append(row)
                shown = ("full_over_cudnn", "realised", "roofline", "full_over_dense")
                short = {key: value for key, value in row.items() if key in shown}
                print(f"{name:7} {what:22} {json.dumps(short)}", flush=True)
            except Exception as error:  # one row must not cost the others
                why = f"{type(error).__name__}: {error}"
        if why is not None:
            report["not_measured"].append({"backend": name, "what": what, "reason": why})
            print(f"{name:7} {what:22} not measured: {why}", flush=True)
        if options.json is not None:
            options.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
