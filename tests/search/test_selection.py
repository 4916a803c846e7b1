import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers

from asga.models import mobilenet_v2, resnet20
from asga.policy import FLOAT_BITS, Policy
from asga.search.budget import Budget
from asga.search.costs import policy_costs
from asga.search.groups import Group
from asga.search.latency import LatencyTable
from asga.search.profiles import LayerProfile, profile_layers
from asga.search.selection import LogProbabilities, best_policy
from asga.search.solver import InfeasibleBudgetError
from asga.search.space import LayerChoices, SearchSpace, SpaceChoices


def log_softmax(values: np.ndarray) -> tuple[float, ...]:
    return tuple((values - np.logaddexp.reduce(values)).tolist())


def random_log_probs(choices: SpaceChoices, rng: np.random.Generator) -> dict[str, LogProbabilities]:
    """As peaked as a search leaves them; what a group shares is equal."""
    found = {}
    for name, layer in choices.layers.items():
        sides = (layer.weight_bits, layer.act_bits)
        found[name] = LogProbabilities(*(log_softmax(2 * rng.normal(size=len(bits))) for bits in sides))
    for group in choices.groups:
        for side in group.sides:
            shared = getattr(found[group.layers[0]], side)
            found |= {name: replace(found[name], **{side: shared}) for name in group.layers}
    return found


def toy(groups: tuple[Group, ...] = ()) -> tuple[SpaceChoices, dict[str, LayerProfile]]:
    layers = {
        "stem": LayerChoices((8,), (8,), pinned=True),
        "a": LayerChoices((2, 4, 8), (2, 4, 8)),
        "b": LayerChoices((2, 4, 8), (2, 4, 8)),
        "c": LayerChoices((2, 4, 8), (2, 4, 8)),
    }
    profiles = {
        name: LayerProfile(name, "Conv2d", macs, numel, 4, inputs)
        for name, macs, numel, inputs in (
            ("stem", 900, 100, 60),
            ("a", 5000, 700, 200),
            ("b", 3000, 800, 300),
            ("c", 2000, 900, 90),
        )
    }
    return SpaceChoices(layers, {}, tuple(layers), groups), profiles


def bits_of(policy: Policy) -> dict[str, tuple[int, int]]:
    return {name: (layer.weight_bits, layer.act_bits) for name, layer in policy.items()}


def policies(choices: SpaceChoices) -> list[Policy]:
    """Every policy of a space."""
    sides = [itertools.product(range(len(c.weight_bits)), range(len(c.act_bits))) for c in choices.layers.values()]
    found = []
    for combination in itertools.product(*sides):
        chosen = dict(zip(choices.layers, combination, strict=True))
        alike = (
            len({chosen[name][("weight", "act").index(side)] for name in group.layers}) == 1
            for group in choices.groups
            for side in group.sides
        )
        if all(alike):
            found.append(choices.policy(chosen))
    return found


def summed(policy: Policy, choices: SpaceChoices, of: Callable[[str, str, tuple, int], float]) -> float:
    """The sum over all choices, what a group shares being one, of what `of` gives: layer, side, candidates, bits."""
    found = {}
    for name, layer in choices.layers.items():
        for side, candidates in (("weight", layer.weight_bits), ("act", layer.act_bits)):
            group = next((g.layers for g in choices.groups if side in g.sides and name in g.layers), (name,))
            found[group, side] = of(name, side, candidates, getattr(policy[name], f"{side}_bits"))
    return math.fsum(found.values())


def log_prob(policy: Policy, log_probs: Mapping[str, LogProbabilities], choices: SpaceChoices) -> float:
    return summed(policy, choices, lambda name, side, bits, b: getattr(log_probs[name], side)[bits.index(b)])


def sufficiency(policy: Policy, log_probs: Mapping[str, LogProbabilities], choices: SpaceChoices) -> float:
    """The log-probability that all bits suffice."""

    def of(name: str, side: str, candidates: tuple, given: int) -> float:
        probs = np.exp(getattr(log_probs[name], side))
        return math.log(sum(p for p, bits in zip(probs, candidates, strict=True) if bits <= given))

    return summed(policy, choices, of)


GROUPS = {
    "none": (),
    "weights": (Group(("a", "b"), "weight"),),
    "inputs": (Group(("a", "b", "c"), "act"),),
    "both": (Group(("a", "c")),),
    "crossed": (Group(("a", "b"), "weight"), Group(("b", "c"), "act")),
}
BUDGETS = [
    Budget(bitops="w4a4"),
    Budget(bitops="0.63*w8a8"),
    Budget(size="w4"),
    Budget(bitops="w6a6", size="0.8*w4"),
    Budget(act_memory="a4", size="w5"),
]


@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize("budget", BUDGETS, ids=str)
def test_equals_brute_force(groups, budget):
    """The likeliest within the budget; then, of those with nowhere fewer bits, the one most probably sufficient."""
    choices, profiles = toy(GROUPS[groups])
    limits = budget.limits(profiles, choices)

    def fits(policy: Policy) -> bool:
        return all(getattr(policy_costs(profiles, policy), metric) <= limit for metric, limit in limits.items())

    fitting = [policy for policy in policies(choices) if fits(policy)]
    for seed in range(3):
        log_probs = random_log_probs(choices, np.random.default_rng(seed))
        likeliest = best_policy(log_probs, choices, profiles, budget, spend=False)
        assert likeliest.meta["log_prob"] == pytest.approx(
            max(log_prob(policy, log_probs, choices) for policy in fitting), abs=1e-8
        )
        spent = best_policy(log_probs, choices, profiles, budget)
        base = bits_of(likeliest)
        raised = [p for p in fitting if all(np.greater_equal(bits, base[n]).all() for n, bits in bits_of(p).items())]
        assert bits_of(spent) in map(bits_of, raised)
        # Each probability has a part of 1e-6 of a uniform one, which moves a logarithm by less than that of the least.
        assert sufficiency(spent, log_probs, choices) == pytest.approx(
            max(sufficiency(policy, log_probs, choices) for policy in raised), abs=1e-4
        )
        assert spent.meta["likeliest_costs"] == policy_costs(profiles, likeliest).to_dict()
        assert spent.meta["log_prob"] == pytest.approx(log_prob(spent, log_probs, choices))


class TestSpending:
    CHOICES, PROFILES = toy()

    def policy(self, log_probs: Mapping[str, LogProbabilities], **options: object) -> Policy:
        budget = Budget(bitops=options.pop("bitops", "w8a8"))
        return best_policy(
            {"stem": LogProbabilities((0.0,), (0.0,)), **log_probs}, self.CHOICES, self.PROFILES, budget, **options
        )

    def test_nothing_more_fits(self):
        """A property of every seed: raising any single choice to its next candidate exceeds a limit."""
        for seed, budget in itertools.product(range(5), BUDGETS):
            policy = best_policy(
                random_log_probs(self.CHOICES, np.random.default_rng(seed)), self.CHOICES, self.PROFILES, budget
            )
            limits = budget.limits(self.PROFILES, self.CHOICES)
            for name, layer in self.CHOICES.layers.items():
                for side, candidates in (("weight_bits", layer.weight_bits), ("act_bits", layer.act_bits)):
                    wider = [bits for bits in candidates if bits > getattr(policy[name], side)]
                    if wider:
                        more = Policy({**policy, name: replace(policy[name], **{side: wider[0]})})
                        costs = policy_costs(self.PROFILES, more)
                        assert any(getattr(costs, metric) > limit for metric, limit in limits.items()), (
                            seed,
                            budget,
                            name,
                        )

    def test_goes_to_toss_ups_before_choices_that_are_clear(self):
        toss_up, clear = log_softmax(np.array([0.05, 0.0, -3.0])), log_softmax(np.array([6.0, 0.0, -3.0]))
        log_probs = {name: LogProbabilities(clear, clear) for name in "abc"}
        log_probs["b"] = LogProbabilities(toss_up, clear)
        least = policy_costs(self.PROFILES, self.CHOICES.uniform(2, 2)).bitops
        policy = self.policy(log_probs, bitops=least + 3000 * 2 * 2)  # what b costs more with 4 weight bits
        assert bits_of(policy) == {"stem": (8, 8), "a": (2, 2), "b": (4, 2), "c": (2, 2)}

    def test_an_ample_budget_takes_all_bits_however_unlikely(self):
        """Probabilities that a softmax at low temperature made vanish: 1 minus them is 1 in floating point."""
        sure = (0.0, -80.0, -90.0)
        log_probs = {name: LogProbabilities(sure, sure) for name in "abc"}
        assert self.policy(log_probs) == self.CHOICES.uniform(8, 8)
        assert self.policy(log_probs, spend=False) == Policy({**self.CHOICES.uniform(2, 2)})

    def test_scores_of_methods_without_training_are_left_alone(self):
        scores = {name: LogProbabilities((0.0, -1.0, -1.0), (-1.0, 0.0, -1.0)) for name in "abc"}
        policy = self.policy(scores, trained=False)
        assert policy == self.CHOICES.uniform(2, 4)
        assert policy.meta.keys() == {"budget", "limits", "pinned", "costs"}
        assert policy.meta["pinned"] == ["stem"]

    def test_small_floats_are_no_more_bits_than_integers_of_their_width(self):
        choices = SpaceChoices({"a": LayerChoices((4, "fp4", 8, "fp8"), (8,))}, {}, ("a",))
        profiles = {"a": LayerProfile("a", "Linear", 100, 100, 2)}
        for likelihoods, expected in (
            ((0.4, 0.3, 0.1, 0.2), "fp8"),
            ((0.4, 0.3, 0.2, 0.1), 8),
            ((0.1, 0.2, 0.3, 0.4), "fp8"),
        ):
            log_probs = {"a": LogProbabilities(tuple(map(math.log, likelihoods)), (0.0,))}
            assert best_policy(log_probs, choices, profiles, Budget(bitops="w8a8"))["a"].weight_bits == expected
        narrow = {"a": LogProbabilities(tuple(map(math.log, (0.4, 0.3, 0.1, 0.2))), (0.0,))}
        assert best_policy(narrow, choices, profiles, Budget(bitops="0.9*w8a8"))["a"].weight_bits == 4


class TestGroups:
    def test_what_is_shared_is_counted_once(self):
        """Else two layers that share their choice would outvote a third: 2 bits here, at a cost of 4 + 4 more."""
        choices, profiles = toy((Group(("a", "b"), "weight"),))
        sure = (0.0, -50.0, -60.0)
        log_probs = {name: LogProbabilities(log_softmax(np.array([0.0, 1.0, -9.0])), sure) for name in "ab"}
        log_probs["c"] = LogProbabilities(log_softmax(np.array([0.0, 1.5, -9.0])), sure)
        log_probs["stem"] = LogProbabilities((0.0,), (0.0,))
        least = policy_costs(profiles, choices.uniform(2, 2)).size_bits
        budget = Budget(size=-(-(least + 1500 * 2) // 8))
        assert bits_of(best_policy(log_probs, choices, profiles, budget, spend=False)) == {
            "stem": (8, 8),
            "a": (2, 2),
            "b": (2, 2),
            "c": (4, 2),
        }
        scored = best_policy(log_probs, choices, profiles, budget, trained=False)
        assert bits_of(scored)["a"] == bits_of(scored)["b"] == (4, 2)


def bert() -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    config = transformers.BertConfig(
        vocab_size=20, hidden_size=16, num_hidden_layers=4, num_attention_heads=2, intermediate_size=24, num_labels=3
    )
    return transformers.BertForSequenceClassification(config), {"input_ids": torch.ones(1, 12, dtype=torch.int64)}


# Model, example, and layers to leave float in the space with groups.
MODELS = {
    "resnet20": lambda: (resnet20(), torch.zeros(1, 3, 32, 32), "layer2.1.*"),
    "mobilenet_v2": lambda: (mobilenet_v2(10, small_images=True), torch.zeros(1, 3, 32, 32), "features.3.*"),
    "bert": lambda: (*bert(), "*layer.1.output*"),
}
NAMES = ("bitops", "size", "act_memory", "latency")


@pytest.fixture(scope="module", params=MODELS)
def setting(request) -> tuple[list[SpaceChoices], dict[str, LayerProfile]]:
    """A model without and with groups, and times of up to 9 digits, where more bits are not always slower."""
    model, example, excluded = MODELS[request.param]()
    rng = np.random.default_rng(0)
    grouped = SearchSpace(exclude=(excluded,), groups=("residual", "qkv", "depthwise"))
    choices = [space.choices(model, example) for space in (SearchSpace(), grouped)]
    assert choices[1].groups
    profiles = profile_layers(model, example, choices[0].names)
    pairs = [(w, a) for w in (*SearchSpace().weight_bits, None) for a in (*SearchSpace().act_bits, None)]
    table = LatencyTable({(name, w, a): int(rng.integers(10**9)) for name in choices[0].names for w, a in pairs})
    return choices, table.add_to(profiles, choices[0])


def recomputed(policy: Policy, profiles: Mapping[str, LayerProfile]) -> dict[str, int]:
    """What a policy costs, from the definitions."""
    bitops = size = act_memory = latency = 0
    for name, layer in policy.items():
        profile = profiles[name]
        weight_bits, act_bits = layer.weight_bits or FLOAT_BITS, layer.act_bits or FLOAT_BITS
        bitops += profile.macs * weight_bits * act_bits
        scales = (0 if layer.weight_bits is None else profile.out_channels) + (layer.act_bits is not None)
        size += profile.weight_numel * weight_bits + 32 * scales
        act_memory = max(act_memory, profile.in_numel * act_bits)
        latency += next(ns for w, a, ns in profile.latency_ns if (w, a) == (layer.weight_bits, layer.act_bits))
    return {"bitops": bitops, "size": size, "act_memory": act_memory, "latency": latency}


def amount(name: str, cost: int) -> int | str:
    """The least limit that allows a cost."""
    return {"bitops": cost, "latency": f"{cost}ns"}.get(name, -(-cost // 8))


def random_choices(choices: SpaceChoices, rng: np.random.Generator) -> Policy:
    chosen = {
        name: [int(rng.integers(len(layer.weight_bits))), int(rng.integers(len(layer.act_bits)))]
        for name, layer in choices.layers.items()
    }
    for group in choices.groups:
        for side in group.sides:
            axis = ("weight", "act").index(side)
            for name in group.layers:
                chosen[name][axis] = chosen[group.layers[0]][axis]
    return choices.policy({name: tuple(pair) for name, pair in chosen.items()})


def test_200_random_budgets_are_met(setting):
    """Any metrics, together what some policy costs or up to twice as much: exactly met, without and with groups."""
    spaces, profiles = setting
    rng = np.random.default_rng(1)
    for k in range(200):
        choices = spaces[k % 2]
        witness = recomputed(random_choices(choices, rng), profiles)
        limited = [name for name in NAMES if rng.random() < 0.6] or [str(rng.choice(NAMES))]
        room = 1 + rng.random() ** 3 if k % 4 else 1
        budget = Budget(**{name: amount(name, int(witness[name] * room)) for name in limited})
        log_probs = random_log_probs(choices, rng)
        policy = best_policy(log_probs, choices, profiles, budget)
        costs, limits = recomputed(policy, profiles), budget.limits(profiles, choices)
        keys = dict(zip(NAMES, ("bitops", "size_bits", "act_memory_bits", "latency_ns"), strict=True))
        assert limits.keys() == {keys[name] for name in limited}
        assert all(costs[name] <= limits[keys[name]] for name in limited), (k, budget)
        assert policy.meta["costs"] == {keys[name]: cost for name, cost in costs.items()}
        for group in choices.groups:
            for side in group.sides:
                assert len({getattr(policy[name], f"{side}_bits") for name in group.layers}) == 1


def test_impossible_budgets_are_refused_with_the_least_cost(setting):
    spaces, profiles = setting
    for choices in spaces:
        log_probs = random_log_probs(choices, np.random.default_rng(0))
        cheapest = recomputed(choices.uniform(2, 2), profiles)
        for name, key in (("bitops", "bitops"), ("size", "size_bits"), ("act_memory", "act_memory_bits")):
            best_policy(log_probs, choices, profiles, Budget(**{name: amount(name, cheapest[name])}))
            with pytest.raises(InfeasibleBudgetError, match=f"least possible {cheapest[name]:,}") as error:
                best_policy(log_probs, choices, profiles, Budget(**{name: amount(name, cheapest[name] - 8)}))
            assert error.value.least == {key: cheapest[name]}
        best_policy(log_probs, choices, profiles, Budget(**{name: amount(name, cheapest[name]) for name in NAMES[:3]}))
