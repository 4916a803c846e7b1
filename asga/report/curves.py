"""Curves over the epochs of a stage; the seeds of a stage lie over each other."""

import itertools
import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from asga._extras import require
from asga.report.run import METRIC_NAMES, Epoch, Seeds
from asga.report.style import FIRST, LINES, MUTED, SECOND, SURFACE, new_figure, style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# By title: what is in the metrics, as `asga.optim.ASGA.diagnostics` names it.
_DIAGNOSTICS = {
    "radius ρ": "rho",
    "gap h": "h",
    "cosine of g0 and g1": "cosine",
    "curvature κ": "kappa",
    "sharpness σ": "sigma",
    "gradient norm ‖g0‖": "norm_g0",
}
# Beyond this ratio of largest to smallest value a linear axis shows little but the largest.
_LINEAR_RATIO = 20.0

_DASHES = ("-", "--", ":", "-.")

# Markers show where the values are, and a lone value at all. In a longer curve they touch, and each is 150 bytes.
_MOST_MARKERS = 30


def training_figure(seeds: Seeds) -> "Figure":
    """Loss and accuracy, in training and, where measured, on the validation images.

    Args:
        seeds: The epochs of each run of a stage.
    """
    with style():
        figure = new_figure(7.2, 2.4)
        loss, accuracy = figure.subplots(1, 2)
        for title, axes, train, val in (
            ("loss", loss, "loss", "val_loss"),
            ("top-1 accuracy", accuracy, "accuracy", "val_top1"),
        ):
            axes.set_title(title)
            _plot(axes, seeds, lambda epoch, key=train: epoch.get(key), FIRST, "training")
            _plot(axes, seeds, lambda epoch, key=val: epoch.get(key), SECOND, "validation")
            _scale(axes)
        accuracy.yaxis.set_major_formatter(require("matplotlib.ticker", "report").PercentFormatter(1.0))
        _legend(figure, loss, accuracy)
    return figure


def cost_figure(seeds: Seeds, shares: Mapping[str, Mapping[str, float]] | None = None) -> "Figure":
    """Expected cost of a search as a share of each limit, and what moves it: the multipliers and the temperature.

    Args:
        seeds: The epochs of each run of a search.
        shares: What the policy (``"policy"``) and the likeliest candidates (``"most_likely"``) cost, as shares of the
            limits, by metric.
    """
    metrics = list(dict.fromkeys(m for epochs in seeds.values() for epoch in epochs for m in epoch["expected_cost"]))
    last = max(epoch["epoch"] for epochs in seeds.values() for epoch in epochs)
    with style():
        figure = new_figure(7.2, 2.4)
        cost, multiplier, temperature = figure.subplots(1, 3)
        cost.axhline(1.0, color=MUTED, linestyle="--", linewidth=1.0, label="budget")
        for metric, color in zip(metrics, itertools.cycle(LINES), strict=False):
            label = METRIC_NAMES.get(metric, metric)
            _plot(cost, seeds, lambda epoch, key=metric: epoch["expected_cost"].get(key), color, label)
            _plot(multiplier, seeds, lambda epoch, key=metric: epoch.get("multiplier", {}).get(key), color, label)
            for key, filled in (("most_likely", False), ("policy", True)):
                if metric in (shares or {}).get(key, {}):
                    face = color if filled else SURFACE
                    cost.plot(last, shares[key][metric], "D", color=color, markerfacecolor=face, clip_on=False)
        for key, label, filled in (("most_likely", "likeliest candidates", False), ("policy", "policy", True)):
            if (shares or {}).get(key):
                face = MUTED if filled else SURFACE
                cost.plot([], [], "D", color=MUTED, markerfacecolor=face, label=label)
        cost.set_title("expected cost / budget")
        cost.yaxis.set_major_formatter(require("matplotlib.ticker", "report").PercentFormatter(1.0))
        multiplier.set_title("multiplier")
        temperature.set_title("temperature")
        _plot(temperature, seeds, lambda epoch: epoch.get("temperature"), MUTED, "_nolegend_")
        _legend(figure, cost)
    return figure


def diagnostics_figure(seeds: Seeds) -> "Figure":
    """What the ASGA step saw at the end of every epoch.

    Args:
        seeds: The epochs of each run of a stage.
    """
    with style():
        figure = new_figure(7.2, 3.8)
        for axes, (title, key) in zip(figure.subplots(2, 3).flat, _DIAGNOSTICS.items(), strict=True):
            axes.set_title(title)
            _plot(axes, seeds, lambda epoch, key=key: epoch.get(key), FIRST, title)
            _scale(axes)
    return figure


def comparison_figure(runs: Mapping[str, Seeds]) -> "Figure":
    """The same curves of several runs over each other; panels that no run has values for are left out.

    Args:
        runs: The epochs of a stage, by the name of the run.
    """
    values = {
        "training loss": lambda epoch: epoch.get("loss"),
        "training top-1": lambda epoch: epoch.get("accuracy"),
        "validation loss": lambda epoch: epoch.get("val_loss"),
        "validation top-1": lambda epoch: epoch.get("val_top1"),
        "expected cost / budget": lambda epoch: max(epoch.get("expected_cost", {}).values(), default=None),
        "radius ρ": lambda epoch: epoch.get("rho"),
    }
    logged = [epoch for seeds in runs.values() for epochs in seeds.values() for epoch in epochs]
    values = {title: value for title, value in values.items() if any(_is_number(value(epoch)) for epoch in logged)}
    with style():
        columns = min(3, max(1, len(values)))
        rows = -(-len(values) // columns)
        figure = new_figure(7.2, 0.4 + 2.0 * max(1, rows))
        panels = list(figure.subplots(max(1, rows), columns, squeeze=False).flat)
        for axes, (title, value) in zip(panels, values.items(), strict=False):
            axes.set_title(title)
            for i, (name, seeds) in enumerate(runs.items()):
                # Four colors; beyond them, other dashes.
                line = _DASHES[i // len(LINES) % len(_DASHES)]
                _plot(axes, seeds, value, LINES[i % len(LINES)], name, line)
            _scale(axes)
            if title.endswith(("top-1", "budget")):
                axes.yaxis.set_major_formatter(require("matplotlib.ticker", "report").PercentFormatter(1.0))
        for axes in panels[len(values) :]:
            axes.set_axis_off()
        _legend(figure, *figure.axes[: len(values)])
    return figure


def _plot(
    axes: "Axes",
    seeds: Seeds,
    value: Callable[[Epoch], float | None],
    color: str,
    label: str,
    line: str = "-",
) -> None:
    """A line per seed through the epochs that have a finite value; `label` is shown once."""
    for epochs in seeds.values():
        points = [(epoch["epoch"], v) for epoch in epochs if _is_number(v := value(epoch))]
        if points:
            marker = "." if len(points) <= _MOST_MARKERS else None
            axes.plot(*zip(*points, strict=True), color=color, linestyle=line, marker=marker, alpha=0.8, label=label)
            label = "_nolegend_"
    axes.xaxis.set_major_locator(require("matplotlib.ticker", "report").MaxNLocator(5, integer=True, min_n_ticks=1))
    axes.set_xlabel("epoch")


def _is_number(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _legend(figure: "Figure", *axes: "Axes") -> None:
    """One legend above the panels, where it hides no curve."""
    labeled = {label: line for a in axes for line, label in zip(*a.get_legend_handles_labels(), strict=True)}
    figure.legend(labeled.values(), labeled.keys(), loc="outside upper right", ncols=len(labeled))


def _scale(axes: "Axes") -> None:
    """A logarithmic axis where one value, such as the loss of a bad epoch, would flatten all the others."""
    values = [v for line in axes.get_lines() for v in line.get_ydata()]
    if values and min(values) > 0 and max(values) > _LINEAR_RATIO * min(values):
        ticker = require("matplotlib.ticker", "report")
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1.0, 2.0, 5.0), numticks=7))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_locator(ticker.NullLocator())
