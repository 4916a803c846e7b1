import json
import math
from dataclasses import replace

import pytest

from asga.policy import LayerPolicy
from asga.search.budget import Budget
from asga.search.costs import policy_costs
from asga.search.groups import Group
from asga.search.profiles import LayerProfile
from asga.search.result import TOSS_UP, FarFromBudget, SearchResult
from asga.search.selection import LogProbabilities, best_policy
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


@pytest.mark.filterwarnings("ignore::asga.search.FarFromBudget")
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

    def test_ample_budget_gives_all_bits_or_the_likeliest(self, result):
        most = {"stem": (0, 0), "body.0": (2, 2), "body.1": (2, 0), "body.2": (2, 2)}
        assert result.policy_for(Budget(bitops="w8a8")) == CHOICES.policy(most)
        policy = result.policy_for(Budget(bitops="w8a8"), spend=False)
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


@pytest.mark.filterwarnings("ignore::asga.search.FarFromBudget")
class TestFrontier:
    def test_points_are_the_policies_of_their_budgets(self, result):
        points = result.pareto(BUDGETS)
        assert [point.budget for point in points] == BUDGETS
        for point in points:
            assert point.policy == result.policy_for(point.budget)
            assert point.costs == result.costs(point.policy)
            assert point.policy.meta["distance"] == point.distance == result.distance(point.budget)
            assert (point.policy.meta["log_prob"], point.policy.meta["far"]) == (point.log_prob, point.far)

    def test_more_budget_is_never_less_likely_before_it_is_spent(self, result):
        points = result.pareto([Budget(bitops=f"{share}*w4a4") for share in (0.55, 0.7, 0.9, 1.3, 3)], spend=False)
        log_probs = [point.log_prob for point in points]
        assert log_probs == sorted(log_probs)
        assert log_probs[-1] == pytest.approx(math.log(0.6 * 0.49 * 0.5 * 0.9 * 0.8))

    def test_distance(self, result):
        assert result.distance(Budget(bitops="1.5*w4a4")) == {"bitops": 0.5}
        # The search had no limit on the size: how far it is from what its policy takes.
        size = result.costs(result.policy).size_bits
        assert result.distance(Budget(bitops="w4a4", size=size // 16)) == {
            "bitops": 0.0,
            "size_bits": pytest.approx(-0.5, abs=0.01),
        }

    def test_impossible(self, result):
        with pytest.raises(InfeasibleBudgetError, match="least possible"):
            result.pareto([Budget(bitops="w4a4"), Budget(bitops=1000)])

    def test_no_distance_from_a_policy_that_costs_nothing(self, result):
        free = tuple((w, a, 0) for w in (None, *range(2, 9)) for a in (None, *range(2, 9)))
        profiles = {name: replace(profile, latency_ns=free) for name, profile in result.profiles.items()}
        point = replace(result, profiles=profiles).pareto([Budget(latency="5ms", bitops="w4a4")])[0]
        assert point.distance == {"bitops": 0.0}

    def test_no_budgets(self, result):
        with pytest.raises(TypeError, match=r"budgets\[1\] is 'w3a3'; .* Budget\(bitops='w3a3'"):
            result.pareto([Budget(bitops="w4a4"), "w3a3"])
        with pytest.raises(TypeError, match="several are needed"):
            result.pareto(Budget(bitops="w4a4"))
        with pytest.raises(TypeError, match=r"budget is 0.5; a Budget is needed"):
            result.policy_for(0.5)

    def test_methods_without_training_have_no_probability(self, result):
        point = replace(result, method="hawq").pareto([BUDGETS[1]])[0]
        assert (point.log_prob, point.far) == (None, False)


class TestFarFromTheBudget:
    def test_warns_where_the_search_speaks_against_the_policy(self, result):
        """Weights of 2 bits, which have 0.1, 0.2 and 0.05, and the likeliest inputs, which have 0.49 and 0.8."""
        assert (1 / 3) ** 5 * math.exp(-5 * TOSS_UP) > 0.1 * 0.2 * 0.05 * 0.49 * 0.8
        with pytest.warns(FarFromBudget, match=r"size <= w2 \(-\d+%\)\. .* less likely than") as caught:
            policy = result.policy_for(Budget(size="w2"))
        assert policy.meta["far"]
        assert caught[0].filename == __file__

    def test_one_warning_for_all_points(self, result):
        with pytest.warns(FarFromBudget) as caught:
            points = result.pareto([BUDGETS[0], Budget(size="w2"), Budget(bitops="0.55*w4a4")])
        assert [point.far for point in points] == [False, True, True]
        assert len(caught) == 1
        assert all(str(point.budget) in str(caught[0].message) for point in points[1:])

    def test_warns_of_tighter_budgets_whatever_the_probabilities(self, result):
        with pytest.warns(FarFromBudget, match=r"0\.79\*w4a4 \(-21%\)\. .* more than 20% tighter"):
            points = nothing_learned(result).pareto([Budget(bitops=f"{share}*w4a4") for share in (0.79, 0.81)])
        assert [point.far for point in points] == [True, False]

    def test_warns_where_one_limit_of_several_is_tighter(self, result):
        size = result.costs(result.policy).size_bits
        with pytest.warns(FarFromBudget):
            point = nothing_learned(result).pareto([Budget(bitops="2*w4a4", size=int(0.75 * size) // 8)])[0]
        assert point.distance == {"bitops": 1.0, "size_bits": pytest.approx(-0.25, abs=0.01)}

    def test_silent_near_it_and_before_anything_is_learned(self, result, recwarn):
        result.policy_for(BUDGETS[0])
        nothing_learned(result).pareto([Budget(bitops=f"{share}*w4a4") for share in (0.81, 1, 2, 10)])
        assert not recwarn.list

    def test_silent_for_methods_without_training(self, result, recwarn):
        replace(result, method="hawq").pareto(BUDGETS)
        assert not recwarn.list


def nothing_learned(result: SearchResult) -> SearchResult:
    """The same with all candidates as likely."""
    even = {
        name: LogProbabilities(logs(*[1 / len(p.weight)] * len(p.weight)), logs(*[1 / len(p.act)] * len(p.act)))
        for name, p in LOG_PROBS.items()
    }
    return replace(result, log_probs=even)


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
    @pytest.mark.filterwarnings("ignore::asga.search.FarFromBudget")
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

    def test_target_is_in_it(self, result, tmp_path):
        """Else a search of several seeds that goes on takes its first seeds for searches of another space."""
        targeted = replace(result, choices=replace(result.choices, target="onnxruntime-cpu"))
        targeted.save(tmp_path / "search.json")
        assert SearchResult.load(tmp_path / "search.json").choices == targeted.choices

    @pytest.mark.filterwarnings("ignore::asga.search.FarFromBudget")
    def test_groups_and_latencies_are_in_it(self, tmp_path):
        """So that policies for other latencies need no other file."""
        layers = {"a": LayerChoices((4, 8), (4, 8)), "b": LayerChoices((4, 8), (4, 8))}
        times = ((4, 4, 5), (4, 8, 6), (8, 4, 7), (8, 8, 9))
        profiles = {name: LayerProfile(name, "Linear", 9, 9, 3, 50, times) for name in layers}
        choices = SpaceChoices(layers, {}, tuple(layers), (Group(("a", "b"), "act"),))
        log_probs = dict.fromkeys(layers, LogProbabilities(logs(0.4, 0.6), logs(0.3, 0.7)))
        policy = best_policy(log_probs, choices, profiles, Budget(latency="15ns"))
        SearchResult(policy, Budget(latency="15ns"), choices, profiles, log_probs).save(tmp_path / "search.json")
        loaded = SearchResult.load(tmp_path / "search.json")
        assert (loaded.policy, loaded.choices, loaded.profiles) == (policy, choices, profiles)
        other = loaded.policy_for(Budget(latency="12ns", act_memory="25B"))
        assert other.meta["costs"]["latency_ns"] == 12
        assert {layer.act_bits for layer in other.values()} == {4}

    def test_version_1_is_read(self, result, tmp_path):
        """It has no groups, methods, sizes of inputs and latencies."""
        path = tmp_path / "search.json"
        result.save(path)
        data = json.loads(path.read_text())
        for key in ("groups", "method", "uniform"):
            del data[key]
        for profile in data["profiles"]:
            del profile["in_numel"], profile["latency_ns"]
        path.write_text(json.dumps({**data, "version": 1}))
        loaded = SearchResult.load(path)
        assert (loaded.policy, loaded.choices, loaded.profiles) == (result.policy, CHOICES, PROFILES)
        with pytest.raises(ValueError, match="a limit on act_memory needs sizes of inputs"):
            loaded.policy_for(Budget(act_memory="1kB"))

    def test_small_floats(self, tmp_path):
        path = tmp_path / "search.json"
        layers = CHOICES.layers | {"body.1": LayerChoices((2, "fp4", 8), (None,))}
        choices = SpaceChoices(layers, CHOICES.skipped, CHOICES.names)
        policy = best_policy(LOG_PROBS, choices, PROFILES, Budget(size="w4"))
        floats = SearchResult(policy, Budget(size="w4"), choices, PROFILES, LOG_PROBS)
        assert policy["body.1"].weight_bits == "fp4"
        floats.save(path)
        loaded = SearchResult.load(path)
        assert (loaded.policy, loaded.choices) == (policy, choices)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"format": "asga.policy"}, r"format 'asga\.policy' version 2 is not known"),
            ({"version": 3}, "version 3 is not known"),
            ({"version": None}, "not a search result"),
            ({"layers": {"stem": {}}}, "weight_bits"),
            ({"log_probs": None}, "not a search result"),
            ({"budget": {"energy": 3}}, "energy"),
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
