import re

import pytest

from asga.report.style import COLORS, css_variables


def _luminance(color: str) -> float:
    """Relative luminance, as WCAG 2.2 defines it."""
    channels = (int(color[i : i + 2], 16) / 255 for i in (1, 3, 5))
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def _contrast(first: str, second: str) -> float:
    high, low = sorted((_luminance(first), _luminance(second)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("mode", [0, 1], ids=["light", "dark"])
class TestColors:
    def test_text_and_lines_can_be_read(self, mode):
        """WCAG 2.2, 1.4.3 and 1.4.11: 4.5 to 1 for text, 3 to 1 for what a figure is made of."""
        surface = COLORS["surface"][mode]
        for name in ("ink", "muted", "alert", "first"):
            assert _contrast(COLORS[name][mode], surface) >= 4.5, name
        for name in ("second", "third", "fourth"):
            assert _contrast(COLORS[name][mode], surface) >= 3, name

    def test_shades_go_from_the_surface_to_the_first_color(self, mode):
        found = dict(re.findall(r"--(\w+): (#\w{6});", css_variables(mode)))
        assert found.keys() == {*COLORS, *(f"shade{i}" for i in range(8))}
        assert found["shade7"] == found["first"] == COLORS["first"][mode]
        contrasts = [_contrast(found[f"shade{i}"], found["surface"]) for i in range(8)]
        assert contrasts == sorted(contrasts)
        assert contrasts[0] > 1.1
