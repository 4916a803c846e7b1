"""Templates, and how numbers are written on a page."""

from collections.abc import Mapping

from asga._extras import require
from asga.report.style import SHADES, css_variables


def render(template: str, content: Mapping[str, object]) -> str:
    """A page that needs nothing else.

    Args:
        template: The name of a file beside this one.
        content: What the template shows; text is escaped.

    Raises:
        ImportError: jinja2 is not installed.
    """
    jinja2 = require("jinja2", "report")
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("asga.report", ""),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": percent, "count": count, "bytes": bytes_, "duration": duration}
    colors = {"light": css_variables(0), "dark": css_variables(1), "shades": SHADES}
    return environment.get_template(template).render({"css": colors, **content})


def percent(share: float) -> str:
    """``0.941`` is ``94.1 %``."""
    return f"{share:.1%}".replace("%", " %")


def count(number: float) -> str:
    """``1500000`` is ``1.5 M``."""
    return require("matplotlib.ticker", "report").EngFormatter(places=1)(number)


def bytes_(number: float) -> str:
    """``1500000`` is ``1.5 MB``."""
    return require("matplotlib.ticker", "report").EngFormatter(unit="B", places=1)(number)


def duration(seconds: float) -> str:
    """``3725`` is ``1 h 2 min``."""
    minutes, seconds = divmod(round(seconds), 60)
    if minutes == 0:
        return f"{seconds} s"
    return f"{minutes} min {seconds} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
