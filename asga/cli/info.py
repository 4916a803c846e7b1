"""``asga info``: what this installation has and what serves each operator."""

import argparse
import json

from asga.info import collect, render

HELP = "show versions, devices, and which backend serves each operator"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the command."""
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(options: argparse.Namespace) -> None:
    """Print."""
    found = collect()
    print(json.dumps(found, indent=2) if options.json else render(found))
