"""The command line: ``asga search | transfer | evaluate | diagnose | report | demo | info | bench``."""

import argparse
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

import asga
from asga.cli import bench, demo, diagnose, evaluate, info, report, search, transfer
from asga.cli.options import as_typed

_COMMANDS = (search, transfer, evaluate, diagnose, report, demo, info, bench)
# What a user can cause and mend: shown as one line, without a traceback.
_USER_ERRORS = (ValueError, TypeError, OSError, ImportError, asga.TrainingError)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: Without the program's name; None: those of the process.

    Returns:
        The exit status: 0, 1 for an error that the message explains, 130 after Ctrl-C.
    """
    parser = argparse.ArgumentParser(
        prog="asga", description="Mixed-precision quantization: search bit-widths on a small dataset, carry them over."
    )
    parser.add_argument("--version", action="version", version=f"asga {asga.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in _COMMANDS:
        name = command.__name__.rpartition(".")[2]
        sub = commands.add_parser(name, help=command.HELP, description=command.HELP, formatter_class=_HelpFormatter)
        command.add_arguments(sub)
        sub.set_defaults(run=command.run)
    options = parser.parse_args(arguments)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            options.run(options)
    except KeyboardInterrupt:
        folder = getattr(options, "out", None)
        begun = folder is not None and Path(folder, "config.json").exists()
        hint = f" Go on with the same command and --resume: {folder}" if begun else ""
        print(f"\nasga: stopped.{hint}", file=sys.stderr)
        return 130
    except _USER_ERRORS as error:
        print(f"asga: {as_typed(str(error), options)}", file=sys.stderr)
        return 1
    return 0


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Defaults behind the help, where they tell something: "None" does not say what is done then."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or action.default is False or action.default in ("", []):
            return action.help
        return super()._get_help_string(action)


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    """In one line, without the place in the code that a user has no use for."""
    print(f"asga: warning: {message}", file=sys.stderr)
