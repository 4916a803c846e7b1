"""The bits of every layer as a figure."""

import io
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from asga._files import write_atomic
from asga.policy import MAX_BITS, Policy, WeightBits, bit_width
from asga.report.style import FIRST, INK, MUTED, SECOND, new_figure, style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# A row of 0.2 inches holds a line of 8 points with some air. From 2,000 layers on rows get thinner: at 150 dots per
# inch, matplotlib draws at most 65,535 of them (437 inches).
_ROW, _MOST_INCHES, _DPI = 0.2, 400.0, 150
_LONGEST_NAME = 44


def policy_figure(policy: Policy) -> "Figure":
    """Bits of the weight and of the input of every layer, from the first layer at the top to the last.

    A tensor that stays float is a pale bar across the whole width; a small float has a bar of its bits, and its name.
    The figure is as tall as the policy is long.

    Args:
        policy: Any number of layers.

    Returns:
        A figure that belongs to no backend: show it in a notebook, or save it with `save_policy_figure`.

    Raises:
        ImportError: matplotlib is not installed.
    """
    with style():
        figure, weight_axes, act_axes = layer_panels(list(policy))
        _bars(weight_axes, "weight bits", [layer.weight_bits for layer in policy.values()], FIRST)
        _bars(act_axes, "activation bits (input)", [layer.act_bits for layer in policy.values()], SECOND)
    return figure


def layer_panels(names: Sequence[str]) -> tuple["Figure", "Axes", "Axes"]:
    """A figure as tall as there are layers, with two panels side by side: at y = i is the layer ``names[i]``."""
    rows = len(names)
    figure = new_figure(7.2, 0.7 + min(_ROW * rows, _MOST_INCHES))
    left, right = figure.subplots(1, 2, sharey=True)
    left.set_ylim(rows - 0.4, -0.6)
    left.set_yticks(range(rows), [_shortened(name) for name in names], fontsize=8, color=INK)
    for label in left.get_yticklabels():
        label.set_parse_math(False)
    for axes in (left, right):
        axes.grid(axis="y", visible=False)
        axes.tick_params(length=0)
    return figure, left, right


def save_policy_figure(policy: Policy, path: str | os.PathLike) -> None:
    """Write `policy_figure` as a PNG file, atomically.

    Raises:
        ImportError: matplotlib is not installed.
    """
    save_png(policy_figure(policy), path)


def save_png(figure: "Figure", path: str | os.PathLike) -> None:
    """Write a figure of this package as a PNG file, atomically."""
    buffer = io.BytesIO()
    with style():
        figure.savefig(buffer, format="png", dpi=_DPI)
    write_atomic(path, buffer.getvalue())


def _bars(axes: "Axes", title: str, bits: list[WeightBits | None], color: str) -> None:
    lengths = [min(bit_width(b), MAX_BITS) for b in bits]
    bars = axes.barh(range(len(bits)), lengths, height=0.7, color=color)
    for bar, b in zip(bars, bits, strict=True):
        if b is None:
            bar.set_alpha(0.2)
    axes.bar_label(bars, ["float" if b is None else str(b) for b in bits], padding=3, fontsize=8, color=MUTED)
    axes.set_title(title)
    axes.set_xlim(0, MAX_BITS + 1)
    axes.set_xticks(range(0, MAX_BITS + 1, 2))


def _shortened(name: str) -> str:
    """The end of a long name: its beginning is the same for many layers."""
    return name if len(name) <= _LONGEST_NAME else "…" + name[-_LONGEST_NAME + 1 :]
