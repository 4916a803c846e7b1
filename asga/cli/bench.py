"""``asga bench``: operators and steps against every other implementation of the same work that is installed."""

import argparse
from dataclasses import replace
from pathlib import Path

import torch

from asga._extras import require
from asga._files import write_json

HELP = "measure operators and steps against other implementations"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the command."""
    parser.add_argument("--quick", action="store_true", help="few cases and rounds, under three minutes on two cores")
    parser.add_argument(
        "--only",
        nargs="+",
        metavar="PATTERN",
        help="cases by name, such as 'core/*' (the default), '*/k5/bfloat16', 'step/*' or 'search/*'",
    )
    parser.add_argument("--list", action="store_true", help="print the names of the cases and run nothing")
    parser.add_argument(
        "--json",
        metavar="FILE",
        help="write all results and the facts of the machine, and beside them, as .png, bandwidth against size",
    )
    parser.add_argument("--png", metavar="FILE", help="draw the figure here instead, or without --json")
    parser.add_argument("--batch-size", type=int, default=64, help="of activations")
    parser.add_argument(
        "--passes",
        nargs="+",
        metavar="PASSES",
        help="what is timed: 'forward', 'forward+backward' (default: both, quick the latter)",
    )
    parser.add_argument("--rounds", type=int, help="samples of each implementation at most; default: 31, quick 7")
    parser.add_argument(
        "--no-compile", action="store_true", help="leave torch.compile out, which takes long to compile"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")


def run(options: argparse.Namespace) -> None:
    """Measure, print the table and write the files; after Ctrl-C, of what is there."""
    # Only here: no other command has a use for the benchmarks.
    from asga.bench.roofline import write_png
    from asga.bench.runner import Config, plan, report
    from asga.bench.runner import run as measure
    from asga.bench.searches import SearchCase
    from asga.bench.table import render

    config = Config.quick(options.device) if options.quick else Config(device=options.device)
    config = replace(config, batch_size=options.batch_size, compiled=not options.no_compile)
    if options.only is not None:
        config = replace(config, only=tuple(options.only))
    if options.passes is not None:
        config = replace(config, passes=tuple(options.passes))
    if options.rounds is not None:
        config = replace(config, rounds=options.rounds)
    if options.list:
        print("\n".join(dict.fromkeys(case.name for case, _ in plan(config))))
        return
    # What would fail at the end fails now.
    for path in filter(None, (options.json, options.png)):
        if not Path(path).parent.is_dir():
            raise FileNotFoundError(f"{path} cannot be written: there is no folder {Path(path).parent}")
    if options.png:
        require("matplotlib", "report")
        if all(isinstance(case, SearchCase) for case, _ in plan(config)):
            raise ValueError(f"--png is {options.png}: it draws bandwidths, and searches have none")
    png = options.png or (options.json and _beside(options.json))

    results = []
    try:
        for result in measure(config, progress=lambda line: print(line, flush=True)):
            results.append(result)
    finally:
        if results:
            print(f"\n{render(results)}")
            if options.json:
                write_json(options.json, report(config, results))
            # Searches have no bandwidth.
            if png and any(result.traffic is not None for result in results):
                write_png(png, results)


def _beside(json: str) -> Path | None:
    """Where the figure of a file of results goes; None, with a line that says so, where nothing can draw it."""
    try:
        require("matplotlib", "report")
    except ImportError as error:
        print(f"no figure beside {json}: {error}")
        return None
    path = Path(json)
    return path.with_suffix(".png") if path.suffix == ".json" else path.with_name(f"{path.name}.png")
