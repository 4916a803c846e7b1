"""Frontiers re-solved from one search each, against a search of its own for every budget.

    python -m asga.bench.frontier_study --proxy imagefolder:CIFAR10 --target imagefolder:TINY --out runs/study

Shares its folder, its float models and its searches with `asga.bench.transfer_study`: a search for one budget there is
that budget's own search here. Every policy is fine-tuned on the target alike, equal policies of one seed once, so that
the two of a budget are paired by seed.

Interrupted, the same command goes on with what is missing. ``frontier.json`` in the folder has every point,
``frontier.md`` the table.
"""

import argparse
import json
import warnings
from collections.abc import Mapping, Sequence

from asga._files import write_atomic, write_json
from asga.bench.machine import machine_facts
from asga.bench.transfer_study import METHODS, Study, add_data_arguments, spread
from asga.search import Budget, FarFromBudget, SearchResult

# Products of 6 to 36 bits.
_BUDGETS = ("w2a3", "w2a4", "w3a3", "w3a4", "w4a4", "w4a5", "w5a5", "w6a6")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is missing of the frontiers, and write their table.

    Args:
        arguments: Without the program's name; None: those of the process.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_data_arguments(parser)
    parser.add_argument("--model", default="resnet20")
    parser.add_argument("--budgets", nargs="+", default=_BUDGETS, help="of BitOps")
    parser.add_argument("--trained", default="w3a3", help="the budget of the one search")
    parser.add_argument("--method", choices=METHODS, default="sgd")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    study = Study(options, options.model)
    points: list[dict[str, object]] = []
    for seed in options.seeds:
        one = study.search(options.trained, options.method, seed)
        for budget in options.budgets:
            points.append(_point(options, study, one, budget, seed))
            _summarize(options, points)


def _point(options: argparse.Namespace, study: Study, one: SearchResult, budget: str, seed: int) -> dict[str, object]:
    """One budget, re-solved from the search of a seed and from a search of its own."""
    limit = Budget(bitops=budget)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FarFromBudget)  # the table says which
        (found,) = one.pareto([limit])
        solved = study.cell(one, budget, options.method, seed, suffix=f"from-{options.trained}.resolved")
    own = study.search(budget, options.method, seed)
    return {
        "seed": seed,
        "budget": budget,
        "distance": found.distance["bitops"],
        "far": found.far,
        "resolved": solved,
        "own": study.cell(own, budget, options.method, seed),
        "own_seconds": _seconds(options, budget, seed),
    }


def _seconds(options: argparse.Namespace, budget: str, seed: int) -> float:
    """How long the search for a budget took."""
    path = options.out / f"{options.model}-{budget}-{options.method}-seed{seed}.history.json"
    return sum(epoch["seconds"] for epoch in json.loads(path.read_text(encoding="utf-8"))["history"])


def _summarize(options: argparse.Namespace, points: Sequence[Mapping[str, object]]) -> None:
    seeds = list(dict.fromkeys(point["seed"] for point in points))
    one = sum(_seconds(options, options.trained, seed) for seed in seeds)
    all_own = sum(point["own_seconds"] for point in points)
    facts = {name: str(value) for name, value in vars(options).items() if name not in ("out", "proxy", "target")}
    write_json(
        options.out / "frontier.json",
        {"machine": machine_facts(), "options": facts, "seconds_of_one_search": one, "points": points},
    )
    by_budget = {
        budget: [point for point in points if point["budget"] == budget] for budget in dict.fromkeys(options.budgets)
    }
    lines = [
        "| BitOps of | from the trained budget | seeds | top-1, re-solved | own search | loss, re-solved | own search "
        "| loss, re-solved minus own, paired |",
        "|---|---|---|---|---|---|---|---|",
        *(_row(budget, of_it) for budget, of_it in by_budget.items() if of_it),
        "",
    ]
    others = [_difference(point, "loss") for point in points if not _same(point)]
    if others:
        lines += [
            f"Re-solved minus own, where the policies differ ({len(others)} of {len(points)} points): loss "
            f"{spread(others, 4)}, top-1 "
            f"{spread([100 * _difference(point, 'top1') for point in points if not _same(point)], 2)} points.",
        ]
    lines += [
        f"Searches for one frontier a seed took {one:.0f} s, those of its own for every point {all_own:.0f} s.",
        "",
    ]
    write_atomic(options.out / "frontier.md", "\n".join(lines))


def _row(budget: str, points: Sequence[Mapping[str, object]]) -> str:
    same = sum(map(_same, points))
    sides = {
        name: [[scale * point[side][name] for point in points] for side in ("resolved", "own")]
        for name, scale in {"top1": 100, "loss": 1}.items()
    }
    columns = [
        budget,
        f"{points[0]['distance']:+.0%}{' (far)' if points[0]['far'] else ''}",
        str(len(points)),
        *(f"{spread(values, 2)} %" for values in sides["top1"]),
        *(spread(values, 4) for values in sides["loss"]),
        "the same policies"
        if same == len(points)
        else spread([_difference(point, "loss") for point in points], 4) + (f" ({same} the same)" if same else ""),
    ]
    return f"| {' | '.join(columns)} |"


def _difference(point: Mapping[str, object], name: str) -> float:
    return point["resolved"][name] - point["own"][name]


def _same(point: Mapping[str, object]) -> bool:
    return point["resolved"]["policy"] == point["own"]["policy"]


if __name__ == "__main__":
    main()
