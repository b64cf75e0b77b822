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

_SUITE = Path(__file__).resolve().parents[1] / "conformance" / "test_every_backend.py"


@pytest.mark.slow
def test_the_conformance_suite_interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    why_not = triton.reason()
    if why_not is not None:
        pytest.skip(why_not)
    command = [sys.executable, "-m", "pytest", "-q", "-k", "triton", "-p", "no:cacheprovider", str(_SUITE)]
    run = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]
    passed = re.search(r"(\d+) passed", run.stdout)
    assert passed and int(passed[1]) >= 60 and "skipped" not in run.stdout, run.stdout[-2000:]
