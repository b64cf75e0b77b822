"""How the backend "triton" is found: its operators, its reasons, and what "auto" takes on a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import rnp_kernels
from rnp_kernels import backends, conformance, testing, triton
from rnp_kernels.triton import tiles

OPERATORS = ("prefix_conv2d", "prefix_conv2d_input_grad", "prefix_conv2d_weight_grad", "agent_step")


@pytest.mark.parametrize("operator", OPERATORS)
def test_its_operators_have_the_same_schemas(operator: str) -> None:
    plain, ours = (getattr(torch.ops.rnp, operator + suffix).default._schema for suffix in ("", "_triton"))
    assert str(ours) == str(plain).replace(operator, operator + "_triton", 1)


@pytest.mark.skipif(triton.reason() is None, reason="the kernels run here")
def test_where_it_cannot_run_the_operators_say_why() -> None:
    arguments = testing.make(testing.case("everything"))
    with pytest.raises(RuntimeError, match="backend 'triton'"):
        rnp_kernels.set_backend("triton")
    with pytest.raises(RuntimeError, match="backend 'triton' cannot run"):
        conformance.agent_operator("triton")(*conformance.agent_arguments("default", "cpu", True), 0.0, 4)
    with pytest.raises(RuntimeError, match="backend 'triton' cannot run"):
        torch.ops.rnp.prefix_conv2d_weight_grad_triton(
            arguments["input"], arguments["input"], (24, 24, 1, 1), (1, 1), (0, 0, 0, 0), (1, 1), 1, None, None
        )


def test_meta_tensors_need_no_kernel() -> None:
    from rnp_kernels.triton.operators import PREFIX_CONV2D

    x, w = torch.empty(2, 8, 6, 6, device="meta"), torch.empty(4, 8, 3, 3, device="meta")
    y, means = PREFIX_CONV2D(x, w, None, [2, 2], [1, 1, 1, 1], [1, 1], 1, *[None] * 5, "none", "zero", True, None)
    assert y.shape == (2, 4, 3, 3) and means.shape == (2, 4)


@pytest.mark.parametrize(
    ("tested", "chosen"),
    [((), "reference"), (("triton",), "triton"), (("cuda",), "cuda"), (("cuda", "triton"), "cuda")],
)
def test_auto_takes_what_was_tested(tested: tuple[str, ...], chosen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_reason", lambda name: None)
    monkeypatch.setattr(backends, "device_of", lambda name: "cuda")
    monkeypatch.setattr(backends, "TESTED_ON", {name: ("a GPU",) * (name in tested) for name in ("cuda", "triton")})
    monkeypatch.setattr(backends, "_warned", [])
    if tested:
        assert backends.resolve_on(torch.device("cuda")) == chosen
    else:
        with pytest.warns(UserWarning, match="never tested on a device"):
            assert backends.resolve_on(torch.device("cuda")) == chosen


def test_what_cannot_run_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_reason", lambda name: "it was not built" if name == "cuda" else None)
    monkeypatch.setattr(backends, "device_of", lambda name: "cuda")
    monkeypatch.setattr(backends, "TESTED_ON", {"cuda": ("a GPU",), "triton": ("a GPU",)})
    assert backends.resolve_on(torch.device("cuda")) == "triton"


def test_tiles_depend_on_the_layer_alone() -> None:
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for precision in ("tf32", "ieee"):
            for positions in (1, 49, 100, 101, 50176):
                for outer in (1, 16, 17, 64, 100, 2048):
                    key = tiles.key_of(dtype, precision, False, positions, outer)
                    tile = tiles.choose(key)
                    assert f"{tile.rows}x{tile.columns} {tiles.operand(dtype, precision)}" == key
    assert tiles.is_direct(torch.float64, 1, 64, 64) and tiles.is_direct(torch.float32, 64, 1, 1)
    assert not tiles.is_direct(torch.float32, 1, 3, 64) and not tiles.is_direct(torch.float16, 2, 16, 16)


def test_a_file_of_tiles(tmp_path: Path) -> None:
    code = "from rnp_kernels.triton import tiles; print(tiles.choose('64x64 half'), tiles.choose('64x16 half'))"
    good, bad = tmp_path / "good.json", tmp_path / "bad.json"
    good.write_text('{"64x64 half": [64, 64, 64, 8, 2]}')
    bad.write_text('{"64x65 half": [64, 64, 64, 8, 2]}')
    runs = [
        subprocess.run([sys.executable, "-c", code], env=os.environ | {"RNP_TRITON_TILES": str(path)}, cwd=tmp_path,
                       capture_output=True, text=True)
        for path in (good, bad)
    ]  # fmt: skip
    expected = f"64 x 64 x 64, 8 warps, 2 stages {tiles.TILES['64x16 half']}"
    assert runs[0].stdout.strip() == expected, runs[0].stderr
    assert runs[1].returncode != 0 and "64x65 half" in runs[1].stderr
