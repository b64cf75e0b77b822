"""Every line of the tile table compiles for sm_80 and sm_90 without a GPU, and keeps what tiles.py promises.

The machine code is disassembled with the tools in Triton's wheel: matrix instructions where they are promised, copies
to shared memory of 16 bytes, nothing spilled, registers and shared memory within the budget.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rnp_kernels import triton as backend
from rnp_kernels.triton import tiles

_WHY_NOT = "kernels are interpreted in this process" if backend.interpreted() else backend.installed()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(_WHY_NOT is not None, reason=str(_WHY_NOT)),
]
ARCHITECTURES = (80, 90)
POINTERS = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float64: "*fp64",
            torch.int32: "*i32"}  # fmt: skip


@dataclass(frozen=True)
class Launch:
    kernel: Any
    arguments: dict[str, Any]
    warps: int
    stages: int


@dataclass(frozen=True)
class Code:
    """What the compiler made: the disassembly and what it uses."""

    sass: str
    registers: int
    stack: int
    shared: int

    def count(self, pattern: str) -> int:
        return len(re.findall(pattern, self.sass))


def source(launched: Launch) -> Any:
    """The kernel with the types and hints that a launch with these arguments would give it."""
    from triton.compiler import ASTSource

    signature, constants, hints = {}, {}, {}
    for i, parameter in enumerate(launched.kernel.params):
        name, value = parameter.name, launched.arguments[parameter.name]
        free = parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (type(value) is int and value == 1 and not free):
            signature[name] = "constexpr"
            constants[(i,)] = value
            continue
        if isinstance(value, Tensor):
            signature[name] = POINTERS[value.dtype]
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32" if abs(value) < 2**31 else "i64"
        if isinstance(value, Tensor) or (type(value) is int and value % 16 == 0 and not free):
            hints[(i,)] = [["tt.divisibility", 16]]
    return ASTSource(launched.kernel, signature, constants, hints)


def compiled(launched: Launch, architecture: int) -> Code:
    import triton
    from triton.backends.compiler import GPUTarget

    options = {"num_warps": launched.warps, "num_stages": launched.stages}
    result = triton.compile(source(launched), target=GPUTarget("cuda", architecture, 32), options=options)
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "kernel.cubin")
        Path(path).write_bytes(result.asm["cubin"])
        sass, usage = (
            subprocess.run([tool, option, path], capture_output=True, text=True, check=True).stdout
            for option in ("-sass", "-res-usage")
        )
    registers, stack = (int(re.search(rf"{what}:(\d+)", usage)[1]) for what in ("REG", "STACK"))
    return Code(sass, registers, stack, result.metadata.shared)


def assert_within_budget(code: Code) -> None:
    assert code.registers <= tiles.MAX_REGISTERS
    assert code.count(r"\b(STL|LDL)\b") == tiles.MAX_SPILLS and code.stack == 0, "spilled registers"
    assert code.shared <= tiles.MAX_SHARED


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[Launch]:
    """What would have been launched."""
    from rnp_kernels.triton import launch

    recorded: list[Launch] = []
    monkeypatch.setattr(
        launch, "launch", lambda kernel, _grid, a, warps, stages: recorded.append(Launch(kernel, a, warps, stages))
    )
    return recorded


def last(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.zeros(shape, dtype=dtype).contiguous(memory_format=torch.channels_last)


def forward(dtype: torch.dtype, size: int, c_in: int, c_out: int, groups: int = 1, *, everything: bool = False) -> None:
    """A 3x3 layer with prefixes; `everything`: tables, residual, relu and means instead of scale, bias and skipping."""
    from rnp_kernels.triton import launch

    x, w = last(4, c_in, size, size, dtype=dtype), last(c_out, c_in // groups, 3, 3, dtype=dtype)
    prefix, table = (
        torch.zeros(4, dtype=torch.int32),
        torch.zeros(4, c_out, dtype=torch.promote_types(dtype, torch.float32)),
    )
    scale, bias = (table, table) if everything else table[:2]
    residual = last(4, c_out, size, size, dtype=dtype) if everything else None
    launch.prefix_conv2d(
        x, w, bias, (1, 1), (1, 1, 1, 1), (1, 1), groups, prefix, prefix, scale, prefix, residual, "relu",
        "zero" if everything else "skip", everything, None,
    )  # fmt: skip


def input_grad(dtype: torch.dtype, size: int, c_in: int, c_out: int, groups: int = 1) -> None:
    from rnp_kernels.triton import launch

    grad, w = last(4, c_out, size, size, dtype=dtype), last(c_out, c_in // groups, 3, 3, dtype=dtype)
    prefix = torch.zeros(4, dtype=torch.int32)
    shape = (4, c_in, 2 * size, 2 * size)
    launch.input_grad(grad, w, shape, (2, 2), (1, 1, 1, 1), (1, 1), groups, prefix, prefix)


def weight_grad(dtype: torch.dtype, size: int, c_in: int, c_out: int, groups: int = 1) -> None:
    from rnp_kernels.triton import launch

    grad, x = last(4, c_out, size, size, dtype=dtype), last(4, c_in, size, size, dtype=dtype)
    prefix = torch.zeros(4, dtype=torch.int32)
    shape = (c_out, c_in // groups, 3, 3)
    launch.weight_grad(grad, x, shape, (1, 1), (1, 1, 1, 1), (1, 1), groups, prefix, prefix)


def of_key(key: str) -> Callable[[], None]:
    """A call that chooses this line of the table."""
    if key.startswith("direct"):
        return partial(forward, torch.float64 if key.endswith("fp64") else torch.float32, 14, 32, 32, 32)
    dtype = torch.bfloat16 if key.endswith("half") else torch.float32
    if key.startswith("weight"):
        return partial(weight_grad, dtype, 14, 64, 64)
    rows, columns = map(int, key.partition(" ")[0].split("x"))
    return partial(forward, dtype, 7 if rows == 64 else 14, 64, columns)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("key", tiles.TILES)
def test_every_tile(key: str, architecture: int, launches: list[Launch], monkeypatch: pytest.MonkeyPatch) -> None:
    from rnp_kernels.triton import launch

    precision = "ieee" if key.endswith("fp32") else "tf32"
    monkeypatch.setattr(launch, "precision_of", lambda _dtype: precision)
    of_key(key)()
    launched = launches[-1]
    tile = tiles.choose(key)
    assert (launched.arguments["ROWS"], launched.arguments["COLUMNS"], launched.warps) == (
        tile.rows, tile.columns, tile.warps
    ), "another line of the table was chosen"  # fmt: skip
    code = compiled(launched, architecture)
    assert_within_budget(code)
    if key.endswith("fp32") or key.startswith("direct"):
        assert code.count(r"\b(HMMA|HGMMA)") == 0
        assert code.count(r"\bDFMA\b" if key.endswith("64") else r"\bFFMA\b") > 0
        return
    matrix = r"\bHGMMA" if architecture == 90 and not key.startswith("weight") else r"\b(HMMA|HGMMA)"
    assert code.count(matrix) > 0
    if not key.startswith("weight"):
        assert code.count(r"\bLDGSTS\S*\.128\b") > 0, "no 16-byte copies to shared memory"


OTHERS: dict[str, Callable[[], None]] = {
    "everything": partial(forward, torch.bfloat16, 14, 64, 128, everything=True),
    "groups": partial(forward, torch.float16, 14, 64, 128, 2, everything=True),
    "depthwise, everything": partial(forward, torch.bfloat16, 14, 64, 64, 64, everything=True),
    "input gradient": partial(input_grad, torch.bfloat16, 14, 128, 64),
    "input gradient, groups": partial(input_grad, torch.bfloat16, 14, 64, 64, 2),
    "input gradient, depthwise": partial(input_grad, torch.bfloat16, 14, 64, 64, 64),
    "weight gradient, depthwise": partial(weight_grad, torch.bfloat16, 14, 64, 64, 64),
}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("name", OTHERS)
def test_every_variant(name: str, architecture: int, launches: list[Launch]) -> None:
    OTHERS[name]()
    for launched in launches:  # the schedule and the means too
        code = compiled(launched, architecture)
        assert_within_budget(code)
        if launched.kernel.__name__ in ("gemm_kernel", "weight_grad_kernel"):
            assert code.count(r"\b(HMMA|HGMMA)") > 0


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_agent_step(architecture: int, launches: list[Launch]) -> None:
    from rnp_kernels import conformance
    from rnp_kernels.triton import launch

    launch.agent_step(*conformance.agent_arguments("default", "cpu", False), -0.2, 64)
    assert_within_budget(compiled(launches[-1], architecture))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_bias_comes_last_with_and_without_prefixes(
    dtype: torch.dtype, launches: list[Launch], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One product a sum: with its length known, the compiler would begin the sum with the bias and give other bits."""
    import triton
    from triton.backends.compiler import GPUTarget

    from rnp_kernels.triton import launch

    monkeypatch.setattr(launch, "precision_of", lambda _dtype: "ieee")
    x, w, bias = last(2, 1, 8, 9, dtype=dtype), last(1, 1, 1, 1, dtype=dtype), torch.zeros(1, dtype=dtype)
    for prefix in (None, torch.ones(2, dtype=torch.int32)):
        launch.prefix_conv2d(
            x, w, bias, (1, 1), (0, 0, 0, 0), (1, 1), 1, prefix, prefix, None, None, None, "none", "zero", False
        )
        launched = launches[-1]
        options = {"num_warps": launched.warps, "num_stages": launched.stages}
        made = triton.compile(source(launched), target=GPUTarget("cuda", 90, 32), options=options)
        text = made.asm["ttir"]
        sums = text.count("tt.dot") or text.count("arith.mulf")
        loops = re.findall(r"scf\.for.*iter_args.*tensor<\d+x\d+xf\d+>", text)
        assert sums and len(loops) >= sums, "a sum without its loop"
        assert text.count("arith.addf") == (1 if dtype is torch.float32 else 2), "the bias"
