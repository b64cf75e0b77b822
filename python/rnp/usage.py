"""Wrong arguments of a sub-command of `rnp`: one line on stderr and exit status 2, before any work."""

from __future__ import annotations

import tempfile
from pathlib import Path


class UsageError(Exception):
    """What is wrong with the arguments. `rnp.cli.main` prints it behind "rnp COMMAND: error:" and returns 2."""


def require(holds: bool, rule: str, value: object) -> None:
    """Raise UsageError with the rule and the value that breaks it, unless it holds."""
    if not holds:
        raise UsageError(f"{rule}, got {value}")


def writable_folder(path: str | Path, option: str) -> Path:
    """The folder that `option` names, made where it is missing; UsageError where nothing can be written there."""
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UsageError(f"{option} must be a folder to write to, got {str(path)!r}: {error.strerror}") from error
    return folder
