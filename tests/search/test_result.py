import json
import math

import pytest

from asga.policy import LayerPolicy
from asga.search.budget import Budget
from asga.search.costs import LayerProfile, policy_costs
from asga.search.result import LogProbabilities, SearchResult, best_policy
from asga.search.solver import InfeasibleBudgetError
from asga.search.space import LayerChoices, SpaceChoices

BITS = (2, 4, 8)
CHOICES = SpaceChoices(
    {
        "stem": LayerChoices((8,), (8,), pinned=True),
        "body.0": LayerChoices(BITS, BITS),
        "body.1": LayerChoices(BITS, (4,)),
        "body.2": LayerChoices(BITS, BITS),
    },
    {"odd": "excluded by the search space"},
    ("stem", "body.0", "odd", "body.1", "body.2"),
)
PROFILES = {
    name: LayerProfile(name, "Conv2d", macs=macs, weight_numel=numel, out_channels=4)
    for name, macs, numel in (
        ("stem", 900, 100),
        ("body.0", 5000, 700),
        ("odd", 10, 10),
        ("body.1", 3000, 800),
        ("body.2", 2000, 900),
    )
}


def logs(*probabilities: float) -> tuple[float, ...]:
    return tuple(math.log(p) for p in probabilities)


LOG_PROBS = {
    "stem": LogProbabilities((0.0,), (0.0,)),
    "body.0": LogProbabilities(logs(0.1, 0.6, 0.3), logs(0.25, 0.26, 0.49)),
    "body.1": LogProbabilities(logs(0.2, 0.3, 0.5), (0.0,)),
    "body.2": LogProbabilities(logs(0.05, 0.05, 0.9), logs(0.8, 0.1, 0.1)),
}
BUDGETS = [
    Budget(bitops="w4a4"),
    Budget(bitops="0.7*w4a4"),
    Budget(size="w4"),
    Budget(size=2200),
    Budget(bitops="w8a8", size="w3"),
    Budget(bitops=170_000, size="2.2kB"),
]


@pytest.fixture
def result() -> SearchResult:
    budget = BUDGETS[0]
    policy = best_policy(LOG_PROBS, CHOICES, PROFILES, budget, {"architecture": "toy"})
    return SearchResult(policy, budget, CHOICES, PROFILES, LOG_PROBS, {"bitops": 1.01}, [{"epoch": 1}])


class TestPolicyFor:
    @pytest.mark.parametrize("budget", BUDGETS, ids=str)
    def test_meets_the_budget(self, result, budget):
        policy = result.policy_for(budget)
        costs = policy_costs(PROFILES, policy)
        limits = budget.limits(PROFILES, CHOICES)
        assert all(getattr(costs, metric) <= limit for metric, limit in limits.items())
        assert result.costs(policy) == costs
        assert list(policy) == list(CHOICES.names)
        assert policy["stem"] == LayerPolicy(8, 8)
        assert policy["odd"] == LayerPolicy(None, None)

    def test_ample_budget_gives_the_likeliest(self, result):
        policy = result.policy_for(Budget(bitops="w8a8"))
        assert policy == result.most_likely()
        bits = {name: (layer.weight_bits, layer.act_bits) for name, layer in policy.items()}
        assert bits["body.0"] == (4, 8)
        assert bits["body.1"] == (8, 4)
        assert bits["body.2"] == (8, 2)

    def test_keeps_the_architecture_and_says_what_it_is_for(self, result):
        meta = result.policy_for(Budget(size="w4"), {"note": "small"}).meta
        limits = Budget(size="w4").limits(PROFILES, CHOICES)
        assert (meta["architecture"], meta["note"], meta["budget"]) == ("toy", "small", {"size": "w4"})
        assert meta["limits"] == limits
        assert meta["costs"]["size_bits"] <= limits["size_bits"]

    def test_impossible(self, result):
        with pytest.raises(InfeasibleBudgetError, match="least possible") as error:
            result.policy_for(Budget(bitops=1000))
        least = policy_costs(PROFILES, CHOICES.uniform(2, 2)).bitops + 3000 * 2 * 2  # body.1 has no 2-bit inputs
        assert error.value.least == {"bitops": least}
        assert f"{least:,}" in str(error.value)


class TestFindings:
    def test_cost_shares(self, result):
        shares = result.cost_shares(CHOICES.uniform(4, 4))
        assert shares == {"bitops": 1.0}
        assert result.cost_shares(result.policy)["bitops"] <= 1

    def test_gaps_of_what_was_searched(self, result):
        gaps = result.gaps()
        assert gaps["body.0"] == pytest.approx({"weight": math.log(2), "act": math.log(0.49 / 0.26)})
        assert gaps["body.1"] == pytest.approx({"weight": math.log(0.5 / 0.3)})
        assert gaps["body.2"] == pytest.approx({"weight": math.log(18), "act": math.log(8)})
        assert list(gaps) == ["body.0", "body.1", "body.2"]


class TestFile:
    def test_round_trip(self, result, tmp_path):
        result.save(tmp_path / "search.json")
        loaded = SearchResult.load(tmp_path / "search.json")
        assert loaded.policy == result.policy
        assert loaded.policy.meta == result.policy.meta
        assert loaded.choices == result.choices
        assert loaded.profiles == result.profiles
        assert loaded.log_probs == result.log_probs
        assert (loaded.budget, loaded.expected_cost) == (result.budget, result.expected_cost)
        for budget in BUDGETS:
            assert loaded.policy_for(budget) == result.policy_for(budget)
            assert loaded.policy_for(budget).meta == result.policy_for(budget).meta

    def test_small_floats_are_of_version_2(self, result, tmp_path):
        path = tmp_path / "search.json"
        result.save(path)
        assert json.loads(path.read_text())["version"] == 1
        layers = CHOICES.layers | {"body.1": LayerChoices((2, "fp4", 8), (None,))}
        choices = SpaceChoices(layers, CHOICES.skipped, CHOICES.names)
        policy = best_policy(LOG_PROBS, choices, PROFILES, Budget(size="w4"))
        floats = SearchResult(policy, Budget(size="w4"), choices, PROFILES, LOG_PROBS)
        assert policy["body.1"].weight_bits == "fp4"
        floats.save(path)
        assert json.loads(path.read_text())["version"] == 2
        loaded = SearchResult.load(path)
        assert (loaded.policy, loaded.choices) == (policy, choices)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"format": "asga.policy"}, r"format 'asga\.policy' version 1 is not known"),
            ({"version": 3}, "version 3 is not known"),
            ({"version": None}, "not a search result"),
            ({"layers": {"stem": {}}}, "weight_bits"),
            ({"log_probs": None}, "not a search result"),
            ({"budget": {"latency": 3}}, "latency"),
            ({"policy": {"format": "asga.policy", "version": 9}}, "newer asga"),
        ],
        ids=["format", "newer", "no version", "layers", "probabilities", "budget", "policy"],
    )
    def test_damaged(self, result, tmp_path, change, message):
        path = tmp_path / "search.json"
        result.save(path)
        path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
        with pytest.raises(ValueError, match=message) as error:
            SearchResult.load(path)
        assert str(path) in str(error.value)

    @pytest.mark.parametrize("content", ["", "{", "[]", "null", '{"format": "asga.search"}'])
    def test_no_result_at_all(self, tmp_path, content):
        path = tmp_path / "search.json"
        path.write_text(content)
        with pytest.raises(ValueError, match=r"search\.json is not a search result"):
            SearchResult.load(path)

    def test_missing(self, tmp_path):
        with pytest.raises(FileNotFoundError):
            SearchResult.load(tmp_path / "search.json")
