from collections import Counter
from dataclasses import replace
from itertools import product

import pytest
import torch

from asga.policy import Policy
from asga.search.baselines import random_choice, uniform_pairs
from asga.search.budget import Budget
from asga.search.costs import policy_costs
from asga.search.groups import Group
from asga.search.profiles import LayerProfile
from asga.search.solver import InfeasibleBudgetError
from asga.search.space import LayerChoices, SpaceChoices

BITS = (2, 4, 8)
CHOICES = SpaceChoices(
    {
        "stem": LayerChoices((8,), (8,), pinned=True),
        "one": LayerChoices(BITS, (2, 4)),
        "two": LayerChoices(BITS, (2, 4, 6)),
    },
    {},
    ("stem", "one", "float", "two"),
)
PROFILES = {
    name: LayerProfile(name, "Conv2d", macs=macs, weight_numel=numel, out_channels=4)
    for name, macs, numel in (("stem", 900, 100), ("one", 5000, 700), ("float", 10, 10), ("two", 3000, 800))
}


def limits(**amounts: object) -> dict[str, int]:
    return Budget(**amounts).limits(PROFILES, CHOICES)


def feasible(limits: dict[str, int]) -> list[dict[str, tuple[int, int]]]:
    sides = [product(range(len(c.weight_bits)), range(len(c.act_bits))) for c in CHOICES.layers.values()]
    policies = [dict(zip(CHOICES.layers, chosen, strict=True)) for chosen in product(*sides)]
    return [
        policy
        for policy in policies
        if all(getattr(policy_costs(PROFILES, CHOICES.policy(policy)), m) <= limit for m, limit in limits.items())
    ]


class TestRandomChoice:
    def test_a_limit_beyond_all_integers(self):
        assert random_choice(PROFILES, CHOICES, {"bitops": 10**30}).keys() == CHOICES.layers.keys()

    @pytest.mark.parametrize("budget", [{"bitops": "w4a4"}, {"bitops": "w4a4", "size": "w4"}], ids=str)
    def test_every_policy_within_the_budget_is_equally_likely(self, budget, monkeypatch):
        monkeypatch.setattr("asga.search.baselines._SWEEPS", 30)  # as good as 200 for two layers
        torch.manual_seed(0)
        possible, draws = feasible(limits(**budget)), 800
        drawn = Counter(tuple(random_choice(PROFILES, CHOICES, limits(**budget)).items()) for _ in range(draws))
        assert drawn.keys() <= {tuple(policy.items()) for policy in possible}
        mean = draws / len(possible)
        chi_square = sum((drawn[tuple(policy.items())] - mean) ** 2 / mean for policy in possible)
        freedom = len(possible) - 1
        assert 10 < freedom < 54
        # Five standard deviations of the statistic.
        assert chi_square < freedom + 5 * (2 * freedom) ** 0.5

    @pytest.mark.parametrize(
        ("group", "budget"),
        [
            (Group(("one", "two"), "weight"), {"bitops": "w4a4"}),
            (Group(("one", "two"), "act"), {"bitops": "w6a6", "act_memory": "a4"}),
        ],
        ids=["shared weight bits", "shared input bits and a peak"],
    )
    def test_groups_and_peaks(self, group, budget, monkeypatch):
        """All policies that the budget and the group allow, and no others, in about equal numbers."""
        monkeypatch.setattr("asga.search.baselines._SWEEPS", 30)
        layers = {**CHOICES.layers, "one": LayerChoices(BITS, (2, 4, 8)), "two": LayerChoices(BITS, (2, 4, 8))}
        choices = SpaceChoices(layers, {}, CHOICES.names, (group,))
        sizes = {"stem": 9, "one": 50, "float": 1, "two": 40}
        profiles = {name: replace(profile, in_numel=sizes[name]) for name, profile in PROFILES.items()}
        limits = Budget(**budget).limits(profiles, choices)
        side = group.sides[0]

        def allowed(policy: Policy) -> bool:
            costs = policy_costs(profiles, policy)
            shared = {getattr(policy[name], f"{side}_bits") for name in group.layers}
            return len(shared) == 1 and all(getattr(costs, m) <= limit for m, limit in limits.items())

        sides = [product(range(len(c.weight_bits)), range(len(c.act_bits))) for c in layers.values()]
        every = (choices.policy(dict(zip(layers, chosen, strict=True))) for chosen in product(*sides))
        possible = [policy for policy in every if allowed(policy)]
        torch.manual_seed(0)
        draws = 400
        drawn = Counter(str(choices.policy(random_choice(profiles, choices, limits))) for _ in range(draws))
        assert set(drawn) == {str(policy) for policy in possible}
        mean = draws / len(possible)
        assert all(count < mean + 5 * mean**0.5 for count in drawn.values())

    def test_follows_the_seed(self):
        def draw(seed: int) -> dict[str, tuple[int, int]]:
            torch.manual_seed(seed)
            return random_choice(PROFILES, CHOICES, limits(bitops="w8a8"))

        assert draw(1) == draw(1)
        assert len({tuple(draw(seed).items()) for seed in range(8)}) > 4

    def test_the_only_policy(self):
        least = CHOICES.uniform(2, 2)
        assert CHOICES.policy(random_choice(PROFILES, CHOICES, limits(bitops="w2a2"))) == least

    def test_impossible(self):
        with pytest.raises(InfeasibleBudgetError):
            random_choice(PROFILES, CHOICES, {"bitops": 1000})


class TestUniformPairs:
    @pytest.mark.parametrize(
        ("budget", "pairs"),
        [
            ({"bitops": "w4a4"}, [(4, 4), (8, 2)]),
            ({"bitops": "w4a4", "size": "w4"}, [(4, 4)]),
            ({"bitops": "w3a3"}, [(2, 4), (4, 2)]),
            ({"bitops": "w2a2"}, [(2, 2)]),
            ({"bitops": "w8a8"}, [(8, 4)]),
        ],
        ids=str,
    )
    def test_fit_and_are_not_dominated(self, budget, pairs):
        """6 bits for inputs are no candidate of layer `one`."""
        assert uniform_pairs(PROFILES, CHOICES, limits(**budget)) == pairs

    @pytest.mark.parametrize(
        ("acts", "budget", "pairs"),
        [
            ((4, 8), {"bitops": "w4a8"}, [(4, 8), ("fp4", 8), (8, 4), ("fp8", 4)]),
            ((4, 8), {"bitops": "w8a8"}, [(8, 8), ("fp8", 8)]),
            ((None,), {"size": "w8"}, [(8, None), ("fp8", None)]),
        ],
        ids=["tight", "loose", "weights only"],
    )
    def test_a_small_float_is_no_better_than_the_integer_of_its_width(self, acts, budget, pairs):
        searched = LayerChoices((2, 4, "fp4", 8, "fp8"), acts)
        choices = SpaceChoices({**CHOICES.layers, "one": searched, "two": searched}, {}, CHOICES.names)
        found = Budget(**budget).limits(PROFILES, choices)
        assert uniform_pairs(PROFILES, choices, found) == pairs

    def test_none_fits(self):
        assert uniform_pairs(PROFILES, CHOICES, {"bitops": 1000}) == []

    def test_no_bits_in_common(self):
        layers = {**CHOICES.layers, "two": LayerChoices((3, 5), (2, 4))}
        choices = SpaceChoices(layers, {}, CHOICES.names)
        assert uniform_pairs(PROFILES, choices, limits(bitops="w8a8")) == []
