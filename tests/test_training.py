import contextlib
import json
import math
import random
import signal
import threading

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset, TensorDataset

from asga.data import Batches, ImageTensor
from asga.recovery import Recovery
from asga.runs import RunExistsError, RunFolder
from asga.steps import StepReport, TrainingError
from asga.training import (
    Progress,
    Stage,
    batches_from,
    count_batches,
    finite_batches,
    first_batches,
)

NAN, INF = math.nan, math.inf


class TestBatchesFrom:
    def test_odd_batches_are_refused(self):
        with pytest.raises(TypeError, match="a batch is a Tensor; a pair"):
            next(batches_from([torch.zeros(2, 1)], 0))

    def test_passes_over(self, labeled_batches):
        batches = labeled_batches(4)
        assert [x is batches[i][0] for i, (x, _) in enumerate(batches_from(batches, 0, 2), 2)] == [True, True]
        assert list(batches_from(batches, 0, 4)) == []

    def test_chooses_the_epoch_of_a_distributed_sampler(self):
        dataset = TensorDataset(torch.arange(8.0), torch.arange(8))
        loader = DataLoader(dataset, sampler=DistributedSampler(dataset, num_replicas=1, rank=0))
        orders = [torch.cat([y for _, y in batches_from(loader, epoch)]).tolist() for epoch in (0, 1, 0)]
        assert orders[0] == orders[2] != orders[1]

    def test_those_with_nan_or_infinities_can_be_left_out(self, labeled_batches):
        batches = labeled_batches(4)
        batches[0][0][0, 0, 0, 0], batches[2][0][-1, -1, -1, -1] = NAN, INF
        assert [x is batches[i][0] for i, (x, _) in zip((1, 3), finite_batches(batches), strict=True)] == [True, True]
        assert [x is batches[1][0] for x, _ in first_batches(batches, 1)] == [True]
        assert len(first_batches(batches, 100)) == 2

    def test_nothing_but_nan(self):
        with pytest.raises(TrainingError, match="every batch of the loader holds NaN or infinities"):
            first_batches([(torch.tensor([NAN]), torch.tensor([0]))], 4)


class _Stream(IterableDataset):
    def __iter__(self):
        return iter([])


@pytest.mark.parametrize(
    ("loader", "message"),
    [
        ((x for x in ()), "a generator without a length"),
        (DataLoader(_Stream()), "a DataLoader without a length"),
        ([], "loader is empty"),
    ],
    ids=["generator", "stream", "empty"],
)
def test_count_batches_refuses(loader, message):
    with pytest.raises(ValueError, match=message):
        count_batches(loader)


class Walk:
    """Something trainable that notes the batches it saw and random numbers for each of them."""

    def __init__(self) -> None:
        self.seen = []

    def step(self, inputs, labels):
        draws = [torch.rand(()).item(), np.random.rand(), random.random()]
        self.seen.append([inputs.flatten().tolist(), labels.tolist(), *draws])
        return StepReport({"loss": float(len(self.seen))})

    def state_dict(self):
        return {"seen": list(self.seen)}

    def load_state_dict(self, state):
        self.seen = list(state["seen"])


def pairs(count: int) -> TensorDataset:
    return TensorDataset(torch.arange(float(count)), torch.arange(count))


class _Jittered(Dataset):
    """Draws random numbers for each item, as augmentation does."""

    def __len__(self) -> int:
        return 6

    def __getitem__(self, i: int):
        return torch.rand(1) + np.random.rand() + random.random(), i


def _shuffled() -> DataLoader:
    return DataLoader(pairs(6), batch_size=2, shuffle=True)


def _augmented() -> Batches:
    images = torch.arange(6 * 4, dtype=torch.uint8).reshape(6, 1, 2, 2)
    return Batches(ImageTensor(images, torch.arange(6) % 2, ("a", "b")), 2, shuffle=True, augment=True, seed=3)


LOADERS = {
    "list": lambda: [(x[None], y[None]) for x, y in pairs(3)],
    "shuffled": _shuffled,
    "own generator": lambda: DataLoader(
        pairs(6), batch_size=2, shuffle=True, generator=torch.Generator().manual_seed(5)
    ),
    "random items": lambda: DataLoader(_Jittered(), batch_size=2, shuffle=True),
    "distributed": lambda: DataLoader(
        pairs(6), batch_size=2, sampler=DistributedSampler(pairs(6), num_replicas=1, rank=0)
    ),
    "Batches": _augmented,
}


class Killed(BaseException):
    """Nothing catches it, as nothing catches SIGKILL."""


def make_stage(epochs: int, walk: Walk, **options) -> Stage:
    recovery = Recovery({"walk": walk}, lambda: "slower", steps=3 * epochs)
    return Stage("walk", epochs, {"walk": walk}, recovery=recovery, **options)


def run_stage(path, loader, *, at=None, end=None, resume=False, epochs=3, **options) -> tuple[Walk, list]:
    """A stage of 3 steps an epoch; `end` is called after step `at`, counted over all epochs."""
    walk = Walk()
    for seed in (torch.manual_seed, np.random.seed, random.seed):
        seed(1)

    def progress(state: Progress) -> None:
        if end is not None and 3 * (state.epoch - 1) + state.step == at:
            end()

    folder = RunFolder(path, "test", {}, resume=resume)
    stage = make_stage(epochs, walk, folder=folder, progress=progress, **options)
    return walk, stage.run(loader, walk.step, lambda epoch: {"double": 2 * epoch})


def _kill() -> None:
    raise Killed


class TestStage:
    def test_epochs_metrics_and_progress(self, tmp_path):
        walk, seen = Walk(), []
        stage = make_stage(2, walk, folder=RunFolder(tmp_path, "test", {}), progress=seen.append)
        history = stage.run(LOADERS["list"](), walk.step, lambda epoch: {"double": 2 * epoch})
        assert len(walk.seen) == 6
        assert [(p.stage, p.epoch, p.epochs, p.step, p.steps) for p in seen] == [
            ("walk", epoch, 2, step, 3) for epoch in (1, 2) for step in (1, 2, 3)
        ]
        assert [p.metrics["loss"] for p in seen] == [1, 1.5, 2, 4, 4.5, 5]
        assert [(r["stage"], r["epoch"], r["loss"], r["double"]) for r in history] == [
            ("walk", 1, 2, 2),
            ("walk", 2, 5, 4),
        ]
        assert all(record["seconds"] >= 0 for record in history)

    def test_metrics_leave_out_what_is_not_finite(self, tmp_path):
        losses = iter([1.0, NAN, 3.0, INF, NAN, INF])

        def step(inputs, labels):
            loss = next(losses)
            return StepReport({"loss": loss}, skipped=not math.isfinite(loss))

        history = make_stage(2, Walk(), folder=RunFolder(tmp_path, "test", {})).run(LOADERS["list"](), step)
        assert [record.get("loss") for record in history] == [2, None]
        assert [record["skipped_steps"] for record in history] == [1, 3]

    def test_without_folder(self):
        walk = Walk()
        make_stage(1, walk).run(LOADERS["list"](), walk.step)
        assert len(walk.seen) == 3

    @pytest.mark.parametrize("loader", LOADERS)
    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
    @pytest.mark.parametrize("at", [1, 3, 5, 9], ids=["first step", "end of epoch", "mid-epoch", "last step"])
    def test_signal_and_resume(self, tmp_path, run_contents, bits_of, loader, number, at):
        whole, history = run_stage(tmp_path / "whole", LOADERS[loader]())
        with pytest.raises(KeyboardInterrupt):
            run_stage(tmp_path / "parts", LOADERS[loader](), at=at, end=lambda: signal.raise_signal(number))
        torch.rand(at)  # another process starts from another random state
        again, rest = run_stage(tmp_path / "parts", LOADERS[loader](), resume=True)
        assert again.seen == whole.seen
        assert bits_of(rest) == bits_of(history)
        assert run_contents(tmp_path / "parts") == run_contents(tmp_path / "whole")

    @pytest.mark.parametrize("loader", LOADERS)
    @pytest.mark.parametrize("at", [2, 4, 9], ids=["before any checkpoint", "mid-epoch", "last step"])
    def test_kill_and_resume(self, tmp_path, run_contents, loader, at):
        whole, _ = run_stage(tmp_path / "whole", LOADERS[loader]())
        with pytest.raises(Killed):
            run_stage(tmp_path / "parts", LOADERS[loader](), at=at, end=_kill)
        again, _ = run_stage(tmp_path / "parts", LOADERS[loader](), resume=True)
        assert again.seen == whole.seen
        assert run_contents(tmp_path / "parts") == run_contents(tmp_path / "whole")

    def test_stopped_again_and_again(self, tmp_path, run_contents):
        whole, _ = run_stage(tmp_path / "whole", _shuffled())
        for at in range(1, 10):
            with pytest.raises(KeyboardInterrupt):
                run_stage(
                    tmp_path / "parts",
                    _shuffled(),
                    at=at,
                    end=lambda: signal.raise_signal(signal.SIGINT),
                    resume=at > 1,
                )
        again, _ = run_stage(tmp_path / "parts", _shuffled(), resume=True)
        assert again.seen == whole.seen
        assert run_contents(tmp_path / "parts") == run_contents(tmp_path / "whole")

    @pytest.mark.parametrize("loader", LOADERS)
    @pytest.mark.parametrize("end", ["signal", "kill"])
    def test_checkpoints_within_an_epoch(self, tmp_path, run_contents, loader, end):
        """After the second step of each; killed, or stopped, after each step in turn, those made again included."""
        whole, _ = run_stage(tmp_path / "whole", LOADERS[loader](), checkpoint_every=2)
        made = []

        def note_and_end():
            made.append(1)
            _kill() if end == "kill" else signal.raise_signal(signal.SIGTERM)

        for at in range(1, 10):
            with pytest.raises((Killed, KeyboardInterrupt)):
                run_stage(
                    tmp_path / "parts", LOADERS[loader](), at=at, end=note_and_end, resume=at > 1, checkpoint_every=2
                )
        assert len(made) == 9
        again, _ = run_stage(tmp_path / "parts", LOADERS[loader](), resume=True, checkpoint_every=2)
        assert again.seen == whole.seen
        assert run_contents(tmp_path / "parts") == run_contents(tmp_path / "whole")

    def test_checkpoint_every(self, tmp_path):
        with pytest.raises(Killed):
            run_stage(tmp_path, _shuffled(), at=7, end=_kill, checkpoint_every=2)
        folder = RunFolder(tmp_path, "test", {}, resume=True)
        state = folder.load_checkpoint()
        assert (state["epoch"], state["step"]) == (1, 2)
        with pytest.raises(ValueError, match="checkpoint_every is 0; it must be at least 1"):
            make_stage(1, Walk(), checkpoint_every=0)

    @pytest.mark.parametrize("damage", ["cut", "gone"])
    @pytest.mark.parametrize("at", [4, 7], ids=["before it another stage's", "before it one of this stage"])
    def test_goes_on_from_the_checkpoint_before(self, tmp_path, run_contents, damage, at):
        """It is gone where a process was killed between two renamings."""

        def run(path, **options):
            with contextlib.suppress(RunExistsError):
                RunFolder(path, "test", {}).log(event="epoch", stage="earlier", seconds=1)
            folder = RunFolder(path, "test", {}, resume=True)
            if folder.finished("earlier") is None:
                folder.finish("earlier", {})
            return run_stage(path, _shuffled(), checkpoint_every=2, resume=True, **options)[0]

        whole = run(tmp_path / "whole")
        with pytest.raises(Killed):
            run(tmp_path / "parts", at=at, end=_kill)
        newest, warned = tmp_path / "parts" / "checkpoint.pt", contextlib.nullcontext()
        if damage == "gone":
            newest.unlink()
        else:
            newest.write_bytes(newest.read_bytes()[:-200])
            warned = pytest.warns(
                UserWarning, match=r"checkpoint.pt is damaged \(.*\); going on from the one before it"
            )
        with warned:
            again = run(tmp_path / "parts")
        assert again.seen == whole.seen
        assert run_contents(tmp_path / "parts") == run_contents(tmp_path / "whole")

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"epochs": 4}, "stage 'walk' was made with 3 epochs, now there are 4: resume with the same"),
            ({"loader": [(torch.zeros(1), torch.zeros(1))]}, "was made with 3 batches an epoch, now there are 1"),
        ],
        ids=["epochs", "data"],
    )
    def test_of_another_length_is_not_resumed(self, tmp_path, change, message):
        with pytest.raises(KeyboardInterrupt):
            run_stage(tmp_path, _shuffled(), at=4, end=lambda: signal.raise_signal(signal.SIGINT))
        options = {"loader": _shuffled(), **change}
        with pytest.raises(ValueError, match=message):
            run_stage(tmp_path, options.pop("loader"), resume=True, **options)

    def test_workers(self, tmp_path, run_contents):
        """Their random numbers too are those of a run that was never stopped."""

        def loader():
            return DataLoader(_Jittered(), batch_size=2, shuffle=True, num_workers=2)

        whole, _ = run_stage(tmp_path / "whole", loader(), epochs=2)
        with pytest.raises(KeyboardInterrupt):
            run_stage(tmp_path / "parts", loader(), at=5, end=lambda: signal.raise_signal(signal.SIGTERM), epochs=2)
        again, _ = run_stage(tmp_path / "parts", loader(), resume=True, epochs=2)
        assert again.seen == whole.seen
        assert run_contents(tmp_path / "parts") == run_contents(tmp_path / "whole")

    def test_complete_runs_no_step_again(self, tmp_path, bits_of):
        whole, history = run_stage(tmp_path, _shuffled())
        again, same = run_stage(tmp_path, _shuffled(), at=1, end=_kill, resume=True)
        assert again.seen == whole.seen
        assert bits_of(same) == bits_of(history)

    def test_checkpoint_of_another_stage_is_not_taken(self, tmp_path):
        run_stage(tmp_path, _shuffled())
        other, folder = Walk(), RunFolder(tmp_path, "test", {}, resume=True)
        recovery = Recovery({}, lambda: "", steps=3)
        Stage("other", 1, {"walk": other}, recovery=recovery, folder=folder).run(_shuffled(), other.step)
        assert len(other.seen) == 3

    def test_checkpoint_of_an_interrupted_stage_is_not_replaced(self, tmp_path, run_contents):
        with pytest.raises(KeyboardInterrupt):
            run_stage(tmp_path, _shuffled(), at=4, end=lambda: signal.raise_signal(signal.SIGINT))
        before = run_contents(tmp_path)
        other, folder = Walk(), RunFolder(tmp_path, "test", {}, resume=True)
        stage = Stage("other", 1, {"walk": other}, recovery=Recovery({}, lambda: "", steps=3), folder=folder)
        with pytest.raises(ValueError, match="of stage 'walk', interrupted in epoch 2 of 3, which stage 'other' would"):
            stage.run(_shuffled(), other.step)
        assert other.seen == []
        assert run_contents(tmp_path) == before
        assert len(run_stage(tmp_path, _shuffled(), resume=True)[0].seen) == 9

    def test_signal_at_the_end_of_the_last_epoch_is_not_lost(self, tmp_path):
        """It comes while the model is evaluated: no step follows that would notice."""
        walk = Walk()
        stage = make_stage(1, walk, folder=RunFolder(tmp_path, "test", {}))

        def end_epoch(epoch):
            signal.raise_signal(signal.SIGINT)
            return {}

        with pytest.raises(KeyboardInterrupt):
            stage.run(LOADERS["list"](), walk.step, end_epoch)
        again, _ = run_stage(tmp_path, LOADERS["list"](), at=1, end=_kill, resume=True, epochs=1)
        assert again.seen == walk.seen

    def test_second_signal_stops_at_once(self, tmp_path):
        steps = []

        def step(inputs, labels):
            steps.append(1)
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
            steps.append(2)

        with pytest.raises(KeyboardInterrupt):
            make_stage(1, Walk(), folder=RunFolder(tmp_path, "test", {})).run(LOADERS["list"](), step)
        assert steps == [1]

    @pytest.mark.parametrize("error", [False, True], ids=["return", "error"])
    def test_handlers_are_given_back(self, error):
        before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)

        def step(inputs, labels):
            if error:
                raise Killed
            return StepReport({"loss": 0.0})

        with pytest.raises(Killed) if error else contextlib.nullcontext():
            make_stage(1, Walk()).run(LOADERS["list"](), step)
        assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before

    def test_runs_outside_the_main_thread(self):
        walk = Walk()
        thread = threading.Thread(target=lambda: make_stage(1, walk).run(LOADERS["list"](), walk.step))
        thread.start()
        thread.join()
        assert len(walk.seen) == 3


class TestNotFinite:
    """The steps of `BAD` are left out: their loss is NaN."""

    BAD = (2, 5)

    def _run(self, path, *, end=None, at=None, resume=False):
        walk, told = Walk(), []

        def step(inputs, labels):
            number = len(walk.seen) + 1
            walk.seen.append(number)
            bad = number in self.BAD
            return StepReport({"loss": NAN if bad else 1.0}, skipped=bad)

        def progress(state):
            if state.note is not None:
                told.append((state.epoch, state.step, state.note))
            if end is not None and 3 * (state.epoch - 1) + state.step == at:
                end()

        folder = RunFolder(path, "test", {}, resume=resume)
        history = make_stage(2, walk, folder=folder, progress=progress).run(LOADERS["list"](), step)
        return history, told

    def test_is_counted_logged_and_told(self, tmp_path):
        history, told = self._run(tmp_path)
        assert [record["skipped_steps"] for record in history] == [1, 1]
        note = "step 2 left out: the loss is nan"
        assert told == [(1, 2, note), (2, 2, note)]
        lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
        event = {"event": "skipped", "stage": "walk", "step": 2, "reason": "the loss is nan"}
        assert [line for line in lines if line["event"] == "skipped"] == [{**event, "epoch": 1}, {**event, "epoch": 2}]

    @pytest.mark.parametrize("at", range(1, 7))
    def test_the_count_survives_a_stop(self, tmp_path, run_contents, at):
        self._run(tmp_path / "whole")
        with pytest.raises(KeyboardInterrupt):
            self._run(tmp_path / "parts", at=at, end=lambda: signal.raise_signal(signal.SIGINT))
        self._run(tmp_path / "parts", resume=True)
        assert run_contents(tmp_path / "parts") == run_contents(tmp_path / "whole")
