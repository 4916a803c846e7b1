"""Whether searches that differ in their seed agree, and the policy that all of them together make likeliest."""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean

import numpy as np

from asga.policy import Policy, WeightBits
from asga.search.result import SearchResult
from asga.search.selection import LogProbabilities, best_policy
from asga.search.space import SpaceChoices

KINDS = ("weight", "act")
Choice = tuple[str, str]

# Enough for p-values down to 1e-4, and half a second for three policies of 150 layers.
_PERMUTATIONS = 9_999


@dataclass(frozen=True)
class PairAgreement:
    """How often two policies choose the same bits; see `policy_agreement`.

    Args:
        first: The name of one.
        second: The name of the other.
        equal: The share of equal choices.
        chance: The share that chance would give.
        p_value: How often chance would give as many equal choices or more.
    """

    first: str
    second: str
    equal: float
    chance: float
    p_value: float


@dataclass(frozen=True)
class Agreement:
    """How often several policies choose the same bits; see `policy_agreement`.

    Args:
        names: Of the policies.
        equal: The share of equal choices, the mean over all pairs.
        chance: The share that chance would give.
        p_value: How often chance would give as many equal choices or more, over all pairs together.
        pairs: The same for each pair.
        bits: Per layer and tensor (``"weight"``, ``"act"``) the bits in each policy, None being float.
    """

    names: tuple[str, ...]
    equal: float
    chance: float
    p_value: float
    pairs: tuple[PairAgreement, ...]
    bits: dict[str, dict[str, tuple[WeightBits | None, ...]]]

    @property
    def choices(self) -> int:
        """How many choices were compared."""
        return sum(len(kinds) for kinds in self.bits.values())

    @property
    def unanimous(self) -> int:
        """How many of them are the same in all policies."""
        return sum(len(set(bits)) == 1 for kinds in self.bits.values() for bits in kinds.values())


def searched_choices(choices: SpaceChoices) -> list[Choice]:
    """What a search decides: tensors with more than one candidate, as pairs of layer and ``"weight"`` or ``"act"``.

    Of what a group shares only the first: the others agree when it does.
    """
    return list(choices.decisions)


def policy_agreement(policies: Mapping[str, Policy], choices: Iterable[Choice] | None = None) -> Agreement:
    """Compare policies of one model, choice by choice.

    Chance means that every policy keeps its bits but in random layers, weights and inputs each among themselves: two
    policies s and t then share on average ``sum_kind n_kind / n * sum_b m_s,kind(b) * m_t,kind(b)`` of their choices,
    with n choices of which n_kind are of that kind, and m(b) the share of bit-width b among them, as in Cohen's kappa.
    So what all layers have in common, such as fewer bits for weights than for inputs, is not counted as agreement.
    The p-value is that of a permutation test with 9,999 random placements, always the same ones; it is never zero.

    Args:
        policies: Two or more, by name.
        choices: What to compare (`searched_choices`); by default all tensors, also those that were never in
            question, such as pinned ones.

    Raises:
        ValueError: There are fewer than two policies, they are not about the same layers, or there is no choice.

    Source:
        Cohen, "A coefficient of agreement for nominal scales", 1960: the expectation. Phipson and Smyth, "Permutation
        P-values should never be zero", 2010.
    """
    names = tuple(policies)
    if len(names) < 2:
        raise ValueError(f"policies has {len(names)} entries; two or more are needed to compare them")
    first = policies[names[0]]
    for name, policy in policies.items():
        if set(policy) != set(first):
            raise ValueError(f"policies {names[0]!r} and {name!r} are not about the same layers")
    choices = [(layer, kind) for layer in first for kind in KINDS] if choices is None else list(choices)
    if not choices:
        raise ValueError("choices is empty: there is nothing to compare")
    bits: dict[str, dict[str, tuple[WeightBits | None, ...]]] = {}
    for layer, kind in choices:
        bits.setdefault(layer, {})[kind] = tuple(getattr(policy[layer], f"{kind}_bits") for policy in policies.values())

    by_kind = [[found[kind] for found in bits.values() if kind in found] for kind in KINDS]
    known = dict.fromkeys(value for table in by_kind for row in table for value in row)
    codes = {value: code for code, value in enumerate(known)}
    tables = [np.array([[codes[v] for v in row] for row in table], dtype=np.int8).T for table in by_kind if table]
    equal = sum(_equal(table) for table in tables)
    chance = sum(_expected(table) for table in tables)
    generator = np.random.default_rng(0)
    permuted = sum(_equal(_permuted(table, generator)) for table in tables)
    pairs = [
        PairAgreement(a, b, float(equal[i] / len(choices)), float(chance[i] / len(choices)), _p(permuted[i], equal[i]))
        for i, (a, b) in enumerate(itertools.combinations(names, 2))
    ]
    return Agreement(
        names=names,
        equal=fmean(pair.equal for pair in pairs),
        chance=fmean(pair.chance for pair in pairs),
        p_value=_p(permuted.sum(0), equal.sum()),
        pairs=tuple(pairs),
        bits=bits,
    )


def consensus(results: Sequence[SearchResult]) -> SearchResult:
    """What searches that differ only in their seed found together.

    Its log-probabilities are the means of theirs, so its policy is the one within the budget that all searches
    together find likeliest, were they independent. It need not be the policy of any of them. A candidate that one of
    them finds next to impossible is out.

    Args:
        results: Of the same model, space and budget.

    Returns:
        A result like that of a single search: it can be asked for the policies of other budgets. Its expected cost is
        the mean, its history empty, and its policy not yet compared with uniform bits (`PolicySearcher.compare`).

    Raises:
        ValueError: There is no result, or they are not of the same layers, candidates, costs, budget and method.
    """
    if not results:
        raise ValueError("results is empty; at least one search is needed")
    first = results[0]
    for i, result in enumerate(results):
        for what in ("choices", "profiles", "budget", "method"):
            if getattr(result, what) != getattr(first, what):
                raise ValueError(f"results[{i}] has other {what} than results[0]: only searches of one kind have a sum")
    log_probs = {
        name: LogProbabilities(*(_mean([getattr(r.log_probs[name], kind) for r in results]) for kind in KINDS))
        for name in first.log_probs
    }
    policy = best_policy(
        log_probs,
        first.choices,
        first.profiles,
        first.budget,
        {**first.policy.meta, "seeds": len(results)},
        trained=first.trained,
    )
    expected = {metric: fmean(r.expected_cost[metric] for r in results) for metric in first.expected_cost}
    return replace(first, policy=policy, log_probs=log_probs, expected_cost=expected, history=[], uniform=None)


def _equal(bits: np.ndarray) -> np.ndarray:
    """Per pair of policies how many of the bits ``[policies, ..., layers]`` are equal."""
    return np.array([(a == b).sum(-1) for a, b in itertools.combinations(bits, 2)])


def _expected(bits: np.ndarray) -> np.ndarray:
    """Per pair of policies how many would be equal on average if the layers of each were in a random order."""
    shares = np.array([[(row == value).mean() for value in np.unique(bits)] for row in bits])
    return np.array([(a * b).sum() for a, b in itertools.combinations(shares, 2)]) * bits.shape[-1]


def _permuted(bits: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Bits ``[policies, permutations, layers]``, the layers of each policy in random orders."""
    copies = np.repeat(bits[:, None], _PERMUTATIONS, axis=1)
    return generator.permuted(copies, axis=-1)


def _p(permuted: np.ndarray, observed: int) -> float:
    return (1 + int((permuted >= observed).sum())) / (1 + permuted.shape[-1])


def _mean(log_probs: Sequence[Sequence[float]]) -> tuple[float, ...]:
    """The mean of log-probabilities, shifted so that the probabilities add up to one again."""
    mean = np.mean(np.array(log_probs), axis=0)
    return tuple((mean - np.logaddexp.reduce(mean)).tolist())
