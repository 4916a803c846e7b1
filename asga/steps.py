"""One step of training a classifier, what follows the last one, and evaluation."""

import contextlib
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.optimizer import Optimizer
from torch.optim.swa_utils import update_bn

from asga._batches import Batch, Inputs, call, split, to_device
from asga._modes import modes_kept
from asga.optim import ASGA
from asga.optim.guarded import GuardedSGD

LossFunction = Callable[[Tensor, Tensor], Tensor]


class TrainingError(RuntimeError):
    """Training cannot go on: the loss is not finite, or the data do not fit the model."""


@dataclass(frozen=True)
class StepReport:
    """What a step saw.

    Args:
        metrics: Numbers to average over the epoch: the `loss` and others.
        skipped: Whether the optimizer left the step out, because the loss or a gradient was not finite.
    """

    metrics: dict[str, float]
    skipped: bool = False


@dataclass(frozen=True)
class Evaluation:
    """Mean loss and top-1 accuracy (0 to 1) over `images` samples; `top1` is NaN where labels are not classes."""

    loss: float
    top1: float
    images: int


def training_step(
    model: nn.Module,
    optimizer: ASGA | GuardedSGD,
    inputs: Inputs,
    labels: Tensor,
    *,
    loss_fn: LossFunction = functional.cross_entropy,
    autocast: torch.dtype | None = None,
) -> StepReport:
    """One step of an optimizer on one batch.

    Gradients of the whole model are cleared before each pass, also of parameters that the optimizer does not hold;
    those of the last pass are left for whoever does.

    Args:
        model: In training mode.
        optimizer: `ASGA` or `GuardedSGD`.
        inputs: Of the batch; moved to the model's device.
        labels: Likewise.
        loss_fn: The mean loss over a batch of logits and labels. With the default, labels are int64 ``[B]`` and logits
            ``[B, classes]``; another one takes whatever logits and labels it is made for.
        autocast: Run the model under autocast to this dtype.

    Returns:
        `loss` of the first pass and, where labels are classes, its `accuracy`.

    Raises:
        TrainingError: The data do not fit the model.
    """
    device = _device(model)
    inputs, labels = to_device(inputs, device), labels.to(device)
    seen: list[Tensor] = []

    def closure() -> Tensor:
        optimizer.zero_grad()
        model.zero_grad()
        logits = model_logits(model, inputs, autocast)
        if not seen:
            seen.append(logits.detach())
        loss = _mean_loss(loss_fn, logits, labels)
        loss.backward()
        return loss

    metrics = {"loss": optimizer.step(closure).item()}
    if (counts := count_correct(seen[0], labels)) is not None:
        metrics["accuracy"] = (counts[0] / counts[1]).item()
    return StepReport(metrics, bool(optimizer.last_skipped))


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    loss_fn: LossFunction = functional.cross_entropy,
    autocast: torch.dtype | None = None,
) -> Evaluation:
    """Loss and accuracy of a classifier, in eval mode; the mode of every module is restored.

    Args:
        model: Gives logits ``[B, classes]``, as a tensor or as the entry `logits` of what it returns.
        batches: Pairs of inputs and labels int64 ``[B]``, where inputs are a tensor, a tuple of positional or a
            mapping of keyword arguments; or mappings with the entry "labels".
        loss_fn: The mean loss over a batch of logits and labels, of other shapes too if it takes them.
        autocast: Run the model under autocast to this dtype.

    Raises:
        ValueError: There is no batch.
        TypeError: A batch is of another kind.
        TrainingError: A label is outside the model's classes, or an output is of another kind.
    """
    device = _device(model)
    loss = correct = counted = torch.zeros((), dtype=torch.float64, device=device)
    images = 0
    with modes_kept(model):
        model.eval()
        for inputs, labels in map(split, batches):
            inputs, labels = to_device(inputs, device), labels.to(device)
            logits = model_logits(model, inputs, autocast)
            loss = loss + _mean_loss(loss_fn, logits, labels).double() * len(labels)
            right, all_of_them = count_correct(logits, labels) or (0, 0)
            correct, counted = correct + right, counted + all_of_them
            images += len(labels)
    if images == 0:
        raise ValueError("batches is empty: there is nothing to evaluate")
    return Evaluation(loss.item() / images, (correct / counted).item(), images)


def measure_batchnorm(
    model: nn.Module, batches: Iterable[tuple[Inputs, Tensor]], *, autocast: torch.dtype | None = None
) -> None:
    """Measure the running statistics of batch normalization anew: the plain mean over some batches.

    Args:
        model: The modes of its modules are restored.
        batches: Pairs of inputs and labels.
        autocast: Run the model under autocast to this dtype.
    """
    device = _device(model)
    with modes_kept(model), autocast_to(device, autocast):
        update_bn(((to_device(inputs, device),) for inputs, _ in batches), _AnyInputs(model))


def batch_loss(
    model: nn.Module,
    inputs: Inputs,
    labels: Tensor,
    *,
    loss_fn: LossFunction = functional.cross_entropy,
    autocast: torch.dtype | None = None,
) -> Tensor:
    """The mean loss of a batch, to be differentiated; arguments as for `training_step`.

    Raises:
        TrainingError: The data do not fit the model.
    """
    device = _device(model)
    logits = model_logits(model, to_device(inputs, device), autocast)
    return _mean_loss(loss_fn, logits, labels.to(device))


def model_logits(model: nn.Module, inputs: Inputs, autocast: torch.dtype | None) -> Tensor:
    """The logits that a model gives for a batch, in float32.

    Raises:
        TrainingError: It gives neither a tensor nor something with a tensor `logits`.
    """
    with autocast_to(_device(model), autocast):
        outputs = call(model, inputs)
    logits = outputs.get("logits") if isinstance(outputs, Mapping) else getattr(outputs, "logits", outputs)
    if not isinstance(logits, Tensor):
        raise TrainingError(
            f"the model gives a {type(outputs).__name__}; a tensor of logits is needed, or an output with a tensor "
            f"'logits': wrap the model in a module that returns it"
        )
    return logits.float()


def check_labels(labels: Tensor, logits: Tensor) -> None:
    """Refuse labels outside the model's classes; on a GPU they would end the process.

    Raises:
        TrainingError: Labels are not int64 ``[B]``, there is none, one is negative or too large, or the logits are not
            ``[B, classes]``.
    """
    own = "For other labels, such as one for each token, give a loss_fn of your own"
    if labels.dim() != 1 or labels.dtype != torch.int64:
        raise TrainingError(f"labels are {labels.dtype} {list(labels.shape)}; torch.int64 [batch] is needed. {own}")
    if logits.dim() != 2 or len(logits) != len(labels):
        raise TrainingError(
            f"the model gives an output of shape {list(logits.shape)} for {len(labels)} labels; "
            f"logits of shape [batch, classes] are needed. {own}"
        )
    if len(labels) == 0:
        raise TrainingError("a batch holds no samples: leave it out of the loader")
    low, high = labels.min().item(), labels.max().item()
    if low < 0 or high >= logits.shape[1]:
        wrong = low if low < 0 else high
        raise TrainingError(f"the data hold the label {wrong}, but the model has {logits.shape[1]} classes")


def count_correct(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor] | None:
    """How many labels have the largest logit, and of how many; None where labels are not classes.

    Labels are classes where they are int64 and the last dimension of the logits is one more; negative ones, which
    losses ignore, are not counted.
    """
    if labels.dtype != torch.int64 or labels.dim() == 0 or labels.shape != logits.shape[:-1]:
        return None
    counted = labels >= 0
    return ((logits.argmax(-1) == labels) & counted).sum(), counted.sum()


def cosine_with_warmup(optimizer: Optimizer, steps: int, warmup: int) -> LambdaLR:
    """The learning rate as a half cosine down to zero, after a linear warm-up of `warmup` steps.

    Source:
        Loshchilov and Hutter, "SGDR", ICLR 2017, eq. 5 without restarts.
    """
    warmup = min(warmup, steps // 2)

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        return 0.5 * (1.0 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))

    return LambdaLR(optimizer, factor)


def autocast_to(device: torch.device, dtype: torch.dtype | None) -> contextlib.AbstractContextManager:
    """Autocast on a device, or nothing for None."""
    return contextlib.nullcontext() if dtype is None else torch.autocast(device.type, dtype)


def finite(values: Mapping[str, float]) -> dict[str, float]:
    """The entries that JSON can hold: NaN and infinities left out."""
    return {name: value for name, value in values.items() if math.isfinite(value)}


def _mean_loss(loss_fn: LossFunction, logits: Tensor, labels: Tensor) -> Tensor:
    """What `loss_fn` gives, one number.

    Raises:
        TrainingError: The labels do not fit the logits, or it gives something else, or nothing to differentiate where
            the logits can be.
    """
    if loss_fn is functional.cross_entropy:
        check_labels(labels, logits)
    loss = loss_fn(logits, labels)
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        found = f"a tensor of shape {list(loss.shape)}" if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
        raise TrainingError(f"loss_fn gives {found}; a tensor of one number is needed, the mean loss over the batch")
    if torch.is_grad_enabled() and logits.requires_grad and not loss.requires_grad:
        raise TrainingError(
            "loss_fn gives a loss without a gradient, while the logits have one: compute it from them with operations "
            "of torch, without detach, item or no_grad"
        )
    return loss


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


class _AnyInputs(nn.Module):
    """A model whose only argument are inputs of any form: `update_bn` knows no other models."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: Inputs) -> object:
        return call(self.model, inputs)
