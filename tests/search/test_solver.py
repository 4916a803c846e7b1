import itertools
import math

import numpy as np
import pytest

from asga.search import solver
from asga.search.costs import PEAKS, cost_tables
from asga.search.groups import Group
from asga.search.profiles import LayerProfile
from asga.search.solver import InfeasibleBudgetError, check_feasible, solve
from asga.search.space import LayerChoices, SpaceChoices

BITS = (2, 3, 4, 6, 8)


def total(tables, chosen) -> int:
    return sum(int(tables[name][pair]) for name, pair in chosen.items())


def total_score(scores, chosen) -> float:
    return math.fsum(scores[name][pair] for name, pair in chosen.items())


def alike(chosen, groups) -> bool:
    """Whether the layers of every group have the same index on what they share."""
    axes = {"weight": 0, "act": 1}
    return all(len({chosen[n][axes[side]] for n in group.layers}) == 1 for group in groups for side in group.sides)


def policies(scores, costs, limits, groups=(), allowed=None):
    """Every choice within the limits with its costs; the limit of a peak is on every layer."""
    for pairs in itertools.product(*(list(np.ndindex(table.shape)) for table in scores.values())):
        chosen = dict(zip(scores, pairs, strict=True))
        spent = {m: (max if m in PEAKS else sum)(int(costs[m][n][chosen[n]]) for n in scores) for m in limits}
        if allowed is not None and not all(allowed[n][chosen[n]] for n in allowed):
            continue
        if all(spent[metric] <= limits[metric] for metric in limits) and alike(chosen, groups):
            yield chosen, spent


def brute_force(scores, costs, limits) -> tuple[float, float] | None:
    """Best score, and the least relative cost among the choices that have it, over every choice there is."""
    least = {metric: sum(int(costs[metric][n].min()) for n in scores) for metric in limits}
    best = None
    for chosen, spent in policies(scores, costs, limits):
        score = total_score(scores, chosen)
        cost = math.fsum((spent[m] - least[m]) / max(limits[m] - least[m], 1) for m in limits)
        if best is None or (-score, cost) < (-best[0], best[1]):
            best = score, cost
    return best


def random_problem(seed: int):
    """2 to 4 layers, 1 to 3 metrics, costs of 1 to 12 digits; the limits are the costs of some choice."""
    rng = np.random.default_rng(seed)
    names = [f"layer{k}" for k in range(rng.integers(2, 5))]
    shapes = {name: tuple(rng.integers(1, 4, size=2)) for name in names}
    digits = int(rng.integers(1, 13))
    metrics = [f"metric{m}" for m in range(rng.integers(1, 4))]
    costs = {m: {n: rng.integers(0, 10**digits, size=shapes[n]) for n in names} for m in metrics}
    witness = {n: tuple(int(rng.integers(size)) for size in shapes[n]) for n in names}
    limits = {m: total(costs[m], witness) for m in metrics}
    if seed % 3 == 0:  # ties between different choices
        scores = {n: rng.integers(0, 3, size=shapes[n]).astype(float) for n in names}
    else:
        scores = {n: rng.normal(size=shapes[n]) for n in names}
    return scores, costs, limits


def resnet20_like() -> tuple[SpaceChoices, dict[str, LayerProfile]]:
    channels = [(3, 16, 32)] + [(16, 16, 32)] * 6 + [(16, 32, 16)] + [(32, 32, 16)] * 5
    channels += [(32, 64, 8)] + [(64, 64, 8)] * 5
    profiles = {
        f"conv{k}": LayerProfile(f"conv{k}", "Conv2d", 9 * i * o * hw * hw, 9 * i * o, o)
        for k, (i, o, hw) in enumerate(channels)
    }
    profiles["fc"] = LayerProfile("fc", "Linear", 640, 640, 10)
    layers = dict.fromkeys(profiles, LayerChoices(BITS, BITS))
    layers["conv0"] = layers["fc"] = LayerChoices((8,), (8,), pinned=True)
    return SpaceChoices(layers, {}, tuple(profiles)), profiles


@pytest.mark.parametrize("block", range(10))
def test_equals_brute_force(block):
    for seed in range(40 * block, 40 * (block + 1)):
        scores, costs, limits = random_problem(seed)
        chosen = solve(scores, costs, limits)
        assert list(chosen) == list(scores)
        spent = {metric: total(costs[metric], chosen) for metric in limits}
        assert all(spent[metric] <= limits[metric] for metric in limits), seed
        best_score, least_cost = brute_force(scores, costs, limits)
        # The promise is 1e-9 of the largest difference of scores, here below 10.
        assert total_score(scores, chosen) == pytest.approx(best_score, rel=0, abs=1e-8), seed
        if seed % 3 == 0:
            least = {m: sum(int(t.min()) for t in costs[m].values()) for m in limits}
            cost = math.fsum((spent[m] - least[m]) / max(limits[m] - least[m], 1) for m in limits)
            # The cost is scaled by 1e3 and HiGHS stops within 1e-6 of its optimum.
            assert cost == pytest.approx(least_cost, rel=0, abs=1e-8), seed


def twelve_digit_problem():
    rng = np.random.default_rng(1)
    names = [f"layer{k}" for k in range(12)]
    scores = {n: rng.random((5, 5)) for n in names}
    costs = {"latency": {n: rng.integers(1, 10**12, size=(5, 5)) for n in names}}
    return scores, costs, sum(int(np.median(t)) for t in costs["latency"].values()) // 2


def test_limit_just_below_the_cost_of_a_better_choice():
    """One unit in 1e12 too much: less than the tolerance of HiGHS, which offers the better choice again."""
    scores, costs, limit = twelve_digit_problem()
    best = solve(scores, costs, {"latency": limit})
    limit = total(costs["latency"], best) - 1
    chosen = solve(scores, costs, {"latency": limit})
    assert total(costs["latency"], chosen) <= limit
    assert total_score(scores, chosen) < total_score(scores, best)


def test_limit_that_exactly_one_choice_meets():
    choices, profiles = resnet20_like()
    costs = cost_tables(profiles, choices)
    least = {metric: sum(int(t.min()) for t in tables.values()) for metric, tables in costs.items()}
    scores = {n: np.arange(t.size, dtype=float).reshape(t.shape) for n, t in costs["bitops"].items()}
    assert set(solve(scores, costs, least).values()) == {(0, 0)}


def test_no_limit_that_binds_gives_the_best_pair_of_each_layer():
    scores = {"a": np.array([[0.0, 3.0], [1.0, 2.0]]), "b": np.array([[5.0], [7.0]])}
    costs = {"bitops": {"a": np.array([[1, 2], [3, 4]]), "b": np.array([[1], [9]])}}
    assert solve(scores, costs, {}) == solve(scores, costs, {"bitops": 11}) == {"a": (0, 1), "b": (1, 0)}


def test_equal_scores_give_the_cheapest_choice():
    costs = {"bitops": {"a": np.array([[4, 1], [3, 2]]), "b": np.array([[5, 6]])}}
    scores = {"a": np.zeros((2, 2)), "b": np.zeros((1, 2))}
    assert solve(scores, costs, {"bitops": 100}) == {"a": (0, 1), "b": (0, 0)}


def test_same_input_same_answer():
    choices, profiles = resnet20_like()
    costs = cost_tables(profiles, choices)
    scores = {n: np.zeros(t.shape) + np.arange(t.shape[1]) for n, t in costs["bitops"].items()}  # many ties
    limits = {"bitops": sum(int(np.median(t)) for t in costs["bitops"].values())}
    assert solve(scores, costs, limits) == solve(scores, costs, limits)


def test_layers_with_one_candidate_need_no_score_but_count():
    costs = {"bitops": {"pinned": np.array([[10]]), "a": np.array([[1, 2]])}}
    scores = {"a": np.array([[0.0, 1.0]])}
    assert solve(scores, costs, {"bitops": 12}) == {"pinned": (0, 0), "a": (0, 1)}
    assert solve(scores, costs, {"bitops": 11}) == {"pinned": (0, 0), "a": (0, 0)}


GROUPS = {
    "none": (),
    "weights": (Group(("a", "b"), "weight"),),
    "inputs": (Group(("a", "b", "c"), "act"),),
    "both": (Group(("a", "c")),),
    "crossed": (Group(("a", "b"), "weight"), Group(("b", "c"), "act")),
    "chained": (Group(("a", "b"), "weight"), Group(("b", "c"), "act"), Group(("c", "d"), "weight")),
}


class TestGroupsPeaksAndAllowedPairs:
    """Everything that a policy may have to heed, against every choice there is."""

    METRICS = ("bitops", "latency_ns", "act_memory_bits")

    def problem(self, seed: int):
        rng = np.random.default_rng(seed)
        names, shape = "abcd", (3, 2)
        scores = {n: rng.normal(size=shape) for n in names}
        costs = {m: {n: rng.integers(0, 1000, size=shape) for n in names} for m in self.METRICS}
        return rng, scores, costs

    @pytest.mark.parametrize("groups", GROUPS)
    def test_equals_brute_force(self, groups):
        groups = GROUPS[groups]
        infeasible = 0
        for seed in range(12):
            rng, scores, costs = self.problem(seed)
            limits = {m: int(rng.integers(500, 1000)) * (1 if m in PEAKS else 3) for m in self.METRICS[: 1 + seed % 3]}
            allowed = None if seed % 2 else {n: rng.random((3, 2)) < 0.9 for n in "ab"}
            found = list(policies(scores, costs, limits, groups, allowed))
            if not found:
                infeasible += 1
                with pytest.raises(InfeasibleBudgetError):
                    solve(scores, costs, limits, groups=groups, allowed=allowed)
                continue
            chosen = solve(scores, costs, limits, groups=groups, allowed=allowed)
            assert chosen in [choice for choice, _ in found], seed
            best = max(total_score(scores, choice) for choice, _ in found)
            assert total_score(scores, chosen) == pytest.approx(best, abs=1e-8), seed
        assert infeasible < 12

    @pytest.mark.parametrize("groups", GROUPS)
    def test_the_least_cost_is_exact(self, groups):
        groups = GROUPS[groups]
        for seed in range(4):
            _, scores, costs = self.problem(seed)
            for metric in self.METRICS:
                least = min(spent[metric] for _, spent in policies(scores, costs, {metric: 10**9}, groups))
                check_feasible(costs, {metric: least}, groups=groups)
                with pytest.raises(InfeasibleBudgetError) as error:
                    check_feasible(costs, {metric: least - 1}, groups=groups)
                assert error.value.least == {metric: least}
                assert f"least possible {least:,}" in str(error.value)

    @pytest.mark.parametrize("groups", GROUPS)
    def test_the_least_cost_with_the_other_limits_met(self, groups):
        groups, seen = GROUPS[groups], 0
        for seed in range(8):
            _, scores, costs = self.problem(seed)
            least = {m: min(s[m] for _, s in policies(scores, costs, {m: 10**9}, groups)) for m in self.METRICS}
            if next(policies(scores, costs, least, groups), None) is not None:
                continue
            seen += 1
            with pytest.raises(InfeasibleBudgetError, match="not all of them together") as error:
                check_feasible(costs, least, groups=groups)
            for metric in self.METRICS:
                others = {m: limit for m, limit in least.items() if m != metric} | {metric: 10**9}
                costs_met = [spent[metric] for _, spent in policies(scores, costs, others, groups)]
                assert error.value.least_together.get(metric) == min(costs_met, default=None), (seed, metric)
                if costs_met:
                    assert f"{min(costs_met):,} with the other limits met" in str(error.value)
        assert seen

    @pytest.mark.parametrize(
        ("groups", "message"),
        [
            ((Group(("a", "x")),), "groups has 'x', which costs has not"),
            ((Group(("a", "b")), Group(("b", "c"), "act")), "two groups share the act bits of 'b'"),
        ],
    )
    def test_bad_groups(self, groups, message):
        _, scores, costs = self.problem(0)
        with pytest.raises(ValueError, match=message):
            solve(scores, costs, {"bitops": 5000}, groups=groups)

    def test_layers_of_a_group_have_the_same_candidates(self):
        costs = {"bitops": {"a": np.array([[1, 2]]), "b": np.array([[1, 2, 3]])}}
        scores = {"a": np.zeros((1, 2)), "b": np.zeros((1, 3))}
        assert solve(scores, costs, {"bitops": 9}, groups=[Group(("a", "b"), "weight")]) == {"a": (0, 0), "b": (0, 0)}
        with pytest.raises(ValueError, match=r"different numbers of candidates: \[2, 3\]"):
            solve(scores, costs, {"bitops": 9}, groups=[Group(("a", "b"))])


class TestInfeasible:
    COSTS = {  # noqa: RUF012
        "bitops": {"a": np.array([[1000, 5000]]), "b": np.array([[300, 900]])},
        "size_bits": {"a": np.array([[80, 20]]), "b": np.array([[60, 10]])},
    }

    def test_least_cost_is_named(self):
        with pytest.raises(InfeasibleBudgetError, match="bitops: limit 1,299, least possible 1,300") as error:
            check_feasible(self.COSTS, {"bitops": 1299, "size_bits": 1000})
        assert error.value.limits == {"bitops": 1299, "size_bits": 1000}
        assert error.value.least == {"bitops": 1300, "size_bits": 30}

    @pytest.mark.parametrize(
        "limits",
        [{"bitops": 1300, "size_bits": 30}, {"bitops": 4000, "size_bits": 85}],
        ids=["no pair fits by itself", "pairs fit by themselves"],
    )
    def test_limits_that_exclude_each_other(self, limits):
        for metric, limit in limits.items():
            check_feasible(self.COSTS, {metric: limit})
        with pytest.raises(InfeasibleBudgetError, match="each limit can be met alone, but not all of them"):
            check_feasible(self.COSTS, limits)

    def test_together_when_only_the_integer_program_can_tell(self):
        costs = {
            "bitops": {n: np.array([[0, 2]]) for n in "abc"},
            "size_bits": {n: np.array([[2, 0]]) for n in "abc"},
        }
        check_feasible(costs, {"bitops": 2, "size_bits": 4})
        with pytest.raises(InfeasibleBudgetError, match="not all of them together"):
            check_feasible(costs, {"bitops": 3, "size_bits": 3})

    def test_exact_least_cost_is_feasible(self):
        check_feasible(self.COSTS, {"bitops": 1300})
        check_feasible(self.COSTS, {"size_bits": 30})


class TestBadInput:
    SCORES = {"a": np.zeros((1, 2)), "b": np.zeros((1, 2))}  # noqa: RUF012
    COSTS = {"bitops": {"a": np.array([[1, 2]]), "b": np.array([[1, 2]])}}  # noqa: RUF012

    @pytest.mark.parametrize("score", [float("nan"), float("-inf"), float("inf")])
    def test_scores_that_are_not_finite(self, score):
        with pytest.raises(ValueError, match=r"scores\['b'\]\[0, 1\] is .*; every score must be finite"):
            solve(self.SCORES | {"b": np.array([[0.0, score]])}, self.COSTS, {"bitops": 9})

    @pytest.mark.parametrize(
        ("scores", "costs", "limits", "message"),
        [
            ({"a": SCORES["a"]}, COSTS, {"bitops": 9}, "scores lacks 'b', which has 1 x 2 candidates"),
            (SCORES | {"c": SCORES["a"]}, COSTS, {"bitops": 9}, "scores has 'c', which costs has not"),
            (SCORES | {"b": np.zeros((2, 2))}, COSTS, {"bitops": 9}, r"scores\['b'\] has shape \(2, 2\)"),
            (SCORES, COSTS, {"bitop": 9}, "limits has 'bitop', but costs are known for: bitops"),
            (SCORES, {}, {}, "costs is empty"),
            (
                SCORES,
                COSTS | {"size": {"a": np.array([[1, 2]])}},
                {"bitops": 9},
                r"different layers: \['b'\]",
            ),
            (SCORES, {"bitops": {"a": np.array([1, 2])}}, {}, r"costs\['bitops'\]\['a'\] has shape \(2,\)"),
        ],
    )
    def test_names_and_shapes(self, scores, costs, limits, message):
        with pytest.raises(ValueError, match=message):
            solve(scores, costs, limits)

    def test_costs_and_limits_are_integers(self):
        with pytest.raises(TypeError, match=r"limits\['bitops'\] is 1.5; an integer is needed"):
            solve(self.SCORES, self.COSTS, {"bitops": 1.5})
        with pytest.raises(TypeError, match=r"costs\['bitops'\]\['a'\] has dtype float64; integers are needed"):
            solve(self.SCORES, {"bitops": {n: np.array([[1.0, 2.0]]) for n in "ab"}}, {"bitops": 9})


def test_ordinary_budgets_are_checked_without_the_integer_program(monkeypatch):
    monkeypatch.delattr(solver, "Program")
    choices, profiles = resnet20_like()
    costs = cost_tables(profiles, choices)
    least = {metric: sum(int(t.min()) for t in tables.values()) for metric, tables in costs.items()}
    check_feasible(costs, least)
    with pytest.raises(InfeasibleBudgetError):
        check_feasible(costs, least | {"size_bits": least["size_bits"] - 1})
