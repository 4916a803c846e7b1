"""The rows of the report's table of layers: bits, probabilities, and how clear each choice was."""

import math
from dataclasses import dataclass

from asga.policy import WeightBits
from asga.report.probabilities import Series, described, read_series, sparkline
from asga.report.run import TENSORS, Run
from asga.report.style import Drawing
from asga.search.result import TOSS_UP


@dataclass(frozen=True)
class Candidate:
    """A bit-width or format that could be chosen, and the probability that the search gave it."""

    bits: WeightBits
    probability: float

    @property
    def shown(self) -> str:
        """What it is, in words."""
        return described(self.bits)


@dataclass(frozen=True)
class Choice:
    """What was chosen for one tensor.

    Args:
        bits: The policy's; None: float, or no policy yet.
        shown: The same as text.
        candidates: Empty where nothing was searched.
        gap: Difference of the two best log-probabilities; None where there were not two.
        by_epoch: The probabilities over the epochs; None where there was no choice.
    """

    bits: WeightBits | None
    shown: str
    candidates: tuple[Candidate, ...]
    gap: float | None
    by_epoch: Drawing | None

    @property
    def toss_up(self) -> bool:
        """Whether the two best candidates were as good as equally likely."""
        return self.gap is not None and self.gap < TOSS_UP


@dataclass(frozen=True)
class LayerRow:
    """A layer, its weight and its input."""

    name: str
    weight: Choice
    act: Choice


def layer_rows(run: Run) -> list[LayerRow]:
    """All layers of the policy, or, while there is none, all that are searched."""
    found = read_series(run)
    names = run.policy if run.policy is not None else found
    return [
        LayerRow(name, *(_choice(run, name, kind, found.get(name, {}).get(kind)) for kind in TENSORS)) for name in names
    ]


def toss_ups(rows: list[LayerRow]) -> tuple[int, int]:
    """How many choices were toss-ups, and how many there were."""
    choices = [choice for row in rows for choice in (row.weight, row.act) if choice.gap is not None]
    return sum(choice.toss_up for choice in choices), len(choices)


def _choice(run: Run, name: str, kind: str, found: Series | None) -> Choice:
    bits, shown = None, ""
    if run.policy is not None:
        bits = getattr(run.policy[name], f"{kind}_bits")
        shown = "float" if bits is None else str(bits)
    candidates, by_epoch = (), None
    if found is not None and len(found.candidates) > 1:
        candidates = tuple(map(Candidate, found.candidates, found.probabilities[-1].tolist()))
        by_epoch = sparkline(found, f"{name}, {kind}")
    # Those of a search that has ended count what a group shares once, with its first layer.
    gaps = (run.result or {}).get("logit_gaps")
    gap = _gap(candidates) if gaps is None else gaps.get(name, {}).get(kind)
    return Choice(bits, shown, candidates, gap, by_epoch)


def _gap(candidates: tuple[Candidate, ...]) -> float | None:
    if len(candidates) < 2:
        return None
    first, second = sorted((candidate.probability for candidate in candidates), reverse=True)[:2]
    return math.log(first / second) if second > 0 else math.inf
