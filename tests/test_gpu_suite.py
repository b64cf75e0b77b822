"""bench/gpu_suite.sh without a GPU: its limits fit ten minutes, it says that there is none, and records its steps."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
SUITE = ROOT / "bench/gpu_suite.sh"

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")


def suite(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHON": sys.executable}
    return subprocess.run(
        ["bash", str(SUITE), *arguments], capture_output=True, text=True, timeout=120, env=environment, cwd=ROOT
    )


def test_the_limits_add_up_to_less_than_ten_minutes():
    rows = [line.split("\t") for line in suite("--list").stdout.splitlines()]
    limits = {name: int(seconds) for name, seconds in rows}
    total = limits.pop("sum")
    assert {"build", "conformance-cuda", "conformance-triton", "memcheck", "racecheck", "benchmark"} <= limits.keys()
    assert total == sum(limits.values())
    assert total + 4 * len(limits) < 600  # two seconds to be killed and two to be recorded


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_and_runs_nothing(tmp_path: Path):
    target = tmp_path / "results"
    done = suite(str(target))
    assert done.returncode != 0 and "there is no GPU" in done.stderr and "nothing was run" in done.stderr
    assert not target.exists()


def test_the_record_grows_with_the_steps(tmp_path: Path):
    def record() -> dict:
        command = [sys.executable, str(ROOT / "bench/gpu_record.py"), str(tmp_path)]
        subprocess.run(command, check=True, cwd=ROOT, timeout=120)
        return json.loads((tmp_path / "suite.json").read_text())

    (tmp_path / "steps.tsv").write_text("")
    first = record()
    assert first["steps"] == [] and first["environment"]["torch"] == torch.__version__
    (tmp_path / "steps.tsv").write_text("build\t0\t71\t130\ndoctor\t124\t25\t25\nmemcheck\t9\t3\t50\n")
    second = record()
    assert second["environment"] == first["environment"]
    assert [(step["step"], step["outcome"]) for step in second["steps"]] == [
        ("build", "passed"), ("doctor", "out of time"), ("memcheck", "failed"),
    ]  # fmt: skip
    assert second["steps"][2] == {
        "step": "memcheck", "outcome": "failed", "exit_status": 9, "seconds": 3, "limit": 50,
    }  # fmt: skip
