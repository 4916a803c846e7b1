"""A policy beside the uniform pairs of bits that its budget allows: on the proxy, without further training."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from asga._batches import Inputs
from asga.nn.layers import QuantizedLayer
from asga.optim.batchnorm import restore_running_statistics, save_running_statistics
from asga.policy import Policy
from asga.search.space import SpaceChoices
from asga.steps import LossFunction, evaluate, measure_batchnorm

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


@dataclass(frozen=True)
class UniformComparison:
    """A policy and the uniform pairs of bits within the same budget.

    All are scored on the same batches, as choices of one mixture: its weights and scales as the search left them (as
    calibrated, where the method does not train), batch normalization measured anew for each, no training. Weights that
    were trained in a mixture suit the policy that came of it, so the comparison leans towards the policy: one that is
    not better here is hardly worth its search; one that is better here has still to prove it after a transfer. The
    error is that of drawing the batches; it leaves out that another training would end elsewhere.

    Args:
        policy: Score of the policy.
        pairs: Scores of the uniform pairs, by names such as ``"w2a4"``.
    """

    policy: Score
    pairs: dict[str, Score] = field(default_factory=dict)

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

    def __str__(self) -> str:
        if self.best is None:
            return "no uniform pair of bits fits the budget"
        pair = self.pairs[self.best]
        costs = ", ".join(
            f"{metric} {share:.1%} against {pair.cost_shares[metric]:.1%} of the limit"
            for metric, share in self.policy.cost_shares.items()
        )
        error = "" if self.error is None else f" ± {self.error:.4f}"
        return (
            f"loss on the proxy {self.policy.loss:.4f}, that of the best uniform pair, {self.best}, {pair.loss:.4f}: "
            f"a difference of {self.difference:+.4f}{error} (standard error over {len(pair.losses)} batches); {costs}"
        )

    def to_dict(self) -> dict[str, object]:
        """Everything, for JSON: also best, difference, error and better."""
        return {
            "policy": _score_dict(self.policy),
            "pairs": {name: _score_dict(score) for name, score in self.pairs.items()},
            **{name: getattr(self, name) for name in ("best", "difference", "error", "better")},
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, object]) -> "UniformComparison":
        """Read what `to_dict` gave."""
        return cls(_read_score(data["policy"]), {name: _read_score(score) for name, score in data["pairs"].items()})

    def _differences(self) -> list[float]:
        if self.best is None:
            return []
        return [ours - theirs for ours, theirs in zip(self.policy.losses, self.pairs[self.best].losses, strict=True)]


def score(
    mixed: nn.Module,
    choices: SpaceChoices,
    policy: Policy,
    cost_shares: Mapping[str, float],
    batches: Sequence[tuple[Inputs, Tensor]],
    *,
    loss_fn: LossFunction,
    autocast: torch.dtype | None,
) -> Score:
    """Score a policy as a choice of a mixture, which is left as it was.

    Args:
        mixed: The mixture, calibrated.
        choices: Its candidates.
        policy: One of them for every layer.
        cost_shares: What it costs.
        batches: Pairs of inputs and labels. Every other one measures batch normalization, the rest the loss; a single
            one does both.
        loss_fn: The mean loss over a batch of logits and labels.
        autocast: Run the model under autocast to this dtype.
    """
    layers = {name: module for name, module in mixed.named_modules() if isinstance(module, QuantizedLayer)}
    statistics_before = save_running_statistics(mixed)
    try:
        for name, layer in layers.items():
            candidates, chosen = choices.layers[name], policy[name]
            _choose(layer.weight_quantizer, candidates.weight_bits, chosen.weight_bits)
            _choose(layer.act_quantizer, candidates.act_bits, chosen.act_bits)
        measure_batchnorm(mixed, batches[::2], autocast=autocast)
        found = [evaluate(mixed, [batch], loss_fn=loss_fn, autocast=autocast) for batch in batches[1::2] or batches]
    finally:
        restore_running_statistics(mixed, statistics_before)
        for layer in layers.values():
            for quantizer in (layer.weight_quantizer, layer.act_quantizer):
                if hasattr(quantizer, "use_probs"):
                    quantizer.use_probs(None)
    top1 = sum(one.top1 * one.images for one in found) / sum(one.images for one in found)
    return Score(tuple(one.loss for one in found), None if math.isnan(top1) else top1, dict(cost_shares))


def _choose(quantizer: nn.Module, candidates: Sequence[object], chosen: object) -> None:
    if hasattr(quantizer, "use_probs"):
        one_hot = torch.zeros(len(candidates), device=quantizer.floor.device)
        one_hot[candidates.index(chosen)] = 1
        quantizer.use_probs(one_hot)


def _score_dict(score: Score) -> dict[str, object]:
    return {"loss": score.loss, "losses": list(score.losses), "top1": score.top1, "cost_shares": score.cost_shares}


def _read_score(data: Mapping[str, object]) -> Score:
    return Score(tuple(data["losses"]), data["top1"], dict(data["cost_shares"]))
