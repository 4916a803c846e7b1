from PIL import Image

from asga.report.sensitivity import correlation_figure, save_sensitivity_figure, sensitivity_figure
from asga.report.style import to_svg

FOUND = {
    "layer1.0.conv1": {"weight": {"2": 0.1, "4": 0.01}, "act": {"2": 0.2, "4": 0.0}},
    "fc": {"weight": {"2": 0.3, "4": 0.02}},
}


def _texts(axes) -> list[tuple[str, float, float]]:
    return [(text.get_text(), *text.get_position()) for text in axes.texts]


class TestSensitivityFigure:
    def test_candidates_stand_at_their_increase(self, policy):
        weight, act = sensitivity_figure(FOUND, policy).axes
        assert _texts(weight) == [("2", 0.1, 0), ("4", 0.01, 0), ("2", 0.3, 1), ("4", 0.02, 1)]
        assert _texts(act) == [("2", 0.2, 0)]  # zero has no place on a logarithmic axis
        assert [label.get_text() for label in weight.get_yticklabels()] == list(FOUND)

    def test_what_was_not_searched_has_no_axis(self):
        weights = {name: {"weight": kinds["weight"]} for name, kinds in FOUND.items()}
        for figure in (sensitivity_figure(weights), correlation_figure(weights, weights)):
            weight, act = figure.axes
            assert (weight.axison, act.axison) == (True, False)
            assert [text.get_text() for text in act.texts] == ["not searched"]

    def test_the_choice_stands_out(self, policy):
        weight, _ = sensitivity_figure(FOUND, policy).axes
        assert [text.get_fontweight() for text in weight.texts] == ["bold", "normal", "normal", "normal"]

    def test_without_a_policy(self):
        assert all(text.get_fontweight() == "normal" for text in sensitivity_figure(FOUND).axes[0].texts)

    def test_powers_of_ten_are_numbers(self):
        """Mathematics is switched off: it would be shown as it is written."""
        assert "mathdefault" not in to_svg(sensitivity_figure(FOUND), "sensitivity")

    def test_png(self, policy, tmp_path):
        save_sensitivity_figure(FOUND, tmp_path / "sensitivity.png", policy)
        with Image.open(tmp_path / "sensitivity.png") as image:
            assert image.format == "PNG"


class TestCorrelationFigure:
    def test_target_over_proxy_for_every_candidate(self):
        proxy = {
            "layer1.0.conv1": {"weight": {"2": 1.0, "4": 0.5}, "act": {"2": 0.2, "4": 0.0}},
            "fc": {"weight": {"2": 3.0, "4": 0.25}},
        }
        weight, act = correlation_figure(proxy, FOUND).axes
        assert [list(zip(*line.get_data(), strict=True)) for line in weight.get_lines()] == [
            [(1.0, 0.1), (3.0, 0.3)],
            [(0.5, 0.01), (0.25, 0.02)],
        ]
        assert [line.get_label() for line in weight.get_lines()] == ["2", "4"]
        assert [line.get_label() for line in act.get_lines()] == ["2"]

    def test_without_any_positive_value(self):
        zero = {"fc": {"weight": {"2": 0.0}, "act": {}}}
        assert "svg" in to_svg(correlation_figure(zero, zero), "correlation")
