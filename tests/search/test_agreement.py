import itertools
import math
from dataclasses import replace

import numpy as np
import pytest

from asga.policy import LayerPolicy, Policy
from asga.search.agreement import PairAgreement, consensus, policy_agreement, searched_choices
from asga.search.budget import Budget
from asga.search.costs import policy_costs
from asga.search.profiles import LayerProfile
from asga.search.result import SearchResult
from asga.search.selection import LogProbabilities, best_policy
from asga.search.solver import InfeasibleBudgetError
from asga.search.space import LayerChoices, SpaceChoices

BITS = (2, 4, 8)


def policy(*pairs: tuple[int | str | None, int | None]) -> Policy:
    return Policy({f"layer{i}": LayerPolicy(*pair) for i, pair in enumerate(pairs)})


def random_policy(rng: np.random.Generator, layers: int = 20) -> Policy:
    """Few bits for weights, more for inputs."""
    return policy(*((int(rng.choice([2, 3])), int(rng.choice([4, 6, 8]))) for _ in range(layers)))


class TestPolicyAgreement:
    def test_equal_choices_are_counted(self):
        first, second = policy((2, 4), (3, 4), (2, 8), (None, 8)), policy((2, 4), (2, 4), (3, 8), (None, 4))
        found = policy_agreement({"a": first, "b": second})
        assert found.names == ("a", "b")
        assert (found.choices, found.unanimous) == (8, 5)
        assert found.equal == 5 / 8
        assert found.bits["layer1"] == {"weight": (3, 2), "act": (4, 4)}
        assert found.bits["layer3"] == {"weight": (None, None), "act": (8, 4)}

    def test_small_floats_are_bits_of_their_own(self):
        first, second = policy(("fp8", 4), (8, 4), ("fp4", 8)), policy((8, 4), (8, 8), ("fp4", 8))
        found = policy_agreement({"a": first, "b": second})
        assert (found.choices, found.equal) == (6, 4 / 6)
        assert found.bits["layer0"] == {"weight": ("fp8", 8), "act": (4, 4)}
        # Sums of products of counts: weights 8: 1 x 2, fp4: 1 x 1; inputs 4: 2 x 1, 8: 1 x 2.
        assert found.chance == pytest.approx((2 + 1 + 2 + 2) / 18)

    def test_chance_is_the_mean_over_all_orders_of_the_layers(self):
        first = [(2, 4), (3, 4), (2, 8), (None, 8)]
        second = [(2, 4), (2, 6), (3, 8), (None, 4)]
        shares = [
            np.mean([[a[kind] == second[i][kind] for a, i in zip(first, order, strict=True)] for kind in (0, 1)])
            for order in itertools.permutations(range(4))
        ]
        found = policy_agreement({"a": policy(*first), "b": policy(*second)})
        assert found.chance == pytest.approx(np.mean(shares))
        assert found.chance == pytest.approx((4 + 1 + 1 + 4 + 2) / 32)  # by hand: sum of products of counts

    def test_p_value_is_the_share_of_placements_that_agree_as_often(self):
        """Of the 24 orders of each kind, exactly one of 24 x 24 puts all eight choices right."""
        bits = policy((2, 2), (3, 3), (4, 4), (6, 6))
        found = policy_agreement({"a": bits, "b": bits})
        assert found.equal == 1
        assert found.p_value == pytest.approx(1 / 576, rel=0.5)

    def test_the_same_rule_for_all_layers_is_no_agreement_about_layers(self):
        bits = policy(*[(2, 4)] * 10)
        found = policy_agreement({"a": bits, "b": bits})
        assert (found.equal, found.chance, found.p_value) == (1, 1, 1)

    def test_weights_and_inputs_are_not_mixed(self):
        """All weights have 2 bits and all inputs 4, but for one weight: chance knows that inputs are equal anyway."""
        first, second = policy((3, 4), *[(2, 4)] * 3), policy(*[(2, 4)] * 3, (3, 4))
        assert policy_agreement({"a": first, "b": second}).chance == pytest.approx((4 + 4 * (9 + 1) / 16) / 8)

    def test_what_has_nothing_to_do_with_each_other(self):
        """A test at 10 % may call one in ten pairs of random policies alike."""
        rng = np.random.default_rng(0)
        found = [policy_agreement({"a": random_policy(rng), "b": random_policy(rng)}) for _ in range(30)]
        assert sum(pair.p_value <= 0.1 for pair in found) <= 6  # 98 % of binomial(30, 0.1)
        assert np.mean([pair.equal - pair.chance for pair in found]) == pytest.approx(0, abs=0.03)

    def test_what_agrees_a_little_is_found_over_several_pairs(self):
        """Three policies that share every second choice."""
        rng = np.random.default_rng(0)
        common = random_policy(rng)
        policies = {}
        for name in "abc":
            other = random_policy(rng)
            policies[name] = Policy({n: common[n] if i % 2 else other[n] for i, n in enumerate(common)})
        found = policy_agreement(policies)
        assert [(pair.first, pair.second) for pair in found.pairs] == [("a", "b"), ("a", "c"), ("b", "c")]
        assert found.equal == pytest.approx(np.mean([pair.equal for pair in found.pairs]))
        assert found.chance == pytest.approx(np.mean([pair.chance for pair in found.pairs]))
        assert found.chance < found.equal
        assert found.p_value < 0.01

    def test_only_what_was_searched_can_be_compared(self):
        first, second = policy((8, 8), (2, 4), (3, 4)), policy((8, 8), (2, 8), (2, 4))
        found = policy_agreement({"a": first, "b": second}, [("layer1", "weight"), ("layer2", "weight")])
        assert (found.choices, found.equal) == (2, 1 / 2)
        assert found.bits == {"layer1": {"weight": (2, 2)}, "layer2": {"weight": (3, 2)}}

    def test_is_the_same_every_time(self):
        rng = np.random.default_rng(0)
        policies = {"a": random_policy(rng), "b": random_policy(rng)}
        assert policy_agreement(policies) == policy_agreement(policies)
        assert isinstance(policy_agreement(policies).pairs[0], PairAgreement)

    @pytest.mark.parametrize(
        ("policies", "choices", "message"),
        [
            ({"a": policy((2, 2))}, None, "policies has 1 entries; two or more"),
            ({"a": policy((2, 2)), "b": policy((2, 2), (2, 2))}, None, "'a' and 'b' are not about the same layers"),
            ({"a": policy((2, 2)), "b": policy((2, 2))}, [], "choices is empty"),
        ],
        ids=["one", "layers", "choices"],
    )
    def test_bad_input(self, policies, choices, message):
        with pytest.raises(ValueError, match=message):
            policy_agreement(policies, choices)


CHOICES = SpaceChoices(
    {
        "stem": LayerChoices((8,), (8,), pinned=True),
        "body.0": LayerChoices(BITS, BITS),
        "body.1": LayerChoices(BITS, (4,)),
    },
    {},
    ("stem", "body.0", "body.1"),
)
PROFILES = {
    name: LayerProfile(name, "Conv2d", macs=macs, weight_numel=100, out_channels=4)
    for name, macs in (("stem", 900), ("body.0", 5000), ("body.1", 3000))
}
BUDGET = Budget(bitops="w4a4")


def search_result(*probabilities: tuple[float, ...], budget: Budget = BUDGET, expected: float = 1.0) -> SearchResult:
    """Probabilities of the weight and input of the first layer and of the weight of the second."""
    first, second, third = (tuple(map(math.log, values)) for values in probabilities)
    found = {
        "stem": LogProbabilities((0.0,), (0.0,)),
        "body.0": LogProbabilities(first, second),
        "body.1": LogProbabilities(third, (0.0,)),
    }
    chosen = best_policy(found, CHOICES, PROFILES, budget, {"architecture": "toy"})
    return SearchResult(chosen, budget, CHOICES, PROFILES, found, {"bitops": expected}, [{"epoch": 1}])


def test_searched_choices():
    assert searched_choices(CHOICES) == [("body.0", "weight"), ("body.0", "act"), ("body.1", "weight")]


class TestConsensus:
    @pytest.fixture
    def results(self) -> list[SearchResult]:
        return [
            search_result((0.1, 0.2, 0.7), (0.5, 0.4, 0.1), (0.6, 0.3, 0.1), expected=0.9),
            search_result((0.5, 0.4, 0.1), (0.2, 0.3, 0.5), (0.5, 0.4, 0.1), expected=1.1),
            search_result((0.2, 0.5, 0.3), (0.3, 0.6, 0.1), (0.1, 0.3, 0.6), expected=1.0),
        ]

    def test_policy_is_the_likeliest_of_all_within_the_budget(self, results):
        """Against every policy there is."""
        limit = BUDGET.limits(PROFILES, CHOICES)["bitops"]
        scores = {}
        for i, j, k in itertools.product(range(3), repeat=3):
            candidate = CHOICES.policy({"stem": (0, 0), "body.0": (i, j), "body.1": (k, 0)})
            if policy_costs(PROFILES, candidate).bitops <= limit:
                layers = [result.log_probs for result in results]
                scores[str(candidate)] = sum(
                    found["body.0"].weight[i] + found["body.0"].act[j] + found["body.1"].weight[k] for found in layers
                )
        together = consensus(results)
        assert str(together.policy) == max(scores, key=scores.__getitem__)
        assert together.policy.meta["architecture"] == "toy"
        assert together.policy.meta["seeds"] == 3
        assert together.policy.meta["costs"]["bitops"] <= limit

    def test_probabilities_are_the_geometric_mean(self, results):
        found = np.exp(consensus(results).log_probs["body.0"].weight)
        expected = np.cbrt([0.1 * 0.5 * 0.2, 0.2 * 0.4 * 0.5, 0.7 * 0.1 * 0.3])
        assert found == pytest.approx(expected / expected.sum())

    def test_is_a_result_like_that_of_one_search(self, results, tmp_path):
        together = consensus(results)
        assert together.expected_cost == {"bitops": pytest.approx(1.0)}
        assert together.history == []
        together.save(tmp_path / "search.json")
        loaded = SearchResult.load(tmp_path / "search.json")
        small = Budget(bitops="0.6*w4a4")
        assert loaded.policy_for(small) == together.policy_for(small)
        with pytest.raises(InfeasibleBudgetError):
            loaded.policy_for(Budget(bitops=10))

    def test_of_one_is_itself(self, results):
        assert consensus(results[:1]).policy == results[0].policy
        assert consensus(results[:1]).log_probs["body.1"].weight == pytest.approx(results[0].log_probs["body.1"].weight)

    def test_of_none(self):
        with pytest.raises(ValueError, match="at least one"):
            consensus([])

    def test_of_different_searches(self, results):
        other = replace(results[0], budget=Budget(bitops="w8a8"))
        with pytest.raises(ValueError, match=r"results\[1\] has other budget than results\[0\]"):
            consensus([results[0], other])
        layers = {**CHOICES.layers, "body.1": LayerChoices((2, 4), (4,))}
        with pytest.raises(ValueError, match=r"results\[2\] has other choices"):
            consensus([*results[:2], replace(results[2], choices=replace(CHOICES, layers=layers))])
