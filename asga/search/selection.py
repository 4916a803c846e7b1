"""From what a search learned to a policy: the likeliest within the budget, then what is left of the budget is spent."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np

from asga.policy import Policy, bit_width
from asga.search.budget import Budget
from asga.search.costs import cost_tables, policy_costs
from asga.search.groups import SIDES
from asga.search.profiles import LayerProfile
from asga.search.solver import solve
from asga.search.space import SpaceChoices

# A softmax at low temperature makes probabilities as small as it likes. This much of each is uniform when a budget is
# spent, so that more bits always count for more than the solver's tolerance; a search tells nothing so small apart.
_UNIFORM_SHARE = 1e-6


@dataclass(frozen=True)
class LogProbabilities:
    """Natural logarithms of the probabilities of one layer's candidates, in the order of its choices.

    Of methods without training they are scores, up to a constant: minus the estimated increases of the loss (or 0 for
    the candidate chosen and -1 for the others, where the method is uniform or random).
    """

    weight: tuple[float, ...]
    act: tuple[float, ...]


def best_policy(
    log_probs: Mapping[str, LogProbabilities],
    choices: SpaceChoices,
    profiles: Mapping[str, LayerProfile],
    budget: Budget,
    meta: Mapping[str, object] | None = None,
    *,
    trained: bool = True,
    spend: bool = True,
) -> Policy:
    """The policy of largest joint probability within a budget, its bits raised while budget is left.

    The likeliest policy need not cost what the budget allows: the mixture spends all of it in expectation, but its
    likeliest candidates may lie below their mean. What is left would be given away, as a tensor quantized with more
    bits is never further from the float one. So, second, the answer is taken from the policies within the budget that
    have nowhere fewer bits than the likeliest one: that for which it is most probable that all bits suffice. The bits
    that a tensor needs are taken to be distributed as the search learned it, so that b bits suffice with the
    probability of all candidates up to b. Bits go where the search doubts that the likeliest suffice, and where it
    tossed a coin; they are raised until nothing more fits.

    Args:
        log_probs: Of every layer with candidates.
        choices: The candidates.
        profiles: What the layers cost.
        budget: The limits.
        meta: Further metadata of the policy.
        trained: `log_probs` are probabilities. Otherwise they are scores, which add up over the layers of a group, and
            are best met as they are.
        spend: Raise bits while budget is left.

    Returns:
        The policy. Its metadata has budget, limits and costs, and the layers that were pinned, which words such as
        ``"w4a4"`` leave at their bits; of a trained search also its ``log_prob``, and ``likeliest_costs``, those of the
        likeliest policy before bits were raised.

    Raises:
        InfeasibleBudgetError: Nothing meets the budget.
    """
    limits, tables = budget.limits(profiles, choices), cost_tables(profiles, choices)
    find = partial(solve, costs=tables, limits=limits, groups=choices.groups)
    scores = {name: (np.array(p.weight), np.array(p.act)) for name, p in log_probs.items()}
    joint = _joint(scores, choices, once=trained)
    chosen = find(joint)
    pinned = [name for name, layer in choices.layers.items() if layer.pinned]
    facts = {"budget": budget.to_dict(), "limits": limits, "pinned": pinned}
    if trained:
        facts["likeliest_costs"] = policy_costs(profiles, choices.policy(chosen)).to_dict()
        if spend:
            chosen = find(_joint(_sufficient(scores, choices), choices), allowed=_raised(chosen, choices))
        facts["log_prob"] = math.fsum(joint[name][chosen[name]] for name in joint)
    policy = choices.policy(chosen)
    facts["costs"] = policy_costs(profiles, policy).to_dict()
    return Policy(policy, {**(meta or {}), **facts})


Sides = Mapping[str, tuple[np.ndarray, np.ndarray]]
"""By layer a score for each candidate of its weight and of its input."""


def _joint(scores: Sides, choices: SpaceChoices, *, once: bool = True) -> dict[str, np.ndarray]:
    """By layer the scores of all pairs.

    Args:
        scores: Of the candidates.
        choices: With the groups.
        once: What a group shares is one choice and counts for its first layer only.
    """
    decided = choices.decisions
    return {
        name: np.add.outer(
            *(values * (not once or (name, side) in decided) for side, values in zip(SIDES, both, strict=True))
        )
        for name, both in scores.items()
    }


def _sufficient(log_probs: Sides, choices: SpaceChoices) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """By layer the logarithms of the probabilities that a candidate's bits suffice.

    Of two candidates as wide as each other (int8 and fp8) the likelier one rather suffices.
    """

    def of(values: np.ndarray, bits: tuple[int | None, ...]) -> np.ndarray:
        probs = (1 - _UNIFORM_SHARE) * np.exp(values) + _UNIFORM_SHARE / len(values)
        widths = np.array([bit_width(b) for b in bits])
        narrower = np.array([probs[widths < w].sum() for w in widths])
        return np.log(narrower + probs)

    return {
        name: (of(weight, choices.layers[name].weight_bits), of(act, choices.layers[name].act_bits))
        for name, (weight, act) in log_probs.items()
    }


def _raised(chosen: Mapping[str, tuple[int, int]], choices: SpaceChoices) -> dict[str, np.ndarray]:
    """By layer the pairs that have nowhere fewer bits than the chosen one: each side the same candidate or a wider."""
    allowed = {}
    for name, layer in choices.layers.items():
        sides = []
        for at, bits in zip(chosen[name], (layer.weight_bits, layer.act_bits), strict=True):
            sides.append([k == at or bit_width(b) > bit_width(bits[at]) for k, b in enumerate(bits)])
        allowed[name] = np.logical_and.outer(*sides)
    return allowed
