"""The backend "triton": the whole operator, its gradients and the agent's step as Triton kernels.

It runs on GPUs that Triton supports, with no compiled extension (no nvcc, ROCm), and, slowly, on CPU tensors under
TRITON_INTERPRET=1, which is how it is tested where there is no GPU. Importing this package does not import triton.

    tiles.py       which tile runs for which layer        launch.py      from tensors to launches
    schedule.py    the work list, on the device           operators.py   torch.ops.rnp.*_triton
    kernels.py     what the kernels share                 gemm.py, direct.py, weight_grad.py, agent_step.py   kernels
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os

import torch

OLDEST = (3, 6)
CAPABILITY = (8, 0)  # of an NVIDIA GPU: bfloat16 and asynchronous copies


def interpreted() -> bool:
    """Whether Triton interprets kernels on the CPU; Triton decides when a kernel's module is imported."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _version(package: str) -> tuple[int, ...]:
    return tuple(int(part) for part in importlib.metadata.version(package).split(".")[:2])


def installed() -> str | None:
    """Why Triton's kernels cannot be compiled here, GPU or not; None where they can."""
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed (pip install triton)"
    version = _version("triton")
    if version < OLDEST:
        return f"triton must be {OLDEST[0]}.{OLDEST[1]} or later, got {importlib.metadata.version('triton')}"
    if interpreted() and version < (3, 7) and _version("numpy") >= (2, 4):
        return "the interpreter of triton 3.6 does not run with numpy 2.4 or later"
    return None


def reason() -> str | None:
    """Why the backend does not run on this machine; None where it does."""
    missing = installed()
    if missing is not None or interpreted():
        return missing
    if not torch.cuda.is_available():
        return "no CUDA device is visible (TRITON_INTERPRET=1 interprets the kernels on a CPU)"
    capability = torch.cuda.get_device_capability()
    if torch.version.hip is None and capability < CAPABILITY:
        return f"the GPU's compute capability must be 8.0 or higher, got {capability[0]}.{capability[1]}"
    return None
