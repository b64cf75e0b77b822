"""What a figure was measured on. It goes into every report."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

import rnp_kernels
from rnp_kernels import _C

RUNTIMES = ("onnxruntime", "openvino")


def processor() -> str:
    """The processor's name, as the system gives it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass  # no Linux: the next line knows less, but something
    return platform.processor() or platform.machine()


def commit() -> str | None:
    """The commit of the checkout that this package runs from, "-dirty" where files differ; or that it was built from,
    if it is installed. None where there was none (an sdist)."""
    built, folder = _C.build_info()["commit"], Path(__file__).resolve().parent
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--exclude=*"], capture_output=True, text=True, cwd=folder
        )
        tracked = subprocess.run(["git", "ls-files", "--error-unmatch", __file__], capture_output=True, cwd=folder)
    except OSError:
        return built
    return described.stdout.strip() if described.returncode == tracked.returncode == 0 else built


def version_of(package: str) -> str | None:
    """The installed version of a package; None where it is not installed."""
    if importlib.util.find_spec(package) is None:
        return None
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def environment() -> dict[str, Any]:
    """Machine, versions, threads, commit, and the load when it is called. Runtimes that are not installed are None."""
    return {
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0)),
        "instruction_set": _C.isa(),
        "threads": torch.get_num_threads(),
        "system": platform.platform(),
        "compiler": _C.build_info()["compiler"],
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{package: version_of(package) for package in RUNTIMES},
        "rnp_kernels": rnp_kernels.__version__,
        "commit": commit(),
        "load": round(os.getloadavg()[0], 2),
    }
