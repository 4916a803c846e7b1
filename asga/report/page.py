"""``report.html``: a run folder as one page that needs nothing else, for the screen and for paper."""

import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from asga._files import write_atomic
from asga.report.curves import cost_figure, diagnostics_figure, training_figure
from asga.report.facts import mean_bits, run_events, run_facts, run_warnings, uniform_comparisons, uniform_notes
from asga.report.html import percent, render
from asga.report.layers import LayerRow, layer_rows, toss_ups
from asga.report.policy import policy_figure
from asga.report.probabilities import shades
from asga.report.run import METRIC_NAMES, TENSORS, Run, Seeds, read_run
from asga.report.sensitivity import correlation_figure, sensitivity_figure
from asga.report.style import Drawing, to_svg
from asga.search.result import TOSS_UP

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def write_report(folder: str | os.PathLike, path: str | os.PathLike | None = None) -> Path:
    """Write the page of a run, atomically.

    It shows what is there: a run under way has no results yet, a transfer no probabilities.

    Args:
        folder: With any of ``config.json``, ``metrics.jsonl``, ``policy.json`` and ``result.json``.
        path: The HTML file; by default ``report.html`` in that folder.

    Returns:
        The path of the page.

    Raises:
        FileNotFoundError: The folder has none of these files.
        ImportError: matplotlib or jinja2 is not installed.
        ValueError: A file is damaged; the message names it.
    """
    path = Path(folder) / "report.html" if path is None else Path(path)
    write_atomic(path, render("page.html.jinja", _content(read_run(folder))))
    return path


def _content(run: Run) -> dict[str, object]:
    result = run.result or {}
    shares = result.get("cost_shares", {})
    layers = layer_rows(run)
    kinds = [kind for layer in result.get("sensitivities", {}).values() for kind in layer.values()]
    increases = [increase for kind in kinds for increase in kind.values()]
    return {
        "command": run.command,
        "facts": run_facts(run),
        "warnings": run_warnings(run),
        "results": result.get("table", []),
        "notes": result.get("notes", []),
        "policy": run.policy and Drawing(to_svg(policy_figure(run.policy), "policy"), "Bits of every layer."),
        "mean_bits": mean_bits(run.policy),
        "layers": layers,
        "metric_names": METRIC_NAMES,
        "searched": bool(run.probabilities or result.get("logit_gaps")),
        "shades": _shades(layers),
        "uniform": uniform_comparisons(run),
        "uniform_notes": uniform_notes(run),
        "agreement": result.get("agreement"),
        "disputed": _disputed(run),
        "toss_ups": toss_ups(layers),
        "toss_up_gap": TOSS_UP,
        "sensitivity": _sensitivity(run),
        "increases": len(increases),
        "not_raised": sum(value <= 0 for value in increases),
        "correlation": _correlation(run),
        "rank_correlations": result.get("rank_correlations", []),
        "increase_on_target": result.get("increase_on_target", {}),
        "starved": result.get("starved"),
        "tensors": TENSORS,
        "cost_shares": _cost_shares(shares),
        "costs": _figures(run, "expected cost", partial(cost_figure, shares=shares), "expected_cost"),
        "curves": _figures(run, "loss and accuracy", training_figure, "loss"),
        "diagnostics": _figures(run, "diagnostics of the ASGA step", diagnostics_figure, "rho"),
        "events": run_events(run),
        "options": run.options,
        "versions": {
            name: run.config[key]
            for name, key in (("asga", "asga_version"), ("torch", "torch_version"))
            if key in run.config
        },
    }


def _figures(run: Run, what: str, draw: Callable[[Seeds], "Figure"], key: str) -> dict[str, Drawing]:
    """A figure for every stage that logged `key`."""
    figures = {}
    for stage, seeds in run.stages.items():
        drawn = {seed: logged for seed, epochs in seeds.items() if (logged := [e for e in epochs if key in e])}
        if drawn:
            figures[stage] = Drawing(to_svg(draw(drawn), f"{what} {stage}"), f"{stage}: {what} by epoch.")
    return figures


def _cost_shares(shares: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, str]]:
    """By metric and by what is counted, the share of the budget."""
    names = {
        "expected": "expected at the end of the search",
        "most_likely": "likeliest candidates of all layers",
        "likeliest": "likeliest policy within the budget",
        "policy": "policy: its bits raised while budget was left",
    }
    metrics = list(dict.fromkeys(metric for by_metric in shares.values() for metric in by_metric))
    return {
        METRIC_NAMES.get(metric, metric): {
            label: percent(shares[key][metric]) for key, label in names.items() if metric in shares.get(key, {})
        }
        for metric in metrics
    }


def _sensitivity(run: Run) -> Drawing | None:
    found = (run.result or {}).get("sensitivities")
    if not found:
        return None
    drawn = to_svg(sensitivity_figure(found, run.policy), "sensitivity")
    return Drawing(drawn, "For every layer, the increase of the loss that each of its candidates causes.")


def _correlation(run: Run) -> Drawing | None:
    result = run.result or {}
    if "proxy_sensitivities" not in result:
        return None
    drawn = to_svg(correlation_figure(result["proxy_sensitivities"], result["sensitivities"]), "correlation")
    return Drawing(drawn, "The increases of the loss on the target against those on the proxy.")


def _disputed(run: Run) -> list[dict[str, object]]:
    """The choices on which seeds differ: bits in each, and in the policy."""
    found = (run.result or {}).get("agreement", {"bits": {}})["bits"]
    rows = []
    for name, kinds in found.items():
        for kind, bits in kinds.items():
            if len(set(bits)) > 1:
                chosen = [*bits, *([] if run.policy is None else [getattr(run.policy[name], f"{kind}_bits")])]
                shown = ["float" if b is None else str(b) for b in chosen]
                rows.append({"layer": name, "tensor": TENSORS[kind], "bits": shown})
    return rows


def _shades(layers: list[LayerRow]) -> list[int]:
    """The shades of the drawing with most candidates: the legend of all."""
    most = max((len(choice.candidates) for row in layers for choice in (row.weight, row.act)), default=0)
    return shades(most)
