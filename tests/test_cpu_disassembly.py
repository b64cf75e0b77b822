"""No microkernel loop touches the stack: the accumulators live in registers, on every instruction set.

The installed library is disassembled. A microkernel loop is a straight innermost loop that sums products: at least
three vector multiply-adds, and four for every vector it stores (Winograd's transforms store more; their 6 x 6 values
are more than registers hold). It is found by its instructions, whatever the function around it is called. An access to
the stack in one is a spill; it costs up to half the speed and no result shows it.
"""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import rnp_kernels
from rnp_kernels import _C

FUNCTION = re.compile(r"^[0-9a-f]+ <(.*)>:$")
INSTRUCTION = re.compile(r"^\s*([0-9a-f]+):\s+([a-z]\S*)\s*(.*)$")
FMA = re.compile(r"^vfn?m(?:add|sub)\d+ps$|^vdpbf16ps$")
STORE = re.compile(r"^v?mov\S+\s+%[xyz]mm\d+,.*\)(\{.*\})?$")
# The gates of the agent's step are polynomials: sums of products too, but what they keep on the stack is constants.
EXEMPT = "gate_units"
REGISTERS = {"zmm": "AVX-512", "ymm": "AVX2", "xmm": "portable"}


@dataclass
class Loop:
    """An innermost loop: its function, its multiply-adds, the registers they use, and what it does to the stack."""

    function: str
    multiply_adds: int
    pairs: bool  # multiplies bfloat16, two to a lane
    width: str  # "zmm", "ymm" or "xmm"
    spills: list[str]


def functions(text: str) -> Iterator[tuple[str, list[tuple[int, str, str]]]]:
    """(name, [(address, mnemonic, operands)]) of objdump's output. Without symbols a section is one function."""
    name, body = "", []
    for line in text.splitlines():
        if header := FUNCTION.match(line):
            if body:
                yield name, body
            name, body = header[1], []
        elif instruction := INSTRUCTION.match(line):
            body.append((int(instruction[1], 16), instruction[2], instruction[3]))
    if body:
        yield name, body


def loops(text: str) -> Iterator[Loop]:
    """Every loop that sums products, as the head of this file has it."""
    for name, body in functions(text):
        # rbp is a frame pointer only where the function says so; otherwise it is a register like any other.
        frame = any(m == "mov" and o.replace(" ", "") == "%rsp,%rbp" for _, m, o in body)
        stack = re.compile(r"\(%r[sb]p\b" if frame else r"\(%rsp\b")
        at = {address: index for index, (address, _, _) in enumerate(body)}
        spans = []
        for index, (_, mnemonic, operands) in enumerate(body):
            target = re.match(r"([0-9a-f]+)", operands) if mnemonic.startswith("j") else None
            start = at.get(int(target[1], 16)) if target else None
            if start is not None and start <= index:
                spans.append((start, index))
        for start, end in spans:
            inside = body[start : end + 1]
            if any(m.startswith(("j", "call")) for _, m, _ in inside[:-1]):
                continue  # not innermost, or no microkernel: those run straight through
            sums = [o for _, m, o in inside if FMA.match(m)]
            if not sums:  # without FMA a multiply and an add are two instructions
                sums = [o for _, m, o in inside if m == "mulps"]
                if not any(m == "addps" for _, m, _ in inside):
                    continue
            stored = [o for _, m, o in inside if STORE.match(f"{m} {o}") and not stack.search(o)]
            if len(sums) < max(3, 4 * len(stored)):
                continue
            width = next(w for w in REGISTERS if any(f"%{w}" in o for o in sums))
            pairs = any(m == "vdpbf16ps" for _, m, _ in inside)
            yield Loop(name, len(sums), pairs, width, [f"{m} {o}" for _, m, o in inside if stack.search(o)])


def disassembled(path: Path) -> str:
    if shutil.which("objdump") is None:
        pytest.skip("objdump is not installed (binutils)")
    if platform.machine() != "x86_64":
        pytest.skip("the loops are told apart by x86-64 instructions")
    command = ["objdump", "-d", "--no-show-raw-insn", str(path)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.fixture(scope="module")
def library() -> list[Loop]:
    return list(loops(disassembled(Path(rnp_kernels.__file__).parent / "librnp_ops.so")))


# Multiply-adds of the largest direct tile: 14 pixels x 2 vectors, 6 x 2, 5 x 2; of bfloat16 also 14 x 1 of 8 channels.
@pytest.mark.parametrize(
    ("width", "pairs", "largest", "vectors"),
    [("zmm", False, 28, 2), ("ymm", False, 12, 2), ("xmm", False, 10, 2), ("zmm", True, 28, 2), ("ymm", True, 14, 1)],
    ids=[*REGISTERS.values(), "AVX512-BF16", "AVX512-BF16, 8 channels"],
)
def test_no_microkernel_loop_spills(library: list[Loop], width: str, pairs: bool, largest: int, vectors: int):
    ours = [loop for loop in library if (loop.width, loop.pairs) == (width, pairs) and EXEMPT not in loop.function]
    # The detector saw the kernels: every tile is there, and each with its variants for edges.
    sizes = Counter(loop.multiply_adds for loop in ours)
    assert all(sizes[vectors * pixels] >= 1 for pixels in range(-(-3 // vectors), largest // vectors + 1)), sizes
    spilling = [f"{s.function}: {s.multiply_adds} multiply-adds, {s.spills[:3]}…" for s in ours if s.spills]
    assert not spilling, "\n".join(spilling)


@pytest.mark.skipif("avx512amx" not in _C.available_isas(), reason="needs a build and a processor with AMX")
def test_matrices_are_multiplied_two_by_two_and_touch_no_stack() -> None:
    """A chunk of 32 pixels x 32 channels: four products, four loads of matrices; nothing of it goes by the stack."""
    text = disassembled(Path(rnp_kernels.__file__).parent / "librnp_ops.so")
    products = re.compile(r"^tdpbf16ps$")
    largest = 0
    for _, body in functions(text):
        run: list[tuple[str, str]] = []  # from the first of a chunk's instructions to its last product
        for _, mnemonic, operands in body:
            if mnemonic.startswith(("j", "call", "ret")):
                run = []
                continue
            run.append((mnemonic, operands))
            count = sum(bool(products.match(m)) for m, _ in run)
            if products.match(mnemonic) and count == 4 and any(m == "tileloadd" for m, _ in run):
                start = next(i for i, (m, _) in enumerate(run) if m == "tileloadd")
                chunk = run[start:]
                assert sum(m == "tileloadd" for m, _ in chunk) == 4
                assert not [o for m, o in chunk if "(%rsp" in o or "(%rbp" in o], chunk
                largest = 4
    assert largest == 4


KERNEL = """
typedef float V __attribute__((vector_size(%(bytes)d), aligned(4), may_alias));
void product(float* out, const float* x, const float* w, long count, long step) {
  V acc[%(accumulators)d] = {};
  for (long i = 0; i < count; ++i) {
    const V b = *(const V*)(w + i * %(bytes)d / 4);
#pragma GCC unroll 64
    for (int p = 0; p < %(accumulators)d; ++p) acc[p] += x[i + p * step] * b;
  }
  for (int p = 0; p < %(accumulators)d; ++p) *(V*)(out + p * %(bytes)d / 4) = acc[p];
}
"""
FLAGS = {"zmm": ["-mavx512f"], "ymm": ["-mavx2", "-mfma"], "xmm": []}


@pytest.mark.parametrize("width", REGISTERS, ids=REGISTERS.values())
@pytest.mark.parametrize(("accumulators", "spills"), [(4, False), (40, True)], ids=["fits", "too-many"])
def test_the_detector_knows_a_spill_when_it_sees_one(tmp_path: Path, width: str, accumulators: int, spills: bool):
    if platform.machine() != "x86_64":
        pytest.skip("the flags are x86-64's")
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler")
    source, built = tmp_path / "kernel.c", tmp_path / "kernel.o"
    source.write_text(KERNEL % {"bytes": {"zmm": 64, "ymm": 32, "xmm": 16}[width], "accumulators": accumulators})
    subprocess.run([compiler, "-O3", "-c", *FLAGS[width], "-o", str(built), str(source)], check=True)
    found = [loop for loop in loops(disassembled(built)) if loop.multiply_adds >= accumulators]
    assert found and all(loop.width == width and bool(loop.spills) == spills for loop in found), found
