"""Dual ascent: what the cost weighs in the search's loss, found on the way instead of guessed."""

import torch
from torch import Tensor

# How fast a multiplier follows the violation, per step, and how much the violation itself weighs. In a search of 400
# steps a rate of 0.005 was too slow (expectations ended 3-14 % over the budget); the proportional part reacts at once
# and damps the overshoot of the integral part.
_RATE, _GAIN = 0.02, 2.0
# The target moves from the cost at the start to the budget over this share of the search: the network follows a slow
# descent better than a jump, and half of the search is left to settle.
_RAMP = 0.5


class DualAscent:
    """Multipliers that pull the expected costs to their limits.

    With c the expected cost divided by its limit and t the target, which goes from the first c to 1, a step adds
    ``rate * (c - t)`` to the multiplier (kept at zero or above), and the loss gets
    ``(multiplier + gain * (c - t)) * c``, its weight again kept at zero or above: except for the metric nearest to its
    limit. As long as every metric is below its target, that one is pulled up: a budget is there to be spent, and the
    gradient of the loss alone is too weak to bring bits back that were taken away too fast.

    Args:
        metrics: The metrics that have a limit.
        steps: Steps of the whole search.

    Source:
        Boyd and Vandenberghe, "Convex Optimization", 2004, section 5.5, for the multiplier; Stooke et al.,
        "Responsive Safety in Reinforcement Learning by PID Lagrangian Methods", ICML 2020, for the proportional part.
    """

    def __init__(self, metrics: list[str], steps: int) -> None:
        self.multipliers = dict.fromkeys(metrics, 0.0)
        self._start: dict[str, float] = {}
        self._steps, self._step = steps, 0

    def penalty(self, expected: dict[str, Tensor]) -> Tensor:
        """What to add to the loss.

        Args:
            expected: Per metric the expected cost divided by its limit, 0-dim, differentiable.
        """
        costs = torch.stack(list(expected.values()))
        targets = [self._target(metric, cost) for metric, cost in expected.items()]
        violations = costs.detach() - costs.new_tensor(targets)
        weights = costs.new_tensor(list(self.multipliers.values())) + _GAIN * violations
        nearest_to_limit = violations == violations.max()
        return (torch.where(nearest_to_limit, weights, weights.clamp(min=0.0)) * costs).sum()

    def update(self, expected: dict[str, float]) -> None:
        """Move the multipliers, after a step of the search."""
        for metric, cost in expected.items():
            violation = cost - self._target(metric, cost)
            self.multipliers[metric] = max(0.0, self.multipliers[metric] + _RATE * violation)
        self._step += 1

    def state_dict(self) -> dict[str, object]:
        """Multipliers, first costs and the number of steps."""
        return {"multipliers": dict(self.multipliers), "start": dict(self._start), "step": self._step}

    def load_state_dict(self, state: dict[str, object]) -> None:
        """Take over what `state_dict` gave."""
        self.multipliers, self._start = dict(state["multipliers"]), dict(state["start"])
        self._step = state["step"]

    def _target(self, metric: str, cost: Tensor | float) -> float:
        start = self._start.setdefault(metric, cost.item() if isinstance(cost, Tensor) else cost)
        left = max(0.0, 1.0 - self._step / (_RAMP * self._steps))
        return 1.0 + (start - 1.0) * left
