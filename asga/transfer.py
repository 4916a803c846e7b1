"""The transfer: fine-tuning a model of fixed bit-widths on the target. Nothing is searched here."""

import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from asga._batches import Batch, Inputs
from asga._checks import check_autocast, check_call, check_count, check_instance, check_number
from asga.nn import calibrate, parameter_groups
from asga.optim import ASGA
from asga.optim.guarded import GuardedSGD
from asga.optim.handed_on import check_optimizer_options, check_suits_model
from asga.recovery import Recovery, halve_steps
from asga.runs import RunFolder, existing_folder, open_folder
from asga.steps import (
    Evaluation,
    LossFunction,
    StepReport,
    cosine_with_warmup,
    evaluate,
    finite,
    measure_batchnorm,
    training_step,
)
from asga.training import (
    CHECKPOINT_EVERY,
    Progress,
    Stage,
    batches_from,
    check_resumable,
    count_batches,
    finite_batches,
    first_batches,
    setting_of,
)

# What a training that goes on must have in common with the one that was interrupted.
_SETTING = ("method", "lr", "momentum", "weight_decay", "warmup", "autocast")


@dataclass(frozen=True)
class TransferResult:
    """The outcome of a transfer.

    Args:
        evaluation: On the validation batches, after training; None without any.
        history: What was logged of every epoch.
    """

    evaluation: Evaluation | None
    history: list[dict[str, object]]


class TransferTrainer:
    """Fine-tunes a quantized model on the target dataset, with the ASGA step.

    Scales of activations that are not set yet are calibrated on a few batches, weights and scales trained, and the
    running statistics of batch normalization measured anew at the end. A float model is trained just the same, there
    being nothing to calibrate::

        model = asga.quantize(float_model, policy)
        result = asga.TransferTrainer(model, epochs=3).fit(train_loader, val_loader)

    Args:
        model: From `asga.quantize`; trained in place.
        epochs: Passes over the training batches.
        method: ``"asga"``, or ``"sgd"``: one pass a step.
        lr: Of weights and scales, for SGD with Nesterov momentum, warmed up and then following a cosine. 0.02 suits
            fine-tuning from a float model, 0.1 training from scratch.
        momentum: Of that SGD.
        weight_decay: Of the weights; never of scales, norms or biases.
        warmup: Steps over which `lr` rises.
        optimizer_options: Further options of `asga.optim.ASGA`.
        calibration_batches: Batches that set those scales of the activations that are not set yet.
        batchnorm_batches: Batches that measure the running statistics at the end; 0 leaves those of training.
        validate_every: Epochs between evaluations; the last epoch is always evaluated.
        loss_fn: The mean loss over a batch of logits and labels. With the default, labels are int64 ``[B]`` and logits
            ``[B, classes]``; another one takes whatever logits and labels it is made for.
        autocast: Run the model under autocast to this dtype.
        checkpoint_every: Steps of an epoch between checkpoints; there is one at its end, too. When its loss stays NaN,
            the training goes back to the last good one, or to a good state since then: one of every 50 steps is in
            memory.
        folder: Where metrics and checkpoints go: a path, or a `RunFolder`. With a checkpoint in it, `fit` resumes; a
            folder of a path that is not there yet is made.
        progress: Called after every step.
        stage: The name of this training in metrics and checkpoints.

    Raises:
        TypeError: An argument is of another type.
        ValueError: An argument is out of range. Nothing has been changed.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        epochs: int,
        method: str = "asga",
        lr: float = 0.02,
        momentum: float = 0.9,
        weight_decay: float = 1e-4,
        warmup: int = 20,
        optimizer_options: Mapping[str, object] | None = None,
        calibration_batches: int = 4,
        batchnorm_batches: int = 50,
        validate_every: int = 1,
        loss_fn: LossFunction = functional.cross_entropy,
        autocast: torch.dtype | None = None,
        checkpoint_every: int = CHECKPOINT_EVERY,
        folder: RunFolder | str | os.PathLike | None = None,
        progress: Callable[[Progress], None] | None = None,
        stage: str = "transfer",
    ) -> None:
        check_instance("model", model, nn.Module, "a torch.nn.Module")
        if method not in ("asga", "sgd"):
            raise ValueError(f"method is {method!r}; it must be 'asga' or 'sgd'")
        self.epochs, self.warmup = check_count("epochs", epochs), check_count("warmup", warmup, least=0)
        self.calibration_batches = check_count("calibration_batches", calibration_batches)
        self.batchnorm_batches = check_count("batchnorm_batches", batchnorm_batches, least=0)
        self.validate_every = check_count("validate_every", validate_every)
        self.checkpoint_every = check_count("checkpoint_every", checkpoint_every)
        self.lr, self.weight_decay = check_number("lr", lr), check_number("weight_decay", weight_decay)
        self.momentum = check_number("momentum", momentum, below=1)
        self.optimizer_options = check_optimizer_options(
            method,
            {} if optimizer_options is None else optimizer_options,
            two_passes=method == "asga",
            momentum=momentum,
            lr=lr,
        )
        check_autocast(autocast)
        check_call("loss_fn", loss_fn)
        check_call("progress", progress, or_none=True)
        check_instance("folder", folder, (RunFolder, str, os.PathLike, type(None)), "a path or a RunFolder, or None,")
        check_instance("stage", stage, str, "a name")
        self.model, self.method, self.loss_fn, self.autocast = model, method, loss_fn, autocast
        self.folder, self.progress, self.stage = folder, progress, stage

    def fit(
        self,
        train: Iterable[Batch],
        val: Iterable[Batch] | None = None,
    ) -> TransferResult:
        """Train.

        Args:
            train: Batches of the forms that `asga.evaluate` takes, with a length.
            val: The same, for evaluation; it need not have a length, but is run through more than once.

        Raises:
            TrainingError: The loss is not finite, or the data do not fit the model.
            TypeError: A batch has another form, or `val` is no loader.
            ValueError: A loader is empty, `train` has no length, `val` is an iterator, `optimizer_options` do not suit
                the model, or `folder` holds another training. Nothing has been changed.
            KeyboardInterrupt: Stopped; the checkpoint in `folder`, if given, resumes the training.
        """
        batches, setting = count_batches(train), setting_of(self, _SETTING)
        steps = self.epochs * batches
        if val is not None:
            _check_val(val)
        check_suits_model(self.optimizer_options, self.model)
        folder = existing_folder(self.folder, "transfer")
        if folder is not None:
            length = {"epochs": self.epochs, "steps": batches}
            folder.check_checkpoint(partial(check_resumable, stage=self.stage, **length, setting=setting))
        calibrate(self.model, first_batches(train, self.calibration_batches), again=False)
        self.model.train()
        groups = parameter_groups(self.model, weight_decay=self.weight_decay, lr=self.lr)
        sgd = {"momentum": self.momentum, "nesterov": self.momentum > 0}
        if self.method == "asga":
            optimizer = ASGA(groups, torch.optim.SGD, model=self.model, **sgd, **self.optimizer_options)
        else:
            optimizer = GuardedSGD(groups, model=self.model, **sgd, **self.optimizer_options)
        scheduler = cosine_with_warmup(optimizer, steps, self.warmup)

        def step(inputs: Inputs, labels: Tensor) -> StepReport:
            options = {"loss_fn": self.loss_fn, "autocast": self.autocast}
            report = training_step(self.model, optimizer, inputs, labels, **options)
            scheduler.step()
            return report

        def end_epoch(epoch: int) -> dict[str, object]:
            record: dict[str, object] = {"lr": optimizer.param_groups[0]["lr"]}
            if isinstance(optimizer, ASGA):
                record |= finite(optimizer.diagnostics())
            if epoch == self.epochs and self.batchnorm_batches > 0:
                self._measure_batchnorm(train)
            if val is not None and (epoch == self.epochs or epoch % self.validate_every == 0):
                found = evaluate(self.model, val, loss_fn=self.loss_fn, autocast=self.autocast)
                record |= finite({"val_loss": found.loss, "val_top1": found.top1})
            return record

        parts = {"model": self.model, "optimizer": optimizer}
        stage = Stage(
            self.stage,
            self.epochs,
            {**parts, "scheduler": scheduler},
            recovery=Recovery(parts, halve_steps(optimizer, scheduler), steps),
            checkpoint_every=self.checkpoint_every,
            folder=open_folder(self.folder, "transfer"),  # after what may fail, so that nothing is written then
            progress=self.progress,
            setting=setting,
        )
        history = stage.run(train, step, end_epoch)
        evaluation = None
        if val is not None:
            evaluation = evaluate(self.model, val, loss_fn=self.loss_fn, autocast=self.autocast)
        return TransferResult(evaluation, history)

    def _measure_batchnorm(self, train: Iterable[Batch]) -> None:
        """Running statistics of the final weights: those of training lag behind by a momentum of 0.1 a step."""
        batches = itertools.islice(finite_batches(batches_from(train, self.epochs)), self.batchnorm_batches)
        measure_batchnorm(self.model, batches, autocast=self.autocast)


def _check_val(val: object) -> None:
    """Refuse what could not be evaluated on after every epoch.

    Raises:
        TypeError: It cannot be iterated over.
        ValueError: It is empty, or can be run through only once.
    """
    if not isinstance(val, Iterable):
        raise TypeError(f"val is {val!r}; a loader of batches, or None, is needed")
    if isinstance(val, Iterator):
        raise ValueError(
            f"val is a {type(val).__name__}, which can be run through only once; a list or a loader is needed"
        )
    try:
        empty = len(val) == 0
    except TypeError:  # of a DataLoader over a dataset without a length
        empty = False
    if empty:
        raise ValueError("val is empty: there is nothing to evaluate; None leaves the evaluation out")
