"""Writes suite.json of bench/gpu_suite.sh: what is known so far. Must work where the package was not built.

python bench/gpu_record.py RESULTS      # reads RESULTS/steps.tsv: name, exit status, seconds, limit
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any


def printed(*command: str) -> str | None:
    """What the command prints, or None where there is no such command or it fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def environment() -> dict[str, Any]:
    found: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "commit": printed("git", "rev-parse", "HEAD"),
        "changed_files": (printed("git", "status", "--porcelain") or "").splitlines(),
        "python": platform.python_version(),
        "system": platform.platform(),
        "cpus": os.cpu_count(),
        "nvcc": (
            printed("nvcc", "--version") or printed("/usr/local/cuda/bin/nvcc", "--version") or "none"
        ).splitlines()[-1],
        "driver": printed("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "cuda_archs": os.environ.get("RNP_CUDA_ARCHS"),
    }
    try:
        import torch

        found |= {"torch": torch.__version__, "torch_cuda": torch.version.cuda, "gpu": None}
        if torch.cuda.is_available():
            device = torch.cuda.get_device_properties(0)
            found |= {
                "gpu": device.name, "capability": f"{device.major}.{device.minor}",
                "multiprocessors": device.multi_processor_count, "memory_bytes": device.total_memory,
            }  # fmt: skip
    except ImportError as error:
        found["torch"] = f"cannot be imported: {error}"
    return found


def steps(text: str) -> list[dict[str, Any]]:
    found = []
    for line in text.splitlines():
        name, status, seconds, limit = line.split("\t")
        outcome = {"0": "passed", "124": "out of time", "137": "out of time"}.get(status, "failed")
        found.append({
            "step": name, "outcome": outcome, "exit_status": int(status), "seconds": int(seconds), "limit": int(limit),
        })  # fmt: skip
    return found


def main() -> None:
    folder = Path(sys.argv[1])
    target = folder / "suite.json"
    # The environment is asked once: git and nvidia-smi answer slowly on a machine that is under test.
    known = json.loads(target.read_text(encoding="utf-8")) if (folder / "steps.tsv").stat().st_size else {}
    report = {"environment": known.get("environment") or environment()}
    report["steps"] = steps((folder / "steps.tsv").read_text(encoding="utf-8"))
    partial = target.with_suffix(".partial")
    partial.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    partial.replace(target)


if __name__ == "__main__":
    main()
