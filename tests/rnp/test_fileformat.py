"""Files are written atomically and read whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from rnp import fileformat
from rnp.fileformat import CheckpointError


def tensors() -> dict[str, torch.Tensor]:
    base = torch.arange(24.0).reshape(2, 3, 2, 2)
    return {
        "weight": base.to(memory_format=torch.channels_last),
        "view": base[:, 0],  # shares memory with the above
        "half": torch.ones(3, dtype=torch.bfloat16),
        "count": torch.tensor(7),
        "empty": torch.zeros(0, 4),
    }


def test_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "x.safetensors"
    fileformat.write(path, "network", tensors(), {"groups": 4, "layers": ["a", "b"]})
    back, header = fileformat.read(path, "network")
    assert header == {"groups": 4, "layers": ["a", "b"]}
    assert set(back) == set(tensors())
    for name, tensor in tensors().items():
        assert back[name].dtype == tensor.dtype
        assert back[name].equal(tensor)
    assert [file.name for file in path.parent.iterdir()] == ["x.safetensors"]
    assert path.stat().st_mode & 0o777 == 0o666 & ~fileformat._umask()


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    fileformat.write(path, "network", tensors(), {})
    whole = path.read_bytes()
    for length in [0, 1, 7, 8, 9, 100, len(whole) // 2, len(whole) - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=r"x\.safetensors: not a whole safetensors file"):
            fileformat.read(path, "network")


def test_a_flipped_bit_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    fileformat.write(path, "network", tensors(), {})
    whole = bytearray(path.read_bytes())
    whole[-3] ^= 1
    path.write_bytes(whole)
    with pytest.raises(CheckpointError, match="sha256"):
        fileformat.read(path, "network")


def test_foreign_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.zeros(2)}, path)
    with pytest.raises(CheckpointError, match="not written by this package"):
        fileformat.read(path, "network")
    path.write_bytes(np.random.default_rng(0).bytes(1000))
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        fileformat.read(path, "network")
    torch.save({"a": torch.zeros(2)}, path)
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        fileformat.read(path, "network")
    with pytest.raises(FileNotFoundError, match="no such file"):
        fileformat.read(tmp_path / "none", "network")
    with pytest.raises(FileNotFoundError, match="not a file"):
        fileformat.read(tmp_path, "network")


def test_another_kind_and_a_newer_format_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.safetensors"
    fileformat.write(path, "network", tensors(), {})
    with pytest.raises(CheckpointError, match="kind must be 'training', got 'network'"):
        fileformat.read(path, "training")
    for version in (2, 0, "²", "1.0", ""):
        with monkeypatch.context() as patch:
            patch.setattr(fileformat, "FORMAT_VERSION", version)
            fileformat.write(path, "network", tensors(), {})
        with pytest.raises(CheckpointError, match=f"format_version must be 1…1 for this package, got '{version}'"):
            fileformat.read(path, "network")


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.safetensors"
    fileformat.write(path, "network", {"a": torch.zeros(2)}, {})

    def fail(*args: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        fileformat.write(path, "network", {"a": torch.ones(2)}, {})
    assert load_file(path)["a"].tolist() == [0, 0]
    assert [file.name for file in tmp_path.iterdir()] == ["x.safetensors"]


def test_what_a_killed_writer_left_is_removed(tmp_path: Path) -> None:
    path, other = tmp_path / "x.safetensors", tmp_path / ".y.safetensors.0.tmp"
    fileformat.write(path, "network", tensors(), {})
    (tmp_path / ".x.safetensors.abc.tmp").write_bytes(b"half")
    other.write_bytes(b"somebody else's")
    fileformat.remove_unfinished(path)
    assert {file.name for file in tmp_path.iterdir()} == {path.name, other.name}
