"""The operator by itself: every rival on two typical layers, warm and cold, and how it scales."""

from __future__ import annotations

from typing import Any

import torch

from rnp.bench.layers import Layer
from rnp.bench.parts.layer import facts
from rnp.bench.rivals import Case, convolution
from rnp.bench.run import Job, Options

TYPICAL = (Layer("3x3_128", 128, 28, 128, 3), Layer("1x1_256", 256, 14, 256, 1))
EIGHTHS = Layer("3x3_64", 64, 56, 64, 3)
CHANNELS = (32, 64, 128, 256, 512)
BATCHES = (1, 2, 4, 8, 16, 32)
WIDTHS = ("1/2", "1/4", "mixed", "skewed", "outlier")


def jobs(options: Options) -> list[Job]:
    """Rivals; cold caches; sweeps over batch, channels and threads; bfloat16; a convolution too small to matter."""
    most, out = options.all_threads, []
    for layer in TYPICAL:
        for threads in options.threads:
            out.append(_job("rivals", layer, 8, threads, widths=WIDTHS, rival_widths=("1/2", "mixed"), dense=True))
        for cold in (False, True):
            out.append(_job("cold" if cold else "warm", layer, 8, most, cold=cold, widths=("1/2", "mixed")))
    sweep = TYPICAL[0]
    for batch in BATCHES[:3] if options.quick else BATCHES:
        out.append(_job("batch", sweep, batch, most, x=batch, widths=("1/2", "mixed")))
    for channels in CHANNELS[:2] if options.quick else CHANNELS:
        layer = Layer(f"3x3_{channels}", channels, 14, channels, 3)
        out.append(_job("channels", layer, 8, most, x=channels, widths=("1/2", "mixed")))
    threads = 1
    while threads <= most:
        out.append(_job("threads", sweep, 8, threads, x=threads, widths=("1/2", "mixed")))
        threads = most if threads < most < 2 * threads else 2 * threads
    for layer in TYPICAL:
        out.append(_job("bfloat16", layer, 8, most, dtype=torch.bfloat16, widths=("1/2", "mixed")))
    for threads in options.threads:  # k = 8: groups of 8 channels, half of a vector
        out.append(_job("eighths", EIGHTHS, 8, threads, widths=("7/8", "3/4", "5/8", "1/2", "3/8", "1/4", "1/8")))
    out.append(_job("overhead", Layer("tiny", 16, 8, 16, 3), 1, 1, widths=("1/2",)))
    return out


def _job(
    sweep: str, layer: Layer, batch: int, threads: int, *, x: int | None = None, cold: bool = False,
    dtype: torch.dtype = torch.float32, dense: bool = False, **arguments: Any,
) -> Job:  # fmt: skip
    def make() -> Case:
        return convolution(layer, batch, dtype=dtype, dense=dense, threads=threads, **arguments)

    kept = facts(layer, batch, dtype) | {"sweep": sweep, "x": x}
    return Job("operator", f"{sweep}: {layer.name} b{batch}", make, threads, cold, kept)
