"""What policies achieve on the proxy, at little cost: as choices of a mixture, or after a short fine-tuning."""

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from asga._batches import Batch, Inputs
from asga.convert import quantize
from asga.nn import calibrate, parameter_groups
from asga.nn.layers import QuantizedLayer
from asga.optim.batchnorm import restore_running_statistics, save_running_statistics
from asga.optim.guarded import GuardedSGD
from asga.policy import Policy
from asga.recovery import MOST_SKIPPED, describe
from asga.search.comparison import Score
from asga.search.costs import policy_costs
from asga.search.profiles import LayerProfile
from asga.steps import TrainingError, evaluate, measure_batchnorm, training_step
from asga.training import batches_from, finite_batches, first_batches

if TYPE_CHECKING:
    from asga.search.searcher import PolicySearcher

# Without training, weights of few bits look worse than they are, for training repairs them. A ResNet-20 with 2/3 bits
# had a loss of 1.16 on its proxy, with 3/2 bits 0.93; after 20 steps 0.819 and 0.839, after 40 steps 0.805 and 0.841,
# and 2/3 bits are the better ones after a transfer, too.
_TUNING_STEPS = 40


class Scorer:
    """Scores policies of one search, each of them once.

    A policy is scored as a choice of the mixture, with its weights and scales as the search left them (float and as
    calibrated, where the method does not train), without training. For the method that has to choose between uniform
    policies this says too little, and a policy of several searches has no mixture of its own: without a mixture,
    policies are scored after 40 steps of SGD from the float model. Either way batch normalization is measured anew, on
    every other batch, and the loss on the rest; a single batch does for both.

    Args:
        options: The search.
        mixed: Its mixture, calibrated. It is left as it was. None: policies are fine-tuned.
        profiles: What its layers cost.
        loader: Its proxy.

    Attributes:
        batches: Pairs of inputs and labels to score on: those on which the loss of the float model is finite, as one
            that is not would make every score NaN.

    Raises:
        TrainingError: There are none.
    """

    def __init__(
        self,
        options: "PolicySearcher",
        mixed: nn.Module | None,
        profiles: Mapping[str, LayerProfile],
        loader: Iterable[Batch],
    ) -> None:
        self._options, self._mixed, self._profiles, self._loader = options, mixed, profiles, loader
        self._limits = options.budget.limits(profiles, options.choices)
        self._loss = {"loss_fn": options.loss_fn, "autocast": options.autocast}
        self._known: list[tuple[Policy, Score]] = []
        self.batches = self._measurable(first_batches(loader, options.measure_batches))

    def __call__(self, policy: Policy) -> Score:
        """The score of a policy of the search's space."""
        for known, score in self._known:
            if known == policy:
                return score
        score = self._tuned(policy) if self.tunes else self._chosen(policy)
        self._known.append((policy, score))
        return score

    @property
    def tunes(self) -> bool:
        """Whether policies are fine-tuned before they are scored."""
        return self._mixed is None

    def _measurable(self, batches: Sequence[tuple[Inputs, Tensor]]) -> Sequence[tuple[Inputs, Tensor]]:
        losses = [self._options.float_loss(batch) for batch in batches]
        found = [batch for batch, loss in zip(batches, losses, strict=True) if math.isfinite(loss)]
        if not found:
            raise TrainingError(
                f"the loss of the float model, in eval mode, is {losses[0]} on batch 1 of the proxy, and not finite on "
                f"any of the {len(losses)} that policies are measured on: check loss_fn, the labels and the weights of "
                f"the model"
            )
        return found

    def _chosen(self, policy: Policy) -> Score:
        layers = {name: module for name, module in self._mixed.named_modules() if isinstance(module, QuantizedLayer)}
        before = save_running_statistics(self._mixed)
        try:
            for name, layer in layers.items():
                candidates, bits = self._options.choices.layers[name], policy[name]
                _choose(layer.weight_quantizer, candidates.weight_bits, bits.weight_bits)
                _choose(layer.act_quantizer, candidates.act_bits, bits.act_bits)
            return self._measured(self._mixed, policy)
        finally:
            restore_running_statistics(self._mixed, before)
            for layer in layers.values():
                for quantizer in (layer.weight_quantizer, layer.act_quantizer):
                    if hasattr(quantizer, "use_probs"):
                        quantizer.use_probs(None)

    def _tuned(self, policy: Policy) -> Score:
        options = self._options
        model = quantize(options.model, policy)
        calibrate(model, first_batches(self._loader, options.calibration_batches))
        model.train()
        groups = parameter_groups(model, weight_decay=options.weight_decay, lr=options.lr)
        optimizer = GuardedSGD(groups, model=model, momentum=options.momentum, nesterov=options.momentum > 0)
        skipped = 0
        batches = finite_batches(_epochs(self._loader))
        for step, (inputs, labels) in enumerate(itertools.islice(batches, _TUNING_STEPS), 1):
            report = training_step(model, optimizer, inputs, labels, **self._loss)
            skipped = skipped + 1 if report.skipped else 0
            if skipped == MOST_SKIPPED:
                bits = "/".join(sorted(set(map(str, policy.values()))))
                raise TrainingError(
                    f"{describe(report.metrics['loss'])} for {skipped} steps in a row, up to step {step} of "
                    f"fine-tuning a policy of {bits}. lr={options.lr:g} may be too high, or loss_fn not finite on the "
                    f"data"
                )
        return self._measured(model, policy)

    def _measured(self, model: nn.Module, policy: Policy) -> Score:
        measure_batchnorm(model, self.batches[::2], autocast=self._options.autocast)
        found = [evaluate(model, [batch], **self._loss) for batch in self.batches[1::2] or self.batches]
        top1 = sum(one.top1 * one.images for one in found) / sum(one.images for one in found)
        costs = policy_costs(self._profiles, policy)
        return Score(
            losses=tuple(one.loss for one in found),
            top1=None if math.isnan(top1) else top1,
            cost_shares={metric: getattr(costs, metric) / limit for metric, limit in self._limits.items()},
        )


def _choose(quantizer: nn.Module, candidates: Sequence[object], chosen: object) -> None:
    """Give a mixture's probability to one of its candidates alone."""
    if hasattr(quantizer, "use_probs"):
        one_hot = torch.zeros(len(candidates), device=quantizer.floor.device)
        one_hot[candidates.index(chosen)] = 1
        quantizer.use_probs(one_hot)


def _epochs(loader: Iterable[Batch]) -> Iterator[tuple[Inputs, Tensor]]:
    """The batches of one epoch after the other."""
    return itertools.chain.from_iterable(batches_from(loader, epoch) for epoch in itertools.count())
