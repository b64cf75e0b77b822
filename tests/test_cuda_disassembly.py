"""What the built CUDA library contains, read from its machine code: no GPU is needed.

Every tile of csrc/cuda/tiles.h is there for its architectures, with matrix instructions and asynchronous copies where
they are promised (HMMA and LDGSTS in those of sm_80; HGMMA, bulk and im2col copies in those of sm_90a), nothing in
local memory, and registers and shared memory within the budget written in that table.
"""

from __future__ import annotations

import collections
import importlib.util
import re
import shutil
import subprocess
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

import rnp_kernels
from rnp_kernels import _C

ROOT = Path(__file__).resolve().parent.parent
LIBRARY = Path(rnp_kernels.__file__).parent / "librnp_cuda.so"
REGISTERS, THREADS, MOST_TILES = 65536, 128, 27
HOPPER_THREADS = 384
SHARED = {"80": 163 * 1024, "90a": 227 * 1024}  # bytes of shared memory that a multiprocessor gives to blocks


def _cuobjdump() -> str | None:
    """The toolkit's, or the one in Triton's wheel."""
    found = shutil.which("cuobjdump") or shutil.which("/usr/local/cuda/bin/cuobjdump")
    spec = importlib.util.find_spec("triton")
    if found is None and spec is not None and spec.origin is not None:
        found = shutil.which(str(Path(spec.origin).parent / "backends/nvidia/bin/cuobjdump"))
    return found


def _missing() -> str | None:
    if _C.build_info()["cuda_compiler"] is None:
        return f"the CUDA library was not built: {_C.build_info()['cuda_reason']}"
    if not LIBRARY.exists():
        return f"{LIBRARY.name} is not beside the package"
    return None if _cuobjdump() else "no cuobjdump: neither a CUDA toolkit's nor Triton's"


pytestmark = pytest.mark.skipif(_missing() is not None, reason=str(_missing()))


@dataclass(frozen=True)
class Tile:
    name: str
    storage: str
    math: str
    bm: int
    bn: int
    blocks: int
    registers: int

    def symbol(self) -> str:
        storage = {"BFloat16": "NS_8BFloat16E", "Float16": "NS_7Float16E", "float": "f"}[self.storage]
        math = {"kMatrix": 0, "kFfma": 1}[self.math]
        return f"conv_tile_kernelINS0_4TileI{storage}LNS0_4MathE{math}ELi{self.bm}ELi{self.bn}EE"

    def shared_bytes(self) -> int:
        """Tile::kSharedBytes."""
        return self.bm * 48 + 16 + max(4 * (self.bm + self.bn) * 64, self.bm * 68 * 4)


@cache
def tiles() -> tuple[Tile, ...]:
    text = (ROOT / "csrc/cuda/tiles.h").read_text()
    rows = re.findall(r"X\((\w+), (\w+), Math::(\w+), (\d+), (\d+), (\d+), (\d+)\)", text)
    return tuple(Tile(n, t, m, *map(int, rest)) for n, t, m, *rest in rows)


@dataclass(frozen=True)
class HopperTile:
    name: str
    storage: str
    bn: int
    registers: int

    def symbol(self) -> str:
        storage = {"BFloat16": "NS_8BFloat16E", "Float16": "NS_7Float16E", "float": "f"}[self.storage]
        return f"hopper_tile_kernelINS0_10HopperTileI{storage}Li{self.bn}EE"

    def kind(self) -> str:
        """K of its wgmma instructions, and their types."""
        return {"BFloat16": "16.F32.BF16", "Float16": "16.F32", "float": "8.F32.TF32"}[self.storage]

    def shared_bytes(self) -> int:
        """HopperTile::kSharedBytes."""
        stages, rows = {256: (4, 128), 128: (6, 256)}[self.bn]  # the narrow kernel also has tiles of 256 rows
        return 1024 + stages * (128 + self.bn) * 128 + 8 * 16 * 64 * 2 + 2 * (rows + 1) * 24 + rows * 16 + 512

    def widths(self) -> list[int]:
        """The columns of its wgmma instructions: multiples of an eighth of the tile."""
        return [grains * self.bn // 8 for grains in range(1, 9)]


@cache
def hopper_tiles() -> tuple[HopperTile, ...]:
    text = (ROOT / "csrc/cuda/tiles.h").read_text()
    rows = re.findall(r"X\((sm90_\w+), (\w+), (\d+), (\d+)\)", text)
    return tuple(HopperTile(name, storage, *map(int, rest)) for name, storage, *rest in rows)


def needs_sm90a() -> None:
    if "90a" not in architectures():
        pytest.skip(f"the CUDA library was built for {architectures()}, without 90a")


def architectures() -> list[str]:
    return str(_C.build_info()["cuda_archs"]).split(";")


def _dump(option: str) -> str:
    command = [str(_cuobjdump()), option, str(LIBRARY)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@cache
def instructions() -> dict[tuple[str, str], collections.Counter[str]]:
    """(architecture, symbol) -> how often each opcode stands in it."""
    found: dict[tuple[str, str], collections.Counter[str]] = {}
    arch, counts = "", collections.Counter()
    for line in _dump("--dump-sass").splitlines():
        if match := re.match(r"\s*arch = sm_(\w+)", line):
            arch = match[1]
        elif match := re.match(r"\s*Function : (\S+)", line):
            counts = found[arch, match[1]] = collections.Counter()
        elif match := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)(\S*)", line):
            counts[match[1]] += 1
            if match[1] == "HGMMA":
                counts[match[1] + match[2]] += 1
    return found


@cache
def resources() -> dict[tuple[str, str], dict[str, int]]:
    """(architecture, symbol) -> REG, STACK, SHARED, LOCAL."""
    found, arch, symbol = {}, "", ""
    for line in _dump("--dump-resource-usage").splitlines():
        if match := re.match(r"\s*arch = sm_(\w+)", line):
            arch = match[1]
        elif match := re.match(r"\s*Function (\S+):", line):
            symbol = match[1]
        elif "REG:" in line:
            found[arch, symbol] = {k: int(v) for k, v in re.findall(r"(\w+):(\d+)", line)}
    return found


def one(table: dict, arch: str, tile: Tile | HopperTile):
    matches = [value for (a, symbol), value in table.items() if a == arch and tile.symbol() in symbol]
    assert len(matches) == 1, f"{tile.name}: {len(matches)} kernels for sm_{arch}"
    return matches[0]


def test_the_table_is_read_and_keeps_its_budget():
    text = (ROOT / "csrc/cuda/tiles.h").read_text()
    every = (*tiles(), *hopper_tiles())
    assert len(every) == text.count("  X(") >= 14
    others = {s for _, s in instructions() if re.search(r"plain_conv|weight_grad_kernel|sum_segments_kernel", s)}
    assert len(others) in (8, 11) and len(every) + len(others) <= MOST_TILES
    assert len({t.symbol() for t in every}) == len(every)


def test_every_tile_was_compiled_for_every_architecture():
    for arch in architectures():
        found = [s for a, s in instructions() if a == arch and "conv_tile_kernel" in s]
        assert len(found) == len(tiles()), f"sm_{arch}"
        found = [s for a, s in instructions() if a == arch and "hopper_tile_kernel" in s]
        assert len(found) == (len(hopper_tiles()) if arch == "90a" else 0), f"sm_{arch}"


def test_matrix_instructions_and_asynchronous_copies_are_where_they_are_promised():
    for arch in architectures():
        for tile in tiles():
            seen = one(instructions(), arch, tile)
            where = f"{tile.name}, sm_{arch}"
            assert (seen["HMMA"] > 0) == (tile.math == "kMatrix"), where
            assert (seen["LDSM"] > 0) == (tile.math == "kMatrix"), where
            assert seen["LDGSTS"] > 0, where
            assert (seen["FFMA"] >= 256) == (tile.math == "kFfma"), where
            # Two blocks of 16 rows by every run of 16 channels, in halves of 8.
            least = 2 * (tile.bn // 16 // (4 // (tile.bm // 32))) * 2
            assert tile.math == "kFfma" or seen["HMMA"] >= least, f"{where}: {seen['HMMA']}"


def test_hopper_tiles_multiply_warpgroups_and_fetch_by_the_copy_engine():
    needs_sm90a()
    for tile in hopper_tiles():
        seen = one(instructions(), "90a", tile)
        assert seen["HMMA"] == 0, tile.name
        for width in tile.widths():  # four steps of a whole chunk, and one in the loop over the steps of the last
            kind = f"HGMMA.64x{width}x{tile.kind()}"
            assert seen[kind] >= 5, f"{tile.name}: {kind} {seen[kind]}"
        assert seen["HGMMA"] == sum(n for name, n in seen.items() if name.startswith("HGMMA.64x")), tile.name
        assert all(int(name.split("x")[1]) in tile.widths() for name in seen if name.startswith("HGMMA.")), tile.name
        assert seen["UTMALDG"] > 0, f"{tile.name}: no im2col copy"
        assert seen["UBLKCP"] > 0, f"{tile.name}: no bulk copy of weights"
        assert seen["LDGSTS"] > 0, f"{tile.name}: no cp.async where rows are scattered"
        assert seen["SYNCS"] > 0 and seen["USETMAXREG"] == 2, tile.name
        # A sum moved between products would make the compiler wait for each: as many waits as places that ask for one.
        # A narrow tile has main loops for one warpgroup's 128 rows, which tiles of 256 rows share, and for two times 64
        # where K is summed in segments.
        loops = len(tile.widths()) * (2 if tile.bn == 128 else 1)
        assert seen["WARPGROUP"] == 4 * loops, f"{tile.name}: {seen['WARPGROUP']} arrivals and waits"


def test_hopper_tiles_keep_the_budget():
    needs_sm90a()
    for tile in hopper_tiles():
        use = one(resources(), "90a", tile)
        assert use["REG"] <= tile.registers, f"{tile.name}: {use}"
        assert tile.registers * HOPPER_THREADS <= REGISTERS, tile.name
        assert use["SHARED"] <= 1024, f"{tile.name}: static; the rest is dynamic"
        assert tile.shared_bytes() <= SHARED["90a"], f"{tile.name}: {tile.shared_bytes()}"


def test_the_weight_gradient_of_halves_uses_matrix_instructions():
    for (arch, symbol), seen in instructions().items():
        if "weight_grad_kernel" not in symbol:
            continue
        halves = "Float16" in symbol  # BFloat16 too
        assert (seen["HMMA"] >= 16) == halves and (seen["LDSM"] >= 8) == halves, (arch, symbol)
        assert seen["LDGSTS"] > 0, (arch, symbol)


def test_nothing_spills_to_local_memory():
    for key, seen in instructions().items():
        assert seen["LDL"] + seen["STL"] == 0, key
    for key, use in resources().items():
        assert use["STACK"] == 0 and use["LOCAL"] == 0, (key, use)


def test_registers_and_shared_memory_keep_the_budget():
    for arch in architectures():
        for tile in tiles():
            use = one(resources(), arch, tile)
            where = f"{tile.name}, sm_{arch}: {use}"
            assert use["REG"] <= tile.registers, where
            assert tile.registers * THREADS * tile.blocks <= REGISTERS, where
            assert use["SHARED"] <= 1024, f"{where}: static; the rest is dynamic"
            if tile.bn == 128:  # narrower tiles: two blocks on sm_80 are bound by shared memory, more elsewhere
                assert tile.shared_bytes() * tile.blocks <= SHARED[arch], where
            assert tile.shared_bytes() * 2 <= SHARED[arch], where


def test_no_double_precision_arithmetic_outside_the_float64_kernels():
    for (arch, symbol), seen in instructions().items():
        if "conv_tile_kernel" in symbol or "hopper_tile_kernel" in symbol or "BFloat16" in symbol:
            assert seen["DFMA"] + seen["DMUL"] + seen["DADD"] == 0, (arch, symbol)
