"""What a search found: probabilities of every candidate, from which any budget's policy is solved."""

import json
import math
import os
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from asga._files import write_json
from asga.policy import Policy
from asga.search.budget import Budget, check_budget
from asga.search.comparison import UniformComparison
from asga.search.costs import Costs, policy_costs
from asga.search.groups import Group
from asga.search.methods import TRAINED
from asga.search.profiles import LayerProfile
from asga.search.selection import LogProbabilities, best_policy
from asga.search.space import LayerChoices, SpaceChoices

# Below this difference of log-probabilities the better candidate is at most 1.1 times as likely as the next.
TOSS_UP = 0.1
# Further below the budget searched for, another search is due: policies solved anew were as good as searches of their
# own at -9 % of BitOps, and 0.9 points of top-1 worse at -26 % (bench/results/frontier.md).
_TIGHTER = 0.2
# Version 2: small floats, groups, sizes of inputs, latencies. Version 1 is read as having none.
_FORMAT, _VERSION = "asga.search", 2


class FarFromBudget(UserWarning):
    """A policy for another budget that a search for it would probably better; see `FrontierPoint.far`."""


@dataclass(frozen=True)
class FrontierPoint:
    """A budget, and the policy for it that a search for another budget gives.

    Args:
        budget: The limits.
        policy: The policy within them.
        costs: Of the policy.
        distance: By metric how far the limit is from the one that was trained for: 0.25 is a quarter above, -0.5 half
            of it. For metrics that the search had no limit on, from what its policy costs.
        log_prob: Of the policy, by the probabilities at the end of the search; None of methods without training.
        far: A search for this budget is due; of methods that train. Either a limit is more than a fifth tighter, or the
            policy is less likely than if the search had learned nothing and all candidates were as likely, by more than
            a toss-up (`TOSS_UP`) for each of its choices: what was learned for the other budget speaks against it.
    """

    budget: Budget
    policy: Policy
    costs: Costs
    distance: dict[str, float]
    log_prob: float | None
    far: bool


@dataclass(frozen=True)
class SearchResult:
    """The outcome of a search.

    Args:
        policy: The best policy within the budget that was searched for.
        budget: That budget.
        choices: The candidates of every layer.
        profiles: What the layers cost, at the resolution the costs are for.
        log_probs: Of every layer with candidates, pinned ones included.
        expected_cost: At the end, by metric, the expected cost divided by its limit; of trained methods.
        history: What was logged of every epoch; of methods without training one entry with their seconds.
        method: One of `asga.search.METHODS`.
        uniform: The policy beside the uniform pairs within the budget.
    """

    policy: Policy
    budget: Budget
    choices: SpaceChoices
    profiles: dict[str, LayerProfile]
    log_probs: dict[str, LogProbabilities]
    expected_cost: dict[str, float] = field(default_factory=dict)
    history: list[dict[str, object]] = field(default_factory=list)
    method: str = "asga"
    uniform: UniformComparison | None = None

    @property
    def trained(self) -> bool:
        """Whether the method trains, so that `log_probs` are probabilities."""
        return self.method in TRAINED

    def policy_for(self, budget: Budget, meta: Mapping[str, object] | None = None, *, spend: bool = True) -> Policy:
        """The best policy within another budget, from the same probabilities, without another search.

        The further a budget is from the one searched for, the less its probabilities know about it.

        Args:
            budget: The limits.
            meta: Further metadata of the policy, besides that of the policy found.
            spend: Raise bits while budget is left; see `asga.search.selection.best_policy`.

        Returns:
            The policy. Its metadata says how far away the budget is: ``distance``, ``log_prob`` and ``far`` as in
            `FrontierPoint`.

        Raises:
            InfeasibleBudgetError: No policy meets it; the message has the least cost that can be met.
            TypeError: It is no `Budget`.
            ValueError: It limits what the profiles do not know.

        Warns:
            FarFromBudget: See `FrontierPoint.far`.
        """
        check_budget("budget", budget)
        point = self._point(budget, meta, spend)
        if point.far:
            warnings.warn(_far([point]), FarFromBudget, stacklevel=2)
        return point.policy

    def pareto(self, budgets: Iterable[Budget], *, spend: bool = True) -> list[FrontierPoint]:
        """The best policies within several budgets, from the probabilities of this one search.

        Args:
            budgets: The limits, of any metrics.
            spend: Raise bits while budget is left.

        Returns:
            A point for every budget, in their order.

        Raises:
            InfeasibleBudgetError: As `policy_for`, of the first budget that no policy meets.
            TypeError: Something else than budgets is given.
            ValueError: As `policy_for`.

        Warns:
            FarFromBudget: Points are far.
        """
        if isinstance(budgets, Budget | str):
            raise TypeError(f"budgets is {budgets!r}; several are needed, such as [Budget(bitops='w4a4')]")
        budgets = list(budgets)
        for k, budget in enumerate(budgets):
            check_budget(f"budgets[{k}]", budget)
        points = [self._point(budget, None, spend) for budget in budgets]
        if far := [point for point in points if point.far]:
            warnings.warn(_far(far), FarFromBudget, stacklevel=2)
        return points

    def distance(self, budget: Budget) -> dict[str, float]:
        """How far a budget is from the one that was searched for; see `FrontierPoint`.

        What costs nothing with the policy found, as a latency may in a table, is no measure of it and left out.
        """
        check_budget("budget", budget)
        limits, trained = (b.limits(self.profiles, self.choices) for b in (budget, self.budget))
        trained = {**self.costs(self.policy).to_dict(), **trained}
        return {metric: limit / trained[metric] - 1 for metric, limit in limits.items() if trained[metric] > 0}

    def _point(self, budget: Budget, meta: Mapping[str, object] | None, spend: bool) -> FrontierPoint:
        meta = {**self.policy.meta, **(meta or {})}
        options = {"trained": self.trained, "spend": spend}
        policy = best_policy(self.log_probs, self.choices, self.profiles, budget, meta, **options)
        distance, log_prob = self.distance(budget), policy.meta["log_prob"] if self.trained else None
        layers = self.choices.layers
        counts = [len(getattr(layers[name], f"{side}_bits")) for name, side in self.choices.decisions]
        nothing_learned = [-math.log(count) for count in counts]
        unlikely = math.fsum(nothing_learned) - TOSS_UP * len(nothing_learned)
        far = log_prob is not None and (log_prob < unlikely or min(distance.values(), default=0.0) < -_TIGHTER)
        policy = Policy(policy, {**policy.meta, "distance": distance, "far": far})
        return FrontierPoint(budget, policy, self.costs(policy), distance, log_prob, far)

    def costs(self, policy: Policy) -> Costs:
        """Exact costs of a policy for the model that was searched."""
        return policy_costs(self.profiles, policy)

    def cost_shares(self, policy: Policy) -> dict[str, float]:
        """By metric, the cost of a policy divided by its limit in the budget searched for."""
        costs, limits = self.costs(policy), self.budget.limits(self.profiles, self.choices)
        return {metric: getattr(costs, metric) / limit for metric, limit in limits.items()}

    def most_likely(self) -> Policy:
        """The policy of the likeliest candidates, whatever it costs: what the search would choose unbound."""
        chosen = {n: (int(np.argmax(p.weight)), int(np.argmax(p.act))) for n, p in self.log_probs.items()}
        return self.choices.policy(chosen)

    def gaps(self) -> dict[str, dict[str, float]]:
        """Per searched layer the difference of the two best log-probabilities of weight and act; of a group once.

        Near zero the choice of a trained method is a toss-up. Where candidates were mixed, temperature stretches these:
        they are those of the last step.
        """
        return {
            name: {kind: _gap(values) for kind, values in asdict(p).items() if (name, kind) in self.choices.decisions}
            for name, p in self.log_probs.items()
            if not self.choices.layers[name].pinned
        }

    def save(self, path: str | os.PathLike) -> None:
        """Write everything but the history as JSON."""
        write_json(
            path,
            {
                "format": _FORMAT,
                "version": _VERSION,
                "method": self.method,
                "policy": self.policy.to_dict(),
                "budget": self.budget.to_dict(),
                "names": list(self.choices.names),
                "skipped": self.choices.skipped,
                "target": self.choices.target,
                "layers": {name: asdict(layer) for name, layer in self.choices.layers.items()},
                "groups": [asdict(group) for group in self.choices.groups],
                "profiles": [asdict(profile) for profile in self.profiles.values()],
                "log_probs": {name: asdict(p) for name, p in self.log_probs.items()},
                "expected_cost": self.expected_cost,
                "uniform": None if self.uniform is None else self.uniform.to_dict(),
            },
        )

    @classmethod
    def load(cls, path: str | os.PathLike) -> "SearchResult":
        """Read what `save` wrote; the history stays empty.

        Raises:
            ValueError: It is not a search result, is of a newer version, or is damaged.
        """
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
            if data["format"] != _FORMAT or not data["version"] <= _VERSION:
                raise ValueError(f"format {data['format']!r} version {data['version']!r} is not known")
            layers = {
                name: LayerChoices(tuple(c["weight_bits"]), tuple(c["act_bits"]), c["pinned"])
                for name, c in data["layers"].items()
            }
            groups = tuple(Group(**group) for group in data.get("groups", ()))
            return cls(
                policy=Policy.from_dict(data["policy"]),
                budget=Budget(**data["budget"]),
                choices=SpaceChoices(layers, data["skipped"], tuple(data["names"]), groups, data.get("target", "any")),
                profiles={p["name"]: LayerProfile(**p) for p in data["profiles"]},
                log_probs={
                    name: LogProbabilities(tuple(p["weight"]), tuple(p["act"])) for name, p in data["log_probs"].items()
                },
                method=data.get("method", "asga"),
                expected_cost=data["expected_cost"],
                uniform=UniformComparison.from_dict(data["uniform"]) if data.get("uniform") else None,
            )
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is not a search result that this asga can read: {error!r}") from error


def _far(points: Iterable[FrontierPoint]) -> str:
    budgets = []
    for point in points:
        budgets.append(f"{point.budget} ({', '.join(f'{distance:+.0%}' for distance in point.distance.values())})")
    return (
        f"far from the budget that was searched for: {'; '.join(budgets)}. A limit is more than {_TIGHTER:.0%} "
        f"tighter, or the policy less likely than if the search had learned nothing; a search for this budget is due"
    )


def _gap(log_probs: tuple[float, ...]) -> float:
    first, second = sorted(log_probs, reverse=True)[:2]
    return first - second
