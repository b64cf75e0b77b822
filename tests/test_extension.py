"""rnp_kernels._C: build info, CPU features, the choice of the instruction set, MAC counts."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from rnp_kernels import _C


@pytest.fixture(autouse=True)
def the_isa_is_restored() -> Iterator[None]:
    before = _C.isa()
    yield
    _C.set_isa(before)


def test_build_info_says_what_was_built():
    info = _C.build_info()
    assert info["torch_abi"] == "stable, 2.10"
    assert info["build_type"] == "Release"
    assert info["commit"] is None or re.fullmatch(r"[0-9a-f]{7,40}(-dirty)?", info["commit"])
    assert info["compiler"] and info["system"].startswith("Linux ")
    assert (info["cuda_compiler"] is None) == (info["cuda_archs"] is None) == (info["cuda_reason"] is not None)


def test_available_isas_are_those_the_processor_has():
    features = _C.cpu_features()
    isas = _C.available_isas()
    assert isas[0] == "portable"
    assert ("avx2" in isas) == (features.get("avx2", False) and features.get("fma", False))
    if "avx512" in isas:
        assert features["avx512f"] and features["avx512vl"]
    assert ("avx512bf16" in isas) == ("avx512" in isas and features["avx512bf16"])
    assert "avx512amx" not in isas or ("avx512bf16" in isas and features["amx_bf16"])
    order = ("portable", "avx2", "avx512", "avx512bf16", "avx512amx")
    assert [name for name in order if name in isas] == isas


def test_auto_takes_the_best_isa():
    _C.set_isa("auto")
    assert _C.isa() == _C.available_isas()[-1]


def test_each_available_isa_can_be_forced():
    for name in _C.available_isas():
        _C.set_isa(name)
        assert _C.isa() == name


def test_an_unknown_isa_is_refused_and_changes_nothing():
    _C.set_isa("portable")
    with pytest.raises(RuntimeError, match="got 'sse9'"):
        _C.set_isa("sse9")
    assert _C.isa() == "portable"


@pytest.mark.parametrize("name", ["portable", "sse9"])
def test_the_environment_forces_the_isa_or_is_refused(name: str, tmp_path: Path):
    code = "from rnp_kernels import _C; print(_C.isa())"
    environment = {**os.environ, "RNP_ISA": name}
    command = [sys.executable, "-c", code]  # in another folder, so that the sources are not imported
    result = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    if name == "portable":
        assert (result.returncode, result.stdout.strip()) == (0, "portable"), result.stderr
    else:
        assert result.returncode != 0
        assert "RuntimeError" in result.stderr and "'sse9'" in result.stderr


LAYER = {"in_channels": 8, "out_channels": 16, "kernel_size": (3, 3), "output_size": (5, 7)}


def test_macs_are_live_inputs_times_live_outputs_times_area_times_positions():
    assert _C.macs([8, 3, 0, 8], [16, 5, 16, 0], **LAYER) == [8 * 16 * 315, 3 * 5 * 315, 0, 0]
    assert _C.macs([], [], **LAYER) == []


def test_macs_with_groups_count_each_groups_own_live_channels():
    # Groups of 4 inputs and 8 outputs. In-prefix 6: 4 and 2 live; out-prefix 11: 8 and 3 live.
    assert _C.macs([6], [11], **LAYER, groups=2) == [(4 * 8 + 2 * 3) * 315]
    # In-prefix 2 leaves the second group no input, whatever its outputs.
    assert _C.macs([2], [16], **LAYER, groups=2) == [2 * 8 * 315]


def test_macs_are_64_bit():
    big = {"in_channels": 1 << 12, "out_channels": 1 << 12, "kernel_size": (3, 3), "output_size": (1 << 10, 1 << 10)}
    assert _C.macs([1 << 12], [1 << 12], **big) == [9 << 44]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([9], [16], {}), "in_prefix must be 0..in_channels, got 9"),
        (([8], [-1], {}), "out_prefix must be 0..out_channels, got -1"),
        (([8, 8], [16], {}), "out_prefix must be as long as in_prefix, got 1"),
        (([8], [16], {"groups": 3}), "in_channels must be a multiple of groups, got 8"),
        (([8], [16], {"groups": 0}), "groups must be positive, got 0"),
        (([8], [16], {"output_size": (5, -7)}), "output_size must not be negative, got -7"),
    ],
)
def test_macs_refuse_what_is_out_of_range(arguments: tuple[list[int], list[int], dict], message: str):
    in_prefix, out_prefix, changed = arguments
    with pytest.raises(ValueError, match=f"macs: {message}"):
        _C.macs(in_prefix, out_prefix, **{**LAYER, **changed})
