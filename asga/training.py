"""Training loops that can be watched, interrupted and resumed, and the batches they run on."""

import itertools
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from asga._batches import Batch, Inputs, all_finite, split
from asga._random import generators_of, owners_of, random_state, set_random_state
from asga._signals import StopSignal
from asga.recovery import Recovery, Stateful, copied, describe
from asga.runs import RunFolder
from asga.steps import StepReport, TrainingError, finite

# Steps between checkpoints: what a kill costs at most. A checkpoint of a ResNet-50 with momentum, 205 MB, took 2.3 s on
# a busy disk, 2 % of the two minutes that 200 steps of two passes take on a GPU; one of a search of ResNet-20 0.06 s.
CHECKPOINT_EVERY = 200
# Steps between states that are kept in memory to go back to: what a diverged training loses at most, beside the steps
# that it takes to notice. Nothing is written, so they can be nearer to each other than checkpoints: one takes
# 10 to 34 ms in searches of ResNet-20 and MobileNet-V2 (one core, batches of 8 to 64), 0.03 to 0.3 % of 50 steps.
KEEP_EVERY = 50


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
        note: What is out of the ordinary about this step.
    """

    stage: str
    epoch: int
    epochs: int
    step: int
    steps: int
    metrics: dict[str, float]
    note: str | None = None


class Stage:
    """Epochs of training steps, with metrics, progress, checkpoints and an orderly stop.

    Checkpoints are made every `checkpoint_every` steps of an epoch and at its end. Ctrl-C and SIGTERM end the step
    under way (after the last one, the epoch), save one and raise `KeyboardInterrupt`; a second Ctrl-C stops at once.
    With a checkpoint of this stage in the folder, `run` continues exactly where it was saved: after that very batch,
    with the same random numbers of torch, NumPy and Python. So however often a run is stopped or killed, what it logs
    and what it ends with are the same: bit for bit on a CPU, times excepted.

    Steps that the optimizer leaves out are counted, logged and told to `progress`; `recovery` sees to it that the
    training does not end with them.

    Args:
        name: Of the stage; checkpoints and metrics carry it.
        epochs: How many.
        parts: Everything that changes in a step, by name.
        recovery: Goes back to the last good state when steps are left out again and again: one of those that
            checkpoints are made of, or of those in between, every `KEEP_EVERY` steps, which are in memory alone.
        checkpoint_every: Steps between checkpoints.
        folder: Where metrics and checkpoints go; None: nowhere.
        progress: Called after every step.
        setting: What a resumed training must have in common with the one that made the checkpoint, by name.

    Raises:
        ValueError: `checkpoint_every` is below 1.
    """

    def __init__(
        self,
        name: str,
        epochs: int,
        parts: dict[str, Stateful],
        *,
        recovery: Recovery,
        checkpoint_every: int = CHECKPOINT_EVERY,
        folder: RunFolder | None = None,
        progress: Callable[[Progress], None] | None = None,
        setting: Mapping[str, str] | None = None,
    ) -> None:
        if checkpoint_every < 1:
            raise ValueError(f"checkpoint_every is {checkpoint_every}; it must be at least 1")
        self._name, self._epochs, self._parts, self._recovery = name, epochs, parts, recovery
        self._checkpoint_every, self._folder, self._progress = checkpoint_every, folder, progress
        self._setting = dict(setting or {})
        self._epoch = self._step = self._steps = self._skipped = 0
        self._averages = _Averages()
        self._seconds = 0.0
        self._history: list[dict[str, object]] = []
        self._generators: list[torch.Generator] = []
        self._random_at_epoch: dict[str, object] = {}
        self._pending: _Snapshot | None = None

    def run(
        self,
        loader: Iterable[Batch],
        step: Callable[[Inputs, Tensor], StepReport],
        end_epoch: Callable[[int], dict[str, object]] | None = None,
    ) -> list[dict[str, object]]:
        """Run what is left of the stage.

        Args:
            loader: Batches of a form that `asga.evaluate` takes; anything with a length. `asga.data.Batches` resumes
                inside an epoch at no cost; other loaders are run through up to the batch, and give the same batches if
                what is random comes from the generator of a `DataLoader`, from the global ones of torch, NumPy or
                Python, or from workers that do not persist.
            step: Trains on one batch.
            end_epoch: Returns what else to log; called with the epoch, counted from 1.

        Returns:
            What was logged of each epoch, those before a resumption included.

        Raises:
            KeyboardInterrupt: A signal ended it; the checkpoint has been saved.
            OSError: A checkpoint or metrics could not be written; the last checkpoint stays.
            TrainingError: Step after step is left out, and going back does not help.
            ValueError: The loader is empty or has no length, or the checkpoint is of a stage of another length,
                with other options, or interrupted and of another name.
        """
        self._steps, self._generators = count_batches(loader), generators_of(loader)
        if not self._resume():
            self._recovery.keep(self._snapshot().state["parts"], self._where())
        with StopSignal() as stop:
            while self._epoch < self._epochs:
                self._run_epoch(loader, step, end_epoch, stop)
        return self._history

    def _run_epoch(self, loader, step, end_epoch, stop: StopSignal) -> None:
        started = time.perf_counter() - self._seconds
        for inputs, labels in self._batches(loader):
            report = step(inputs, labels)
            self._averages.add(report.metrics)
            self._step += 1
            note = self._watch(report)
            self._seconds = time.perf_counter() - started
            if self._progress is not None:
                means = self._averages.means()
                position = (self._epoch + 1, self._epochs, self._step, self._steps)
                self._progress(Progress(self._name, *position, means, note))
            if self._pending is not None and not report.skipped:
                self._confirm()
            # After the last step the epoch is ended first: its record tells what that step saw, no checkpoint does.
            if self._step < self._steps:
                due = self._step % self._checkpoint_every == 0
                if not due and self._step % KEEP_EVERY == 0:
                    self._pending = self._snapshot(checkpoint=self._writes_pending)
                self._save(stop, due=due)
        record = {
            "stage": self._name,
            "epoch": self._epoch + 1,
            "epochs": self._epochs,
            **self._averages.means(),
            **(end_epoch(self._epoch + 1) if end_epoch is not None else {}),
            "skipped_steps": self._skipped,
            "seconds": round(time.perf_counter() - started, 3),
        }
        if self._folder is not None:
            self._folder.log(event="epoch", **record)
        self._history.append(record)
        self._epoch, self._step, self._skipped, self._seconds = self._epoch + 1, 0, 0, 0.0
        self._averages = _Averages()
        self._save(stop, due=True)

    def _watch(self, report: StepReport) -> str | None:
        """Log what is out of the ordinary; returns what is to be said of it."""
        position = {"stage": self._name, "epoch": self._epoch + 1, "step": self._step}
        note = None
        if report.skipped:
            self._skipped += 1
            reason = describe(report.metrics["loss"])
            if self._folder is not None:
                self._folder.log(event="skipped", **position, reason=reason)
            if self._skipped == 1:  # of an epoch; its record has their number
                note = f"step {self._step} left out: {reason}"
        went_back = self._recovery.watch(report.metrics["loss"], skipped=report.skipped)
        if went_back is not None:
            self._pending = None
            if self._folder is not None:
                self._folder.log(event="recovery", **position, what=went_back)
        return went_back or note

    def _save(self, stop: StopSignal, *, due: bool) -> None:
        """Make a checkpoint if it is due, write one if the process is to stop or this is the end; then stop.

        A step tells what the state before it was worth. So a checkpoint is written after the next step, when it is
        known whether its state is one to go back to; one that cannot wait holds the last such state, too.
        """
        if due:
            self._pending = self._snapshot()
        if self._epoch == self._epochs:
            self._pending.state["recovery"]["good"] = None  # there are no steps to go back from
            self._write(self._pending)
        elif stop.requested:
            now = self._pending if due else self._snapshot()
            pending = None if self._pending is None else tuple(self._pending)
            self._write(now._replace(state={**now.state, "pending": pending}))
        if stop.requested:
            raise KeyboardInterrupt

    def _confirm(self) -> None:
        """Write the checkpoint that waited for a step."""
        state = self._pending.state
        if self._recovery.well:
            self._recovery.keep(state["parts"], state["where"])
            state["recovery"]["good"] = None  # it is the present one
        if self._writes_pending:
            self._write(self._pending)
        self._pending = None

    @property
    def _writes_pending(self) -> bool:
        """Whether a state waits to be written as a checkpoint; a later one that takes its place is, too."""
        return self._pending is not None and self._pending.checkpoint

    def _write(self, snapshot: "_Snapshot") -> None:
        if self._folder is not None:
            self._folder.save_checkpoint(snapshot.state, snapshot.metrics_size)

    def _snapshot(self, *, checkpoint: bool = True) -> "_Snapshot":
        """Everything that a checkpoint holds; later steps do not change it. `checkpoint`: whether it becomes one."""
        state = {
            "stage": self._name,
            "setting": self._setting,
            "epochs": self._epochs,
            "steps": self._steps,
            "epoch": self._epoch,
            "step": self._step,
            "where": self._where(),
            "skipped": self._skipped,
            "seconds": self._seconds,
            "averages": self._averages.state(),
            "history": list(self._history),
            "random": random_state(self._generators),
            "random_at_epoch": self._random_at_epoch,
            "parts": {name: copied(part.state_dict()) for name, part in self._parts.items()},
            "recovery": self._recovery.state_dict(),
            "pending": None,
        }
        return _Snapshot(state, 0 if self._folder is None else self._folder.metrics_size(), checkpoint)

    def _where(self) -> str:
        return f"epoch {self._epoch + 1}, step {self._step}"

    def _batches(self, loader: Iterable[Batch]) -> Iterator[tuple[Inputs, Tensor]]:
        """What is left of the epoch. A loader draws its order when the epoch begins: from that random state."""
        now = random_state(self._generators)
        if self._step == 0:
            self._random_at_epoch = now
            return batches_from(loader, self._epoch)
        set_random_state(self._random_at_epoch, self._generators)
        batches = batches_from(loader, self._epoch, self._step)
        set_random_state(now, self._generators)
        return batches

    def _resume(self) -> bool:
        """Go on from the checkpoint of this stage, if there is one."""
        if self._folder is None:
            return False
        length = {"epochs": self._epochs, "steps": self._steps}
        state = self._folder.load_checkpoint(
            partial(check_resumable, stage=self._name, **length, setting=self._setting)
        )
        if state is None or state["stage"] != self._name:
            return False
        self._recovery.load_state_dict(state["recovery"])
        for name, part in self._parts.items():
            part.load_state_dict(copied(state["parts"][name]))
        if state["recovery"]["good"] is None:
            self._recovery.keep(state["parts"], state["where"])
        self._pending = None if state["pending"] is None else _Snapshot(*state["pending"])
        self._epoch, self._step, self._seconds = state["epoch"], state["step"], state["seconds"]
        self._skipped, self._averages = state["skipped"], _Averages(**state["averages"])
        self._history, self._random_at_epoch = state["history"], state["random_at_epoch"]
        set_random_state(state["random"], self._generators)
        return True


def setting_of(trainer: object, names: Iterable[str]) -> dict[str, str]:
    """Options of a trainer that a resumed training must have in common with the one before, as `Stage` takes them.

    Args:
        trainer: With a `loss_fn`, which goes by its name, and `optimizer_options`.
        names: Of the attributes that count beside them.
    """
    plain = (bool, int, float, str, tuple, type(None))  # others may print where they lie in memory
    return {
        **{name: str(getattr(trainer, name)) for name in names},
        "loss_fn": _name_of(trainer.loss_fn),
        **{name: str(value) for name, value in trainer.optimizer_options.items() if isinstance(value, plain)},
    }


def check_resumable(
    state: Mapping[str, object], stage: str, *, epochs: int, steps: int, setting: Mapping[str, str]
) -> None:
    """Refuse to go on from a checkpoint of a stage that had another length or other options; nothing is changed.

    Args:
        state: Of the checkpoint; one of another stage passes if that is complete: it is not gone on from, but replaced.
        stage: Name of the stage that is to go on.
        epochs: Of that stage.
        steps: Of an epoch.
        setting: As for `Stage`.

    Raises:
        ValueError: It was made with something else, or by another stage that was interrupted; the message has both.
    """
    if state["stage"] != stage:
        if state["stage"] is not None and state["epoch"] < state["epochs"]:
            raise ValueError(
                f"the folder holds the checkpoint of stage {state['stage']!r}, interrupted in epoch "
                f"{state['epoch'] + 1} of {state['epochs']}, which stage {stage!r} would replace: resume that one "
                f"first, or choose another folder"
            )
        return
    before = state.get("setting") or setting  # checkpoints of earlier versions have none
    for name in {**before, **setting}:
        if before.get(name) != setting.get(name):
            raise ValueError(
                f"the checkpoint of stage {stage!r} was made with {name} {before.get(name)}, now it is "
                f"{setting.get(name)}: resume with the same options, or begin anew in another folder"
            )
    lengths = {"epochs": (state["epochs"], epochs), "batches an epoch": (state["steps"], steps)}
    for name, (then, now) in lengths.items():
        if then != now:
            raise ValueError(
                f"the checkpoint of stage {stage!r} was made with {then} {name}, now there are {now}: resume "
                f"with the same data and options, or begin anew in another folder"
            )


def batches_from(loader: Iterable[Batch], epoch: int, start: int = 0) -> Iterator[tuple[Inputs, Tensor]]:
    """Iterate over epoch `epoch` of a loader from batch `start` on; earlier ones are passed over at once.

    Raises:
        TypeError: A batch has none of the forms that `asga.evaluate` takes.
    """
    for owner in owners_of(loader):
        if hasattr(owner, "set_epoch"):
            owner.set_epoch(epoch)
    if hasattr(loader, "iterate"):
        return map(split, loader.iterate(start))
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


def _name_of(function: Callable[..., object]) -> str:
    """Name of a function, or of the class of another object that can be called."""
    while isinstance(function, partial):
        function = function.func
    named = function if hasattr(function, "__qualname__") else type(function)
    return named.__qualname__  # not its module, which is __main__ or not by how a script is started


class _Snapshot(NamedTuple):
    """What goes into a checkpoint, how long the metrics were then, and whether it is to be written."""

    state: dict[str, object]
    metrics_size: int
    checkpoint: bool = True


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
