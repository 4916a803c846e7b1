import math

import pytest
import torch

from asga.optim.radius import Radius

CPU = torch.device("cpu")


def adaptive(rho_min, rho_max):
    return Radius(rho_min, rho_max, rule="adaptive", device=CPU)


def update(radius, gap, valid=True):
    """The end of a step that saw the gap."""
    scalar = torch.ones((), dtype=torch.float64)
    gap = torch.as_tensor(gap, dtype=torch.float64)
    # A loss of 0 and one that is the gap; a step is made invalid by its q0, so that the gap may be anything.
    losses = torch.stack([torch.zeros_like(gap), gap])
    q0 = scalar if valid else scalar * math.nan
    torch.ops.asga.sam_coefficients(
        *(q0, scalar, None, losses, None, None, radius.rho, radius.counts),
        *(0, 0.0, None, radius.follows_gap, radius.rho_min, radius.rho_max),
    )


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
    radius = adaptive(0.01, 0.5)
    update(radius, h)
    assert radius.rho.item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("h", [math.nan, math.inf, -math.inf])
def test_non_finite_gap_keeps_the_radius_and_is_not_counted(h):
    radius = adaptive(0.01, 0.5)
    before = radius.rho.clone()
    update(radius, h)
    assert torch.equal(radius.rho, before)
    assert radius.count("updates") == 0


def test_invalid_step_keeps_the_radius():
    radius = adaptive(0.01, 0.5)
    before = radius.rho.clone()
    update(radius, 0.2, valid=False)
    assert torch.equal(radius.rho, before)


def test_starts_at_the_geometric_mean_of_the_bounds():
    assert adaptive(0.01, 0.49).rho.item() == pytest.approx(0.07, rel=1e-12)


def test_constant_radius_stays_at_rho_max():
    radius = Radius(0.01, 0.5, rule="constant", device=CPU)
    update(radius, 0.2)
    assert radius.rho == 0.5
    assert radius.count("updates") == 0


def test_a_collapsing_radius_stays_at_rho_min():
    """h = rho ||g|| with ||g|| = 0.5: the bare rule reaches exactly 0, the bounded one stops."""
    bare, radius = 0.05, adaptive(0.01, 0.5)
    for _ in range(1500):
        bare = math.log1p(0.5 * bare)
        update(radius, 0.5 * radius.rho)
    assert bare == 0.0
    assert radius.rho == 0.01
    assert radius.count("at_rho_min") > 1400
    assert radius.count("at_rho_max") == 0


def test_state_is_updated_in_place():
    radius = adaptive(0.01, 0.5)
    pointers = {name: value.data_ptr() for name, value in radius.state().items()}
    update(radius, 0.2)
    assert {name: value.data_ptr() for name, value in radius.state().items()} == pointers


class TestProportional:
    def radius(self, lr=0.2):
        return Radius(0.01, 0.5, rule="proportional", device=CPU, lr=lr)

    @pytest.mark.parametrize("kind", [float, lambda lr: torch.tensor(lr)], ids=["a number", "a tensor"])
    @pytest.mark.parametrize(
        ("group", "rho"),
        [
            pytest.param({"lr": 0.2}, 0.5, id="at the start"),
            pytest.param({"lr": 0.05}, 0.125, id="a quarter of it"),
            pytest.param({"lr": 0.0}, 0.01, id="none: rho_min"),
            pytest.param({"lr": 0.4}, 0.5, id="more than at the start: rho_max"),
            pytest.param({"lr": 0.2, "initial_lr": 0.4}, 0.25, id="a scheduler knows the start better"),
        ],
    )
    def test_follows_the_learning_rate(self, group, rho, kind):
        radius = self.radius()
        radius.before_step({name: kind(value) for name, value in group.items()})
        assert radius.rho.item() == pytest.approx(rho, rel=1e-6)

    def test_a_start_of_zero_is_refused(self):
        radius = self.radius()
        with pytest.raises(ValueError, match="initial_lr is 0"):
            radius.before_step({"lr": 0.1, "initial_lr": 0.0})
        assert radius.rho == 0.5

    def test_does_not_follow_the_gap(self):
        radius = self.radius()
        update(radius, 0.2)
        assert radius.rho == 0.5
        assert radius.count("updates") == 0

    def test_keeps_its_start_in_the_state(self):
        assert self.radius().state()["initial_lr"] == 0.2
        assert "initial_lr" not in adaptive(0.01, 0.5).state()


@pytest.mark.parametrize("rule", ["adaptive", "constant", "proportional"])
def test_scaled(rule):
    radius = Radius(0.1, 0.4, rule=rule, device=CPU)
    rho = radius.rho.item()
    radius.scale(0.5)
    assert (radius.rho_min, radius.rho_max, radius.rho.item()) == (0.1, 0.2, rho / 2)
    radius.scale(0.25)
    assert (radius.rho_min, radius.rho_max, radius.rho.item()) == (0.05, 0.05, rho / 8)
    radius.before_step({"lr": 1.0})
    update(radius, 10.0)
    assert radius.rho.item() == {"adaptive": 0.05, "constant": rho / 8, "proportional": 0.05}[rule]
