import itertools
from dataclasses import replace

import numpy as np
import pytest

from asga.policy import LayerPolicy, Policy
from asga.search.costs import policy_costs
from asga.search.diagnosis import (
    Starved,
    by_candidate,
    least_increase,
    rank_correlations,
    spearman,
    starved,
    total_increase,
)
from asga.search.groups import Group
from asga.search.probe import LossIncrease
from asga.search.profiles import LayerProfile
from asga.search.solver import InfeasibleBudgetError
from asga.search.space import LayerChoices, SpaceChoices

NAMES = ("first", "a", "b", "float", "last")
CHOICES = SpaceChoices(
    {
        "first": LayerChoices((2, 8), (2, 8)),
        "a": LayerChoices((2, 4, 8), (2, 8)),
        "b": LayerChoices((2, 4, 8), (2, 8)),
        "last": LayerChoices((8,), (8,), pinned=True),
    },
    {"float": "excluded by the search space"},
    NAMES,
)
PROFILES = {
    name: LayerProfile(name, "Conv2d", macs=macs, weight_numel=100, out_channels=4)
    for name, macs in zip(NAMES, (10, 50, 40, 1, 10), strict=True)
}
INCREASES = {
    "first": LossIncrease((0.9, 0.1), (0.5, 0.0)),
    "a": LossIncrease((0.4, 0.2, 0.1), (0.3, 0.1)),
    "b": LossIncrease((0.8, 0.1, 0.0), (0.2, 0.1)),
    "last": LossIncrease((0.0,), (0.0,)),
}


def policy(first: tuple, a: tuple, b: tuple) -> Policy:
    bits = {"first": first, "a": a, "b": b, "float": (None, None), "last": (8, 8)}
    return Policy({name: LayerPolicy(*pair) for name, pair in bits.items()})


class TestSpearman:
    def test_is_the_correlation_of_ranks(self):
        scipy = pytest.importorskip("scipy.stats")
        rng = np.random.default_rng(0)
        for values in (rng.normal(size=(2, 20)), rng.integers(0, 4, (2, 20)), [[1, 2, 3], [9, 4, 1]]):
            assert spearman(*values) == pytest.approx(scipy.spearmanr(*values).statistic)

    @pytest.mark.parametrize(("first", "second"), [([1.0], [2.0]), ([1.0, 1.0, 1.0], [1.0, 2.0, 3.0])])
    def test_without_an_order_there_is_none(self, first, second):
        assert spearman(first, second) is None


class TestRankCorrelations:
    @pytest.fixture
    def choices(self) -> SpaceChoices:
        names = tuple(f"layer{i}" for i in range(8))
        return SpaceChoices({name: LayerChoices((2, 4), (8,)) for name in names}, {}, names)

    def test_of_every_candidate_over_the_layers(self, choices):
        first = {name: LossIncrease((i, i), (0.0,)) for i, name in enumerate(choices.layers)}
        second = {name: LossIncrease((i**3, -i), (0.0,)) for i, name in enumerate(choices.layers)}
        two, four = rank_correlations(first, second, choices)
        assert (two.kind, two.bits, two.layers) == ("weight", 2, 8)
        assert (two.rho, two.interval) == (pytest.approx(1), None)
        assert (four.bits, four.rho) == (4, pytest.approx(-1))

    def test_interval_holds_the_truth_as_often_as_it_says(self, choices):
        """Pairs of normal variables of correlation r have Spearman's 6 / pi * asin(r / 2)."""
        names = tuple(f"layer{i}" for i in range(30))
        choices = SpaceChoices({name: LayerChoices((2, 4), (8,)) for name in names}, {}, names)
        rng, r = np.random.default_rng(0), 0.6
        truth, held = 6 / np.pi * np.arcsin(r / 2), 0
        for _ in range(200):
            x = rng.normal(size=(30, 2))
            y = r * x + np.sqrt(1 - r**2) * rng.normal(size=(30, 2))
            first, second = ({n: LossIncrease(tuple(v), (0.0,)) for n, v in zip(names, z, strict=True)} for z in (x, y))
            held += sum(
                low < truth < high for low, high in (c.interval for c in rank_correlations(first, second, choices))
            )
        assert 0.9 < held / 400 < 0.98


class TestPolicies:
    def test_increases_of_all_choices_add_up(self):
        assert total_increase(INCREASES, CHOICES, policy((2, 8), (4, 2), (8, 8))) == pytest.approx(0.9 + 0.5 + 0.1)

    def test_a_float_tensor_adds_nothing(self):
        assert total_increase(INCREASES, CHOICES, policy((None, 8), (4, 2), (8, 8))) == pytest.approx(0.5 + 0.1)

    @pytest.mark.parametrize("limit", [2664, 3500, 5000, 20_000])
    def test_least_increase_is_the_best_of_all_policies(self, limit):
        kept = LayerPolicy(8, 8)
        pairs = list(itertools.product((2, 4, 8), (2, 8)))
        fitting = [
            candidate
            for a, b in itertools.product(pairs, pairs)
            if policy_costs(PROFILES, candidate := policy((8, 8), a, b)).bitops <= limit
        ]
        found = least_increase(INCREASES, CHOICES, PROFILES, {"bitops": limit}, {"first": kept})
        best = min(total_increase(INCREASES, CHOICES, candidate) for candidate in fitting)
        assert total_increase(INCREASES, CHOICES, found) == pytest.approx(best)
        assert policy_costs(PROFILES, found).bitops <= limit
        assert found["first"] == kept

    def test_kept_layers_of_a_group_are_left_out_of_it(self):
        grouped = replace(CHOICES, groups=(Group(("first", "a", "b"), "act"), Group(("a", "b"), "weight")))
        kept = {"first": LayerPolicy(2, 8), "a": LayerPolicy(8, 2)}
        found = least_increase(INCREASES, grouped, PROFILES, {"bitops": 10**6}, kept)
        assert found == policy((2, 8), (8, 2), (8, 8))

    def test_impossible(self):
        with pytest.raises(InfeasibleBudgetError):
            least_increase(INCREASES, CHOICES, PROFILES, {"bitops": 10}, {})

    def test_starved_are_those_with_fewer_bits_than_wanted(self):
        found = starved(INCREASES, CHOICES, policy((8, 2), (2, 8), (2, 8)), policy((2, 8), (4, 8), (8, 2)))
        assert found == [
            Starved("b", "weight", 2, 8, 0.8),
            Starved("first", "act", 2, 8, 0.5),
            Starved("a", "weight", 2, 4, 0.2),
        ]

    def test_float_is_not_starved(self):
        assert starved(INCREASES, CHOICES, policy((None, 8), (2, 2), (2, 2)), policy((8, 8), (2, 2), (2, 2))) == []


def test_by_candidate():
    found = by_candidate(INCREASES, CHOICES)
    assert list(found) == ["first", "a", "b"]
    assert found["a"] == {"weight": {"2": 0.4, "4": 0.2, "8": 0.1}, "act": {"2": 0.3, "8": 0.1}}
