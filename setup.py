"""Builds the C++ libraries by running CMake with Ninja. CMakeLists.txt is the one list of sources.

Environment: RNP_CUDA=auto|1|0 (auto: build the CUDA library where nvcc is found), RNP_CUDA_ARCHS (default "80;90a"),
MAX_JOBS (compilers at once, default: one per core that this process may use).
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


def find_tool(name: str) -> str:
    """The program of the PyPI package `name` in this build environment, or else the one on PATH."""
    spec = importlib.util.find_spec(name)
    if spec is not None and spec.submodule_search_locations:
        package = Path(spec.submodule_search_locations[0])
        for folder in (package / "data" / "bin", *(p / "bin" for p in package.parents)):
            if (folder / name).is_file():
                return str(folder / name)
    found = shutil.which(name)
    if found is None:
        raise SystemExit(f"setup.py: {name} not found; pip install {name}")
    return found


def jobs() -> int:
    """MAX_JOBS, or the number of cores this process may use."""
    value = os.environ.get("MAX_JOBS", "")
    if not value:
        return len(os.sched_getaffinity(0))
    if not value.isdigit() or int(value) < 1:
        raise SystemExit(f"setup.py: MAX_JOBS must be a positive integer, got {value!r}")
    return int(value)


def cuda_choice() -> str:
    """RNP_CUDA, checked before anything is compiled."""
    value = os.environ.get("RNP_CUDA", "auto")
    if value not in ("auto", "1", "0"):
        raise SystemExit(f"setup.py: RNP_CUDA must be auto, 1 or 0, got {value!r}")
    return value


def commit() -> str:
    """The commit of this checkout, "-dirty" where files differ from it; nothing outside of one, as in an sdist."""
    tracked = ["git", "ls-files", "--error-unmatch", "setup.py"]  # not so in somebody else's repository
    describe = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    try:
        runs = [subprocess.run(command, cwd=ROOT, capture_output=True, text=True) for command in (tracked, describe)]
    except OSError:
        return ""
    return "" if any(run.returncode for run in runs) else runs[-1].stdout.strip()


def check_headers() -> None:
    """Distributions keep Python.h in a package of its own; CMake's words for its absence name no remedy."""
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    if not header.is_file():
        raise SystemExit(f"setup.py: {header} is missing; Debian and Ubuntu: python3-dev, Fedora: python3-devel")


class CMakeBuild(build_ext):
    """Configures, builds and installs with CMake instead of compiling the extension's own (empty) list of sources."""

    def build_extension(self, ext: Extension) -> None:
        parallel = str(jobs())
        check_headers()
        # CMake installs into <prefix>/rnp_kernels: beside build_lib's Python files.
        package = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        build = Path(self.build_temp).resolve()
        configure = [
            find_tool("cmake"),
            *("-S", str(ROOT), "-B", str(build), "-G", "Ninja", "--fresh"),
            f"-DCMAKE_MAKE_PROGRAM={find_tool('ninja')}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DRNP_CUDA={cuda_choice()}",
            f"-DRNP_CUDA_ARCHS={os.environ.get('RNP_CUDA_ARCHS', '80;90a')}",
            f"-DRNP_COMMIT={commit()}",
            "-DRNP_BUILD_TESTS=OFF",
        ]
        build.mkdir(parents=True, exist_ok=True)
        self.run_cmake(configure)
        self.run_cmake([configure[0], "--build", str(build), "--parallel", parallel])
        self.run_cmake([configure[0], "--install", str(build), "--prefix", str(package.parent)])

    @staticmethod
    def run_cmake(command: list[str]) -> None:
        print("+", " ".join(command), flush=True)
        result = subprocess.run(command)
        if result.returncode != 0:
            raise SystemExit(f"setup.py: '{' '.join(command[:2])} …' failed with status {result.returncode}; see above")

    def copy_extensions_to_source(self) -> None:
        """For an editable install: every library beside the sources, not only the Python module."""
        built = Path(self.build_lib).resolve() / "rnp_kernels"
        for library in built.glob("*.so"):
            self.copy_file(str(library), str(ROOT / "rnp_kernels" / library.name))


setup(ext_modules=[Extension("rnp_kernels._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
