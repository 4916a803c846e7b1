"""A search by training: the mixture with its optimizers, one step of it, and what it says of itself."""

import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from asga._batches import Batch, Inputs
from asga.nn import parameter_groups
from asga.nn.layers import QuantizedLayer
from asga.optim import ASGA
from asga.optim.batchnorm import restore_running_statistics, save_running_statistics
from asga.optim.guarded import GuardedSGD
from asga.recovery import Recovery, halve_steps
from asga.search.dual import DualAscent
from asga.search.expected import ExpectedCosts
from asga.search.held_out import split_loader
from asga.search.methods import SGD, TRAINED
from asga.search.profiles import LayerProfile
from asga.search.relaxation import Relaxation
from asga.search.selection import LogProbabilities
from asga.search.watches import ClassWatch, GradientWatch
from asga.steps import StepReport, batch_loss, cosine_with_warmup, finite, training_step

if TYPE_CHECKING:
    from asga.search.searcher import PolicySearcher


class Search:
    """A search under way: the mixture, its optimizers, and one step of training. `PolicySearcher.start` makes one.

    Attributes:
        model: The mixture.
        profiles: What its layers cost.
        parts: Everything that changes in a step, by name.
        recovery: What takes model and optimizers back when steps are left out again and again.
        relaxation: The probabilities of the candidates.
        loader: The batches to train on: all but those held out for the logits.
    """

    def __init__(
        self,
        options: "PolicySearcher",
        mixed: nn.Module,
        profiles: Mapping[str, LayerProfile],
        limits: Mapping[str, int],
        loader: Iterable[Batch],
    ) -> None:
        self.model, self.profiles = mixed, profiles
        self.loader, self._held_out = loader, None
        if options.held_out is not None:
            self.loader, self._held_out = split_loader(loader, options.held_out)
        steps = options.epochs * len(self.loader)
        self._options, self._steps = options, steps
        self._layers = {name: module for name, module in mixed.named_modules() if isinstance(module, QuantizedLayer)}
        self.relaxation = Relaxation(mixed, options.relaxation)
        self._costs = ExpectedCosts(self._layers, profiles, options.choices, limits)
        self._optimizer = _weight_optimizer(options, mixed)
        # The second beta is lower than usual: gradients of logits change with temperature and multiplier. Fused: one
        # operation instead of some for each of many small tensors.
        self._logit_optimizer = torch.optim.Adam(
            self.relaxation.logits, lr=options.logit_lr, betas=(0.9, 0.99), fused=True
        )
        self._scheduler = cosine_with_warmup(self._optimizer, steps, options.warmup)
        self._dual = DualAscent(list(limits), steps)
        self._classes = ClassWatch(len(self.loader))
        self._gradients = GradientWatch(self._layers)
        going_back = {"model": mixed, "optimizer": self._optimizer, "logit_optimizer": self._logit_optimizer}
        self.recovery = Recovery(going_back, halve_steps(self._optimizer, self._scheduler), steps)
        self.parts = {**going_back, "scheduler": self._scheduler, "dual": self._dual, "gradients": self._gradients}

    def step(self, inputs: Inputs, labels: Tensor) -> StepReport:
        """Train on one batch.

        Args:
            inputs: A batch for the model, in a form that `asga.evaluate` takes.
            labels: Its labels.

        Returns:
            Loss and, where labels are classes, accuracy of the mixture before the step; whether the step was left out.

        Raises:
            TrainingError: The labels do not fit.
            ValueError: A whole epoch has shown a single class.
        """
        self._classes.see(labels)
        self.relaxation.set_temperature(self._temperature())
        self.relaxation.draw()
        options = {"loss_fn": self._options.loss_fn, "autocast": self._options.autocast}
        report = training_step(self.model, self._optimizer, inputs, labels, **options)
        # The logits have the gradient of the second pass: that at the perturbed weights, as for SAM.
        skipped = report.skipped
        if self._held_out is not None:
            self._differentiate_logits(*self._held_out.batch(self._scheduler.last_epoch))
            skipped = False
        self._gradients.see()
        self._update_logits(skipped=skipped)
        self._scheduler.step()
        return report

    def end_epoch(self, epoch: int) -> dict[str, object]:
        """Log the probabilities; returns what else to log of an epoch."""
        record = {
            "lr": self._optimizer.param_groups[0]["lr"],
            "temperature": self._temperature(),
            "multiplier": dict(self._dual.multipliers),
            "expected_cost": self.expected_now(),
        }
        if missing := self._gradients.missing():
            record["without_gradient"] = missing
        if isinstance(self._optimizer, ASGA):
            record |= finite(self._optimizer.diagnostics())
        if self._options.folder is not None:
            self._options.folder.log(
                event="probabilities", stage=self._options.stage, epoch=epoch, layers=self._probabilities()
            )
        return record

    @torch.no_grad()
    def expected_now(self) -> dict[str, float]:
        """By metric, the expected cost divided by its limit."""
        return {metric: cost.item() for metric, cost in self._costs(self.relaxation.probs()).items()}

    def log_probs(self) -> dict[str, LogProbabilities]:
        """Of every layer, at the present temperature."""
        known = self.relaxation.log_probs()
        certain = (0.0,)

        def of(quantizer: nn.Module) -> tuple[float, ...]:
            return known[quantizer.logits] if hasattr(quantizer, "logits") else certain

        return {
            name: LogProbabilities(of(layer.weight_quantizer), of(layer.act_quantizer))
            for name, layer in self._layers.items()
        }

    def _differentiate_logits(self, inputs: Inputs, labels: Tensor) -> None:
        """Give the logits the gradient of the new weights on images held out, instead of that of the step."""
        options = {"loss_fn": self._options.loss_fn, "autocast": self._options.autocast}
        logits = self.relaxation.logits
        statistics = save_running_statistics(self.model)
        loss = batch_loss(self.model, inputs, labels, **options)
        gradients = torch.autograd.grad(loss, logits, allow_unused=True)
        restore_running_statistics(self.model, statistics)
        for parameter, gradient in zip(logits, gradients, strict=True):
            parameter.grad = gradient

    def _update_logits(self, *, skipped: bool) -> None:
        """Add the gradients of what the policy costs, and step; in a step left out nothing but multipliers move."""
        logits = self.relaxation.logits
        expected = self._costs(self.relaxation.probs())
        of_costs = [self._gradients_of(cost) for cost in expected.values()]
        of_loss = [torch.zeros_like(p) if p.grad is None else p.grad for p in logits]
        norms = [torch.nn.utils.get_total_norm(gradients) for gradients in (of_loss, *of_costs)]
        # One transfer from the device for all.
        values = torch.stack([*expected.values(), *norms]).detach().tolist()
        costs, loss_norm, cost_norms = values[: len(expected)], values[len(expected)], values[len(expected) + 1 :]
        skipped = skipped or not math.isfinite(loss_norm)
        ratios = [math.nan if skipped or norm == 0 else loss_norm / norm for norm in cost_norms]
        weights = self._dual.step(*(dict(zip(expected, found, strict=True)) for found in (costs, ratios)))
        if skipped:
            return
        for weight, gradients in zip(weights.values(), of_costs, strict=True):
            for total, gradient in zip(of_loss, gradients, strict=True):
                total.add_(gradient, alpha=weight)
        for parameter, total in zip(logits, of_loss, strict=True):
            parameter.grad = total
        self._logit_optimizer.step()

    def _gradients_of(self, cost: Tensor) -> tuple[Tensor, ...]:
        """With respect to the logits; zero if every layer has a single candidate."""
        logits = self.relaxation.logits
        if not cost.requires_grad:
            return tuple(map(torch.zeros_like, logits))
        return torch.autograd.grad(cost, logits, retain_graph=True, allow_unused=True, materialize_grads=True)

    def _temperature(self) -> float:
        start, end = self._options.temperature
        done = min(1.0, self._scheduler.last_epoch / max(1, self._steps - 1))
        return start * (end / start) ** done

    def _probabilities(self) -> dict[str, dict[str, list]]:
        return {
            name: {
                "weight_bits": list(self._options.choices.layers[name].weight_bits),
                "weight_probs": [math.exp(p) for p in found.weight],
                "act_bits": list(self._options.choices.layers[name].act_bits),
                "act_probs": [math.exp(p) for p in found.act],
            }
            for name, found in self.log_probs().items()
            if not self._options.choices.layers[name].pinned
        }


def _weight_optimizer(options: "PolicySearcher", mixed: nn.Module) -> torch.optim.Optimizer:
    """For everything but the logits, which the ASGA step neither perturbs nor decays."""
    groups = parameter_groups(mixed, weight_decay=options.weight_decay, lr=options.lr)
    sgd = {"momentum": options.momentum, "nesterov": options.momentum > 0}
    if options.method == SGD:
        return GuardedSGD(groups, model=mixed, **sgd, **options.optimizer_options)
    own = {**TRAINED[options.method], **options.optimizer_options}
    return ASGA(groups, torch.optim.SGD, model=mixed, **sgd, **own)
