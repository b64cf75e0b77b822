"""`rnp doctor`: what it reports, and that it fails where something is wrong."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import rnp_kernels
from rnp_kernels import _C, doctor, ops


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    return doctor.report()


def run(as_json: bool = False) -> int:
    return doctor.run(argparse.Namespace(json=as_json))


def test_every_backend_and_instruction_set_that_runs_is_tested(found: dict[str, Any]):
    assert found["ok"]
    tested = [(row["backend"], row["isa"]) for row in found["self_test"] if row["backend"] == "cpu"]
    assert tested == [("cpu", isa) for isa in _C.available_isas()]
    assert all(row["cases"] >= 10 and row["failures"] == [] for row in found["self_test"])
    for name, state in found["backends"].items():
        assert state["runs"] == (state["reason"] is None)
        assert state["tested"] == (state["runs"] and name != "reference")


def test_it_tells_versions_build_and_what_auto_picks(found: dict[str, Any]):
    assert found["versions"]["rnp-kernels"] == rnp_kernels.__version__
    assert found["versions"]["torch"].partition("+")[0] == torch.__version__.partition("+")[0]
    assert found["build"] == _C.build_info()
    assert found["machine"]["isa"] == _C.isa()
    assert found["auto"]["cpu"] == "cpu"
    assert (found["auto"]["cuda"] is not None) <= torch.cuda.is_available()


def test_the_json_is_the_report(capsys: pytest.CaptureFixture[str], found: dict[str, Any]):
    assert run(as_json=True) == 0
    assert json.loads(capsys.readouterr().out) == found


def test_the_text_names_each_backend(capsys: pytest.CaptureFixture[str], found: dict[str, Any]):
    assert run() == 0
    printed = capsys.readouterr().out
    for name, state in found["backends"].items():
        assert f"  {name:10} " + ("runs" if state["runs"] else "") in printed
    assert printed.endswith("all is well\n")


def test_it_leaves_backend_and_instruction_set_as_they_were():
    before = _C.isa()
    try:
        _C.set_isa("portable")
        with rnp_kernels.backend("reference"):
            doctor.report()
            assert (_C.isa(), rnp_kernels.get_backend()) == ("portable", "reference")
    finally:
        _C.set_isa(before)


def test_a_wrong_result_fails_and_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    right = ops.prefix_conv2d

    def wrong(**arguments: Any) -> Any:
        result = right(**arguments)
        if _C.isa() == "portable" and arguments["groups"] == 3 and arguments["in_prefix"] is None:
            result[0, 0, 0, 0] += 1e-3
        return result

    monkeypatch.setattr(ops, "prefix_conv2d", wrong)
    assert run() == 1
    printed = capsys.readouterr().out
    assert "cpu portable   1 of" in printed
    assert "    groups: AssertionError: output: error 0.001 at [0, 0, 0, 0]" in printed
    assert printed.endswith("NOT well: see above\n")


def test_a_kernel_that_raises_fails(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    def broken(**arguments: Any) -> Any:
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(ops, "prefix_conv2d", broken)
    assert run(as_json=True) == 1
    rows = json.loads(capsys.readouterr().out)["self_test"]
    assert all(row["failures"][0]["error"] == "RuntimeError: no such kernel" for row in rows)
    assert all(len(row["failures"]) == row["cases"] for row in rows)


def test_an_instruction_set_that_cannot_run_is_told_and_fails(tmp_path: Path):
    environment = {**os.environ, "RNP_ISA": "sse9"}
    command = [sys.executable, "-m", "rnp.cli", "doctor"]
    result = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 1, result.stderr
    assert "instruction set: NONE" in result.stdout and "'sse9'" in result.stdout
    assert "Traceback" not in result.stderr
