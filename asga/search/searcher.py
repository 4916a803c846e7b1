"""The search: bit-widths as probabilities, trained with the weights on a small dataset within a budget."""

import json
import os
import time
import warnings
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from dataclasses import asdict

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from asga._batches import Batch, Inputs, first_sample, to_device
from asga._checks import check_autocast, check_call, check_count, check_instance, check_number
from asga._extras import require
from asga.convert import check_float, prepare
from asga.nn import calibrate
from asga.nn.quantizable import second_names, unwrapped
from asga.optim.handed_on import check_optimizer_options
from asga.policy import LayerPolicy, Policy, WeightBits, check_is_policy, plain_json
from asga.runs import RunFolder, open_folder
from asga.search.baselines import uniform_pairs
from asga.search.budget import Budget, check_budget
from asga.search.comparison import NotBetterThanUniform, UniformComparison
from asga.search.costs import cost_tables
from asga.search.held_out import split_loader
from asga.search.latency import LatencyTable
from asga.search.methods import METHODS, SGD, TRAINED
from asga.search.profiles import ExampleInputs, LayerProfile, left_as_found, profile_layers, run_once
from asga.search.relaxation import check_relaxation
from asga.search.result import SearchResult
from asga.search.scoring import Scorer
from asga.search.selection import best_policy
from asga.search.solver import check_feasible
from asga.search.space import SearchSpace
from asga.search.trained import Search
from asga.search.untrained import score_candidates
from asga.search.watches import ClassWatch
from asga.steps import LossFunction, TrainingError, evaluate
from asga.training import CHECKPOINT_EVERY, Progress, Stage, count_batches, first_batches, setting_of

# Options that a search that goes on must have in common with the one that was interrupted, beside its candidates.
_SETTING = (
    "method",
    "budget",
    "lr",
    "momentum",
    "weight_decay",
    "warmup",
    "logit_lr",
    "relaxation",
    "temperature",
    "held_out",
    "autocast",
)


class PolicySearcher:
    """Searches a bit-width policy on a small (proxy) dataset.

    Every searched layer becomes a mixture of its candidates, sampled anew in every step with probabilities that are the
    softmax of logits; logits, scales and weights are trained together with the ASGA step (or plain SGD), while dual
    ascent pulls the expected cost to the budget. The final policy is the likeliest one within the budget, found
    exactly::

        searcher = asga.PolicySearcher(model, asga.SearchSpace(), budget=asga.Budget(bitops="w4a4"), epochs=5)
        policy = searcher.fit(loader).policy

    The defaults are those of a search that starts from a trained float model.

    Args:
        model: The float model, best trained on the proxy. It is copied, not changed; out of `torch.compile` and
            `DataParallel` it is taken first, so that layers have their own names.
        space: The candidates.
        budget: The limits that the policy meets.
        epochs: Passes over the loader; without effect on methods that do not train.
        method: One of `asga.search.METHODS`, which says what they are.
        lr: Of weights and scales, for SGD with Nesterov momentum, warmed up and then following a cosine.
        momentum: Of that SGD.
        weight_decay: Of the weights; never of scales or logits.
        warmup: Steps over which `lr` rises.
        logit_lr: Of the logits, for Adam.
        temperature: Of the relaxation, at the start and at the end; it falls exponentially.
        relaxation: ``"gumbel"``, candidates sampled, or ``"softmax"``, mixed, which sees less of what a single choice
            breaks; see `asga.search.relaxation.Relaxation`.
        held_out: Share of the proxy's samples whose gradients train the logits, in a pass of its own after each step on
            the rest, which trains the weights and scales (alternating updates). None: all samples train both at once.
        optimizer_options: Further options of `asga.optim.ASGA`, such as ``{"rho_max": 0.2}``; they go before those
            that make the method.
        calibration_batches: Batches that set the scales of the activations before the search.
        measure_batches: Batches on which the policy is compared with uniform ones at the end
            (`asga.search.scoring.Scorer`), and on which methods without training measure.
        example_inputs: What the target model will be fed, if not what the loader gives: costs are those at this
            resolution.
        latency_table: What layers take on the target device, for budgets with a limit on the latency.
        loss_fn: The mean loss over a batch of logits and labels. With the default, labels are int64 ``[B]`` and logits
            ``[B, classes]``; another one takes whatever logits and labels it is made for.
        autocast: Run the model under autocast to this dtype.
        checkpoint_every: Steps of an epoch between checkpoints; there is one at its end, too. When its loss stays NaN,
            the search goes back to the last good one, or to a good state since then: one of every 50 steps is in
            memory.
        folder: Where metrics and checkpoints go: a path, or a `RunFolder`. With a checkpoint in it, `fit` resumes; a
            folder of a path that is not there yet is made.
        progress: Called after every step.
        stage: The name of this search in metrics and checkpoints.
        meta: Further metadata of the policy, such as the architecture's name.

    Raises:
        TypeError: An option is of another type.
        ValueError: An option is out of range, or the model has no layer to search or is converted already.

    Source:
        The relaxations: see `asga.search.relaxation.Relaxation`. The step: see `asga.optim.ASGA`.
    """

    def __init__(
        self,
        model: nn.Module,
        space: SearchSpace | None = None,
        *,
        budget: Budget,
        epochs: int = 5,
        method: str = "asga",
        lr: float = 0.01,
        momentum: float = 0.9,
        weight_decay: float = 1e-4,
        warmup: int = 20,
        logit_lr: float = 0.03,
        temperature: tuple[float, float] = (1.0, 0.2),
        relaxation: str = "gumbel",
        held_out: float | None = None,
        optimizer_options: Mapping[str, object] | None = None,
        calibration_batches: int = 4,
        measure_batches: int = 16,
        example_inputs: ExampleInputs | None = None,
        latency_table: LatencyTable | None = None,
        loss_fn: LossFunction = functional.cross_entropy,
        autocast: torch.dtype | None = None,
        checkpoint_every: int = CHECKPOINT_EVERY,
        folder: RunFolder | str | os.PathLike | None = None,
        progress: Callable[[Progress], None] | None = None,
        stage: str = "search",
        meta: Mapping[str, object] | None = None,
    ) -> None:
        check_instance("model", model, nn.Module, "a torch.nn.Module")
        check_instance("space", space, (SearchSpace, type(None)), "a SearchSpace, or None for the usual one,")
        check_budget("budget", budget)
        if method not in METHODS:
            raise ValueError(f"method is {method!r}; it must be one of {', '.join(map(repr, METHODS))}")
        check_relaxation(relaxation)
        self.epochs, self.warmup = check_count("epochs", epochs), check_count("warmup", warmup, least=0)
        self.calibration_batches = check_count("calibration_batches", calibration_batches)
        self.measure_batches = check_count("measure_batches", measure_batches)
        self.checkpoint_every = check_count("checkpoint_every", checkpoint_every)
        self.lr, self.logit_lr = check_number("lr", lr), check_number("logit_lr", logit_lr)
        self.weight_decay = check_number("weight_decay", weight_decay)
        self.momentum = check_number("momentum", momentum, below=1)
        self.temperature = _check_temperature(temperature)
        self.held_out = held_out
        if held_out is not None:
            self.held_out = check_number("held_out", held_out, below=1)
            if held_out == 0:
                raise ValueError("held_out is 0; it must lie between 0 and 1, or be None")
        self.optimizer_options = check_optimizer_options(
            method,
            {} if optimizer_options is None else optimizer_options,
            two_passes=method != SGD,
            momentum=momentum,
            lr=lr,
        )
        table = "a LatencyTable (LatencyTable.from_csv reads one), or None,"
        check_instance("latency_table", latency_table, (LatencyTable, type(None)), table)
        check_autocast(autocast)
        check_call("loss_fn", loss_fn)
        check_call("progress", progress, or_none=True)
        check_instance("stage", stage, str, "a name")
        check_instance("folder", folder, (RunFolder, str, os.PathLike, type(None)), "a path or a RunFolder, or None,")
        check_instance("meta", meta, (Mapping, type(None)), "a mapping")
        plain_json(dict(meta or {}))  # refuses what the policy could not be saved with, before anything is trained
        self.space = space if space is not None else SearchSpace()
        model = unwrapped(model)
        check_float(model)
        # Rules for groups run the model; without `example_inputs` they wait for the loader.
        waits = self.space.runs_the_model and example_inputs is None
        self.choices = None if waits else self.space.choices(model, _beside(model, example_inputs))
        self.model, self.budget, self.method, self.relaxation = model, budget, method, relaxation
        self.example_inputs, self.latency_table = example_inputs, latency_table
        self.loss_fn, self.autocast = loss_fn, autocast
        self.folder, self.progress, self.stage = folder, progress, stage
        self.meta = ({} if self.space.target == "any" else {"deployment_target": self.space.target}) | dict(meta or {})

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
            ValueError: The loader is empty, has no length, or has one class only, the model calls its layers from
                elsewhere than its modules, or `folder` holds another run.
            KeyboardInterrupt: Stopped; the checkpoint in `folder`, if given, resumes the search.

        Warns:
            NotBetterThanUniform: On the proxy the policy is not better than uniform bits within the same budget; see
                `asga.search.comparison.UniformComparison`.
        """
        if self.method in TRAINED:
            search = self.start(loader)
            stage = Stage(
                self.stage,
                self.epochs,
                search.parts,
                recovery=search.recovery,
                checkpoint_every=self.checkpoint_every,
                folder=self.folder,
                progress=self.progress,
                setting=self._setting(search.profiles),
            )
            history = stage.run(search.loader, search.step, search.end_epoch)
            search.relaxation.remove()
            mixed, profiles = search.model, search.profiles
            log_probs, expected = search.log_probs(), search.expected_now()
        else:
            profiles, _ = self.check(loader)
            mixed = None if self.method == "uniform" else self._mixture(loader)
            log_probs, expected = {}, {}
        uniform = self._uniform(profiles)
        scorer = Scorer(self, mixed, profiles, loader)
        if self.method not in TRAINED:
            seen = ClassWatch(len(scorer.batches), f"the first {len(scorer.batches)} batches of the proxy have")
            for _, labels in scorer.batches:
                seen.see(labels)
            started = time.perf_counter()
            log_probs = score_candidates(self, profiles, scorer, uniform)
            history = [{"stage": self.stage, "seconds": round(time.perf_counter() - started, 3)}]
        trained = self.method in TRAINED
        policy = best_policy(log_probs, self.choices, profiles, self.budget, self.meta, trained=trained)
        comparison = _compared(policy, uniform, scorer)
        if comparison.best is not None and comparison.better is not True and self.method != "uniform":
            warnings.warn(f"the policy is {comparison.verdict}: {comparison}", NotBetterThanUniform, stacklevel=2)
        return SearchResult(
            policy=policy,
            budget=self.budget,
            choices=self.choices,
            profiles=profiles,
            log_probs=log_probs,
            expected_cost=expected,
            history=history,
            method=self.method,
            uniform=comparison,
        )

    def compare(self, policy: Policy, loader: Iterable[Batch]) -> UniformComparison:
        """A policy beside the uniform pairs within the budget, all after a short fine-tuning from the float model.

        For a policy that none of this searcher's mixtures was trained for, such as the `asga.search.consensus` of
        several searches; `fit` compares its own. Random numbers, of dropout, are those of torch's global generator.

        Args:
            policy: One of the space.
            loader: As for `fit`.

        Raises:
            InfeasibleBudgetError, ImportError, TrainingError: As `fit` does.
            TypeError: As `fit` does, or `policy` is no `Policy`.
            ValueError: As `fit` does, or the policy is not about the layers of the model.
        """
        check_is_policy(policy)
        profiles, _ = self.check(loader)
        policy.check_against(self.choices.names, second_names(self.model))
        return _compared(policy, self._uniform(profiles), Scorer(self, None, profiles, loader))

    def _uniform(self, profiles: Mapping[str, LayerProfile]) -> dict[tuple[WeightBits, int | None], Policy]:
        """The uniform policies to compare with, by their bits."""
        limits = self.budget.limits(profiles, self.choices)
        return {pair: self.choices.uniform(*pair) for pair in uniform_pairs(profiles, self.choices, limits)}

    def _setting(self, profiles: Mapping[str, LayerProfile]) -> dict[str, str]:
        """What a search that goes on must have in common with the one that was interrupted."""
        # Words such as w4a4 stay the same where costs change, with the resolution or a latency table.
        costs = json.dumps([asdict(profile) for profile in profiles.values()])
        return {
            **setting_of(self, _SETTING),
            "limits": str(self.budget.limits(profiles, self.choices)),
            "costs of the layers": f"of checksum {zlib.crc32(costs.encode()):08x}",
            "groups": str([(group.layers, group.sides) for group in self.choices.groups]),
            **{
                f"candidates of {name}": f"{layer.weight_bits} x {layer.act_bits}"
                for name, layer in self.choices.layers.items()
            },
        }

    def start(self, loader: Iterable[Batch]) -> "Search":
        """The search before its first step, for a loop of one's own; `fit` makes all steps and ends with the policy.

        Args:
            loader: As for `fit`; its first batches calibrate the scales, its length and `epochs` set the schedules.

        Raises:
            InfeasibleBudgetError, ImportError, TrainingError, TypeError: As `fit` does.
            ValueError: As `fit` does, or the method makes no steps.
        """
        if self.method not in TRAINED:
            raise ValueError(f"method is {self.method!r}, which makes no steps: call fit")
        profiles, limits = self.check(loader)
        mixture = self._mixture(loader).train()
        self.folder = open_folder(self.folder, "search")  # last, so that nothing is written where there is an error
        return Search(self, mixture, profiles, limits, loader)

    def check(self, loader: Iterable[Batch]) -> tuple[dict[str, LayerProfile], dict[str, int]]:
        """Find what would make `fit` refuse to start, without training: for before a float model is trained.

        Args:
            loader: As for `fit`; at most one batch is taken from it.

        Returns:
            What the layers cost, and the limits of the budget by metric.

        Raises:
            InfeasibleBudgetError: No policy meets the budget.
            ImportError: scipy is not installed.
            TrainingError: The data do not fit the model, or it gives no logits.
            ValueError: The loader is empty, has no length, or has one class only.
        """
        require("scipy.optimize", "search")  # the last step needs it; it would be a pity to learn it then
        count_batches(loader)
        _check_classes(loader)
        batch = first_batches(loader, 1)[0]
        example = self._example(batch[0])
        if self.choices is None:
            self.choices = self.space.choices(self.model, example)
        profiles = profile_layers(self.model, example, self.choices.names, unused=self.choices.excluded)
        if self.latency_table is not None:
            profiles = self.latency_table.add_to(profiles, self.choices)
        limits = self.budget.limits(profiles, self.choices)
        check_feasible(cost_tables(profiles, self.choices), limits, groups=self.choices.groups)
        if self.held_out is not None:
            split_loader(loader, self.held_out)
        self.float_loss(batch)
        return profiles, limits

    def float_loss(self, batch: tuple[Inputs, Tensor]) -> float:
        """The loss of the float model on a batch, in eval mode; the model is left as it was.

        Raises:
            TrainingError: The data do not fit the model.
        """
        with left_as_found(self.model, batch[0]):
            return evaluate(self.model, [batch], loss_fn=self.loss_fn, autocast=self.autocast).loss

    def _example(self, inputs: Inputs) -> Inputs:
        """What costs are for: `example_inputs`, or else the first sample of a batch."""
        return _beside(self.model, first_sample(inputs) if self.example_inputs is None else self.example_inputs)

    def _mixture(self, loader: Iterable[Batch]) -> nn.Module:
        """A copy of the model with all candidates in it, calibrated."""
        mixed = prepare(self.model, self.choices)
        batches = first_batches(loader, self.calibration_batches)
        calibrate(mixed, batches)
        _check_called(mixed, self._example(batches[0][0]), self.choices.layers)
        return mixed


def _beside(model: nn.Module, inputs: ExampleInputs | None) -> ExampleInputs | None:
    """Inputs on the device of the model."""
    parameter = next(model.parameters(), None)
    return inputs if inputs is None or parameter is None else to_device(inputs, parameter.device)


def _check_called(mixed: nn.Module, example: Inputs, names: Iterable[str]) -> None:
    """Refuse a model that goes on calling its float layers; all of these were called before it was converted.

    Raises:
        ValueError: It does.
    """
    called: set[str] = set()
    handles = []
    for name in names:
        layer = mixed.get_submodule(name)
        # Not the layer itself, which has its hooks in common with the float one.
        handles += [
            quantizer.register_forward_hook(lambda *_, name=name: called.add(name))
            for quantizer in (layer.weight_quantizer, layer.act_quantizer)
        ]
    try:
        run_once(mixed, example)
    finally:
        for handle in handles:
            handle.remove()
    if missed := [name for name in names if name not in called]:
        raise ValueError(
            f"quantized layers are never called in place of {', '.join(map(repr, missed))}: the model keeps its layers "
            f"elsewhere than in its modules, too, such as in a plain list, and calls them from there; use nn.ModuleList"
        )


def _compared(
    policy: Policy, uniform: Mapping[tuple[WeightBits, int | None], Policy], scorer: Scorer
) -> UniformComparison:
    scores = {str(LayerPolicy(*pair)): scorer(choice) for pair, choice in uniform.items()}
    found = scorer(policy)
    if not found.finite:
        raise TrainingError(
            f"a loss of the policy on the proxy is not finite ({', '.join(map(str, found.losses))}), while that of the "
            f"float model is: lr may be too high, or the range of autocast too small"
        )
    return UniformComparison(found, {name: score for name, score in scores.items() if score.finite}, scorer.tunes)


def _check_temperature(temperature: tuple[float, float]) -> tuple[float, float]:
    if isinstance(temperature, str) or not isinstance(temperature, Sequence) or len(temperature) != 2:
        raise TypeError(f"temperature is {temperature!r}; a pair is needed, that at the start and that at the end")
    temperature = tuple(check_number(f"temperature[{k}]", value) for k, value in enumerate(temperature))
    if not temperature[0] >= temperature[1] > 0:
        raise ValueError(f"temperature is {temperature}; the second must be above zero and no larger than the first")
    return temperature


def _check_classes(loader: Iterable[Batch]) -> None:
    """Refuse a proxy of one class, where the dataset tells: `labels` as ours, `targets` as torchvision's.

    Anything there but a class for every sample, a number or a word, says nothing and passes.
    """
    dataset = getattr(loader, "dataset", None)
    if not isinstance(dataset, Sized):
        return
    for attribute in ("labels", "targets"):
        labels = getattr(dataset, attribute, None)
        labels = labels.tolist() if isinstance(labels, Tensor | np.ndarray) else labels
        if not isinstance(labels, Sequence) or not all(isinstance(label, int | str) for label in labels):
            continue
        if len(labels) == len(dataset) > 0 and len(set(labels)) < 2:
            raise ValueError("the proxy has a single class: every policy would look perfect on it")
