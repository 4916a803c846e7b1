"""The integer program behind the solver: exact, and small enough to be quick."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from asga._extras import require

if TYPE_CHECKING:
    import scipy.sparse

# HiGHS stops within 1e-6 of the optimum, whatever its scale. With the largest loss scaled to 1e3 that is 1e-9
# of it; a much larger scale would run into the 1e-6 by which HiGHS lets variables miss 0 and 1.
TOLERANCE = 1e-6
LARGEST_LOSS = 1e3
_MAX_CUTS = 1000  # limits that cut between near-equal costs of 12 digits took one or two
# Pairs beside the best of each layer that the first core has. Few programs need more, and time grows fast with it:
# 1 ms for 50 layers with 10 more pairs, 50 ms with 50 more.
_FIRST_CORE = 10


@dataclass(frozen=True)
class Pair:
    """One candidate of a layer.

    Args:
        index: Its place in the layer's matrices.
        loss: Its score below the layer's best.
        extra: By limited metric, its cost above the layer's least.
        relative_cost: The sum of `extra`, each divided by what the limit leaves to spend.
    """

    index: tuple[int, int]
    loss: float
    extra: tuple[int, ...]
    relative_cost: float


@dataclass(frozen=True)
class Link:
    """Layers, by number, whose pairs have the same index along an axis."""

    axis: int
    layers: tuple[int, ...]


class Program:
    """One pair of each layer, linked ones alike, so that the sum of each extra cost is at most its slack.

    Most pairs cannot be part of the best solution, and the duals of the relaxation prove it: a solution with a certain
    pair loses at least the relaxation's bound and that pair's reduced cost. So the program is solved on a *core* of
    pairs with small reduced costs, and its answer is the best of all once it loses no more than any pair outside would.

    HiGHS accepts answers that exceed a row by its tolerance, so every answer is checked in integers. One that
    exceeds a limit is cut off, together with all that cost as much or more in every layer, by a cover
    inequality: its coefficients are 0 and 1, so no tolerance blurs it. Then the program is solved again.

    Args:
        layers: Pairs of each layer, at least one; the first has the least loss.
        slack: By limited metric, what may be spent above the least.
        links: Layers with shared bits.

    Source:
        Kellerer, Pferschy and Pisinger, "Knapsack Problems", Springer 2004: the multiple-choice knapsack and its core
        (chapter 11), and cover inequalities.
    """

    def __init__(self, layers: Sequence[Sequence[Pair]], slack: Sequence[int], links: Sequence[Link] = ()) -> None:
        self._pairs = [pair for layer in layers for pair in layer]
        self._owner = np.repeat(np.arange(len(layers)), [len(layer) for layer in layers])
        self._slack = slack
        # Relative to the slack: rows of order one, whatever the unit of the metric.
        extras = [[pair.extra[m] / max(room, 1) for pair in self._pairs] for m, room in enumerate(slack)]
        self._limits = np.array(extras, dtype=float).reshape(len(slack), len(self._pairs))
        self._upper = np.ones(len(slack))
        self._equal = self._equalities(links)
        self._equal_to = np.zeros(self._equal.shape[0])
        self._equal_to[: len(layers)] = 1.0
        losses = np.array([pair.loss for pair in self._pairs])
        self._scale = LARGEST_LOSS / (losses.max() or 1.0)
        self._losses = losses * self._scale
        self._relative_costs = np.array([pair.relative_cost for pair in self._pairs]) * LARGEST_LOSS

    def least_loss(self) -> list[Pair] | None:
        """The pairs of least total loss, and of these the cheapest; None if nothing fits."""
        bound, reduced = self._relaxed()
        if bound is None:
            return None
        order = np.sort(reduced)
        gap = order[min(np.count_nonzero(reduced <= 0) + _FIRST_CORE, len(order)) - 1]
        while True:
            core = reduced <= gap + TOLERANCE
            chosen = self._minimize(self._losses, core)
            if chosen is not None and (core.all() or self._loss(chosen) <= bound + gap):
                break
            if core.all():
                return None
            # What the core found bounds the gap; if it found nothing, twice as many pairs may.
            doubled = order[min(2 * np.count_nonzero(core), len(order) - 1)]
            gap = doubled if chosen is None else self._loss(chosen) - bound
        return self._cheapest(chosen, reduced <= self._loss(chosen) - bound + TOLERANCE)

    def _cheapest(self, best: list[Pair], core: np.ndarray) -> list[Pair]:
        """Of the answers as good as `best` the cheapest; all of them are in the core."""
        if np.count_nonzero(core) == len(best):
            return best
        loss = self._loss(best)
        cheapest = self._minimize(self._relative_costs, core, largest_loss=loss)
        return cheapest if cheapest and self._loss(cheapest) <= loss + TOLERANCE else best

    def _loss(self, chosen: Sequence[Pair]) -> float:
        return math.fsum(pair.loss for pair in chosen) * self._scale

    def _equalities(self, links: Sequence[Link]) -> "scipy.sparse.csc_array":
        """A row for each layer, the sum of its pairs, and rows that are zero where linked layers choose the same index.

        Sparse: of a thousand layers' rows all but a thousandth is zero.
        """
        entries = [(self._owner, np.arange(len(self._owner)), np.ones(len(self._owner)))]
        count = int(self._owner[-1]) + 1
        for link in links:
            first, *others = (np.flatnonzero(self._owner == layer) for layer in link.layers)
            place = np.array([pair.index[link.axis] for pair in self._pairs])
            for other in others:
                members = np.concatenate([first, other])
                indices, rows = np.unique(place[members], return_inverse=True)
                signs = np.repeat([1.0, -1.0], [len(first), len(other)])
                entries.append((count + rows, members, signs))
                count += len(indices)
        rows, columns, values = map(np.concatenate, zip(*entries, strict=True))
        shape = count, len(self._pairs)
        return require("scipy.sparse", "search").csc_array((values, (rows, columns)), shape=shape)

    def _relaxed(self) -> tuple[float | None, np.ndarray | None]:
        """A lower bound of the loss, and by how much more a solution with a certain pair loses at least."""
        result = require("scipy.optimize", "search").linprog(
            self._losses, self._limits, self._upper, self._equal, self._equal_to, bounds=(0, 1), method="highs"
        )
        if result.status == 2:  # proven infeasible
            return None, None
        _check_solved(result)
        # Any multipliers of the right sign give a bound; those of HiGHS may miss the sign by rounding.
        of_limits = np.minimum(result.ineqlin.marginals, 0.0)
        links = slice(self._owner[-1] + 1, None)
        reduced = self._losses - of_limits @ self._limits - result.eqlin.marginals[links] @ self._equal[links]
        best = np.full(self._owner[-1] + 1, np.inf)
        np.minimum.at(best, self._owner, reduced)
        return float(best.sum() + of_limits @ self._upper), reduced - best[self._owner]

    def _minimize(self, objective: np.ndarray, core: np.ndarray, largest_loss: float = math.inf) -> list[Pair] | None:
        """The pairs of the core with the least sum of `objective` within the limits; None if nothing fits."""
        for _ in range(_MAX_CUTS):
            chosen = self._solve(objective, core, largest_loss)
            exceeded = None if chosen is None else exceeds(chosen, self._slack)
            if exceeded is None:
                return chosen
            owners = zip(self._pairs, self._owner, strict=True)
            cover = [pair.extra[exceeded] >= chosen[owner].extra[exceeded] for pair, owner in owners]
            self._limits = np.vstack([self._limits, cover])
            self._upper = np.append(self._upper, len(chosen) - 1.0)
        raise RuntimeError(f"the solver's answers exceed the limits even after {_MAX_CUTS} cuts")

    def _solve(self, objective: np.ndarray, core: np.ndarray, largest_loss: float) -> list[Pair] | None:
        optimize = require("scipy.optimize", "search")
        rows, upper = np.vstack([self._limits, self._losses])[:, core], [*self._upper, largest_loss]
        # In one of a hundred programs HiGHS prints "... tmpSolver.run();" when it repairs an answer of its own; neither
        # `disp` nor tolerances nor solving without presolve silence that: https://github.com/jump-dev/HiGHS.jl/issues/312
        result = optimize.milp(
            objective[core],
            integrality=np.ones(np.count_nonzero(core)),
            bounds=optimize.Bounds(0, 1),
            constraints=[
                optimize.LinearConstraint(self._equal[:, core], self._equal_to, self._equal_to),
                optimize.LinearConstraint(rows, -np.inf, upper),
            ],
            options={"mip_rel_gap": 0},
        )
        if result.status == 2:  # proven infeasible
            return None
        _check_solved(result)
        pairs = np.flatnonzero(core)
        chosen: dict[int, int] = {}
        for k in np.argsort(result.x, kind="stable"):  # the largest variable of each layer comes last
            chosen[int(self._owner[pairs[k]])] = int(pairs[k])
        return [self._pairs[chosen[layer]] for layer in range(len(chosen))]


def exceeds(chosen: Sequence[Pair], slack: Sequence[int]) -> int | None:
    """The first limit that the pairs exceed, in exact integers."""
    totals = (sum(pair.extra[m] for pair in chosen) for m in range(len(slack)))
    return next((m for m, total in enumerate(totals) if total > slack[m]), None)


def _check_solved(result: object) -> None:
    if not result.success:
        raise RuntimeError(f"the integer program could not be solved: {result.message}")
