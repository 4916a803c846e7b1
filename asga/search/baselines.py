"""What any search must beat: a random policy, and the best uniform pair of bits within the budget."""

import operator
from collections.abc import Mapping

import numpy as np
import torch

from asga.policy import WeightBits, bit_width
from asga.search.costs import LayerProfile, cost_tables, policy_costs
from asga.search.solver import solve
from asga.search.space import SpaceChoices

# Sweeps of the sampler over all layers; a policy has forgotten where it began within some tens.
_SWEEPS = 200


def random_choice(
    profiles: Mapping[str, LayerProfile], choices: SpaceChoices, limits: Mapping[str, int]
) -> dict[str, tuple[int, int]]:
    """Draw one of all policies within the limits, every one with the same probability.

    By Gibbs sampling: beginning with the cheapest policy, layer after layer is drawn anew among those pairs of
    candidates that keep the policy within the limits. Most policies cost nearly as much as they may, so does the one
    drawn. Random numbers are those of torch's global generator.

    Args:
        profiles: What the layers cost.
        choices: Their candidates.
        limits: By metric.

    Returns:
        Per layer the indices into its candidates, as `SpaceChoices.policy` takes them.

    Raises:
        InfeasibleBudgetError: There is no such policy.

    Source:
        Morris and Sinclair, "Random walks on truncated cubes and sampling 0-1 knapsack solutions", SIAM J. Comput.
        34, 2004: walks of this kind mix rapidly.
    """
    tables = cost_tables(profiles, choices)
    shapes = {name: table.shape for name, table in next(iter(tables.values())).items()}
    chosen = solve({name: np.zeros(shape) for name, shape in shapes.items()}, tables, limits)
    # [metrics, pairs] of every layer
    costs = {name: np.stack([tables[metric][name].ravel() for metric in limits]) for name in shapes}
    pair = {name: int(np.ravel_multi_index(chosen[name], shape)) for name, shape in shapes.items()}
    room = np.array(list(limits.values())) - sum(costs[name][:, pair[name]] for name in costs)
    draws = np.random.default_rng(int(torch.randint(2**62, ())))
    for _ in range(_SWEEPS):
        for name, table in costs.items():
            room += table[:, pair[name]]
            fitting = np.flatnonzero((table <= room[:, None]).all(0))
            pair[name] = int(fitting[draws.integers(len(fitting))])
            room -= table[:, pair[name]]
    return {name: tuple(map(int, np.unravel_index(pair[name], shapes[name]))) for name in choices.layers}


def uniform_pairs(
    profiles: Mapping[str, LayerProfile], choices: SpaceChoices, limits: Mapping[str, int]
) -> list[tuple[WeightBits, int | None]]:
    """The uniform pairs of weight and activation bits worth comparing with.

    These are pairs of candidates of all searched layers that fit every limit, without those that another one which
    fits exceeds in one of both bit-widths and equals or exceeds in the other.

    Args:
        profiles: What the layers cost.
        choices: Their candidates.
        limits: By metric.

    Returns:
        Ascending by weight bits, where a small float counts like the integer of its width; none if no pair fits, or
        there is no bit-width that all layers have.
    """
    searched = [layer for layer in choices.layers.values() if not layer.pinned]
    weights = set.intersection(*(set(layer.weight_bits) for layer in searched))
    acts = set.intersection(*(set(layer.act_bits) for layer in searched))

    def fits(pair: tuple[WeightBits, int | None]) -> bool:
        costs = policy_costs(profiles, choices.uniform(*pair))
        return all(getattr(costs, metric) <= limit for metric, limit in limits.items())

    pairs = [(w, a) for w in sorted(weights, key=_order) for a in sorted(acts, key=_order)]
    widths = {pair: tuple(map(bit_width, pair)) for pair in pairs if fits(pair)}

    def dominated(width: tuple[int, ...]) -> bool:
        return any(other != width and all(map(operator.ge, other, width)) for other in widths.values())

    return [pair for pair, width in widths.items() if not dominated(width)]


def _order(bits: WeightBits | None) -> tuple[int, bool]:
    """Ascending, a small float behind the integer of its width."""
    return bit_width(bits), isinstance(bits, str)
