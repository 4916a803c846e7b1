"""Training loops that can be watched, interrupted and resumed, and the batches they run on."""

import itertools
import math
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import FrameType
from typing import Protocol

import torch
from torch import Tensor

from asga._batches import Batch, Inputs, all_finite, split
from asga.runs import RunFolder
from asga.steps import TrainingError, finite

# Steps in a row whose loss is not finite before training gives up: the optimizers skip such steps, so a few of them
# do no harm, but a network that has diverged does not come back.
_MAX_BAD_STEPS = 10


@dataclass(frozen=True)
class Progress:
    """Where a stage of training is; sent after every step.

    Args:
        stage: Its name, such as ``"search"``.
        epoch: The epoch under way, counted from 1.
        epochs: Epochs in all.
        step: Steps done in this epoch.
        steps: Steps in an epoch.
        metrics: Averages over this epoch so far, such as loss and accuracy.
    """

    stage: str
    epoch: int
    epochs: int
    step: int
    steps: int
    metrics: dict[str, float]


class Stateful(Protocol):
    """Something that a checkpoint holds: modules, optimizers, schedulers."""

    def state_dict(self) -> dict[str, object]:
        """Its state in tensors and plain containers."""

    def load_state_dict(self, state: dict[str, object]) -> object:
        """Take over such a state."""


class Stage:
    """Epochs of training steps, with metrics, progress, checkpoints and an orderly stop.

    Ctrl-C and SIGTERM end the step under way (after the last one, the epoch), save a checkpoint (with a `folder`)
    and raise `KeyboardInterrupt`; a second Ctrl-C stops at once. With a checkpoint of this stage in the folder, `run`
    continues exactly where it was saved: after that very batch, with the same random numbers.

    Args:
        name: Of the stage; checkpoints and metrics carry it.
        epochs: How many.
        parts: Everything that changes in a step, by name.
        folder: Where metrics and checkpoints go; None: nowhere.
        progress: Called after every step.
    """

    def __init__(
        self,
        name: str,
        epochs: int,
        parts: dict[str, Stateful],
        *,
        folder: RunFolder | None = None,
        progress: Callable[[Progress], None] | None = None,
    ) -> None:
        self._name, self._epochs, self._parts = name, epochs, parts
        self._folder, self._progress = folder, progress
        self._epoch = self._step = 0
        self._averages = _Averages()
        self._seconds = 0.0
        self._history: list[dict[str, object]] = []
        self._random_at_epoch = _random_state()

    def run(
        self,
        loader: Iterable[Batch],
        step: Callable[[Inputs, Tensor], dict[str, float]],
        end_epoch: Callable[[int], dict[str, object]] | None = None,
    ) -> list[dict[str, object]]:
        """Run what is left of the stage.

        Args:
            loader: Batches of a form that `asga.evaluate` takes; anything with a length. `asga.data.Batches` resumes
                inside an epoch at no cost; other loaders are run through up to the batch, and give the same batches
                only if they draw them from torch's global generator or not at all.
            step: Trains on one batch and returns numbers to average over the epoch.
            end_epoch: Returns what else to log; called with the epoch, counted from 1.

        Returns:
            What was logged of each epoch, those before a resumption included.

        Raises:
            KeyboardInterrupt: A signal ended it; the checkpoint has been saved.
            ValueError: The loader is empty or has no length.
        """
        steps = count_batches(loader)
        self._resume()
        with _StopSignal() as stop:
            while self._epoch < self._epochs:
                self._run_epoch(loader, steps, step, end_epoch, stop)
                if stop.requested:
                    raise KeyboardInterrupt
        return self._history

    def _run_epoch(self, loader, steps: int, step, end_epoch, stop: "_StopSignal") -> None:
        started = time.perf_counter() - self._seconds
        for inputs, labels in self._batches(loader):
            self._averages.add(step(inputs, labels))
            self._step += 1
            self._seconds = time.perf_counter() - started
            if self._progress is not None:
                means = self._averages.means()
                self._progress(Progress(self._name, self._epoch + 1, self._epochs, self._step, steps, means))
            # After the last step the epoch is ended first: its record tells what that step saw, no checkpoint does.
            if stop.requested and self._step < steps:
                self._save()
                raise KeyboardInterrupt
        record = {
            "stage": self._name,
            "epoch": self._epoch + 1,
            "epochs": self._epochs,
            **self._averages.means(),
            **(end_epoch(self._epoch + 1) if end_epoch is not None else {}),
            "seconds": round(time.perf_counter() - started, 3),
        }
        if self._folder is not None:
            self._folder.log(event="epoch", **record)
        self._history.append(record)
        self._epoch, self._step, self._seconds = self._epoch + 1, 0, 0.0
        self._averages = _Averages()
        self._save()

    def _batches(self, loader: Iterable[Batch]) -> Iterator[tuple[Inputs, Tensor]]:
        """What is left of the epoch. A loader draws its order when the epoch begins: from that random state."""
        if self._step == 0:
            self._random_at_epoch = _random_state()
            return batches_from(loader, self._epoch)
        now = _random_state()
        _set_random_state(self._random_at_epoch)
        batches = batches_from(loader, self._epoch, self._step)
        _set_random_state(now)
        return batches

    def _save(self) -> None:
        if self._folder is None:
            return
        state = {
            "stage": self._name,
            "epoch": self._epoch,
            "step": self._step,
            "seconds": self._seconds,
            "averages": self._averages.state(),
            "history": self._history,
            "random": _random_state(),
            "random_at_epoch": self._random_at_epoch,
            "parts": {name: part.state_dict() for name, part in self._parts.items()},
        }
        self._folder.save_checkpoint(state)

    def _resume(self) -> None:
        state = None if self._folder is None else self._folder.load_checkpoint()
        if state is None or state["stage"] != self._name:
            return
        for name, part in self._parts.items():
            part.load_state_dict(state["parts"][name])
        self._epoch, self._step, self._seconds = state["epoch"], state["step"], state["seconds"]
        self._averages = _Averages(**state["averages"])
        self._history, self._random_at_epoch = state["history"], state["random_at_epoch"]
        _set_random_state(state["random"])


def batches_from(loader: Iterable[Batch], epoch: int, start: int = 0) -> Iterator[tuple[Inputs, Tensor]]:
    """Iterate over epoch `epoch` of a loader from batch `start` on; earlier ones are passed over at once.

    Raises:
        TypeError: A batch has none of the forms that `asga.evaluate` takes.
    """
    for owner in (loader, getattr(loader, "sampler", None)):
        if hasattr(owner, "set_epoch"):
            owner.set_epoch(epoch)
    if hasattr(loader, "iterate"):
        return loader.iterate(start)
    batches = iter(loader)
    for _ in itertools.islice(batches, start):
        pass
    return map(split, batches)


def finite_batches(batches: Iterable[tuple[Inputs, Tensor]]) -> Iterator[tuple[Inputs, Tensor]]:
    """Leave out batches with NaN or infinities, which would spoil what is measured on them."""
    return ((inputs, labels) for inputs, labels in batches if all_finite(inputs))


def first_batches(loader: Iterable[Batch], count: int) -> list[tuple[Inputs, Tensor]]:
    """Up to `count` batches of epoch 0 to calibrate on, those with NaN or infinities left out.

    Raises:
        TrainingError: None is left.
    """
    found = list(itertools.islice(finite_batches(batches_from(loader, 0)), count))
    if not found:
        raise TrainingError("every batch of the loader holds NaN or infinities")
    return found


def count_batches(loader: Iterable[Batch]) -> int:
    """How many batches an epoch has.

    Raises:
        ValueError: None, or the loader has no length.
    """
    try:
        count = len(loader)
    except TypeError:  # of an object without a length, or of a DataLoader over such a dataset
        raise ValueError(
            f"loader is a {type(loader).__name__} without a length; a DataLoader or a list is needed"
        ) from None
    if count == 0:
        raise ValueError("loader is empty: there is no batch")
    return count


class LossWatch:
    """Counts steps whose loss is not finite and gives up when they do not end.

    Args:
        steps: Steps of the whole training; when none of a short one is good, it is given up too.
    """

    def __init__(self, steps: int) -> None:
        self._most = min(steps, _MAX_BAD_STEPS)
        self._bad = 0

    def check(self, loss: float) -> None:
        """Take note of the loss of a step.

        Raises:
            TrainingError: The loss was not finite for several steps in a row.
        """
        self._bad = 0 if math.isfinite(loss) else self._bad + 1
        if self._bad >= self._most:
            raise TrainingError(
                f"the loss is {loss} for {self._bad} steps in a row. The learning rate may be too high, or the data "
                f"hold NaN; a checkpoint of the last finished epoch, if there is one, is kept"
            )


class _Averages:
    """Means of numbers by name; NaN and infinities, those of skipped steps, are left out."""

    def __init__(self, sums: Mapping[str, float] | None = None, counts: Mapping[str, int] | None = None) -> None:
        self._sums, self._counts = Counter(sums), Counter(counts)

    def add(self, values: Mapping[str, float]) -> None:
        for name, value in finite(values).items():
            self._sums[name] += value
            self._counts[name] += 1

    def means(self) -> dict[str, float]:
        return {name: total / self._counts[name] for name, total in self._sums.items()}

    def state(self) -> dict[str, dict[str, float]]:
        return {"sums": dict(self._sums), "counts": dict(self._counts)}


class _StopSignal:
    """Turns the first SIGINT or SIGTERM into a flag; the second one acts as usual."""

    def __init__(self) -> None:
        self.requested = False
        self._previous = {}

    def __enter__(self) -> "_StopSignal":
        # Only the main thread may set handlers; elsewhere, whoever owns the process decides.
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._request)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _request(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        signal.signal(number, self._previous[number])


def _random_state() -> dict[str, object]:
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return {"cpu": torch.get_rng_state(), "cuda": cuda}


def _set_random_state(state: dict[str, object]) -> None:
    torch.set_rng_state(state["cpu"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])
