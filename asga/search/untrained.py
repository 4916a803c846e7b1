"""The methods that do not train: they score candidates once, and the solver does the rest."""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from asga.policy import Policy
from asga.search.baselines import random_choice
from asga.search.hessian import hessian_sensitivity
from asga.search.profiles import LayerProfile
from asga.search.scoring import Scorer
from asga.search.selection import LogProbabilities
from asga.search.sensitivity import gradient_sensitivity
from asga.search.solver import InfeasibleBudgetError
from asga.search.space import SpaceChoices

if TYPE_CHECKING:
    from asga.search.searcher import PolicySearcher


def score_candidates(
    options: "PolicySearcher",
    profiles: Mapping[str, LayerProfile],
    scorer: Scorer,
    uniform: Mapping[tuple[int, int], Policy],
) -> dict[str, LogProbabilities]:
    """What takes the place of log-probabilities in a search without training.

    Args:
        options: The search.
        profiles: What the layers cost.
        scorer: Of its policies on the proxy.
        uniform: The uniform policies within the budget, by weight and activation bits.

    Raises:
        InfeasibleBudgetError: The method is uniform, and no uniform pair is within the budget.
    """
    limits = options.budget.limits(profiles, options.choices)
    if options.method == "random":
        return _only(options.choices, random_choice(profiles, options.choices, limits))
    if options.method == "uniform":
        if not uniform:
            raise InfeasibleBudgetError("no uniform pair of candidates meets the budget", limits, {})
        scores = {pair: scorer(policy) for pair, policy in uniform.items()}
        best = min(scores, key=lambda pair: scores[pair].loss if scores[pair].finite else math.inf)
        return _only(options.choices, options.choices.uniform_choice(*best))
    if options.method == "hawq":
        found = hessian_sensitivity(options.model, options.choices, scorer.batches, loss_fn=options.loss_fn)
    else:
        found = gradient_sensitivity(
            options.model, options.choices, scorer.batches, loss_fn=options.loss_fn, autocast=options.autocast
        )
    return {
        name: LogProbabilities(*(tuple(-value for value in values) for values in increase))
        for name, increase in found.items()
    }


def _only(choices: SpaceChoices, chosen: Mapping[str, tuple[int, int]]) -> dict[str, LogProbabilities]:
    """Scores that make the solver choose this, and for other budgets what differs from it in the fewest choices."""
    return {
        name: LogProbabilities(
            *(
                tuple(0.0 if index == at else -1.0 for index in range(len(candidates)))
                for candidates, at in zip((layer.weight_bits, layer.act_bits), chosen[name], strict=True)
            )
        )
        for name, layer in choices.layers.items()
    }
