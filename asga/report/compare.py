"""One page that compares several runs."""

import itertools
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from asga._files import write_atomic
from asga.report.curves import comparison_figure
from asga.report.facts import mean_bits, run_facts, scored, uniform_comparisons
from asga.report.html import render
from asga.report.run import METRIC_NAMES, TENSORS, Run, Seeds, read_run
from asga.report.style import Drawing, to_svg
from asga.search.agreement import Choice, policy_agreement

Runs = Mapping[str, Run]


def write_comparison(folders: Sequence[str | os.PathLike], path: str | os.PathLike) -> Path:
    """Write a page that compares runs, atomically: options, results, policies, and curves over each other.

    Runs may be of different commands, and need not be finished: what one of them has not is left open.

    Args:
        folders: Two or more run folders.
        path: The HTML file.

    Returns:
        `path`.

    Raises:
        FileNotFoundError: A folder holds no run.
        ImportError: matplotlib or jinja2 is not installed.
        ValueError: There are fewer than two folders, one is there twice, or a file is damaged; the message names it.
    """
    resolved = [Path(folder).resolve() for folder in folders]
    if len(resolved) < 2:
        raise ValueError(f"folders has {len(resolved)} entries; two or more runs are needed to compare them")
    for folder in resolved:
        if resolved.count(folder) > 1:
            raise ValueError(f"{folder} is there twice; a run compared with itself shows nothing")
    runs = {name: read_run(folder) for name, folder in zip(_names(resolved), folders, strict=True)}
    path = Path(path)
    write_atomic(path, render("compare.html.jinja", _content(runs)))
    return path


def _content(runs: Runs) -> dict[str, object]:
    groups = list(_same_layers(runs))
    facts = {name: {"command": run.command, **run_facts(run)} for name, run in runs.items()}
    alone = [name for group in groups if len(group) == 1 for name in group]
    return {
        "runs": list(runs),
        "facts": {
            fact: [of_run.get(fact) for of_run in facts.values()]
            for fact in dict.fromkeys(fact for of_run in facts.values() for fact in of_run)
        },
        "options": _differing_options(runs),
        "results": [{"run": name, **row} for name, run in runs.items() for row in (run.result or {}).get("table", [])],
        "searches": {name: found for name, run in runs.items() if (found := _search(run))},
        "metric_names": METRIC_NAMES,
        "policies": [_policies(group) for group in groups if len(group) > 1],
        "alone": alone,
        "curves": _curves(runs),
    }


def _names(folders: Sequence[Path]) -> list[str]:
    """The ends of the paths, as long as they must be to tell the runs apart."""
    for length in itertools.count(1):
        names = ["/".join(folder.parts[-length:]) for folder in folders]
        if len(set(names)) == len(names):
            return names
    raise AssertionError("different paths have different ends")


def _differing_options(runs: Runs) -> dict[str, list[object]]:
    """By option the value in every run, None where it has none, if they are not all the same."""
    names = dict.fromkeys(name for run in runs.values() for name in run.options)
    values = {name: [run.options.get(name) for run in runs.values()] for name in names}
    return {name: found for name, found in values.items() if any(value != found[0] for value in found)}


def _search(run: Run) -> dict[str, object] | None:
    """What a search found besides its policy; None for other runs."""
    result = run.result or {}
    if "cost_shares" not in result or run.command != "search":
        return None
    keys = ("method", "cost_shares", "toss_ups", "choices", "agreement", "search_seconds")
    uniform = uniform_comparisons(run).get("policy")
    how = None if uniform is None else scored(run, tuned=uniform.tuned)
    return {**{key: result.get(key) for key in keys}, "uniform": uniform, "scored": how}


def _same_layers(runs: Runs) -> Iterable[dict[str, Run]]:
    """The runs with a policy, those about the same layers together."""
    groups: dict[frozenset[str], dict[str, Run]] = {}
    for name, run in runs.items():
        if run.policy is not None:
            groups.setdefault(frozenset(run.policy), {})[name] = run
    return groups.values()


def _policies(runs: Runs) -> dict[str, object]:
    """Policies of the same layers side by side, and how far they agree."""
    policies = {name: run.policy for name, run in runs.items()}
    searched = _searched(runs.values())
    means = [mean_bits(policy) for policy in policies.values()]

    def bits(layer: str, kind: str) -> list[str]:
        found = [getattr(policy[layer], f"{kind}_bits") for policy in policies.values()]
        return ["float" if b is None else str(b) for b in found]

    return {
        "names": list(policies),
        "rows": [
            {"layer": layer, "bits": [bits(layer, kind) for kind in TENSORS]} for layer in next(iter(policies.values()))
        ],
        "mean_bits": [[mean.get(kind) for mean in means] for kind in ("weights", "activations")],
        "agreement": policy_agreement(policies, searched or None),
        "searched": bool(searched),
    }


def _searched(runs: Iterable[Run]) -> list[Choice]:
    """The choices that any of the runs is known to have searched."""
    found: dict[Choice, None] = {}
    for run in runs:
        result = (run.result or {}) if run.command in ("search", "demo") else {}
        # What a group shares is decided once; only files of earlier versions lack the decisions.
        layers = result.get("logit_gaps") or result.get("sensitivities") or {}
        decisions = result.get("decisions", [(layer, kind) for layer, kinds in layers.items() for kind in kinds])
        found |= dict.fromkeys(map(tuple, decisions))
    return list(found)


def _curves(runs: Runs) -> dict[str, Drawing]:
    """A figure for every stage that several runs have."""
    stages: dict[str, dict[str, Seeds]] = {}
    for name, run in runs.items():
        for stage, seeds in run.stages.items():
            stages.setdefault(stage, {})[name] = seeds
    shared = {stage: of_runs for stage, of_runs in stages.items() if len(of_runs) > 1}
    return {
        stage: Drawing(to_svg(comparison_figure(of_runs), f"compare {stage}"), f"{stage}: {', '.join(of_runs)}.")
        for stage, of_runs in shared.items()
    }
