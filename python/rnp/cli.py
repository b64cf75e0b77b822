"""The command `rnp`.

Each sub-command lives in its own module, with `add_arguments(parser)` and `run(arguments) -> int | None`, imported
only when asked for, so that `rnp doctor` works where the packages of the demo are not installed. What argparse cannot
tell of the arguments, `run` checks first and raises as :class:`rnp.usage.UsageError`.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module

from rnp.usage import UsageError


@dataclass(frozen=True)
class Command:
    """Where a sub-command lives, its line of help, and the extra that brings the packages it needs."""

    module: str
    summary: str
    extra: str = ""
    needs: tuple[str, ...] = ()  # import names, checked before the command starts, not when it has run for minutes


COMMANDS = {
    "doctor": Command(
        "rnp_kernels.doctor", "what was built, what this machine offers, which backend runs; a self-test"
    ),
    "bench": Command(
        "rnp.bench.command", "the operator, layers, networks and training steps beside their rivals (about 27 minutes)"
    ),
    "demo": Command(
        "rnp.demo",
        "train and measure a network that spends less on easy images (about six minutes)",
        extra="demo",
        needs=("sklearn", "matplotlib"),
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run `rnp`; returns the exit status: 0 for success, 1 for a failure, 2 for wrong usage, 130 after Ctrl-C."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(prog="rnp", description="Convolutions that compute only what each image needs.")
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    commands = parser.add_subparsers(dest="command", metavar="command")
    chosen = arguments[0] if arguments and arguments[0] in COMMANDS else None
    for name, command in COMMANDS.items():
        subparser = commands.add_parser(name, help=command.summary, description=command.summary)
        if name == chosen:
            missing = [package for package in command.needs if importlib.util.find_spec(package) is None]
            if missing:
                print(f"rnp {name}: missing Python packages: {', '.join(missing)}. Install them with", file=sys.stderr)
                print(f"  pip install 'rnp-kernels[{command.extra}]'", file=sys.stderr)
                return 1
            module = import_module(command.module)
            module.add_arguments(subparser)
            subparser.set_defaults(run=module.run)

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
    except UsageError as error:
        print(f"rnp {options.command}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"rnp {options.command}: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
