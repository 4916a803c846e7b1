import math

import pytest

from asga.report.curves import comparison_figure, cost_figure, diagnostics_figure, training_figure
from asga.report.style import to_svg


def _epochs(**values: list[object]) -> list[dict[str, object]]:
    """Epochs 1, 2, ... with the given values; None leaves a value out."""
    rows = zip(*values.values(), strict=True)
    return [
        {"epoch": i, **{k: v for k, v in zip(values, row, strict=True) if v is not None}}
        for i, row in enumerate(rows, 1)
    ]


def _points(line) -> list[tuple[float, float]]:
    return list(zip(*line.get_data(), strict=True))


def test_training_and_validation_are_drawn_where_measured():
    epochs = _epochs(loss=[2.0, 1.0], accuracy=[0.3, 0.6], val_loss=[None, 1.5], val_top1=[None, 0.5])
    loss, accuracy = training_figure({"": epochs}).axes
    assert [_points(line) for line in loss.get_lines()] == [[(1, 2.0), (2, 1.0)], [(2, 1.5)]]
    assert [_points(line) for line in accuracy.get_lines()] == [[(1, 0.3), (2, 0.6)], [(2, 0.5)]]


def test_seeds_share_color_and_legend():
    epochs = _epochs(loss=[2.0, 1.0], accuracy=[0.3, 0.6])
    figure = training_figure({"seed0": epochs, "seed1": epochs})
    lines = figure.axes[0].get_lines()
    assert len(lines) == 2
    assert lines[0].get_color() == lines[1].get_color()
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["training"]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_are_left_out(value):
    loss, _ = training_figure({"": _epochs(loss=[2.0, value, 1.0], accuracy=[0.1, 0.2, 0.3])}).axes
    assert _points(loss.get_lines()[0]) == [(1, 2.0), (3, 1.0)]


def test_a_stage_without_any_finite_value_can_be_drawn():
    figure = training_figure({"": _epochs(loss=[math.nan])})
    assert "svg" in to_svg(figure, "loss")


@pytest.mark.parametrize(
    ("values", "scale"),
    [([2.0, 1.0], "linear"), ([52.0, 1.0], "log"), ([52.0, -1.0], "linear"), ([52.0, 0.0], "linear")],
    ids=["close", "far-apart", "negative", "zero"],
)
def test_axis_is_logarithmic_where_one_value_would_hide_the_others(values, scale):
    loss, _ = training_figure({"": _epochs(loss=values, accuracy=[0.1, 0.2])}).axes
    assert loss.get_yscale() == scale


def test_expected_costs_stand_against_the_budget():
    epochs = _epochs(
        expected_cost=[{"bitops": 1.2, "size_bits": 0.9}, {"bitops": 1.0, "size_bits": 0.8}],
        multiplier=[{"bitops": 0.1, "size_bits": 0.0}, {"bitops": 0.2, "size_bits": 0.0}],
    )
    figure = cost_figure({"": epochs})
    budget, bitops, size = figure.axes[0].get_lines()
    assert [axes.get_title("left") for axes in figure.axes] == ["expected cost / budget", "multiplier", "temperature"]
    assert list(budget.get_ydata()) == [1.0, 1.0]
    assert _points(bitops) == [(1, 1.2), (2, 1.0)]
    assert _points(size) == [(1, 0.9), (2, 0.8)]
    assert _points(figure.axes[1].get_lines()[0]) == [(1, 0.1), (2, 0.2)]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["budget", "BitOps", "size"]


def test_policy_and_likeliest_candidates_stand_at_the_end():
    epochs = _epochs(expected_cost=[{"bitops": 1.2}, {"bitops": 1.0}], temperature=[1.0, 0.2])
    figure = cost_figure({"": epochs}, {"most_likely": {"bitops": 1.07}, "policy": {"bitops": 0.99}})
    likely, policy = figure.axes[0].get_lines()[2:4]
    assert (_points(likely), _points(policy)) == ([(2, 1.07)], [(2, 0.99)])
    assert likely.get_markerfacecolor() != policy.get_markerfacecolor()
    assert _points(figure.axes[2].get_lines()[0]) == [(1, 1.0), (2, 0.2)]
    shown = [text.get_text() for text in figure.legends[0].get_texts()]
    assert shown == ["budget", "BitOps", "likeliest candidates", "policy"]


def test_diagnostics_need_not_be_complete():
    panels = diagnostics_figure({"": _epochs(rho=[0.1, 0.2], cosine=[None, 0.9])}).axes
    drawn = {axes.get_title("left"): [_points(line) for line in axes.get_lines()] for axes in panels}
    assert drawn["radius ρ"] == [[(1, 0.1), (2, 0.2)]]
    assert drawn["cosine of g0 and g1"] == [[(2, 0.9)]]
    assert drawn["gap h"] == []


def test_runs_lie_over_each_other_in_their_own_colors():
    first = {"": _epochs(loss=[2.0, 1.0], val_loss=[None, 1.5])}
    second = {f"seed{i}": _epochs(loss=[3.0, 2.0], expected_cost=[{"bitops": 1.2, "size": 1.4}] * 2) for i in (0, 1)}
    figure = comparison_figure({"first": first, "second": second})
    panels = {axes.get_title("left"): axes.get_lines() for axes in figure.axes if axes.axison}
    assert list(panels) == ["training loss", "validation loss", "expected cost / budget"]
    assert [_points(line) for line in panels["training loss"]] == [
        *([(1, 2.0), (2, 1.0)], [(1, 3.0), (2, 2.0)], [(1, 3.0), (2, 2.0)])
    ]
    assert [_points(line) for line in panels["expected cost / budget"]] == [[(1, 1.4), (2, 1.4)]] * 2  # the largest
    colors = [line.get_color() for line in panels["training loss"]]
    assert colors[0] != colors[1] == colors[2]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["first", "second"]


def test_panels_without_values_are_not_drawn():
    epochs = _epochs(loss=[2.0, 1.0], accuracy=[0.1, 0.2], val_loss=[2.0, 1.0], rho=[0.1, 0.2])
    panels = comparison_figure({"first": {"": epochs}, "second": {"": epochs}}).axes
    assert [axes.axison for axes in panels] == [True] * 4 + [False] * 2


def test_many_runs_can_be_told_apart():
    figure = comparison_figure({f"run{i}": {"": _epochs(loss=[1.0, i])} for i in range(16)})
    assert len({(line.get_color(), line.get_linestyle()) for line in figure.axes[0].get_lines()}) == 16


def test_runs_without_any_value_can_be_drawn():
    assert "svg" in to_svg(comparison_figure({"a": {"": _epochs(loss=[math.nan])}, "b": {"": []}}), "compare")
