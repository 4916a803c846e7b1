"""The best policy within budgets: a multiple-choice knapsack, solved as an integer program and verified."""

import operator
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import reduce

import numpy as np

from asga.policy import did_you_mean
from asga.search.costs import PEAKS
from asga.search.groups import SIDES, Group
from asga.search.program import Link, Pair, Program, exceeds


class InfeasibleBudgetError(ValueError):
    """No policy meets the budgets.

    Args:
        message: What cannot be met, and the least that can.
        limits: The limits asked for, by metric.
        least: The least cost of any policy, by metric, each metric taken alone.
        least_together: By metric, the least cost of a policy that meets the other limits; empty where some limit cannot
            be met even alone, and without the metrics for which nothing meets the other limits.
    """

    def __init__(
        self, message: str, limits: dict[str, int], least: dict[str, int], least_together: dict[str, int] | None = None
    ) -> None:
        super().__init__(message)
        self.limits = limits
        self.least = least
        self.least_together = least_together or {}


def solve(
    scores: Mapping[str, np.ndarray],
    costs: Mapping[str, Mapping[str, np.ndarray]],
    limits: Mapping[str, int],
    *,
    groups: Sequence[Group] = (),
    allowed: Mapping[str, np.ndarray] | None = None,
) -> dict[str, tuple[int, int]]:
    """Choose one candidate pair per layer so that the sum of scores is largest and every limit is met.

    The answer meets every limit in exact integer arithmetic. Its score is the largest there is, up to 1e-9 of
    the largest difference between two scores of one layer. Of equal scores the cheaper is taken, by the sum
    over the metrics of (cost - least cost) / (limit - least cost). The same input gives the same answer.

    Args:
        scores: Per layer a float matrix ``[len(weight_bits), len(act_bits)]``, such as log-probabilities.
            Layers with a single candidate pair may be left out.
        costs: Per metric and layer an integer matrix of the same shape (`asga.search.costs.cost_tables`).
        limits: Per metric the largest sum allowed; for those in `asga.search.costs.PEAKS` the largest cost of any
            layer. Metrics of `costs` without a limit do not count.
        groups: Layers that choose alike (`SpaceChoices.groups`). Scores and costs of all of them count.
        allowed: Per layer a boolean matrix, True for the pairs that may be chosen; layers that are left out may choose
            any.

    Returns:
        The chosen ``(i, j)`` of every layer in `costs`, in that order.

    Raises:
        ImportError: scipy is not installed.
        InfeasibleBudgetError: Nothing meets the limits.
        RuntimeError: The solver gave up, which no known input makes it do.
        TypeError: A limit or a cost is not an integer.
        ValueError: A score is NaN or infinite, or names or shapes do not agree.
    """
    limits = {metric: _integer(f"limits[{metric!r}]", limit) for metric, limit in limits.items()}
    tables = _check_costs(costs, limits)
    _check_groups(groups, tables)
    scores = _check_scores(scores, tables)
    problem = _Problem(tables, limits, groups, allowed or {})
    least = {metric: problem.least(metric) for metric in limits}
    if any(limit < least[metric] for metric, limit in limits.items()):
        raise _infeasible("no policy meets the budget", limits, least)
    chosen = problem.solve(scores, limits)
    if chosen is None:
        together = {metric: problem.least_together(metric, limits) for metric in limits}
        raise _infeasible("each limit can be met alone, but not all of them together", limits, least, together)
    return {name: pair.index for name, pair in zip(tables, chosen, strict=True)}


def check_feasible(
    costs: Mapping[str, Mapping[str, np.ndarray]], limits: Mapping[str, int], *, groups: Sequence[Group] = ()
) -> None:
    """Check that some policy meets the limits. Needs no scores, so it can be asked before any training.

    Args:
        costs: As for `solve`.
        limits: As for `solve`.
        groups: As for `solve`.

    Raises:
        InfeasibleBudgetError: Nothing meets the limits; the message has the least cost of every metric.
        TypeError: As for `solve`.
        ValueError: As for `solve`.
    """
    indifferent = {name: np.zeros(np.shape(t)) for tables in costs.values() for name, t in tables.items()}
    solve(indifferent, costs, limits, groups=groups)


class _Problem:
    """Costs, groups and allowed pairs of one model; limits and scores come with each question."""

    def __init__(
        self,
        tables: Mapping[str, np.ndarray],
        metrics: Iterable[str],
        groups: Sequence[Group],
        allowed: Mapping[str, np.ndarray],
    ) -> None:
        self._tables, self._metrics, self._allowed = tables, list(metrics), allowed
        self._links = [
            Link(SIDES.index(side), tuple(list(tables).index(name) for name in group.layers))
            for group in groups
            for side in group.sides
        ]
        # By layer the links of its weight and of its activation bits, None where it has its own.
        self._links_of: list[list[int | None]] = [[None, None] for _ in tables]
        for number, link in enumerate(self._links):
            for layer in link.layers:
                self._links_of[layer][link.axis] = number

    def least(self, metric: str) -> int:
        """The least cost by one metric, exactly."""
        m, total = self._metrics.index(metric), np.maximum if metric in PEAKS else np.add
        factors = []
        for table, links in zip(self._tables.values(), self._links_of, strict=True):
            own = tuple(axis for axis in (0, 1) if links[axis] is None)
            scope = tuple(link for link in links if link is not None)
            costs = table[m].min(axis=own) if own else table[m]
            # In the order of the links, so that tables can be lined up.
            factors.append((scope, costs) if list(scope) == sorted(scope) else (scope[::-1], costs.T))
        return _eliminate(factors, total)

    def least_together(self, metric: str, limits: Mapping[str, int]) -> int | None:
        """The least cost by one metric of a policy that meets the limits on the others; None if nothing does."""
        m = self._metrics.index(metric)
        others = {name: limit for name, limit in limits.items() if name != metric}
        if metric in PEAKS:
            indifferent = {name: np.zeros(table.shape[1:]) for name, table in self._tables.items()}
            peaks = sorted({int(cost) for table in self._tables.values() for cost in table[m].flat})
            met = bisect_left(
                peaks, True, key=lambda peak: self.solve(indifferent, others | {metric: peak}) is not None
            )
            return peaks[met] if met < len(peaks) else None
        chosen = self.solve({name: -table[m].astype(float) for name, table in self._tables.items()}, others)
        if chosen is None:
            return None
        return sum(int(table[(m, *pair.index)]) for table, pair in zip(self._tables.values(), chosen, strict=True))

    def solve(self, scores: Mapping[str, np.ndarray], limits: Mapping[str, int]) -> list[Pair] | None:
        """The pairs of the best sum of scores, and of these the cheapest; None if nothing meets the limits."""
        peaks = {self._metrics.index(metric): limit for metric, limit in limits.items() if metric in PEAKS}
        sums = {self._metrics.index(metric): limit for metric, limit in limits.items() if metric not in PEAKS}
        slack = [limit - sum(int(table[m].min()) for table in self._tables.values()) for m, limit in sums.items()]
        layers = []
        for (name, table), links in zip(self._tables.items(), self._links_of, strict=True):
            fits = np.array(self._allowed.get(name, np.ones(table.shape[1:], dtype=bool)))
            for m, limit in peaks.items():
                fits &= table[m] <= limit
            layers.append(_useful_pairs(scores[name], table[list(sums)], fits, slack, links))
        if not all(layers):
            return None
        best = [layer[0] for layer in layers]
        if exceeds(best, slack) is None and self._linked_alike(best):
            return best
        return Program(layers, slack, self._links).least_loss()

    def _linked_alike(self, chosen: Sequence[Pair]) -> bool:
        return all(len({chosen[layer].index[link.axis] for layer in link.layers}) == 1 for link in self._links)


def _useful_pairs(
    scores: np.ndarray, table: np.ndarray, fits: np.ndarray, slack: Sequence[int], links: Sequence[int | None]
) -> list[Pair]:
    """The pairs that fit by themselves and that no other beats in score and every cost, best score first.

    Where an index is shared with other layers, a pair is only beaten by one that has the same.
    """
    room = np.array([min(left, np.iinfo(np.int64).max) for left in slack], dtype=np.int64)
    extra = np.moveaxis(table - table.min(axis=(1, 2), keepdims=True), 0, -1)
    index = np.argwhere(fits & (extra <= room).all(-1))
    losses, extra = (scores.max() - scores)[tuple(index.T)], extra[tuple(index.T)]
    relative_costs = (extra / np.maximum(room, 1)).sum(-1)
    order = np.lexsort((*index.T[::-1], relative_costs, losses))
    index, losses, extra, relative_costs = index[order], losses[order], extra[order], relative_costs[order]
    shared = index[:, [link is not None for link in links]]
    # [pair, other]: no other in front of a pair, so of no less score, may cost as little.
    beaten = (extra[None] <= extra[:, None]).all(-1) & (shared[None] == shared[:, None]).all(-1)
    useful = ~np.tril(beaten, -1).any(1)
    return [
        Pair(tuple(at), loss, tuple(costs), relative)
        for at, loss, costs, relative, keep in zip(
            index.tolist(), losses.tolist(), extra.tolist(), relative_costs.tolist(), useful, strict=True
        )
        if keep
    ]


def _eliminate(factors: Iterable[tuple[tuple[int, ...], np.ndarray]], total: Callable) -> int:
    """The least total of tables that share axes: each axis in turn is minimized out of the tables that have it.

    Args:
        factors: Tables with the names of their axes, ascending.
        total: How costs add up, `np.add` or `np.maximum`.

    Source:
        Dechter, "Bucket elimination: a unifying framework for reasoning", Artificial Intelligence 113, 1999.
    """
    factors = list(factors)
    while axes := sorted({axis for scope, _ in factors for axis in scope}):
        # The axis that meets the fewest others makes the smallest table.
        scopes = {a: sorted({b for scope, _ in factors if a in scope for b in scope}) for a in axes}
        axis = min(axes, key=lambda a: len(scopes[a]))
        scope = scopes[axis]
        met = [
            table.reshape([table.shape[own.index(a)] if a in own else 1 for a in scope])
            for own, table in factors
            if axis in own
        ]
        least = reduce(total, met).min(axis=scope.index(axis))
        factors = [factor for factor in factors if axis not in factor[0]]
        factors.append((tuple(a for a in scope if a != axis), least))
    return int(reduce(total, (table for _, table in factors)))


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


def _check_groups(groups: Sequence[Group], tables: Mapping[str, np.ndarray]) -> None:
    for side, axis in zip(SIDES, (1, 2), strict=True):
        names = [name for group in groups if side in group.sides for name in group.layers]
        for name in names:
            if name not in tables:
                raise ValueError(f"groups has {name!r}, which costs has not{did_you_mean(name, tables)}")
            if names.count(name) > 1:
                raise ValueError(f"two groups share the {side} bits of {name!r}; make one group of them")
        for group in groups:
            sizes = {tables[name].shape[axis] for name in group.layers if side in group.sides}
            if len(sizes) > 1:
                raise ValueError(f"layers of {group} have different numbers of candidates: {sorted(sizes)}")


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


def _infeasible(
    reason: str, limits: dict[str, int], least: dict[str, int], together: dict[str, int | None] | None = None
) -> InfeasibleBudgetError:
    together = {name: cost for name, cost in (together or {}).items() if cost is not None}
    lines = [f"{reason}:"]
    for name, limit in limits.items():
        others = f", {together[name]:,} with the other limits met" if name in together and len(limits) > 1 else ""
        lines.append(f"  {name}: limit {limit:,}, least possible {least[name]:,}{others}")
    return InfeasibleBudgetError("\n".join(lines), limits, least, together)
