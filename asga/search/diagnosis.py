"""Whether sensitivities on a proxy say what those on the target say, and which layers a policy starves."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from asga.policy import LayerPolicy, Policy, WeightBits, bit_width
from asga.search.costs import cost_tables
from asga.search.groups import Group
from asga.search.probe import LossIncrease
from asga.search.profiles import LayerProfile
from asga.search.solver import solve
from asga.search.space import LayerChoices, SpaceChoices

Increases = Mapping[str, LossIncrease]
_KINDS = ("weight", "act")
# Of a normal distribution, for an interval of 95 %.
_QUANTILE = 1.96


@dataclass(frozen=True)
class RankCorrelation:
    """How far two orders of the layers agree, from the least to the most sensitive.

    Args:
        kind: ``"weight"`` or ``"act"``.
        bits: The candidate.
        rho: Spearman's: 1 for the same order, 0 for none in common, -1 for the opposite. None with less than two
            layers, or where all are equally sensitive.
        interval: Of 95 %; None with less than four layers.
        layers: How many.
    """

    kind: str
    bits: WeightBits
    rho: float | None
    interval: tuple[float, float] | None
    layers: int


@dataclass(frozen=True)
class Starved:
    """A tensor that has fewer bits than it should have at equal cost, by the sensitivities.

    Args:
        layer: Its layer.
        kind: ``"weight"`` or ``"act"``.
        bits: What the policy gives it.
        wanted: What the sensitivities would give it.
        increase: How much more the loss rises with `bits` than with `wanted`.
    """

    layer: str
    kind: str
    bits: WeightBits
    wanted: WeightBits
    increase: float


def rank_correlations(first: Increases, second: Increases, choices: SpaceChoices) -> list[RankCorrelation]:
    """Spearman's rank correlation of two sensitivities, by tensor and candidate.

    Args:
        first: Increases of the loss, such as `asga.search.gradient_sensitivity` gives, on one dataset.
        second: On another, of the same layers.
        choices: The candidates of both.

    Source:
        The interval: Bonett and Wright, "Sample size requirements for estimating Pearson, Kendall and Spearman
        correlations", Psychometrika 65, 2000.
    """
    found = []
    for kind in _KINDS:
        values: dict[WeightBits, list[tuple[float, float]]] = {}
        for name, layer in choices.layers.items():
            candidates = getattr(layer, f"{kind}_bits")
            if len(candidates) > 1:
                pairs = zip(getattr(first[name], kind), getattr(second[name], kind), strict=True)
                for bits, pair in zip(candidates, pairs, strict=True):
                    values.setdefault(bits, []).append(pair)
        for bits, pairs in values.items():
            rho = spearman(*zip(*pairs, strict=True))
            found.append(RankCorrelation(kind, bits, rho, _interval(rho, len(pairs)), len(pairs)))
    return found


def spearman(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Spearman's rank correlation, equal values sharing their mean rank; None where it is not defined."""
    ranks = [_ranks(np.asarray(values)) for values in (first, second)]
    if any(np.ptp(r) == 0 for r in ranks):
        return None
    return float(np.corrcoef(*ranks)[0, 1])


def total_increase(increases: Increases, choices: SpaceChoices, policy: Policy) -> float:
    """The increases of the loss of all choices of a policy, added up; a tensor that stays float adds nothing."""
    return math.fsum(_increase(increases, choices, policy, name, kind) for name in choices.layers for kind in _KINDS)


def least_increase(
    increases: Increases,
    choices: SpaceChoices,
    profiles: Mapping[str, LayerProfile],
    limits: Mapping[str, int],
    kept: Mapping[str, LayerPolicy],
) -> Policy:
    """The policy within the limits whose increases of the loss add up to the least.

    Args:
        increases: Of every candidate.
        choices: The candidates.
        profiles: What the layers cost.
        limits: By metric.
        kept: Layers whose bits are given.

    Raises:
        InfeasibleBudgetError: No policy meets the limits.
    """
    pinned = {name: LayerChoices((b.weight_bits,), (b.act_bits,), pinned=True) for name, b in kept.items()}
    free_of = [[name for name in group.layers if name not in kept] for group in choices.groups]
    groups = tuple(Group(n, g.share) for n, g in zip(free_of, choices.groups, strict=True) if len(n) > 1)
    choices = replace(choices, layers={**choices.layers, **pinned}, groups=groups)
    free = [name for name in choices.layers if name not in kept]
    scores = {name: -np.add.outer(increases[name].weight, increases[name].act) for name in free}
    return choices.policy(solve(scores, cost_tables(profiles, choices), limits, groups=choices.groups))


def starved(increases: Increases, choices: SpaceChoices, policy: Policy, wanted: Policy) -> list[Starved]:
    """The tensors that have fewer bits in `policy` than in `wanted`, from the one that it costs most loss.

    Args:
        increases: Of every candidate.
        choices: The candidates.
        policy: Any policy of them.
        wanted: Another, such as that of `least_increase` at equal cost.
    """
    found = []
    for name in choices.layers:
        for kind in _KINDS:
            bits, more = (getattr(p[name], f"{kind}_bits") for p in (policy, wanted))
            if None not in (bits, more) and bit_width(bits) < bit_width(more):
                lost, kept = (_increase(increases, choices, p, name, kind) for p in (policy, wanted))
                found.append(Starved(name, kind, bits, more, lost - kept))
    return sorted(found, key=lambda one: -one.increase)


def by_candidate(increases: Increases, choices: SpaceChoices) -> dict[str, dict[str, dict[str, float]]]:
    """Increases as JSON: by layer, tensor and candidate, of the tensors that have a choice."""
    return {
        name: {
            kind: dict(zip(map(str, candidates), getattr(increases[name], kind), strict=True))
            for kind in _KINDS
            if len(candidates := getattr(layer, f"{kind}_bits")) > 1
        }
        for name, layer in choices.layers.items()
        if not layer.pinned
    }


def _increase(increases: Increases, choices: SpaceChoices, policy: Policy, name: str, kind: str) -> float:
    bits, candidates = getattr(policy[name], f"{kind}_bits"), getattr(choices.layers[name], f"{kind}_bits")
    return 0.0 if bits is None else getattr(increases[name], kind)[candidates.index(bits)]


def _ranks(values: np.ndarray) -> np.ndarray:
    _, which, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[which]


def _interval(rho: float | None, layers: int) -> tuple[float, float] | None:
    """By Fisher's transformation, with the variance ``(1 + rho^2 / 2) / (n - 3)`` for Spearman's correlation."""
    if rho is None or layers < 4 or abs(rho) > 1 - 1e-12:
        return None
    center, half = math.atanh(rho), _QUANTILE * math.sqrt((1 + rho**2 / 2) / (layers - 3))
    return math.tanh(center - half), math.tanh(center + half)
