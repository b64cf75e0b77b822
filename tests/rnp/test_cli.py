"""The command `rnp`: its sub-commands, exit statuses, and what it says where an extra is not installed."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import rnp_kernels
from rnp import cli
from rnp.usage import writable_folder


def test_without_a_command_it_prints_help_and_fails(capsys: pytest.CaptureFixture[str]):
    assert cli.main([]) == 2
    printed = capsys.readouterr().out
    assert "doctor" in printed and "demo" in printed


def test_version(capsys: pytest.CaptureFixture[str]):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"rnp-kernels {rnp_kernels.__version__}\n"


def test_an_unknown_command_is_a_usage_error(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as exit:
        cli.main(["prune"])
    assert exit.value.code == 2
    assert "prune" in capsys.readouterr().err


def test_the_module_runs_as_a_program(tmp_path: Path):
    command = [sys.executable, "-m", "rnp.cli", "--version"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")


def test_only_the_command_asked_for_is_imported(monkeypatch: pytest.MonkeyPatch):
    imported: list[str] = []
    module = SimpleNamespace(
        add_arguments=lambda parser: parser.add_argument("--seed", type=int), run=lambda options: options.seed
    )
    monkeypatch.setattr(cli, "import_module", lambda name: imported.append(name) or module)
    assert cli.main(["demo", "--seed", "3"]) == 3
    assert imported == ["rnp.demo"]


def test_a_missing_extra_is_named_before_anything_starts(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    command = cli.Command("rnp.nowhere", "", extra="demo", needs=("argparse", "no_such_package", "nor_this_one"))
    monkeypatch.setitem(cli.COMMANDS, "demo", command)
    assert cli.main(["demo", "--steps", "3"]) == 1
    message = capsys.readouterr().err
    assert "rnp demo: missing Python packages: no_such_package, nor_this_one." in message
    assert "pip install 'rnp-kernels[demo]'" in message


def test_a_bug_in_a_command_is_not_taken_for_a_missing_extra(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(cli.COMMANDS, "demo", cli.Command("rnp.demmo", "", extra="demo"))
    with pytest.raises(ModuleNotFoundError, match=r"rnp\.demmo"):
        cli.main(["demo"])


def test_the_demo_extra_brings_what_the_demo_needs():
    try:
        requirements = importlib.metadata.requires("rnp-kernels") or []
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("runs from the sources, without an installed distribution")
    brought = {r.partition(";")[0].strip() for r in requirements if "extra ==" in r and "demo" in r}
    assert {"sklearn": "scikit-learn", "matplotlib": "matplotlib"}.keys() == set(cli.COMMANDS["demo"].needs)
    assert brought >= {"scikit-learn", "matplotlib"}


@pytest.mark.parametrize("command", ["demo", "bench"])
@pytest.mark.parametrize("where", ["a file", "below a file", "where nothing can be made"])
def test_an_out_that_cannot_be_written_to_is_refused(
    command: str, where: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    file = tmp_path / "file"
    file.write_text("kept")
    out = {"a file": file, "below a file": file / "out", "where nothing can be made": Path("/proc/rnp")}[where]
    assert cli.main([command, "--quick", "--out", str(out)]) == 2
    captured = capsys.readouterr()
    message = captured.err.splitlines()
    assert len(message) == 1 and not captured.out
    assert message[0].startswith(f"rnp {command}: error: --out must be a folder to write to, got {str(out)!r}: ")
    assert file.read_text() == "kept"


def test_a_folder_to_write_to_is_made_and_left_empty(tmp_path: Path):
    folder = writable_folder(tmp_path / "a" / "b", "--out")
    assert folder == writable_folder(folder, "--out") == tmp_path / "a" / "b"
    assert list(folder.iterdir()) == []


def test_ctrl_c_ends_with_130(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    def interrupted(options: object) -> int:
        raise KeyboardInterrupt

    module = SimpleNamespace(add_arguments=lambda parser: None, run=interrupted)
    monkeypatch.setattr(cli, "import_module", lambda name: module)
    assert cli.main(["demo"]) == 130
    assert "interrupted" in capsys.readouterr().err
