"""The search: bit-widths as probabilities, trained with the weights on a small dataset within a budget."""

import math
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional

from asga._batches import Batch, Inputs, first_sample, to_device
from asga._extras import require
from asga.convert import prepare
from asga.nn import calibrate, logits, parameter_groups, set_temperature
from asga.nn.layers import QuantizedLayer
from asga.optim import ASGA
from asga.optim.guarded import GuardedSGD
from asga.runs import RunFolder
from asga.search.budget import Budget
from asga.search.costs import ExampleInputs, LayerProfile, cost_tables, profile_layers
from asga.search.dual import DualAscent
from asga.search.result import LogProbabilities, SearchResult, best_policy
from asga.search.solver import check_feasible
from asga.search.space import SearchSpace, SpaceChoices
from asga.steps import LossFunction, cosine_with_warmup, finite, training_step
from asga.training import LossWatch, Progress, Stage, count_batches, first_batches


class PolicySearcher:
    """Searches a bit-width policy on a small (proxy) dataset.

    Every searched layer becomes a mixture of its candidates, weighted by the softmax of logits; the mixture, its
    scales and the weights are trained together with the ASGA step (or plain SGD), while dual ascent pulls the
    expected cost to the budget. The final policy is the likeliest one within the budget, found exactly::

        searcher = asga.PolicySearcher(model, asga.SearchSpace(), budget=asga.Budget(bitops="w4a4"), epochs=5)
        policy = searcher.fit(loader).policy

    The defaults are those of a search that starts from a trained float model.

    Args:
        model: The float model, best trained on the proxy. It is copied, not changed.
        space: The candidates.
        budget: The limits that the policy meets.
        epochs: Passes over the loader.
        method: ``"asga"``, or ``"sgd"``: one pass a step, for comparison (EdMIPS).
        lr: Of weights and scales, for SGD with Nesterov momentum, warmed up and then following a cosine.
        momentum: Of that SGD.
        weight_decay: Of the weights; never of scales or logits.
        warmup: Steps over which `lr` rises.
        logit_lr: Of the logits, for Adam.
        temperature: Of the softmax, at the start and at the end; it falls exponentially.
        optimizer_options: Further options of `asga.optim.ASGA`, such as ``{"rho_max": 0.2}``.
        calibration_batches: Batches that set the scales of the activations before the search.
        example_inputs: What the target model will be fed, if not what the loader gives: costs are those at this
            resolution.
        loss_fn: The mean loss over a batch of logits and labels. With the default, labels are int64 ``[B]`` and logits
            ``[B, classes]``; another one takes whatever logits and labels it is made for.
        autocast: Run the model under autocast to this dtype.
        folder: Where metrics and checkpoints go; with a checkpoint in it, `fit` resumes.
        progress: Called after every step.
        stage: The name of this search in metrics and checkpoints.
        meta: Further metadata of the policy, such as the architecture's name.

    Raises:
        ValueError: An option is out of range, or the model has no layer to search.

    Source:
        The relaxation: Cai and Vasconcelos, "Rethinking Differentiable Search for Mixed-Precision Neural
        Networks" (EdMIPS), CVPR 2020. The step: see `asga.optim.ASGA`.
    """

    def __init__(
        self,
        model: nn.Module,
        space: SearchSpace | None = None,
        *,
        budget: Budget,
        epochs: int,
        method: str = "asga",
        lr: float = 0.01,
        momentum: float = 0.9,
        weight_decay: float = 1e-4,
        warmup: int = 20,
        logit_lr: float = 0.03,
        temperature: tuple[float, float] = (1.0, 0.2),
        optimizer_options: Mapping[str, object] | None = None,
        calibration_batches: int = 4,
        example_inputs: ExampleInputs | None = None,
        loss_fn: LossFunction = functional.cross_entropy,
        autocast: torch.dtype | None = None,
        folder: RunFolder | None = None,
        progress: Callable[[Progress], None] | None = None,
        stage: str = "search",
        meta: Mapping[str, object] | None = None,
    ) -> None:
        if method not in ("asga", "sgd"):
            raise ValueError(f"method is {method!r}; it must be 'asga' or 'sgd'")
        for name, value in (("epochs", epochs), ("calibration_batches", calibration_batches)):
            if value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
        if not (temperature[0] >= temperature[1] > 0):
            raise ValueError(f"temperature is {temperature}; it must fall and stay above zero")
        self.space = space if space is not None else SearchSpace()
        self.choices = self.space.choices(model)
        self.model, self.budget, self.epochs, self.method = model, budget, epochs, method
        self.lr, self.momentum, self.weight_decay, self.warmup = lr, momentum, weight_decay, warmup
        self.logit_lr, self.temperature = logit_lr, temperature
        self.optimizer_options = dict(optimizer_options or {})
        self.calibration_batches, self.example_inputs = calibration_batches, example_inputs
        self.loss_fn, self.autocast = loss_fn, autocast
        self.folder, self.progress, self.stage = folder, progress, stage
        self.meta = dict(meta or {})

    def fit(self, loader: Iterable[Batch]) -> SearchResult:
        """Search on the batches of a loader.

        Args:
            loader: Batches of the forms that `asga.evaluate` takes, with a length; a `torch.utils.data.DataLoader` or
                `asga.data.Batches`.

        Returns:
            The policy and the probabilities it was solved from.

        Raises:
            InfeasibleBudgetError: No policy meets the budget; nothing has been trained then.
            ImportError: scipy is not installed.
            TrainingError: The loss is not finite, or the data do not fit the model.
            TypeError: A batch has another form.
            ValueError: The loader is empty, has no length, or has one class only.
            KeyboardInterrupt: Stopped; the checkpoint in `folder`, if given, resumes the search.
        """
        search = self.start(loader)
        stage = Stage(self.stage, self.epochs, search.parts, folder=self.folder, progress=self.progress)
        history = stage.run(loader, search.step, search.end_epoch)
        log_probs = search.log_probs()
        policy = best_policy(log_probs, self.choices, search.profiles, self.budget, self.meta)
        return SearchResult(
            policy=policy,
            budget=self.budget,
            choices=self.choices,
            profiles=search.profiles,
            log_probs=log_probs,
            expected_cost=search.expected_now(),
            history=history,
        )

    def start(self, loader: Iterable[Batch]) -> "Search":
        """The search before its first step, for a loop of one's own; `fit` makes all steps and ends with the policy.

        Args:
            loader: As for `fit`; its first batches calibrate the scales, its length and `epochs` set the schedules.

        Raises:
            InfeasibleBudgetError, ImportError, TrainingError, TypeError, ValueError: As `fit` does.
        """
        profiles, limits = self.check(loader)
        mixed = prepare(self.model, self.space).train()
        calibrate(mixed, first_batches(loader, self.calibration_batches))
        return Search(self, mixed, profiles, limits, steps=self.epochs * len(loader))

    def check(self, loader: Iterable[Batch]) -> tuple[dict[str, LayerProfile], dict[str, int]]:
        """Find what would make `fit` refuse to start, without training: for before a float model is trained.

        Args:
            loader: As for `fit`; at most one batch is taken from it.

        Returns:
            What the layers cost, and the limits of the budget by metric.

        Raises:
            InfeasibleBudgetError: No policy meets the budget.
            ImportError: scipy is not installed.
            ValueError: The loader is empty, has no length, or has one class only.
        """
        require("scipy.optimize", "search")  # the last step needs it; it would be a pity to learn it then
        count_batches(loader)
        _check_classes(loader)
        example = self.example_inputs
        if example is None:
            example = first_sample(first_batches(loader, 1)[0][0])
        device = next(self.model.parameters()).device
        profiles = profile_layers(self.model, to_device(example, device), self.choices.names)
        limits = self.budget.limits(profiles, self.choices)
        check_feasible(cost_tables(profiles, self.choices), limits)
        return profiles, limits


class Search:
    """A search under way: the mixture, its optimizers, and one step of training. `PolicySearcher.start` makes one.

    Attributes:
        model: The mixture.
        profiles: What its layers cost.
        parts: Everything that changes in a step, by name.
    """

    def __init__(
        self,
        options: PolicySearcher,
        mixed: nn.Module,
        profiles: Mapping[str, LayerProfile],
        limits: Mapping[str, int],
        steps: int,
    ) -> None:
        self.model, self.profiles = mixed, profiles
        self._options, self._steps = options, steps
        self._device = next(mixed.parameters()).device
        self._layers = {name: module for name, module in mixed.named_modules() if isinstance(module, QuantizedLayer)}
        self._costs = _ExpectedCosts(profiles, options.choices, limits, self._device)
        groups = parameter_groups(mixed, weight_decay=options.weight_decay, lr=options.lr)
        sgd = {"momentum": options.momentum, "nesterov": options.momentum > 0}
        if options.method == "asga":
            self._optimizer = ASGA(groups, torch.optim.SGD, model=mixed, **sgd, **options.optimizer_options)
        else:
            self._optimizer = GuardedSGD(groups, model=mixed, **sgd, **options.optimizer_options)
        self._logits = logits(mixed)
        # The second beta is lower than usual: gradients of logits change with temperature and multiplier.
        self._logit_optimizer = torch.optim.Adam(self._logits, lr=options.logit_lr, betas=(0.9, 0.99))
        self._scheduler = cosine_with_warmup(self._optimizer, steps, options.warmup)
        self._dual = DualAscent(list(limits), steps)
        self._watch = LossWatch(steps)
        self.parts = {
            "model": mixed,
            "optimizer": self._optimizer,
            "logit_optimizer": self._logit_optimizer,
            "scheduler": self._scheduler,
            "dual": self._dual,
        }

    def step(self, inputs: Inputs, labels: Tensor) -> dict[str, float]:
        """Train on one batch.

        Args:
            inputs: A batch for the model, in a form that `asga.evaluate` takes.
            labels: Its labels.

        Returns:
            Loss and, where labels are classes, accuracy of the mixture before the step.

        Raises:
            TrainingError: The labels do not fit, or the loss has not been finite for several steps.
        """
        set_temperature(self.model, self._temperature())
        metrics = training_step(
            self.model,
            self._optimizer,
            inputs,
            labels,
            loss_fn=self._options.loss_fn,
            autocast=self._options.autocast,
            penalty=lambda: self._dual.penalty(self._costs.expected(self._layers)),
        )
        self._watch.check(metrics["loss"])
        # The logits have the gradient of the second pass: that at the perturbed weights, as for SAM.
        gradients = [p.grad for p in self._logits if p.grad is not None]
        if math.isfinite(torch.nn.utils.get_total_norm(gradients).item()):
            self._logit_optimizer.step()
        self._scheduler.step()
        self._dual.update(self.expected_now())
        return metrics

    def end_epoch(self, epoch: int) -> dict[str, object]:
        """Log the probabilities; returns what else to log of an epoch."""
        record = {
            "lr": self._optimizer.param_groups[0]["lr"],
            "temperature": self._temperature(),
            "multiplier": dict(self._dual.multipliers),
            "expected_cost": self.expected_now(),
        }
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
        return {metric: cost.item() for metric, cost in self._costs.expected(self._layers).items()}

    @torch.no_grad()
    def log_probs(self) -> dict[str, LogProbabilities]:
        """Of every layer, at the present temperature."""
        return {
            name: LogProbabilities(_log_probs(layer.weight_quantizer), _log_probs(layer.act_quantizer))
            for name, layer in self._layers.items()
        }

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


class _ExpectedCosts:
    """Expected costs of the mixture, divided by their limits: differentiable in the logits."""

    def __init__(
        self,
        profiles: Mapping[str, LayerProfile],
        choices: SpaceChoices,
        limits: Mapping[str, int],
        device: torch.device,
    ) -> None:
        tables = cost_tables(profiles, choices)
        self._tables: dict[str, dict[str, Tensor]] = {}
        self._fixed: dict[str, Tensor] = {}
        for metric, limit in limits.items():
            shares = {name: table / limit for name, table in tables[metric].items()}
            fixed = sum(share[0, 0] for share in shares.values() if share.size == 1)
            self._fixed[metric] = torch.tensor(fixed, dtype=torch.float32, device=device)
            self._tables[metric] = {
                name: torch.tensor(share, dtype=torch.float32, device=device)
                for name, share in shares.items()
                if share.size > 1
            }

    def expected(self, layers: Mapping[str, QuantizedLayer]) -> dict[str, Tensor]:
        totals = {}
        for metric, tables in self._tables.items():
            terms = [
                _probs(layers[name].weight_quantizer, table) @ table @ _probs(layers[name].act_quantizer, table)
                for name, table in tables.items()
            ]
            totals[metric] = torch.stack([self._fixed[metric], *terms]).sum()
        return totals


def _probs(quantizer: nn.Module, like: Tensor) -> Tensor:
    """Probabilities of a mixture, or the single one of a fixed quantizer or a float tensor."""
    return quantizer.probs() if hasattr(quantizer, "probs") else like.new_ones(1)


def _log_probs(quantizer: nn.Module) -> tuple[float, ...]:
    if not hasattr(quantizer, "probs"):
        return (0.0,)
    return tuple(torch.log_softmax(quantizer.logits.double() / quantizer.temperature.double(), 0).tolist())


def _check_classes(loader: Iterable[Batch]) -> None:
    """Refuse a proxy of one class, where the dataset tells: `labels` as ours, `targets` as torchvision's."""
    dataset = getattr(loader, "dataset", None)
    for attribute in ("labels", "targets"):
        labels = getattr(dataset, attribute, None)
        if labels is not None and len(set(labels.tolist() if isinstance(labels, Tensor) else labels)) < 2:
            raise ValueError("the proxy has a single class: every policy would look perfect on it")
