"""Colors of the figures, and figures as SVG that follows the reader's light or dark mode."""

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from asga._extras import require

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# By CSS variable: in light mode and PNG files, and in dark mode. Blue, vermilion and green are of the palette of Okabe
# and Ito (Wong, "Points of view: Color blindness", Nature Methods 2011), the fourth is its purple, darker; in dark mode
# its sky blue and orange stand out better, and paler green and purple.
COLORS = {
    "surface": ("#ffffff", "#16191d"),
    "ink": ("#1c2126", "#e4e7ea"),
    "muted": ("#5f6871", "#a0a8b0"),
    "line": ("#d5dae0", "#363c44"),
    "first": ("#0072b2", "#56b4e9"),
    "second": ("#d55e00", "#e69f00"),
    "third": ("#009e73", "#35d0a3"),
    "fourth": ("#a8478a", "#e3a0cc"),
    "alert": ("#b34700", "#e69f00"),  # the second, dark enough for text
}
SURFACE, INK, MUTED, LINE, FIRST, SECOND, THIRD, FOURTH, ALERT = (light for light, _ in COLORS.values())
LINES = (FIRST, SECOND, THIRD, FOURTH)
# For what has an order, such as the candidates of a tensor: from pale to the first color, light and dark.
SHADES = 8

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


@dataclass(frozen=True)
class Drawing:
    """An SVG element and what it shows, for those who do not see it."""

    svg: str
    description: str


def css_variables(mode: int) -> str:
    """All colors as declarations of CSS variables, those of `SHADES` named ``shade0`` to ``shade7``.

    Args:
        mode: 0 for light, 1 for dark.
    """
    variables = {name: pair[mode] for name, pair in COLORS.items()}
    pale, full = _rgb(COLORS["surface"][mode]), _rgb(COLORS["first"][mode])
    for i in range(SHADES):
        # The palest is still told from the surface.
        share = 0.12 + 0.88 * i / (SHADES - 1)
        mixed = (round(a + share * (b - a)) for a, b in zip(pale, full, strict=True))
        variables[f"shade{i}"] = "#" + "".join(f"{value:02x}" for value in mixed)
    return " ".join(f"--{name}: {color};" for name, color in variables.items())


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


def _rgb(color: str) -> tuple[int, int, int]:
    return int(color[1:3], 16), int(color[3:5], 16), int(color[5:7], 16)
