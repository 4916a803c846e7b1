"""``report.html``: a run folder as one page that needs nothing else, for the screen and for paper."""

import os
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

from asga._files import write_atomic
from asga.policy import bit_width
from asga.report.curves import cost_figure, diagnostics_figure, training_figure
from asga.report.html import bytes_, count, duration, percent, render
from asga.report.layers import LayerRow, layer_rows, toss_ups
from asga.report.policy import policy_figure
from asga.report.probabilities import shades
from asga.report.run import METRIC_NAMES, TENSORS, Run, Seeds, read_run
from asga.report.style import Drawing, to_svg
from asga.search.result import TOSS_UP

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# A radius on one bound for more than this share of the steps is in effect a constant.
_STUCK_SHARE = 0.9


def write_report(folder: str | os.PathLike) -> Path:
    """Write ``report.html`` into a run folder, atomically.

    It shows what is there: a run under way has no results yet, a transfer no probabilities.

    Args:
        folder: With any of ``config.json``, ``metrics.jsonl``, ``policy.json`` and ``result.json``.

    Returns:
        The path of the page.

    Raises:
        FileNotFoundError: The folder has none of these files.
        ImportError: matplotlib or jinja2 is not installed.
        ValueError: A file is damaged; the message names it.
    """
    path = Path(folder) / "report.html"
    write_atomic(path, render("page.html.jinja", _content(read_run(folder))))
    return path


def _content(run: Run) -> dict[str, object]:
    result = run.result or {}
    shares = result.get("cost_shares", {})
    layers = layer_rows(run)
    return {
        "command": run.command,
        "facts": _facts(run),
        "warnings": _warnings(run),
        "results": result.get("table", []),
        "notes": result.get("notes", []),
        "policy": run.policy and Drawing(to_svg(policy_figure(run.policy), "policy"), "Bits of every layer."),
        "mean_bits": _mean_bits(run),
        "layers": layers,
        "searched": bool(run.probabilities or result.get("logit_gaps")),
        "shades": _shades(layers),
        "agreement": result.get("agreement"),
        "disputed": _disputed(run),
        "toss_ups": toss_ups(layers),
        "toss_up_gap": TOSS_UP,
        "cost_shares": _cost_shares(shares),
        "costs": _figures(run, "expected cost", partial(cost_figure, shares=shares), "expected_cost"),
        "curves": _figures(run, "loss and accuracy", training_figure, "loss"),
        "diagnostics": _figures(run, "diagnostics of the ASGA step", diagnostics_figure, "rho"),
        "events": _events(run),
        "options": run.options,
        "versions": {
            name: run.config[key]
            for name, key in (("asga", "asga_version"), ("torch", "torch_version"))
            if key in run.config
        },
    }


def _facts(run: Run) -> dict[str, str]:
    meta = run.policy.meta if run.policy is not None else {}
    options = run.options
    epoch = run.last_epoch
    facts = {
        "model": options.get("model") or meta.get("architecture"),
        "data": options.get("data"),
        "policy searched on": meta.get("proxy"),
        "budget": _budget(meta.get("budget", {})) or options.get("budget"),
    }
    for metric, limit in meta.get("limits", {}).items():
        if metric in meta.get("costs", {}):
            # A transfer may have another resolution and head: its own costs stand in the table of results.
            where = " in the search" if run.command == "transfer" else ""
            name = f"{METRIC_NAMES.get(metric, metric)} of the policy{where}"
            facts[name] = _cost_against(metric, meta["costs"][metric], limit)
    if run.result is not None:
        facts["time"] = duration(run.result["seconds"])
    elif epoch is not None:
        epochs = [e for seeds in run.stages.values() for epochs in seeds.values() for e in epochs]
        facts["state"] = f"not finished; last epoch: {epoch['stage']}, {epoch['epoch']} of {epoch['epochs']}"
        facts["time so far"] = duration(sum(e["seconds"] for e in epochs))
    facts["started"] = run.config.get("created")
    return {name: str(value) for name, value in facts.items() if value}


def _warnings(run: Run) -> list[str]:
    recoveries = Counter(event["stage"] for event in run.events if event["event"] == "recovery")
    warnings = [
        f"{stage}: training went back to an earlier step {times} time{'s' * (times > 1)}, see Events below."
        for stage, times in recoveries.items()
    ]
    for stage, seeds in run.stages.items():
        for bound, where in (("rho_min", "lower"), ("rho_max", "upper")):
            shares = [epochs[-1].get(f"share_at_{bound}", 0.0) for epochs in seeds.values()]
            if stuck := [share for share in shares if share > _STUCK_SHARE]:
                warnings.append(
                    f"{stage}: the radius ρ was on its {where} bound, {bound}, in {' and '.join(map(percent, stuck))} "
                    f"of the steps. It did not adapt but was in effect a constant."
                )
    if run.unreadable:
        warnings.append(
            f"Lines of metrics.jsonl that could not be read and are missing here: {run.unreadable}. A process that is "
            f"killed leaves its last line cut short."
        )
    return warnings


def _figures(run: Run, what: str, draw: Callable[[Seeds], "Figure"], key: str) -> dict[str, Drawing]:
    """A figure for every stage that logged `key`."""
    figures = {}
    for stage, seeds in run.stages.items():
        drawn = {seed: logged for seed, epochs in seeds.items() if (logged := [e for e in epochs if key in e])}
        if drawn:
            figures[stage] = Drawing(to_svg(draw(drawn), f"{what} {stage}"), f"{stage}: {what} by epoch.")
    return figures


def _mean_bits(run: Run) -> dict[str, float]:
    """Mean bits of weights and activations over the layers that are quantized."""
    if run.policy is None:
        return {}
    bits = {
        "weights": [bit_width(layer.weight_bits) for layer in run.policy.values() if layer.weight_bits is not None],
        "activations": [layer.act_bits for layer in run.policy.values() if layer.act_bits is not None],
    }
    return {kind: fmean(values) for kind, values in bits.items() if values}


def _cost_shares(shares: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, str]]:
    """By metric and by what is counted, the share of the budget."""
    names = {
        "expected": "expected at the end of the search",
        "most_likely": "likeliest candidates of all layers",
        "policy": "policy, solved within the budget",
    }
    metrics = list(dict.fromkeys(metric for by_metric in shares.values() for metric in by_metric))
    return {
        METRIC_NAMES.get(metric, metric): {
            label: percent(shares[key][metric]) for key, label in names.items() if metric in shares.get(key, {})
        }
        for metric in metrics
    }


def _budget(budget: Mapping[str, object]) -> str:
    return ", ".join(f"{METRIC_NAMES.get(name, name)} ≤ {amount}" for name, amount in budget.items())


def _cost_against(metric: str, cost: int, limit: int) -> str:
    show = (lambda bits: bytes_(bits / 8)) if metric == "size_bits" else count
    verdict = "within the budget" if cost <= limit else "over the budget"
    return f"{show(cost)} of {show(limit)} ({percent(cost / limit)}), {verdict}"


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


def _events(run: Run) -> list[str]:
    """What was out of the ordinary, in order; of the steps that were left out, the first of each stage."""
    skipped = Counter(event["stage"] for event in run.events if event["event"] == "skipped")
    lines, seen = [], set()
    for event in run.events:
        stage = event["stage"]
        text = f"{stage}, epoch {event['epoch']}, step {event['step']}: {event.get('what') or event.get('reason')}"
        if event["event"] != "skipped":
            lines.append(text)
        elif stage not in seen:
            seen.add(stage)
            lines.append(f"{text}. Steps of {stage} that were left out: {skipped[stage]}")
    return lines
