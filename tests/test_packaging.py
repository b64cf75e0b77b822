"""What an installation promises: one version, typed packages, a complete source distribution, clear build errors."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import runpy
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

import rnp_kernels
from rnp_kernels import _C

ROOT = Path(__file__).resolve().parent.parent


def distribution() -> importlib.metadata.Distribution:
    try:
        return importlib.metadata.distribution("rnp-kernels")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("runs from the sources, without an installed distribution")


def test_the_version_is_written_in_one_place():
    version = rnp_kernels.__version__
    assert re.fullmatch(r"\d+\.\d+\.\d+", version)
    assert _C.build_info()["version"] == version
    for name in ("pyproject.toml", "setup.py", "CMakeLists.txt"):
        assert version not in (ROOT / name).read_text()


def test_the_distribution_has_that_version_and_its_metadata():
    installed = distribution()
    assert installed.version == rnp_kernels.__version__
    assert installed.metadata["License-Expression"] == "BSD-3-Clause"
    assert installed.metadata["Requires-Python"] == ">=3.10"
    scripts = {e.name: e.value for e in installed.entry_points if e.group == "console_scripts"}
    assert scripts == {"rnp": "rnp.cli:main"}


def test_an_installed_torch_is_never_replaced_for_being_too_new():
    requirements = [r for r in distribution().requires or [] if re.match(r"torch\b", r)]
    assert requirements == ["torch>=2.10"]


@pytest.mark.parametrize("package", ["rnp_kernels", "rnp"])
def test_both_packages_are_typed(package: str):
    spec = importlib.util.find_spec(package)
    assert spec is not None and spec.origin is not None
    assert (Path(spec.origin).parent / "py.typed").is_file()


def test_a_build_names_the_commit_it_is_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("setuptools.setup", lambda **_: None)
    shutil.copy(ROOT / "setup.py", tmp_path)
    commit = runpy.run_path(str(tmp_path / "setup.py"))["commit"]

    def git(*arguments: str) -> str:
        who = ("-c", "user.name=x", "-c", "user.email=x@example.com")
        command = ["git", *who, *arguments]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout

    assert commit() == ""
    git("init", "-q")
    (tmp_path / "other").touch()
    git("add", "other")
    git("commit", "-qm", "somebody else's")
    assert commit() == ""
    git("add", "setup.py")
    git("commit", "-qm", "ours")
    assert commit() == git("rev-parse", "--short", "HEAD").strip()
    (tmp_path / "other").write_text("changed")
    assert commit() == git("rev-parse", "--short", "HEAD").strip() + "-dirty"


def test_setup_stays_small_and_offline():
    text = (ROOT / "setup.py").read_text()
    assert len(text.splitlines()) <= 120
    for word in ("urllib", "requests", "http", "socket", "import torch"):
        assert word not in text


def build_backend(arguments: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run setup.py's folder through the build backend of pyproject.toml, as pip does, with the environment changed."""
    return subprocess.run(
        [sys.executable, "-c", f"import setuptools.build_meta as b; b.{arguments}"],
        cwd=folder, env={**os.environ, **environment}, capture_output=True, text=True,
    )  # fmt: skip


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the source tree, since building writes beside setup.py."""
    copy = tmp_path_factory.mktemp("sources") / "rnp-kernels"
    unwanted = (".git", ".venv", "build", "dist", "*.egg-info", "__pycache__", ".*_cache", "demo-out")
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(*unwanted))
    return copy


def test_the_sdist_holds_all_that_a_build_and_its_tests_need(sources: Path, tmp_path: Path):
    result = build_backend(f"build_sdist({str(tmp_path)!r})", sources)
    assert result.returncode == 0, result.stderr
    (archive,) = tmp_path.glob("rnp_kernels-*.tar.gz")
    with tarfile.open(archive) as tar:
        held = {name.partition("/")[2] for name in tar.getnames()}
    wanted = {
        str(path.relative_to(sources))
        for folder in ("csrc", "cmake", "rnp_kernels", "python", "tests", "bench", ".ci")
        for path in (sources / folder).rglob("*")
        if path.is_file() and path.suffix not in (".so", ".pyc") and ".egg-info" not in str(path)
    }
    wanted |= {"CMakeLists.txt", "Makefile", "constraints.txt", "pyproject.toml", "setup.py", "README.md", "LICENSE"}
    assert wanted - held == set()
    assert [name for name in held if name.endswith((".so", ".pyc", ".o"))] == []


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("RNP_CUDA", "yes", "RNP_CUDA must be auto, 1 or 0, got 'yes'"),
        ("MAX_JOBS", "0", "MAX_JOBS must be a positive integer, got '0'"),
        ("MAX_JOBS", "two", "MAX_JOBS must be a positive integer, got 'two'"),
    ],
)
def test_a_wrong_variable_stops_the_build_before_it_starts(
    sources: Path, tmp_path: Path, variable: str, value: str, message: str
):
    result = build_backend(f"build_wheel({str(tmp_path)!r})", sources, **{variable: value})
    assert result.returncode != 0
    assert message in result.stdout + result.stderr
    assert "Building CXX" not in result.stdout + result.stderr


def configure_cuda(folder: Path, choice: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Configure a project of nothing but cmake/cuda.cmake."""
    cmake = shutil.which("cmake", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))
    if cmake is None:
        pytest.skip("there is no cmake")
    project = "cmake_minimum_required(VERSION 3.24)\nproject(probe LANGUAGES CXX)\n"
    (folder / "CMakeLists.txt").write_text(project + f'include("{ROOT}/cmake/cuda.cmake")\n')
    command = [cmake, "-S", str(folder), "-B", str(folder / "build"), f"-DRNP_CUDA={choice}", "-DRNP_CUDA_ARCHS=80;90a"]
    return subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True)


def test_asking_for_cuda_without_nvcc_is_an_error_that_says_so(tmp_path: Path):
    result = configure_cuda(tmp_path, "1", CUDACXX="/nowhere/nvcc")
    assert result.returncode != 0
    assert "RNP_CUDA=1 asks for the CUDA library" in result.stderr
    assert "/nowhere/nvcc" in result.stderr


def test_without_nvcc_auto_builds_no_cuda_library_and_says_why(tmp_path: Path):
    result = configure_cuda(tmp_path, "auto", CUDACXX="/nowhere/nvcc")
    assert result.returncode == 0, result.stderr
    assert "CUDA library: not built, there is no nvcc at CUDACXX=/nowhere/nvcc" in result.stdout


def test_cuda_can_be_switched_off_where_nvcc_is(tmp_path: Path):
    result = configure_cuda(tmp_path, "0")
    assert result.returncode == 0, result.stderr
    assert "CUDA library: not built, switched off by RNP_CUDA=0" in result.stdout


def test_the_libraries_name_no_folder_of_the_build_machine():
    """What is needed at run time is found beside the module or by the name of a library that torch has loaded."""
    readelf = shutil.which("readelf")
    if readelf is None:
        pytest.skip("there is no readelf")
    folder = Path(rnp_kernels.__file__).parent
    libraries = [*folder.glob("librnp_*.so"), *folder.glob("_C*.so")]
    assert len(libraries) >= 2
    for library in libraries:
        dynamic = subprocess.run([readelf, "-d", str(library)], capture_output=True, text=True, check=True).stdout
        paths = re.findall(r"(?:RPATH|RUNPATH).*\[(.*)\]", dynamic)
        assert paths == (["$ORIGIN"] if library.name.startswith("_C") else []), library.name


@pytest.mark.parametrize("sources", [True, False])
def test_a_package_without_libraries_says_what_to_do(tmp_path: Path, sources: bool):
    """Python started in a clone imports its sources, installed or not."""
    without = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(ROOT / "rnp_kernels", tmp_path / "rnp_kernels", ignore=without)
    if sources:
        shutil.copy(ROOT / "CMakeLists.txt", tmp_path)
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONSAFEPATH")}
    command = [sys.executable, "-c", "import rnp_kernels"]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith(f"ImportError: rnp_kernels: {tmp_path / 'rnp_kernels' / 'librnp_ops.so'} is missing; ")
    assert last.endswith("`pip install .`")
    assert ("Start it elsewhere" in last) == sources
