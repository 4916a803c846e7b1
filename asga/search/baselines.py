"""What any search must beat: a random policy, and the best uniform pair of bits within the budget."""

import operator
from collections.abc import Mapping

import numpy as np
import torch

from asga.policy import WeightBits, bit_width
from asga.search.costs import PEAKS, cost_tables, policy_costs
from asga.search.groups import SIDES
from asga.search.profiles import LayerProfile
from asga.search.solver import solve
from asga.search.space import SpaceChoices

# Sweeps of the sampler over all layers; a policy has forgotten where it began within some tens.
_SWEEPS = 200


def random_choice(
    profiles: Mapping[str, LayerProfile], choices: SpaceChoices, limits: Mapping[str, int]
) -> dict[str, tuple[int, int]]:
    """Draw one of all policies within the limits, every one with the same probability.

    By Gibbs sampling: beginning with the cheapest policy, layer after layer is drawn anew among those pairs of
    candidates that keep the policy within the limits; what a group shares is drawn for all its layers at once. Most
    policies cost nearly as much as they may, so does the one drawn. Random numbers are those of torch's global
    generator.

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
    names = next(iter(tables.values())).keys()
    indifferent = {name: np.zeros((len(c.weight_bits), len(c.act_bits))) for name, c in choices.layers.items()}
    chosen = solve(indifferent, tables, limits, groups=choices.groups)
    # [weight candidates, act candidates, metrics] of every layer; of a peak whether it exceeds the limit, with no room.
    costs = {
        name: np.stack([tables[m][name] > limit if m in PEAKS else tables[m][name] for m, limit in limits.items()], -1)
        for name in names
    }
    # A limit may be larger than any integer of NumPy's, but no policy costs that much.
    room = np.array([0 if metric in PEAKS else min(limit, 2**62) for metric, limit in limits.items()])
    room -= sum(costs[name][chosen[name]] for name in names)
    draws = np.random.default_rng(int(torch.randint(2**62, ())))
    blocks = _blocks(choices)
    for _ in range(_SWEEPS):
        for layers, sides in blocks:
            options = sum(costs[name][_where(chosen[name], sides)] for name in layers)
            room += sum(costs[name][chosen[name]] for name in layers)
            fitting = np.argwhere((options <= room).all(-1))
            drawn = fitting[draws.integers(len(fitting))].tolist()
            for name in layers:
                both = zip(SIDES, drawn, chosen[name], strict=True)
                chosen[name] = tuple(new if side in sides else old for side, new, old in both)
            room -= sum(costs[name][chosen[name]] for name in layers)
    return {name: chosen[name] for name in choices.layers}


def _blocks(choices: SpaceChoices) -> list[tuple[tuple[str, ...], tuple[str, ...]]]:
    """What is drawn at once: layers, and which of their sides."""
    shared = {(name, side) for group in choices.groups for side in group.sides for name in group.layers}
    own = {name: tuple(side for side in SIDES if (name, side) not in shared) for name in choices.layers}
    return [
        *((group.layers, group.sides) for group in choices.groups),
        *(((name,), own[name]) for name in own if own[name]),
    ]


def _where(chosen: tuple[int, int], sides: tuple[str, ...]) -> tuple[slice, ...]:
    """Everything along the given sides, the chosen index along the others."""
    return tuple(slice(None) if side in sides else slice(at, at + 1) for side, at in zip(SIDES, chosen, strict=True))


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
