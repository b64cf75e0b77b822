"""Layers of VGG-16 and ResNet-18/50, and shapes that are hard: full width, pruned, against the stock paths."""

from __future__ import annotations

from typing import Any

import torch

from rnp.bench.layers import BY_NAME, LAYERS, Layer
from rnp.bench.rivals import Case, convolution, winograd_tile
from rnp.bench.run import Job, Options
from rnp_kernels import _C

QUICK = ("r4_3x3", "r1_1x1", "depthwise_s2", "tiny_4x4")
_STOCK = {1: "oneDNN", 2: "gemm"}


def jobs(options: Options) -> list[Job]:
    """Every layer at every batch and number of threads; runtimes and rivals for pruned work with all threads only."""
    chosen = [BY_NAME[name] for name in QUICK] if options.quick else LAYERS
    return [
        job(layer, batch, threads, threads == options.all_threads, options.dtype)
        for threads in options.threads
        for batch in options.batches
        for layer in chosen
    ]


def job(layer: Layer, batch: int, threads: int, dense: bool = False, dtype: torch.dtype = torch.float32) -> Job:
    """One layer. ``dense``: with the runtimes, and the rivals at mixed widths (a single sample: at 1/2)."""

    def make() -> Case:
        rival_widths = ("mixed" if batch > 1 else "1/2",) if dense else ()
        return convolution(layer, batch, dtype=dtype, dense=dense, threads=threads, rival_widths=rival_widths)

    return Job("layer", f"{layer.name} b{batch}", make, threads, facts=facts(layer, batch, dtype))


def facts(layer: Layer, batch: int, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """What a report says of a layer. Flops without the taps in the padding; bytes of the dense layer, each once."""
    return {
        "layer": layer.name,
        "shape": layer.shape,
        "batch": batch,
        "dtype": str(dtype).removeprefix("torch."),
        "flops": 2 * batch * layer.valid_macs(),
        "bytes": layer.bytes(batch, dtype.itemsize),
        "path": path(layer, dtype),
    }


def path(layer: Layer, dtype: torch.dtype = torch.float32) -> str:
    """What the dispatch rule names for full width: our Winograd, our direct kernels, or a stock path."""
    arguments = (
        (layer.c_in, layer.size, layer.size), (layer.c_out, layer.c_in // layer.groups, layer.kernel, layer.kernel),
        [layer.stride] * 2, [layer.padding] * 4, [1, 1], layer.groups, str(dtype).removeprefix("torch."),
    )  # fmt: skip
    if tile := winograd_tile(layer, dtype):
        return f"Winograd {tile}x{tile}"
    return _STOCK.get(_C.stock_path(*arguments, True), "direct")
