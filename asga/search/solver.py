"""The best policy within budgets: a multiple-choice knapsack, solved as an integer program and verified."""

import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from asga._extras import require
from asga.policy import did_you_mean

# HiGHS stops within 1e-6 of the optimum, whatever its scale. With the largest loss scaled to 1e3 that is 1e-9
# of it; a much larger scale would run into the 1e-6 by which HiGHS lets variables miss 0 and 1.
_TOLERANCE = 1e-6
_LARGEST_LOSS = 1e3
_MAX_CUTS = 1000  # limits that cut between near-equal costs of 12 digits took one or two


class InfeasibleBudgetError(ValueError):
    """No policy meets the budgets.

    Args:
        message: What cannot be met, and the least that can.
        limits: The limits asked for, by metric.
        least: The least cost of any policy, by metric, each metric taken alone.
    """

    def __init__(self, message: str, limits: dict[str, int], least: dict[str, int]) -> None:
        super().__init__(message)
        self.limits = limits
        self.least = least


def solve(
    scores: Mapping[str, np.ndarray],
    costs: Mapping[str, Mapping[str, np.ndarray]],
    limits: Mapping[str, int],
) -> dict[str, tuple[int, int]]:
    """Choose one candidate pair per layer so that the sum of scores is largest and every limit is met.

    The answer meets every limit in exact integer arithmetic. Its score is the largest there is, up to 1e-9 of
    the largest difference between two scores of one layer. Of equal scores the cheaper is taken, by the sum
    over the metrics of (cost - least cost) / (limit - least cost). The same input gives the same answer.

    Args:
        scores: Per layer a float matrix ``[len(weight_bits), len(act_bits)]``, such as log-probabilities.
            Layers with a single candidate pair may be left out.
        costs: Per metric and layer an integer matrix of the same shape (`asga.search.costs.cost_tables`).
        limits: Per metric the largest sum allowed. Metrics of `costs` without a limit do not count.

    Returns:
        The chosen ``(i, j)`` of every layer in `costs`, in that order.

    Raises:
        ImportError: scipy is not installed.
        InfeasibleBudgetError: Nothing meets the limits.
        RuntimeError: The solver gave up, which no known input makes it do.
        TypeError: A limit or a cost is not an integer.
        ValueError: A score is NaN or infinite, or names or shapes do not agree.

    Source:
        Kellerer, Pferschy and Pisinger, "Knapsack Problems", Springer 2004: the multiple-choice knapsack
        (chapter 11) and cover inequalities.
    """
    limits = {metric: _integer(f"limits[{metric!r}]", limit) for metric, limit in limits.items()}
    tables = _check_costs(costs, limits)
    scores = _check_scores(scores, tables)
    least = {metric: sum(int(table[m].min()) for table in tables.values()) for m, metric in enumerate(limits)}
    slack = [limit - least[metric] for metric, limit in limits.items()]
    if any(room < 0 for room in slack):
        raise _infeasible("no policy meets the budget", limits, least)
    layers = [_useful_pairs(scores[name], table, slack) for name, table in tables.items()]
    chosen = _best(layers, slack) if all(layers) else None
    if chosen is None:
        raise _infeasible("each limit can be met alone, but not all of them together", limits, least)
    return {name: pair.index for name, pair in zip(tables, chosen, strict=True)}


def check_feasible(costs: Mapping[str, Mapping[str, np.ndarray]], limits: Mapping[str, int]) -> None:
    """Check that some policy meets the limits. Needs no scores, so it can be asked before any training.

    Args:
        costs: As for `solve`.
        limits: As for `solve`.

    Raises:
        InfeasibleBudgetError: Nothing meets the limits; the message has the least cost of every metric.
        TypeError: As for `solve`.
        ValueError: As for `solve`.
    """
    indifferent = {name: np.zeros(np.shape(t)) for tables in costs.values() for name, t in tables.items()}
    solve(indifferent, costs, limits)


@dataclass(frozen=True)
class _Pair:
    """One candidate of a layer: its loss below the layer's best score, its costs above the layer's least."""

    index: tuple[int, int]
    loss: float
    extra: tuple[int, ...]
    relative_cost: float


def _useful_pairs(scores: np.ndarray, table: np.ndarray, slack: Sequence[int]) -> list[_Pair]:
    """The pairs that fit by themselves and that no other beats in score and every cost, best score first."""
    best, least = scores.max(), [int(costs.min()) for costs in table]
    pairs = []
    for i, j in np.ndindex(scores.shape):
        extra = tuple(int(costs[i, j]) - low for costs, low in zip(table, least, strict=True))
        if all(cost <= room for cost, room in zip(extra, slack, strict=True)):
            relative_cost = math.fsum(cost / max(room, 1) for cost, room in zip(extra, slack, strict=True))
            pairs.append(_Pair((i, j), float(best - scores[i, j]), extra, relative_cost))
    useful: list[_Pair] = []
    for pair in sorted(pairs, key=lambda p: (p.loss, p.relative_cost, p.index)):
        if not any(all(map(operator.le, other.extra, pair.extra)) for other in useful):
            useful.append(pair)
    return useful


def _best(layers: list[list[_Pair]], slack: Sequence[int]) -> list[_Pair] | None:
    """The pairs of least total loss, and of these the cheapest; None if nothing fits."""
    unconstrained = [layer[0] for layer in layers]
    if _exceeded(unconstrained, slack) is None:
        return unconstrained
    program = _Program(layers, slack)
    first = program.minimize(program.losses)
    if first is None:
        return None
    loss = math.fsum(pair.loss for pair in first) * program.loss_scale
    cheapest = program.minimize(program.relative_costs, largest_loss=loss)
    if cheapest and math.fsum(pair.loss for pair in cheapest) * program.loss_scale <= loss + _TOLERANCE:
        return cheapest
    return first


class _Program:
    """The integer program: a 0/1 variable per pair, one pair per layer, a row per limit.

    HiGHS accepts answers that exceed a row by its tolerance, so every answer is checked in integers. One that
    exceeds a limit is cut off, together with all that cost as much or more in every layer, by a cover
    inequality: its coefficients are 0 and 1, so no tolerance blurs it. Then the program is solved again.
    """

    def __init__(self, layers: list[list[_Pair]], slack: Sequence[int]) -> None:
        self._pairs = [pair for layer in layers for pair in layer]
        self._owner = np.repeat(np.arange(len(layers)), [len(layer) for layer in layers])
        self._slack = slack
        # Relative to the slack: rows of order one, whatever the unit of the metric.
        extras = [[pair.extra[m] / max(room, 1) for pair in self._pairs] for m, room in enumerate(slack)]
        self._rows = [np.array(row) for row in extras]
        self._upper = [1.0] * len(slack)
        losses = np.array([pair.loss for pair in self._pairs])
        self.loss_scale = _LARGEST_LOSS / (losses.max() or 1.0)
        self.losses = losses * self.loss_scale
        self.relative_costs = np.array([pair.relative_cost for pair in self._pairs]) * _LARGEST_LOSS

    def minimize(self, objective: np.ndarray, largest_loss: float = math.inf) -> list[_Pair] | None:
        """The pairs with the least sum of `objective` within the limits; None if nothing fits."""
        for _ in range(_MAX_CUTS):
            chosen = self._solve(objective, largest_loss)
            exceeded = None if chosen is None else _exceeded(chosen, self._slack)
            if exceeded is None:
                return chosen
            owners = zip(self._pairs, self._owner, strict=True)
            cover = [pair.extra[exceeded] >= chosen[owner].extra[exceeded] for pair, owner in owners]
            self._rows.append(np.array(cover, dtype=float))
            self._upper.append(len(chosen) - 1.0)
        raise RuntimeError(f"the solver's answers exceed the limits even after {_MAX_CUTS} cuts")

    def _solve(self, objective: np.ndarray, largest_loss: float) -> list[_Pair] | None:
        optimize, sparse = require("scipy.optimize", "search"), require("scipy.sparse", "search")
        count = len(self._pairs)
        one_each = sparse.csr_array((np.ones(count), (self._owner, np.arange(count))))
        rows, upper = np.array([*self._rows, self.losses]), [*self._upper, largest_loss]
        result = optimize.milp(
            objective,
            integrality=np.ones(count),
            bounds=optimize.Bounds(0, 1),
            constraints=[
                optimize.LinearConstraint(one_each, 1, 1),
                optimize.LinearConstraint(rows, -np.inf, upper),
            ],
            options={"mip_rel_gap": 0},
        )
        if result.status == 2:  # proven infeasible
            return None
        if not result.success:
            raise RuntimeError(f"the integer program could not be solved: {result.message}")
        chosen: dict[int, int] = {}
        for k in np.argsort(result.x, kind="stable"):  # the largest variable of each layer comes last
            chosen[int(self._owner[k])] = int(k)
        return [self._pairs[chosen[layer]] for layer in range(len(chosen))]


def _exceeded(chosen: Sequence[_Pair], slack: Sequence[int]) -> int | None:
    """The first limit that the pairs exceed, in exact integers."""
    totals = (sum(pair.extra[m] for pair in chosen) for m in range(len(slack)))
    return next((m for m, total in enumerate(totals) if total > slack[m]), None)


def _check_costs(costs: Mapping[str, Mapping[str, np.ndarray]], limits: Mapping[str, int]) -> dict[str, np.ndarray]:
    """Per layer the costs that have a limit: integers ``[metrics, len(weight_bits), len(act_bits)]``."""
    for metric in limits:
        if metric not in costs:
            raise ValueError(f"limits has {metric!r}, but costs are known for: {', '.join(costs)}")
    if not costs:
        raise ValueError("costs is empty; a table for at least one metric is needed")
    first = next(iter(costs))
    stacked = {}
    for metric, tables in costs.items():
        if tables.keys() != costs[first].keys():
            differing = sorted(tables.keys() ^ costs[first].keys())
            raise ValueError(f"costs[{metric!r}] and costs[{first!r}] have different layers: {differing}")
    for name, reference in costs[first].items():
        shape = np.shape(reference)
        for metric, tables in costs.items():
            table = np.asarray(tables[name])
            if table.ndim != 2 or table.size == 0 or table.shape != shape:
                raise ValueError(
                    f"costs[{metric!r}][{name!r}] has shape {table.shape}, costs[{first!r}] has {shape}; a "
                    f"non-empty matrix of the same shape for every metric is needed"
                )
            if not np.issubdtype(table.dtype, np.integer):
                raise TypeError(f"costs[{metric!r}][{name!r}] has dtype {table.dtype}; integers are needed")
        limited = [np.asarray(costs[metric][name]) for metric in limits]
        stacked[name] = np.stack(limited) if limited else np.empty((0, *shape), dtype=np.int64)
    return stacked


def _check_scores(scores: Mapping[str, np.ndarray], tables: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    for name in scores:
        if name not in tables:
            raise ValueError(f"scores has {name!r}, which costs has not{did_you_mean(name, tables)}")
    checked = {}
    for name, table in tables.items():
        shape = table.shape[1:]
        if name not in scores and shape != (1, 1):
            raise ValueError(f"scores lacks {name!r}, which has {shape[0]} x {shape[1]} candidates")
        score = np.asarray(scores.get(name, np.zeros(shape)), dtype=np.float64)
        if score.shape != shape:
            raise ValueError(f"scores[{name!r}] has shape {score.shape}; its costs have {shape}")
        if not np.isfinite(score).all():
            i, j = map(int, np.argwhere(~np.isfinite(score))[0])
            raise ValueError(f"scores[{name!r}][{i}, {j}] is {score[i, j]}; every score must be finite")
        checked[name] = score
    return checked


def _integer(name: str, value: object) -> int:
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name} is {value!r}; an integer is needed") from None


def _infeasible(reason: str, limits: dict[str, int], least: dict[str, int]) -> InfeasibleBudgetError:
    lines = [f"  {name}: limit {limit:,}, least possible {least[name]:,}" for name, limit in limits.items()]
    return InfeasibleBudgetError("\n".join([f"{reason}:", *lines]), limits, least)
