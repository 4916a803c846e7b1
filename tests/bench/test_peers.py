"""Implementations are checked against the reference before they are timed, and the check notices what is wrong."""

import sys

import pytest
import torch

from asga.bench import peers
from asga.bench.inputs import make_inputs
from asga.bench.shapes import MIXED_BITS, Case

CASES = [
    Case("test", kind, (6, 4, 3, 3), bits, dtype)
    for kind in ("act", "weight")
    for bits in ((4,), MIXED_BITS)
    for dtype in (torch.float32, torch.bfloat16)
]
OPTIONS = [
    Case("test", kind, (6, 4, 3, 3), bits, dtype, **options)
    for kind, options in (
        ("act", {"offset": True}),
        ("weight", {"offset": True}),
        ("act", {"channels_last": True}),
        ("weight", {"channels_last": True, "offset": True}),
        ("weight", {"group_size": 3}),
        ("weight", {"group_size": 3, "offset": True}),
    )
    for bits in ((4,), MIXED_BITS)
    for dtype in (torch.float32, torch.bfloat16)
]
SINGLE = next(case for case in CASES if case.kind == "weight" and case.dtype == torch.float32)
MIXTURE = next(case for case in CASES if case.kind == "weight" and case.bits == MIXED_BITS)


@pytest.mark.parametrize("case", CASES + OPTIONS, ids=lambda case: case.name)
def test_all_that_come_with_torch_agree_with_the_reference(case):
    found, left_out = peers.build_all(make_inputs(case, "cpu"), compiled=False)
    expected = ["asga", "eager LSQ", "torch fake_quantize", "torch learnable"]
    if len(case.bits) > 1:
        expected.remove("torch fake_quantize")
    assert [contestant.name for contestant in found if contestant.name in expected] == expected
    # The others are optional, but those that are installed must do the same work.
    assert all(reason == "not installed" for reason in left_out.values())


@pytest.mark.parametrize("case", [SINGLE, OPTIONS[-2]], ids=lambda case: case.name)
def test_the_compiled_formula_agrees_with_the_reference(case):
    inputs = make_inputs(case, "cpu")
    contestant = peers.build("torch.compile", inputs)
    assert len(contestant.backward(contestant.forward())) == len(inputs.differentiable)


def test_only_a_fixed_scale_is_less_work():
    found, _ = peers.build_all(make_inputs(SINGLE, "cpu"), compiled=False)
    assert [contestant.name for contestant in found if contestant.less_work] == ["torch fake_quantize"]
    assert [contestant.name for contestant in found if not contestant.is_peer] == ["asga"]


def test_a_peer_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "brevitas.core.quant.int_base", None)
    found, left_out = peers.build_all(make_inputs(SINGLE, "cpu"), compiled=False)
    assert left_out["brevitas"] == "not installed"
    assert "brevitas" not in [contestant.name for contestant in found]


class _Wrong:
    """Quantizers with one mistake each."""

    @staticmethod
    def half_a_step_off(x, scale, low, high, zero_point=None):
        return _lsq(x, scale, low, high) + 0.5 * scale.detach().reshape(-1, 1, 1, 1)

    @staticmethod
    def range_too_wide(x, scale, low, high, zero_point=None):
        return _lsq(x, scale, low - 1, high + 1)

    @staticmethod
    def gradient_where_clamped(x, scale, low, high, zero_point=None):
        return _lsq(x, scale, low, high) + 0.01 * (x - x.detach())

    @staticmethod
    def gradient_of_scale_one_percent_large(x, scale, low, high, zero_point=None):
        return _lsq(x, scale.detach() + 1.01 * (scale - scale.detach()), low, high)


def _lsq(x, scale, low, high, zero_point=None):
    scale = scale.reshape(-1, 1, 1, 1)
    steps = torch.clamp(x / scale, low, high)
    return (steps + (torch.round(steps) - steps).detach()) * scale


MISTAKES = {
    "half_a_step_off": "output",
    "range_too_wide": "output",
    "gradient_where_clamped": "gradient of the input",
    "gradient_of_scale_one_percent_large": "gradient of the scales",
}


@pytest.mark.parametrize(("mistake", "what"), MISTAKES.items(), ids=MISTAKES)
@pytest.mark.parametrize("case", [SINGLE, MIXTURE], ids=lambda case: case.name)
def test_a_peer_that_computes_something_else_is_left_out(monkeypatch, case, mistake, what):
    def wrong(name, inputs):
        return peers._peer(name, inputs, quantizer=lambda inputs: getattr(_Wrong, mistake))

    monkeypatch.setitem(peers._BUILDERS, "eager LSQ", wrong)
    found, left_out = peers.build_all(make_inputs(case, "cpu"), compiled=False)
    assert left_out["eager LSQ"].startswith(f"UnequalResultsError: {what} differs")
    assert "eager LSQ" not in [contestant.name for contestant in found]


@pytest.mark.parametrize("case", OPTIONS[4:8] + OPTIONS[-4:], ids=lambda case: case.name)
def test_a_zero_point_that_learns_something_else_is_noticed(monkeypatch, case):
    def double_gradient(x, scale, low, high, zero_point):
        return peers.lsq(x, scale, low, high, 2 * zero_point - zero_point.detach())

    def wrong(name, inputs):
        shape = peers._channel_shape(inputs)

        def quantize(x, scale, low, high, zero_point):
            return double_gradient(x.float(), scale.reshape(shape), low, high, zero_point.reshape(shape)).to(x.dtype)

        return peers._peer(name, inputs, quantizer=lambda inputs: quantize)

    monkeypatch.setitem(peers._BUILDERS, "eager LSQ", wrong)
    _, left_out = peers.build_all(make_inputs(case, "cpu"), compiled=False)
    assert left_out["eager LSQ"].startswith("UnequalResultsError: gradient of the zero points differs")


def test_asga_itself_must_agree(monkeypatch):
    def wrong(name, inputs):
        return peers._peer(name, inputs, quantizer=lambda inputs: _Wrong.range_too_wide)

    monkeypatch.setitem(peers._BUILDERS, "asga", wrong)
    with pytest.raises(peers.UnequalResultsError, match="output differs"):
        peers.build_all(make_inputs(SINGLE, "cpu"), compiled=False)
