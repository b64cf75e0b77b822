"""One safetensors file with a JSON header: written atomically, read whole or not at all. Never pickle.

The safetensors metadata holds ``format`` ("rnp"), ``format_version``, ``kind`` ("network" or "training"), ``header``
(JSON) and ``sha256`` over the header and every tensor, so that a damaged file is told from a good one.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

FORMAT = "rnp"
FORMAT_VERSION = 1


class CheckpointError(ValueError):
    """A checkpoint that cannot be used: the message names the file, the rule and the value."""


def digest(tensors: dict[str, Tensor], header: str) -> str:
    """SHA-256 of the header and of every tensor's name, type, shape and bytes, in the order of the names."""
    total = hashlib.sha256(header.encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        if tensor.numel():
            total.update(memoryview(tensor.reshape(-1).view(torch.uint8).numpy()))
    return total.hexdigest()


def write(path: str | Path, kind: str, tensors: dict[str, Tensor], header: dict[str, Any]) -> None:
    """Write the file in one atomic step: a reader sees the old file or the new one, even after a crash.

    A temporary file in the same folder is written, flushed to the disk and renamed; the folder is created if missing.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(header, sort_keys=True)
    # safetensors wants contiguous tensors of their own memory
    flat = {
        name: tensor.detach().to("cpu").clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()
    }
    metadata = {
        "format": FORMAT,
        "format_version": str(FORMAT_VERSION),
        "kind": kind,
        "header": text,
        "sha256": digest(flat, text),
    }
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    os.close(handle)
    try:
        save_file(flat, temporary, metadata=metadata)
        _flush(temporary)
        os.chmod(temporary, 0o666 & ~_umask())  # mkstemp made it private
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    _flush(path.parent)


def remove_unfinished(path: str | Path) -> None:
    """Remove what writers of this file left behind when they were killed. Not while one is at work on it."""
    path = Path(path)
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        left.unlink(missing_ok=True)


def read(path: str | Path, kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors (on the CPU) and the header of a file that :func:`write` wrote with this ``kind``.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: it is truncated, damaged, foreign, of another kind or of a newer format.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file" if not path.exists() else f"{path}: not a file")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise CheckpointError(
                    f"{path}: a safetensors file, but not written by this package: its format must be {FORMAT!r}, "
                    f"got {metadata.get('format')!r}"
                )
            version = metadata.get("format_version", "")
            if version not in {str(known) for known in range(1, FORMAT_VERSION + 1)}:
                raise CheckpointError(
                    f"{path}: format_version must be 1…{FORMAT_VERSION} for this package, got {version!r}"
                )
            if metadata.get("kind") != kind:
                raise CheckpointError(f"{path}: kind must be {kind!r}, got {metadata.get('kind')!r}")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (safe_open is no mapping)
    except (SafetensorError, OSError) as error:
        size = path.stat().st_size
        raise CheckpointError(
            f"{path}: not a whole safetensors file ({size} bytes), truncated or of another format: {error}"
        ) from error
    text = metadata.get("header", "")
    if digest(tensors, text) != metadata.get("sha256"):
        raise CheckpointError(f"{path}: damaged: the sha256 of its contents is not the one it names")
    return tensors, json.loads(text)


def _flush(path: str | Path) -> None:
    """Flush a file or a folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
