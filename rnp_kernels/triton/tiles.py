"""The tile of every Triton kernel, chosen from the layer's shape and dtype alone: never from the batch or its prefixes.

A tile that depended on a sample's company could change the order of its sums, and so its bits. Nothing is tuned while
the program runs. `RNP_TRITON_TILES=file.json` replaces entries of the table for a layer class, one choice for the
whole process: `{"128x64 half": [128, 64, 64, 4, 3]}`, the key as RNP_LOG=1 prints it; `bench/gpu.py --tune` writes it.
"""

from __future__ import annotations

import functools
import json
import os
from dataclasses import dataclass
from pathlib import Path

import torch

DIRECT_BELOW = 16  # channels of a group under which the matrix unit would mostly multiply zeros


@dataclass(frozen=True)
class Tile:
    """rows x columns of the output that a program keeps in registers, `depth` channels a step, warps and stages."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int

    def __str__(self) -> str:
        return f"{self.rows} x {self.columns} x {self.depth}, {self.warps} warps, {self.stages} stages"


# Shared memory: stages x (rows + columns) x depth x size of an element; sm_80 has 163 KB a multiprocessor, sm_86 and
# sm_89 have 99 KB. Registers: rows x columns / (32 x warps) accumulators a thread. "half" is float16 and bfloat16,
# "tf32" and "fp32" are float32 with and without TF32. tests/triton_backend/test_compile.py holds each to the budget
# below.
TILES = {
    # large maps                                   shared memory    accumulators a thread
    "128x128 half": Tile(128, 128, 32, 8, 4),  #        64 KB        64  (a depth of 64 spills with a residual)
    "128x64 half": Tile(128, 64, 32, 4, 4),  #          48 KB        64
    "128x32 half": Tile(128, 32, 32, 8, 4),  #          40 KB        16  (4 warps spill on sm_80)
    "128x16 half": Tile(128, 16, 32, 4, 4),  #          36 KB        16
    "128x128 tf32": Tile(128, 128, 32, 8, 3),  #        96 KB        64
    "128x64 tf32": Tile(128, 64, 32, 8, 3),  #          72 KB        32  (4 warps spill on sm_80)
    "128x32 tf32": Tile(128, 32, 32, 8, 3),  #          60 KB        16  (4 warps spill on sm_80)
    "128x16 tf32": Tile(128, 16, 32, 4, 3),  #          54 KB        16
    # maps of at most 100 positions: a class of samples seldom fills 128 rows
    "64x128 half": Tile(64, 128, 64, 8, 3),  #          72 KB        32  (4 warps spill on sm_80)
    "64x64 half": Tile(64, 64, 32, 4, 4),  #            32 KB        32
    "64x32 half": Tile(64, 32, 32, 4, 4),  #            24 KB        16
    "64x16 half": Tile(64, 16, 32, 4, 4),  #            20 KB         8
    "64x128 tf32": Tile(64, 128, 32, 4, 3),  #          72 KB        64
    "64x64 tf32": Tile(64, 64, 32, 4, 3),  #            48 KB        32
    "64x32 tf32": Tile(64, 32, 32, 4, 3),  #            36 KB        16
    "64x16 tf32": Tile(64, 16, 32, 4, 3),  #            30 KB         8
    # without TF32 the products run on the ordinary units, operands in registers
    "64x64 fp32": Tile(64, 64, 16, 8, 2),  # 4 warps spill on sm_80
    "64x32 fp32": Tile(64, 32, 16, 8, 1),  # 4 warps spill on sm_80, and so do 2 stages
    "64x16 fp32": Tile(64, 16, 16, 4, 2),
    # kernels without the matrix unit: depthwise, small groups, float64
    "direct": Tile(32, 64, 1, 4, 1),
    "direct fp64": Tile(16, 32, 1, 4, 1),
    # gradient of the weights: rows and columns are output and input channels, depth is positions
    "weight half": Tile(64, 64, 64, 4, 3),
    "weight tf32": Tile(64, 64, 32, 4, 3),
    "weight fp32": Tile(32, 32, 16, 4, 2),
}

# What the compiler may use, for every line of TILES and every kernel: registers a thread, bytes spilled, shared memory.
MAX_REGISTERS = 255
MAX_SPILLS = 0
MAX_SHARED = 99 * 1024

# Alternatives that `bench/gpu.py --tune` tries for the lines above that end in "half" or "tf32".
CANDIDATES = (
    Tile(128, 128, 32, 8, 4),
    Tile(128, 128, 64, 8, 3),
    Tile(128, 64, 64, 4, 3),
    Tile(128, 64, 32, 4, 5),
    Tile(64, 128, 64, 4, 3),
    Tile(64, 64, 64, 4, 4),
)


@functools.cache
def _table() -> dict[str, Tile]:
    path = os.environ.get("RNP_TRITON_TILES")
    if not path:
        return TILES
    changed = {key: Tile(*values) for key, values in json.loads(Path(path).read_text(encoding="utf-8")).items()}
    unknown = changed.keys() - TILES.keys()
    if unknown:
        raise ValueError(f"RNP_TRITON_TILES: a key must be one of {sorted(TILES)}, got {sorted(unknown)}")
    return TILES | changed


_override: dict[str, Tile] = {}


def override(changed: dict[str, Tile]) -> None:
    """Other tiles for some keys, for a tuner: the same process then gives other bits. {} ends it."""
    _override.clear()
    _override.update(changed)


def operand(dtype: torch.dtype, precision: str) -> str:
    """The kind of product: "half", "tf32" or "fp32"; `precision` is "tf32" or "ieee" and concerns float32 alone."""
    if dtype is torch.float32:
        return "tf32" if precision == "tf32" else "fp32"
    return "half"


def is_direct(dtype: torch.dtype, groups: int, inner: int, outer: int) -> bool:
    """Whether a layer of `inner` to `outer` channels a group runs without the matrix unit."""
    return dtype is torch.float64 or (groups > 1 and min(inner, outer) < DIRECT_BELOW)


def key_of(dtype: torch.dtype, precision: str, direct: bool, positions: int, outer: int) -> str:
    """The table's key: by map size (`positions` of one sample) and channels written (`outer` a group)."""
    if direct:
        return "direct fp64" if dtype is torch.float64 else "direct"
    kind = operand(dtype, precision)
    rows = 64 if positions <= 100 or kind == "fp32" else 128
    widest = 64 if kind == "fp32" else 128
    columns = min(max(16, 1 << (outer - 1).bit_length()), widest)
    return f"{rows}x{columns} {kind}"


def choose(key: str) -> Tile:
    """The tile of a key: the table's, or that of RNP_TRITON_TILES."""
    return _override.get(key) or _table()[key]
