"""The command `rnp`.

Each sub-command lives in its own module, with `add_arguments(parser)` and `run(arguments) -> int | None`, imported
only when asked for, so that `rnp doctor` works where the packages of the demo are not installed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module
from types import ModuleType

# name: (module, the extra that brings the packages it needs, one line of help)
COMMANDS: dict[str, tuple[str, str | None, str]] = {
    "doctor": (
        "rnp_kernels.doctor",
        None,
        "what was built, what this machine offers, which backend runs; a self-test",
    ),
    "demo": ("rnp.demo", "demo", "train and measure a network that spends less on easy images (about six minutes)"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run `rnp`; returns the exit status: 0 for success, 1 for a failure, 2 for wrong usage, 130 after Ctrl-C."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(prog="rnp", description="Convolutions that compute only what each image needs.")
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    commands = parser.add_subparsers(dest="command", metavar="command")
    chosen = arguments[0] if arguments and arguments[0] in COMMANDS else None
    for name, (module_name, extra, summary) in COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=summary)
        if name == chosen:
            module = _import(name, module_name, extra)
            if module is None:
                return 1
            module.add_arguments(command)
            command.set_defaults(run=module.run)

    options = parser.parse_args(arguments)
    if options.version:
        from rnp_kernels._version import __version__

        print(f"rnp-kernels {__version__}")
        return 0
    if options.command is None:
        parser.print_help()
        return 2
    try:
        return options.run(options) or 0
    except KeyboardInterrupt:
        print(f"rnp {options.command}: interrupted", file=sys.stderr)
        return 130


def _import(command: str, module: str, extra: str | None) -> ModuleType | None:
    """The sub-command's module; None, with a message, where a package of its extra is missing."""
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if extra is None or missing in ("rnp", "rnp_kernels", ""):
            raise
        print(f"rnp {command}: the Python package {missing!r} is missing. The command needs:", file=sys.stderr)
        print(f"  pip install 'rnp-kernels[{extra}]'", file=sys.stderr)
        return None


if __name__ == "__main__":
    sys.exit(main())
