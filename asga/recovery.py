"""Taking a training whose loss stays NaN or infinite back to where it was well."""

import copy
import math
from collections.abc import Callable, Mapping
from typing import Protocol

from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.optimizer import Optimizer

from asga.optim import ASGA
from asga.steps import TrainingError

# Steps in a row that were left out before the training goes back: a few do no harm, they are batches with NaN; a
# network that has diverged does not come back by itself.
MOST_SKIPPED = 10
# Times to go back to one state before giving up: what fails with an eighth of the radius does not fail because of it.
_MOST_RETURNS = 3
# A state is good if its loss is finite and not this many times the usual one. A loss that grows without bound gets
# there within steps, batches that happen to be hard do not.
_DIVERGING = 10.0
# The usual loss is a mean that forgets over about a hundred steps, and at least 1: the cross entropy of a guess among
# three. A training with next to no loss left may well see a tenfold one.
_FORGET, _USUAL_AT_LEAST = 0.01, 1.0

_SAVED = ("where", "usual", "skipped", "returns", "softened", "ever_well")


class Stateful(Protocol):
    """Something that a checkpoint holds: modules, optimizers, schedulers."""

    def state_dict(self) -> dict[str, object]:
        """Its state in tensors and plain containers."""

    def load_state_dict(self, state: dict[str, object]) -> object:
        """Take over such a state."""


class Recovery:
    """Holds the last good state, and goes back to it when step after step is left out.

    The optimizers of this package leave out a step whose loss or gradient is not finite. When that happens ten times in
    a row, `parts` are taken back and `soften` makes the next steps smaller; the training goes on with its next batches.
    It is given up when going back did not help three times, or when no step was ever good.

    Args:
        parts: What goes back: modules and optimizers. Not what tells the time, such as a scheduler: steps that were
            made count as made.
        soften: Makes the next steps smaller and says how. It is called after the parts went back, and after loading a
            checkpoint, before its parts are loaded, as often as it was called before.
        steps: Of the whole training.

    Attributes:
        well: Whether the last step was made, with a loss that is not far from the usual one.
    """

    def __init__(self, parts: Mapping[str, Stateful], soften: Callable[[], str], steps: int) -> None:
        self._parts, self._soften = dict(parts), soften
        self._at_first = min(steps, MOST_SKIPPED)
        self._good: dict[str, object] | None = None
        self._where = ""
        self._usual: float | None = None
        self._skipped = self._returns = self._softened = 0
        self.well = self._ever_well = False

    def keep(self, states: Mapping[str, object], where: str) -> None:
        """Take a state as the good one.

        Args:
            states: Of the parts and perhaps of others, by name: copies.
            where: In the training, to be said when it goes back here.
        """
        self._good = {name: states[name] for name in self._parts}
        self._where, self._returns = where, 0

    def watch(self, loss: float, *, skipped: bool) -> str | None:
        """Take note of a step, and go back if it was one too many.

        Args:
            loss: Of the step.
            skipped: Whether the optimizer left it out, as it does when the loss is not finite.

        Returns:
            What was done, if the training went back.

        Raises:
            TrainingError: It cannot be helped. The parts are at the last good state.
        """
        if not skipped:
            usual = loss if self._usual is None else self._usual
            self.well = loss <= _DIVERGING * max(usual, _USUAL_AT_LEAST)
            self._usual = usual + _FORGET * (loss - usual)
            self._skipped, self._ever_well = 0, True
            return None
        self.well = False
        self._skipped += 1
        if self._skipped < (MOST_SKIPPED if self._ever_well else self._at_first):
            return None
        problem = f"{describe(loss)} for {self._skipped} steps in a row"
        for name, part in self._parts.items():
            # An optimizer goes on to work in the tensors that it is given.
            part.load_state_dict(copied(self._good[name]))
        if not self._ever_well or self._returns == _MOST_RETURNS:
            tried = f", and again after each of {_MOST_RETURNS} returns to {self._where}" if self._ever_well else ""
            raise TrainingError(
                f"{problem}{tried}. The learning rate or the radius may be too high, or the data hold NaN; the last "
                f"checkpoint, if there is one, is kept"
            )
        self._skipped, self._returns, self._softened = 0, self._returns + 1, self._softened + 1
        return f"{problem}: back to {self._where}, {self._soften()}"

    def state_dict(self) -> dict[str, object]:
        """Counters and the good state; `good` may be left out (None) where that is the present one."""
        return {"good": self._good, **{name: getattr(self, f"_{name}") for name in _SAVED}}

    def load_state_dict(self, state: dict[str, object]) -> None:
        """Take over what `state_dict` gave; the parts are to be loaded next, and without a good state `keep` called."""
        self._good = state["good"]
        for name in _SAVED:
            setattr(self, f"_{name}", state[name])
        for _ in range(self._softened):
            self._soften()


def halve_steps(optimizer: Optimizer, scheduler: LambdaLR) -> Callable[[], str]:
    """What makes the next steps smaller, for `Recovery`: each call halves the radius.

    Plain SGD has none. There it halves the learning rate, the one other thing that decides how far a step goes.

    Args:
        optimizer: `ASGA` or another.
        scheduler: Of its learning rate.
    """

    def halve() -> str:
        if isinstance(optimizer, ASGA):
            optimizer.scale_radius(0.5)
            rates, done = scheduler.get_last_lr(), f"half the radius (rho_max is now {optimizer.rho_max:g})"
        else:
            scheduler.base_lrs = [0.5 * lr for lr in scheduler.base_lrs]
            rates, done = [0.5 * lr for lr in scheduler.get_last_lr()], "half the learning rate"
        # The optimizer went back to the rates of then; the schedule goes on.
        for group, lr in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = lr
        return done

    return halve


def describe(loss: float) -> str:
    """Why a step was left out."""
    return "the gradients are not finite" if math.isfinite(loss) else f"the loss is {loss}"


def copied(value: object) -> object:
    """A state dict with copies of its tensors, in the memory of the CPU, of which there is more."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        result = copy.copy(value)  # with what a module's state dict has beside its entries
        result.update({key: copied(item) for key, item in value.items()})
        return result
    return [copied(item) for item in value] if isinstance(value, list) else value
