import itertools

import matplotlib
import pytest
from PIL import Image

from asga.policy import LayerPolicy, Policy
from asga.report import policy as policy_module
from asga.report import policy_figure, save_policy_figure


def _long_policy(layers: int) -> Policy:
    return Policy({f"model.encoder.block.{i}.attention.projection.inner": LayerPolicy(4, 8) for i in range(layers)})


def test_both_panels_show_every_layer_in_order(policy):
    weight, act = policy_figure(policy).axes
    assert [label.get_text() for label in weight.get_yticklabels()] == list(policy)
    assert [bar.get_width() for bar in weight.patches] == [8, 2, 8]
    assert [bar.get_width() for bar in act.patches] == [8, 4, 8]
    assert [text.get_text() for text in weight.texts] == ["8", "2", "float"]
    assert weight.get_ylim()[0] > weight.get_ylim()[1]  # the first layer is at the top


def test_small_floats_have_a_bar_of_their_bits_and_their_name():
    weight = policy_figure(Policy({"a": LayerPolicy("fp4", 8), "b": LayerPolicy("fp8", None)})).axes[0]
    assert [bar.get_width() for bar in weight.patches] == [4, 8]
    assert [text.get_text() for text in weight.texts] == ["fp4", "fp8"]
    assert all(bar.get_alpha() is None for bar in weight.patches)


def test_float_is_told_from_eight_bits(policy):
    pinned, _, unquantized = policy_figure(policy).axes[0].patches
    assert pinned.get_alpha() is None
    assert unquantized.get_alpha() < 0.5


@pytest.mark.parametrize("layers", [1, 20, 60])
def test_rows_do_not_overlap(layers):
    figure = policy_figure(_long_policy(layers))
    figure.draw_without_rendering()
    boxes = [label.get_window_extent() for label in figure.axes[0].get_yticklabels()]
    assert len(boxes) == layers
    assert all(upper.y0 >= lower.y1 for upper, lower in itertools.pairwise(boxes))
    assert boxes[0].x0 >= 0


def test_a_very_long_policy_stays_within_what_can_be_drawn(monkeypatch):
    dots = (policy_module._MOST_INCHES + 1) * policy_module._DPI
    assert dots < 2**16  # matplotlib's limit
    monkeypatch.setattr(policy_module, "_MOST_INCHES", 5.0)  # as if 60 layers were thousands
    assert policy_figure(_long_policy(60)).get_figheight() < 6.0


def test_dollar_signs_are_not_mathematics(tmp_path):
    policy = Policy({r"a$\frac$": LayerPolicy(4, 4)})
    save_policy_figure(policy, tmp_path / "policy.png")  # would raise: \frac without arguments


def test_png_is_written_and_replaced(policy, tmp_path):
    path = tmp_path / "policy.png"
    path.write_bytes(b"old")
    save_policy_figure(policy, path)
    with Image.open(path) as image:
        assert image.format == "PNG"
        assert image.width == 1080  # 7.2 inches at 150 dots
    assert list(tmp_path.iterdir()) == [path]


def test_settings_of_the_user_stay(policy, tmp_path):
    with matplotlib.rc_context({"font.size": 31.0}):
        before = dict(matplotlib.rcParams)
        save_policy_figure(policy, tmp_path / "policy.png")
        assert dict(matplotlib.rcParams) == before


def test_import_is_lazy_and_no_backend_is_chosen(run_python, tmp_path):
    code = """
import sys
from asga.policy import LayerPolicy, Policy
from asga.report import save_policy_figure
print("matplotlib" in sys.modules, "jinja2" in sys.modules)
save_policy_figure(Policy({"conv": LayerPolicy(2, 4)}), "policy.png")
print("matplotlib.pyplot" in sys.modules)
"""
    assert run_python(code, cwd=tmp_path).split() == ["False", "False", "False"]
