"""``asga report``: the page of a run, or one page that compares several."""

import argparse
from pathlib import Path

HELP = "write the page of a run again, or one page that compares several runs"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the command."""
    parser.add_argument("folders", nargs="+", metavar="RUN", help="a run folder, finished or not")
    parser.add_argument(
        "--out", metavar="FILE", help="the page; default: report.html of a single run, comparison.html of several"
    )


def run(options: argparse.Namespace) -> None:
    """Write the page and say where it is."""
    # Only here: no other command needs them to be installed.
    from asga.report import write_comparison, write_report

    if options.out is not None and not Path(options.out).resolve().parent.is_dir():
        raise FileNotFoundError(f"{options.out} cannot be written: there is no folder {Path(options.out).parent}")
    if len(options.folders) == 1:
        print(write_report(options.folders[0], options.out))
    else:
        print(write_comparison(options.folders, options.out or "comparison.html"))
