"""Colors of the figures, and figures as SVG that follows the reader's light or dark mode."""

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from asga._extras import require

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# By CSS variable: in light mode and PNG files, and in dark mode. Blue and vermilion are of the palette of Okabe and Ito
# (Wong, "Points of view: Color blindness", Nature Methods 2011); in dark mode its sky blue and orange stand out better.
COLORS = {
    "surface": ("#ffffff", "#16191d"),
    "ink": ("#1c2126", "#e4e7ea"),
    "muted": ("#5f6871", "#a0a8b0"),
    "line": ("#d5dae0", "#363c44"),
    "first": ("#0072b2", "#56b4e9"),
    "second": ("#d55e00", "#e69f00"),
}
SURFACE, INK, MUTED, LINE, FIRST, SECOND = (light for light, _ in COLORS.values())

_SETTINGS = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],  # comes with matplotlib, so that figures are the same everywhere
    "font.size": 9.0,
    "figure.facecolor": SURFACE,
    "savefig.facecolor": SURFACE,
    "axes.facecolor": SURFACE,
    "axes.edgecolor": LINE,
    "axes.labelcolor": MUTED,
    "axes.titlecolor": INK,
    "axes.titlesize": 10.0,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": LINE,
    "grid.linewidth": 0.6,
    "text.color": INK,
    "text.parse_math": False,  # names come from outside: a dollar sign is a dollar sign
    "xtick.color": LINE,
    "ytick.color": LINE,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "lines.linewidth": 1.4,
    "lines.markersize": 4.0,
    "legend.frameon": False,
}


@contextmanager
def style() -> Iterator[None]:
    """Matplotlib's settings for the figures of this package; those of the user come back afterwards.

    Raises:
        ImportError: matplotlib is not installed.
    """
    with require("matplotlib", "report").rc_context(_SETTINGS):
        yield


def new_figure(width: float, height: float) -> "Figure":
    """An empty figure that belongs to no backend and no window; `width` and `height` are in inches."""
    return require("matplotlib.figure", "report").Figure(figsize=(width, height), layout="constrained")


def to_svg(figure: "Figure", name: str) -> str:
    """The figure as an SVG element for an HTML page that defines `COLORS` as CSS variables.

    Args:
        figure: Drawn in the light colors.
        name: Different for each figure of a page: references within the SVG are derived from it.
    """
    buffer = io.StringIO()
    with style(), require("matplotlib", "report").rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(buffer, format="svg", metadata=no_metadata)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    for variable, (light, _) in COLORS.items():
        svg = svg.replace(f": {light}", f": var(--{variable})")
    # Only ids that something refers to: the others are the same in every figure and would clash on one page.
    used = set(re.findall(r"#([\w-]+)", svg))
    return re.sub(r' id="([^"]*)"', lambda match: match[0] if match[1] in used else "", svg)
