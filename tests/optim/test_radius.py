import math

import pytest
import torch

from asga.optim.radius import Radius

CPU = torch.device("cpu")
YES, NO = torch.tensor(True), torch.tensor(False)


def gap(value):
    return torch.tensor(value, dtype=torch.float64)


@pytest.mark.parametrize(
    ("h", "expected"),
    [
        pytest.param(0.1, math.log(1.1), id="between the bounds"),
        pytest.param(10.0, 0.5, id="large h: rho_max"),
        pytest.param(1e-9, 0.01, id="small h: rho_min"),
        pytest.param(0.0, 0.01, id="h = 0: rho_min"),
        pytest.param(-0.9, 0.01, id="negative h: rho_min"),
        pytest.param(-5.0, 0.01, id="h below -1, outside the logarithm: rho_min"),
    ],
)
def test_adaptive_radius_is_the_clamped_logarithm(h, expected):
    radius = Radius(0.01, 0.5, adaptive=True, device=CPU)
    radius.update(gap(h), YES)
    assert radius.rho.item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("h", [math.nan, math.inf, -math.inf])
def test_non_finite_gap_keeps_the_radius_and_is_not_counted(h):
    radius = Radius(0.01, 0.5, adaptive=True, device=CPU)
    before = radius.rho.clone()
    radius.update(gap(h), YES)
    assert torch.equal(radius.rho, before)
    assert radius.updates == 0


def test_invalid_step_keeps_the_radius():
    radius = Radius(0.01, 0.5, adaptive=True, device=CPU)
    before = radius.rho.clone()
    radius.update(gap(0.2), NO)
    assert torch.equal(radius.rho, before)


def test_starts_at_the_geometric_mean_of_the_bounds():
    assert Radius(0.01, 0.49, adaptive=True, device=CPU).rho.item() == pytest.approx(0.07, rel=1e-12)


def test_constant_radius_stays_at_rho_max():
    radius = Radius(0.01, 0.5, adaptive=False, device=CPU)
    radius.update(gap(0.2), YES)
    assert radius.rho == 0.5
    assert radius.updates == 0


def test_a_collapsing_radius_stays_at_rho_min():
    """h = rho ||g|| with ||g|| = 0.5: the bare rule reaches exactly 0, the bounded one stops."""
    bare, radius = 0.05, Radius(0.01, 0.5, adaptive=True, device=CPU)
    for _ in range(1500):
        bare = math.log1p(0.5 * bare)
        radius.update(0.5 * radius.rho, YES)
    assert bare == 0.0
    assert radius.rho == 0.01
    assert radius.at_rho_min > 1400
    assert radius.at_rho_max == 0


def test_state_is_updated_in_place():
    radius = Radius(0.01, 0.5, adaptive=True, device=CPU)
    pointers = {name: value.data_ptr() for name, value in radius.state().items()}
    radius.update(gap(0.2), YES)
    assert {name: value.data_ptr() for name, value in radius.state().items()} == pointers
