"""The Triton kernels in Triton's interpreter, on the CPU: the conformance suite's quick cases, in a process of its own.

Triton decides when a kernel's module is imported whether it compiles or interprets, so the two cannot share a process.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from rnp_kernels import triton

_ROOT = Path(__file__).resolve().parents[2]
_SUITE = _ROOT / "tests" / "conformance" / "test_every_backend.py"


@pytest.mark.slow
def test_the_conformance_suite_interpreted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    why_not = triton.reason()
    if why_not is not None:
        pytest.skip(why_not)
    # From another folder: the checkout's rnp_kernels, which has no libraries, must not hide the installed one.
    # The interpreter is Python on one thread, so each core takes tests of its own.
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    workers = ["-n", str(min(os.cpu_count() or 1, 8)), "--dist", "worksteal"]
    options = ["-q", *workers, "-k", "triton", "-p", "no:cacheprovider", "-c", str(_ROOT / "pyproject.toml")]
    command = [sys.executable, "-m", "pytest", *options, "--rootdir", str(_ROOT), str(_SUITE)]
    run = subprocess.run(command, env=os.environ.copy(), cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]
    passed = re.search(r"(\d+) passed", run.stdout)
    assert passed and int(passed[1]) >= 60, run.stdout[-2000:]
    assert not re.search(r"\d+ skipped", run.stdout), run.stdout[-2000:]
