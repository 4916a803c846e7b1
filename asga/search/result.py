"""What a search found: probabilities of every candidate, from which any budget's policy is solved."""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from asga._files import write_json
from asga.policy import SMALL_FLOATS, Policy
from asga.search.budget import Budget
from asga.search.comparison import UniformComparison
from asga.search.costs import Costs, LayerProfile, cost_tables, policy_costs
from asga.search.methods import TRAINED
from asga.search.solver import solve
from asga.search.space import LayerChoices, SpaceChoices

# Below this difference of log-probabilities the better candidate is at most 1.1 times as likely as the next.
TOSS_UP = 0.1
_FORMAT, _VERSION = "asga.search", 2


@dataclass(frozen=True)
class LogProbabilities:
    """Natural logarithms of the probabilities of one layer's candidates, in the order of its choices.

    Of methods without training they are scores, up to a constant: minus the estimated increases of the loss (or 0 for
    the candidate chosen and -1 for the others, where the method is uniform or random).
    """

    weight: tuple[float, ...]
    act: tuple[float, ...]


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

    def policy_for(self, budget: Budget, meta: Mapping[str, object] | None = None) -> Policy:
        """The best policy within another budget, from the same probabilities, without another search.

        The further a budget is from the one searched for, the less its probabilities know about it.

        Args:
            budget: The limits.
            meta: Further metadata of the policy, besides that of the policy found.

        Raises:
            InfeasibleBudgetError: No policy meets it; the message has the least cost that can be met.
        """
        return best_policy(self.log_probs, self.choices, self.profiles, budget, {**self.policy.meta, **(meta or {})})

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
        """Per searched layer the difference of the two best log-probabilities of weight and act.

        Near zero the choice of a trained method is a toss-up. Temperature stretches these: they are those of the last
        step.
        """
        return {
            name: {kind: _gap(values) for kind, values in asdict(p).items() if len(values) > 1}
            for name, p in self.log_probs.items()
            if not self.choices.layers[name].pinned
        }

    def save(self, path: str | os.PathLike) -> None:
        """Write everything but the history as JSON, of version 2 if a candidate is a small float, else of version 1."""
        small = any(bits in SMALL_FLOATS for layer in self.choices.layers.values() for bits in layer.weight_bits)
        write_json(
            path,
            {
                "format": _FORMAT,
                "version": 2 if small else 1,
                "method": self.method,
                "policy": self.policy.to_dict(),
                "budget": self.budget.to_dict(),
                "names": list(self.choices.names),
                "skipped": self.choices.skipped,
                "layers": {name: asdict(layer) for name, layer in self.choices.layers.items()},
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
            return cls(
                policy=Policy.from_dict(data["policy"]),
                budget=Budget(**data["budget"]),
                choices=SpaceChoices(layers, data["skipped"], tuple(data["names"])),
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


def best_policy(
    log_probs: Mapping[str, LogProbabilities],
    choices: SpaceChoices,
    profiles: Mapping[str, LayerProfile],
    budget: Budget,
    meta: Mapping[str, object] | None = None,
) -> Policy:
    """The policy of largest joint probability within a budget; see `asga.search.solver.solve`."""
    limits = budget.limits(profiles, choices)
    scores = {name: np.add.outer(p.weight, p.act) for name, p in log_probs.items()}
    policy = choices.policy(solve(scores, cost_tables(profiles, choices), limits))
    costs = asdict(policy_costs(profiles, policy))
    facts = {"budget": budget.to_dict(), "limits": limits, "costs": costs}
    return Policy(policy, {**(meta or {}), **facts})


def _gap(log_probs: tuple[float, ...]) -> float:
    first, second = sorted(log_probs, reverse=True)[:2]
    return first - second
