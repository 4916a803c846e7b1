"""A policy beside the uniform pairs of bits that its budget allows."""

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field

# What differs by less than two standard errors may be due to the images that happened to be drawn.
_ERRORS = 2.0


class NotBetterThanUniform(UserWarning):
    """A search found nothing better than the best uniform pair of bits within its budget."""


@dataclass(frozen=True)
class Score:
    """What a policy achieves on the proxy.

    Args:
        losses: Of each batch.
        top1: Share of right answers, 0 to 1; None where labels are not classes.
        cost_shares: By metric, the cost divided by its limit.
    """

    losses: tuple[float, ...]
    top1: float | None
    cost_shares: dict[str, float]

    @property
    def loss(self) -> float:
        """The mean over the batches."""
        return statistics.fmean(self.losses)

    @property
    def finite(self) -> bool:
        """Whether no loss is NaN or infinite."""
        return all(map(math.isfinite, self.losses))


@dataclass(frozen=True)
class UniformComparison:
    """A policy and the uniform pairs of bits within the same budget.

    All are scored alike, on the same batches: see `asga.search.scoring.Scorer`. Weights that were trained in a mixture
    suit the policy that came of it, so after a search with training the comparison leans towards the policy: one that
    is not better here is hardly worth its search; one that is better has still to prove it after a transfer. Without
    training it leans towards few activation bits, as training repairs weights and not activations. The error is that of
    drawing the batches; it leaves out that another training would end elsewhere.

    Args:
        policy: Score of the policy.
        pairs: Scores of the uniform pairs, by names such as ``"w2a4"``.
        tuned: All were fine-tuned for a few steps from the float model, and so lean towards neither.
    """

    policy: Score
    pairs: dict[str, Score] = field(default_factory=dict)
    tuned: bool = False

    @property
    def best(self) -> str | None:
        """The pair with the least loss; None without any."""
        return min(self.pairs, key=lambda name: self.pairs[name].loss, default=None)

    @property
    def difference(self) -> float | None:
        """Loss of the policy minus that of the best pair, the mean over the batches."""
        return None if self.best is None else statistics.fmean(self._differences())

    @property
    def error(self) -> float | None:
        """Standard error of `difference`, from its spread over the batches; None with less than two."""
        differences = self._differences()
        return statistics.stdev(differences) / math.sqrt(len(differences)) if len(differences) > 1 else None

    @property
    def better(self) -> bool | None:
        """Whether the policy's loss is lower by more than two standard errors; None where that is not known."""
        return None if self.error is None else self.difference < -_ERRORS * self.error

    @property
    def verdict(self) -> str:
        """The same in words that go behind "the policy is".

        A difference in favour of the policy that is within two standard errors is not distinguishable; one against it
        is not better, whatever its size. A policy that scores exactly as the best pair, batch by batch, is that pair.
        """
        if self.best is not None and self.policy == self.pairs[self.best]:
            return f"the uniform pair {self.best} itself"
        if self.best is None:
            return "not comparable with uniform bits"
        if self.better is None:
            return "not comparable with uniform bits on a single batch (smaller ones give more)"
        if self.better:
            return "better than uniform bits"
        return f"{'not distinguishable from' if self.difference < 0 else 'NOT better than'} uniform bits"

    def __str__(self) -> str:
        if self.best is None:
            return "no uniform pair of bits fits the budget"
        pair = self.pairs[self.best]
        costs = ", ".join(
            f"{metric} {share:.1%} against {pair.cost_shares[metric]:.1%} of the limit"
            for metric, share in self.policy.cost_shares.items()
        )
        error = "" if self.error is None else f" ± {self.error:.4f}"
        tuned = " after a short fine-tuning" if self.tuned else ""
        return (
            f"loss on the proxy{tuned} {self.policy.loss:.4f}, that of the best uniform pair, {self.best}, "
            f"{pair.loss:.4f}: a difference of {self.difference:+.4f}{error} (standard error over {len(pair.losses)} "
            f"batches); {costs}"
        )

    def to_dict(self) -> dict[str, object]:
        """Everything, for JSON: also best, difference, error, better and verdict."""
        return {
            "policy": _score_dict(self.policy),
            "pairs": {name: _score_dict(score) for name, score in self.pairs.items()},
            "tuned": self.tuned,
            **{name: getattr(self, name) for name in ("best", "difference", "error", "better", "verdict")},
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, object]) -> "UniformComparison":
        """Read what `to_dict` gave."""
        pairs = {name: _read_score(score) for name, score in data["pairs"].items()}
        return cls(_read_score(data["policy"]), pairs, data.get("tuned", False))

    def _differences(self) -> list[float]:
        if self.best is None:
            return []
        return [ours - theirs for ours, theirs in zip(self.policy.losses, self.pairs[self.best].losses, strict=True)]


def _score_dict(score: Score) -> dict[str, object]:
    return {"loss": score.loss, "losses": list(score.losses), "top1": score.top1, "cost_shares": score.cost_shares}


def _read_score(data: Mapping[str, object]) -> Score:
    return Score(tuple(data["losses"]), data["top1"], dict(data["cost_shares"]))
