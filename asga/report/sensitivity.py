"""What every candidate of every layer is estimated to cost in loss, as a figure."""

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING

from asga._extras import require
from asga.policy import Policy
from asga.report.policy import layer_panels, save_png
from asga.report.run import TENSORS
from asga.report.style import ALERT, FIRST, LINE, MUTED, SECOND, new_figure, style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

# By layer and tensor (``"weight"``, ``"act"``) the increase of the loss by candidate.
Sensitivities = Mapping[str, Mapping[str, Mapping[str, float]]]


def sensitivity_figure(sensitivities: Sensitivities, policy: Policy | None = None) -> "Figure":
    """A row for each layer: every candidate, written as its bits, at the increase of the loss that it causes.

    Args:
        sensitivities: Of the tensors that were searched. Increases that are not positive are left out: the axis is
            logarithmic.
        policy: Its choices are in color.
    """
    with style():
        figure, *panels = layer_panels(list(sensitivities))
        for axes, (kind, title), color in zip(panels, TENSORS.items(), (FIRST, ALERT), strict=True):
            axes.set_title(title)
            if not any(kind in kinds for kinds in sensitivities.values()):
                _not_searched(axes)
                continue
            axes.set_xscale("log")
            for row, (name, kinds) in enumerate(sensitivities.items()):
                chosen = None if policy is None else str(getattr(policy[name], f"{kind}_bits"))
                _row(axes, row, kinds.get(kind, {}), chosen, color)
            axes.set_xlabel("increase of the loss")
            _plain(axes.xaxis)
    return figure


def save_sensitivity_figure(
    sensitivities: Sensitivities, path: str | os.PathLike, policy: Policy | None = None
) -> None:
    """Write `sensitivity_figure` as a PNG file, atomically."""
    save_png(sensitivity_figure(sensitivities, policy), path)


def correlation_figure(proxy: Sensitivities, target: Sensitivities) -> "Figure":
    """Every candidate of every layer: its sensitivity on the target against that on the proxy, pale with few bits.

    Args:
        proxy: Sensitivities there.
        target: Of the same tensors.
    """
    with style():
        figure = new_figure(7.2, 3.2)
        for axes, (kind, title), color in zip(figure.subplots(1, 2), TENSORS.items(), (FIRST, SECOND), strict=True):
            axes.set_title(title)
            if not any(kind in kinds for kinds in target.values()):
                _not_searched(axes)
                continue
            points: dict[str, list[tuple[float, float]]] = {}
            for name, kinds in target.items():
                for bits, value in kinds.get(kind, {}).items():
                    points.setdefault(bits, []).append((proxy[name][kind][bits], value))
            for k, (bits, pairs) in enumerate(points.items()):
                shown = [pair for pair in pairs if min(pair) > 0]
                if shown:
                    alpha = 1 - 0.75 * k / max(1, len(points) - 1)
                    axes.plot(*zip(*shown, strict=True), ".", color=color, alpha=alpha, markersize=6, label=bits)
            axes.set_xscale("log")
            axes.set_yscale("log")
            _plain(axes.xaxis)
            _plain(axes.yaxis)
            axes.set_xlabel("on the proxy")
            axes.set_ylabel("on the target")
            if axes.get_lines():
                axes.legend(title="bits", fontsize=8)
    return figure


def _not_searched(axes: "Axes") -> None:
    """In place of an axis that nothing would lie on."""
    axes.set_axis_off()
    axes.text(0.5, 0.5, "not searched", transform=axes.transAxes, ha="center", va="center", color=MUTED)


def _plain(axis: "Axis") -> None:
    """Powers of ten as numbers, and not too many: mathematics is switched off in texts."""
    ticker = require("matplotlib.ticker", "report")
    axis.set_major_locator(ticker.LogLocator(numticks=5))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_locator(ticker.NullLocator())


def _row(axes: "Axes", row: int, increases: Mapping[str, float], chosen: str | None, color: str) -> None:
    shown = {bits: value for bits, value in increases.items() if value > 0}
    if not shown:
        return
    axes.plot([min(shown.values()), max(shown.values())], [row, row], color=LINE, linewidth=0.8)
    for bits, value in shown.items():
        look = {"color": color, "fontweight": "bold"} if bits == chosen else {"color": MUTED}
        axes.text(value, row, bits, fontsize=8, ha="center", va="center", **look)
