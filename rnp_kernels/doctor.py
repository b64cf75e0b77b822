"""`rnp doctor`: what was built, what this machine offers, which backend runs, and a self-test of every one that can.

`report()` returns all of it as plain data (what `--json` prints); its key "ok" is False where the self-test failed or
RNP_ISA names an instruction set that cannot run.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import os
import platform
from collections.abc import Iterator
from typing import Any

import torch

from . import _C, _libraries, backends, conformance, testing, triton
from ._version import __version__

_PACKAGES = ("torch", "numpy", "safetensors", "tqdm", "scikit-learn", "matplotlib", "triton")

# Of rnp_kernels.testing.CASES: each kernel once, and what joins them.
_SELF_TEST = (
    "3x3", "1x1 stride 2", "7x7 stem", "groups", "depthwise", "mixed prefixes", "mixed, contiguous",
    "prefix across groups", "tables", "everything", "everything, contiguous", "skipped tail, pooled", "empty batch",
)  # fmt: skip


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as lines:
        for line in lines:
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()


def _gpus() -> list[dict[str, Any]]:
    if not torch.cuda.is_available():
        return []
    devices = (torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count()))
    return [{"name": d.name, "capability": f"{d.major}.{d.minor}", "memory_bytes": d.total_memory} for d in devices]


def _machine() -> dict[str, Any]:
    """The processor and its GPUs. "isa" is None where RNP_ISA names one that cannot run; "isa_error" then says why."""
    try:
        isa, isa_error = _C.isa(), None
    except RuntimeError as error:
        isa, isa_error = None, str(error)
    return {
        "system": platform.platform(),
        "processor": _processor(),
        "usable_cores": len(os.sched_getaffinity(0)),
        "torch_threads": torch.get_num_threads(),
        "cpu_features": [name for name, present in _C.cpu_features().items() if present],
        "isas": _C.available_isas(),
        "isa": isa,
        "isa_error": isa_error,
        "gpus": _gpus(),
    }


def _compiled(name: str) -> bool:
    """Whether this installation holds the backend, whatever the machine can run."""
    if name == "cuda":
        return _C.build_info()["cuda_compiler"] is not None
    return name != "triton" or triton.installed() is None  # Triton compiles at the first call


def _auto(device: str) -> str | None:
    """The backend that "auto" takes for tensors of `device`; None where there is no such device or no backend."""
    if device == "cuda" and not torch.cuda.is_available():
        return None
    with backends.backend("auto"), contextlib.suppress(RuntimeError):
        return backends.resolve(torch.empty(0, device=device))
    return None


_BFLOAT16 = ("avx512bf16", "avx512amx")


@contextlib.contextmanager
def _isa(name: str) -> Iterator[None]:
    before = _C.isa()
    _C.set_isa(name)
    try:
        yield
    finally:
        _C.set_isa(before)


def _check(case: testing.Case, device: str, dtype: torch.dtype) -> None:
    """AssertionError where the backend in force is less accurate than native torch; errors of the call pass through."""
    arguments = testing.make(case, dtype, device)
    with conformance.float32_products("ieee"):
        conformance.check_output(case, arguments, *conformance.call(case, arguments))


def _failures(device: str, dtype: torch.dtype) -> list[dict[str, str]]:
    failures = []
    for name in _SELF_TEST:
        try:
            _check(testing.case(name), device, dtype)
        except Exception as error:  # whatever goes wrong is what the doctor is asked to tell
            failures.append({"case": name, "error": f"{type(error).__name__}: {error}"})
    return failures


def _self_test(reasons: dict[str, str | None]) -> list[dict[str, Any]]:
    """One row for each backend that runs here; for `cpu` one for each instruction set."""
    rows = []
    for name in (n for n in reasons if reasons[n] is None and n != "reference"):
        device = backends.device_of(name) or "cpu"
        for isa in _C.available_isas() if name == "cpu" else [None]:
            with backends.backend(name), _isa(isa) if isa else contextlib.nullcontext():
                # What sets these apart are their kernels for bfloat16; those for float32 are avx512's.
                failures = _failures(device, torch.bfloat16 if isa in _BFLOAT16 else torch.float32)
            rows.append({"backend": name, "isa": isa, "cases": len(_SELF_TEST), "failures": failures})
    return rows


def report() -> dict[str, Any]:
    """Everything `rnp doctor` knows, as plain data; runs the self-test (about a second on a CPU)."""
    machine = _machine()
    reasons = backends.available_backends()
    rows = _self_test(reasons) if machine["isa_error"] is None else []
    return {
        "ok": machine["isa_error"] is None and bool(rows) and not any(row["failures"] for row in rows),
        "versions": {"rnp-kernels": __version__, "python": platform.python_version()}
        | {name: _version(name) for name in _PACKAGES},
        "build": _C.build_info(),
        "machine": machine,
        "backends": {
            name: {
                "compiled": _compiled(name),
                "runs": reason is None,
                "reason": reason,
                "tested": any(row["backend"] == name for row in rows),
                "tested_on": list(backends.TESTED_ON[name]) if name in backends.TESTED_ON else None,
            }
            for name, reason in reasons.items()
        },
        "cuda_library": _libraries.cuda_reason or "loaded",
        "auto": {device: _auto(device) for device in ("cpu", "cuda")},
        "self_test": rows,
    }


def _text(found: dict[str, Any]) -> Iterator[str]:
    """The report in lines for people."""
    build, machine = found["build"], found["machine"]
    versions = found["versions"]
    yield f"rnp-kernels {versions['rnp-kernels']}, Python {versions['python']}, {machine['system']}"
    yield "  " + ", ".join(f"{name} {versions[name] or '(not installed)'}" for name in _PACKAGES)
    torch_headers = f"torch {build['torch_headers']} (ABI {build['torch_abi']})"
    of_commit = f", commit {build['commit']}" if build["commit"] else ""
    yield f"built with {build['compiler']}, {build['build_type']}, {torch_headers}{of_commit}"
    if build["cuda_compiler"]:
        yield f"  CUDA library: {build['cuda_compiler']} for {build['cuda_archs']}; {found['cuda_library']}"
    else:
        yield f"  CUDA library: not built, {build['cuda_reason']}"
    cores, threads = machine["usable_cores"], machine["torch_threads"]
    yield f"processor {machine['processor']}, usable cores {cores}, threads of torch {threads}"
    yield "  features: " + (" ".join(machine["cpu_features"]) or "none known")
    choice = machine["isa"] or f"NONE, {machine['isa_error']}"
    yield f"  instruction set: {choice} (there are {', '.join(machine['isas'])}; RNP_ISA forces one)"
    for gpu in machine["gpus"]:
        yield f"GPU {gpu['name']}, sm_{gpu['capability'].replace('.', '')}, {gpu['memory_bytes'] / 2**30:.0f} GiB"
    if not machine["gpus"]:
        yield "no GPU that torch sees"
    yield "backends"
    for name, state in found["backends"].items():
        compiled = "" if state["compiled"] or state["runs"] else "not compiled; "
        line = "runs" if state["runs"] else f"{compiled}does not run: {state['reason']}"
        if state["tested_on"] is not None:
            line += (
                f"; conformance suite passed on {', '.join(state['tested_on'])}"
                if state["tested_on"]
                else "; UNTESTED on a GPU"
            )
        yield f"  {name:10} {line}"
    chosen = ", ".join(f"{name or 'none'} on {device}" for device, name in found["auto"].items())
    yield f"  auto picks {chosen}"
    yield "self-test against the reference"
    for row in found["self_test"]:
        name = row["backend"] + (f" {row['isa']}" if row["isa"] else "")
        failed = len(row["failures"])
        yield f"  {name:14} " + (
            f"{failed} of {row['cases']} cases FAILED" if failed else f"{row['cases']} cases passed"
        )
        for failure in row["failures"]:
            yield f"    {failure['case']}: {failure['error']}"
    yield "all is well" if found["ok"] else "NOT well: see above"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print the report as JSON")


def run(options: argparse.Namespace) -> int:
    """Print the report; 0 only if the self-test passed."""
    found = report()
    print(json.dumps(found, indent=2) if options.json else "\n".join(_text(found)))
    return 0 if found["ok"] else 1
