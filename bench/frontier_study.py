"""A frontier re-solved from one search, against a search of its own for every budget.

    python -m asga.bench.frontier_study --proxy imagefolder:CIFAR10 --target imagefolder:TINY --out runs/study

Shares its folder, its float models and its searches with `asga.bench.transfer_study`: a search for one budget there is
that budget's own search here. Every policy is fine-tuned on the target alike, equal policies of one seed once.

Interrupted, the same command goes on with what is missing. ``frontier.json`` in the folder has every point,
``frontier.md`` the table.
"""

import argparse
import json
import statistics
import warnings
from collections.abc import Mapping, Sequence

from asga._files import write_atomic, write_json
from asga.bench.machine import machine_facts
from asga.bench.transfer_study import METHODS, Study, add_data_arguments
from asga.search import Budget, FarFromBudget

# Products of 6 to 36 bits.
_BUDGETS = ("w2a3", "w2a4", "w3a3", "w3a4", "w4a4", "w4a5", "w5a5", "w6a6")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is missing of a frontier, and write its table.

    Args:
        arguments: Without the program's name; None: those of the process.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_data_arguments(parser)
    parser.add_argument("--model", default="resnet20")
    parser.add_argument("--budgets", nargs="+", default=_BUDGETS, help="of BitOps")
    parser.add_argument("--trained", default="w3a3", help="the budget of the one search")
    parser.add_argument("--method", choices=METHODS, default="sgd")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    study = Study(options, options.model)
    one = study.search(options.trained, options.method, options.seed)
    points = []
    for budget in options.budgets:
        limit = Budget(bitops=budget)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FarFromBudget)  # the table says which
            (found,) = one.pareto([limit])
            solved = study.cell(one, budget, options.method, options.seed, suffix=f"from-{options.trained}.resolved")
        own = study.search(budget, options.method, options.seed)
        points.append(
            {
                "budget": budget,
                "distance": found.distance["bitops"],
                "far": found.far,
                "resolved": solved,
                "own": study.cell(own, budget, options.method, options.seed),
                "own_seconds": _seconds(options, budget),
            }
        )
        _summarize(options, points)


def _seconds(options: argparse.Namespace, budget: str) -> float:
    """How long the search for a budget took."""
    path = options.out / f"{options.model}-{budget}-{options.method}-seed{options.seed}.history.json"
    return sum(epoch["seconds"] for epoch in json.loads(path.read_text(encoding="utf-8"))["history"])


def _summarize(options: argparse.Namespace, points: Sequence[Mapping[str, object]]) -> None:
    one, all_own = _seconds(options, options.trained), sum(point["own_seconds"] for point in points)
    differences = [100 * (point["resolved"]["top1"] - point["own"]["top1"]) for point in points]
    facts = {name: str(value) for name, value in vars(options).items() if name not in ("out", "proxy", "target")}
    write_json(
        options.out / "frontier.json",
        {"machine": machine_facts(), "options": facts, "seconds_of_one_search": one, "points": points},
    )
    lines = [
        "| BitOps of | from the trained budget | top-1, re-solved | top-1, own search | loss, re-solved | own search |",
        "|---|---|---|---|---|---|",
        *map(_row, points),
        "",
        f"Re-solved minus own top-1: {statistics.fmean(differences):+.2f} points on average, {min(differences):+.2f} "
        f"to {max(differences):+.2f}. One search took {one:.0f} s, {len(points)} searches {all_own:.0f} s.",
        "",
    ]
    write_atomic(options.out / "frontier.md", "\n".join(lines))


def _row(point: Mapping[str, object]) -> str:
    solved, own = point["resolved"], point["own"]
    same = " (the same policy)" if solved["policy"] == own["policy"] else ""
    columns = [
        point["budget"],
        f"{point['distance']:+.0%}{' (far)' if point['far'] else ''}",
        f"{100 * solved['top1']:.2f} %{same}",
        f"{100 * own['top1']:.2f} %",
        f"{solved['loss']:.4f}",
        f"{own['loss']:.4f}",
    ]
    return f"| {' | '.join(columns)} |"


if __name__ == "__main__":
    main()
