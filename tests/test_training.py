import math
import signal
import threading

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset, TensorDataset

from asga.data import Batches, ImageTensor
from asga.runs import RunFolder
from asga.training import (
    LossWatch,
    Progress,
    Stage,
    TrainingError,
    batches_from,
    check_labels,
    class_logits,
    cosine_with_warmup,
    count_batches,
    evaluate,
    finite_batches,
    first_batches,
)

NAN, INF = math.nan, math.inf


class Logits(nn.Module):
    """Gives its inputs back as logits; remembers the mode it was called in."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.modes = []

    def forward(self, x):
        self.modes.append(self.training)
        return x * self.scale


class TestEvaluate:
    BATCHES = (
        (torch.tensor([[2.0, 0.0], [0.0, 1.0], [3.0, 0.0]]), torch.tensor([0, 0, 0])),
        (torch.tensor([[0.0, 5.0]]), torch.tensor([1])),
    )

    def test_by_hand(self):
        """Batches of 3 and 1: the mean is over images, not over batches."""
        found = evaluate(Logits(), self.BATCHES)
        losses = [math.log1p(math.exp(-2)), math.log1p(math.exp(1)), math.log1p(math.exp(-3)), math.log1p(math.exp(-5))]
        assert found.images == 4
        assert found.top1 == 3 / 4
        # The loss of a batch is computed in float32.
        assert found.loss == pytest.approx(sum(losses) / 4, rel=1e-6)

    def test_own_loss(self):
        found = evaluate(Logits(), self.BATCHES, loss_fn=lambda logits, labels: labels.float().mean() + 1)
        assert found.loss == 5 / 4

    @pytest.mark.parametrize("training", [True, False])
    def test_eval_mode_and_back(self, training):
        model = Logits().train(training)
        evaluate(model, self.BATCHES)
        assert model.modes == [False, False]
        assert model.training is training

    def test_mode_is_restored_after_an_error(self):
        model = Logits().train()
        with pytest.raises(TrainingError):
            evaluate(model, [(torch.zeros(1, 2), torch.tensor([2]))])
        assert model.training

    def test_autocast_gives_logits_in_float32(self):
        model, seen = nn.Linear(2, 2), []
        model.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
        dtypes = []

        def loss_fn(logits, labels):
            dtypes.append(logits.dtype)
            return functional.cross_entropy(logits, labels)

        evaluate(model, self.BATCHES, autocast=torch.bfloat16, loss_fn=loss_fn)
        assert set(seen) == {torch.bfloat16}
        assert set(dtypes) == {torch.float32}

    def test_no_batch(self):
        with pytest.raises(ValueError, match="batches is empty"):
            evaluate(Logits(), [])


class TestCheckLabels:
    LOGITS = torch.zeros(2, 3)

    def test_in_range(self):
        check_labels(torch.tensor([0, 2]), self.LOGITS)

    @pytest.mark.parametrize(
        ("labels", "logits", "message"),
        [
            (torch.tensor([0, 3]), LOGITS, "the label 3, but the model has 3 classes"),
            (torch.tensor([-1, 0]), LOGITS, "the label -1, but the model has 3 classes"),
            (torch.tensor([0, 1, 2]), LOGITS, r"output of shape \[2, 3\] for 3 labels"),
            (torch.tensor([0, 1]), torch.zeros(2, 3, 4), r"output of shape \[2, 3, 4\] for 2 labels"),
            (torch.tensor([0.0, 1.0]), LOGITS, r"labels are torch.float32 \[2\]; torch.int64 \[batch\] is needed"),
            (torch.eye(3)[:2], LOGITS, r"labels are torch.float32 \[2, 3\]"),
        ],
        ids=["too large", "negative", "count", "dimensions", "float", "one-hot"],
    )
    def test_refused(self, labels, logits, message):
        with pytest.raises(TrainingError, match=message):
            check_labels(labels, logits)


@pytest.mark.parametrize("output", [{"logits": torch.zeros(1, 2)}, (torch.zeros(1, 2), None)], ids=["dict", "tuple"])
def test_outputs_other_than_a_tensor_are_refused(output):
    class Odd(nn.Module):
        def forward(self, x):
            return output

    with pytest.raises(TrainingError, match=f"the model gives a {type(output).__name__}; a tensor of logits"):
        class_logits(Odd(), torch.zeros(1, 2), None)


class TestBatchesFrom:
    @pytest.mark.parametrize(
        ("batch", "message"),
        [
            ({"x": torch.zeros(1), "y": torch.zeros(1)}, "a batch is a dict; a pair of tensors"),
            ((torch.zeros(1), torch.zeros(1), torch.zeros(1)), "a tuple of Tensor, Tensor, Tensor; a pair"),
            ([torch.zeros(1), 3], "a list of Tensor, int; a pair of tensors"),
            (torch.zeros(2, 1), "a batch is a Tensor; a pair of tensors"),
        ],
        ids=["dict", "three", "number", "tensor"],
    )
    def test_odd_batches_are_refused(self, batch, message):
        with pytest.raises(TrainingError, match=message):
            next(batches_from([batch], 0))
        with pytest.raises(TrainingError, match=message):
            evaluate(Logits(), [batch])

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


class TestCosineWithWarmup:
    def test_values(self):
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=2.0)
        scheduler = cosine_with_warmup(optimizer, steps=12, warmup=4)
        rates = []
        for _ in range(13):
            rates.append(optimizer.param_groups[0]["lr"] / 2)
            optimizer.step()
            scheduler.step()
        cosine = [0.5 + 0.5 * math.cos(math.pi * i / 8) for i in range(9)]
        assert rates == pytest.approx([0.2, 0.4, 0.6, 0.8, *cosine], abs=1e-12)

    @pytest.mark.parametrize("steps", [1, 2, 3])
    def test_warmup_takes_at_most_half_of_a_short_training(self, steps):
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
        scheduler = cosine_with_warmup(optimizer, steps, warmup=20)
        rates = []
        for _ in range(steps):
            rates.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            scheduler.step()
        assert rates == pytest.approx({1: [1], 2: [0.5, 1], 3: [0.5, 1, 0.5]}[steps])
        assert optimizer.param_groups[0]["lr"] == pytest.approx(0, abs=1e-12)


class TestLossWatch:
    def test_gives_up_after_ten_in_a_row(self):
        watch = LossWatch(steps=100)
        for loss in [NAN] * 9 + [1.0] + [INF] * 9:
            watch.check(loss)
        with pytest.raises(TrainingError, match=r"the loss is inf for 10 steps in a row"):
            watch.check(INF)

    def test_gives_up_when_no_step_of_a_short_training_was_good(self):
        watch = LossWatch(steps=3)
        watch.check(NAN)
        watch.check(NAN)
        with pytest.raises(TrainingError, match="the loss is nan for 3 steps in a row"):
            watch.check(NAN)


class Walk:
    """Something trainable that notes the batches it saw and a random number for each of them."""

    def __init__(self) -> None:
        self.seen = []

    def step(self, inputs, labels):
        self.seen.append([inputs.flatten().tolist(), labels.tolist(), torch.rand(()).item()])
        return {"loss": float(len(self.seen))}

    def state_dict(self):
        return {"seen": list(self.seen)}

    def load_state_dict(self, state):
        self.seen = list(state["seen"])


def pairs(count: int) -> TensorDataset:
    return TensorDataset(torch.arange(float(count)), torch.arange(count))


class _Jittered(Dataset):
    """Draws a random number for each item, as augmentation does."""

    def __len__(self) -> int:
        return 6

    def __getitem__(self, i: int):
        return torch.rand(1), i


def _shuffled() -> DataLoader:
    return DataLoader(pairs(6), batch_size=2, shuffle=True)


def _augmented() -> Batches:
    images = torch.arange(6 * 4, dtype=torch.uint8).reshape(6, 1, 2, 2)
    return Batches(ImageTensor(images, torch.arange(6) % 2, ("a", "b")), 2, shuffle=True, augment=True, seed=3)


LOADERS = {
    "list": lambda: [(x[None], y[None]) for x, y in pairs(3)],
    "shuffled": _shuffled,
    "random items": lambda: DataLoader(_Jittered(), batch_size=2, shuffle=True),
    "distributed": lambda: DataLoader(
        pairs(6), batch_size=2, sampler=DistributedSampler(pairs(6), num_replicas=1, rank=0)
    ),
    "Batches": _augmented,
}


class Killed(BaseException):
    """Nothing catches it, as nothing catches SIGKILL."""


def run_stage(path, loader, *, at=None, end=None, resume=False, epochs=3, parts=None) -> tuple[Walk, list]:
    """A stage of 3 steps an epoch; `end` is called after step `at`, counted over all epochs."""
    walk = Walk()
    torch.manual_seed(1)

    def progress(state: Progress) -> None:
        if end is not None and 3 * (state.epoch - 1) + state.step == at:
            end()

    folder = RunFolder(path, "test", {}, resume=resume)
    stage = Stage("walk", epochs, {"walk": walk, **(parts or {})}, folder=folder, progress=progress)
    return walk, stage.run(loader, walk.step, lambda epoch: {"double": 2 * epoch})


def _kill() -> None:
    raise Killed


class TestStage:
    def test_epochs_metrics_and_progress(self, tmp_path):
        walk, seen = Walk(), []
        stage = Stage("walk", 2, {"walk": walk}, folder=RunFolder(tmp_path, "test", {}), progress=seen.append)
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
        stage = Stage("walk", 2, {}, folder=RunFolder(tmp_path, "test", {}))
        history = stage.run(LOADERS["list"](), lambda inputs, labels: {"loss": next(losses)})
        assert history[0]["loss"] == 2
        assert "loss" not in history[1]

    def test_without_folder(self):
        walk = Walk()
        Stage("walk", 1, {"walk": walk}).run(LOADERS["list"](), walk.step)
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

    def test_complete_runs_no_step_again(self, tmp_path, bits_of):
        whole, history = run_stage(tmp_path, _shuffled())
        again, same = run_stage(tmp_path, _shuffled(), at=1, end=_kill, resume=True)
        assert again.seen == whole.seen
        assert bits_of(same) == bits_of(history)

    def test_checkpoint_of_another_stage_is_not_taken(self, tmp_path):
        run_stage(tmp_path, _shuffled())
        other = Walk()
        Stage("other", 1, {"walk": other}, folder=RunFolder(tmp_path, "test", {}, resume=True)).run(
            _shuffled(), other.step
        )
        assert len(other.seen) == 3

    def test_signal_at_the_end_of_the_last_epoch_is_not_lost(self, tmp_path):
        """It comes while the model is evaluated: no step follows that would notice."""
        walk = Walk()
        stage = Stage("walk", 1, {"walk": walk}, folder=RunFolder(tmp_path, "test", {}))

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
            Stage("walk", 1, {}, folder=RunFolder(tmp_path, "test", {})).run(LOADERS["list"](), step)
        assert steps == [1]

    @pytest.mark.parametrize("error", [False, True], ids=["return", "error"])
    def test_handlers_are_given_back(self, error):
        before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)

        def step(inputs, labels):
            if error:
                raise Killed
            return {}

        if error:
            with pytest.raises(Killed):
                Stage("walk", 1, {}).run(LOADERS["list"](), step)
        else:
            Stage("walk", 1, {}).run(LOADERS["list"](), step)
        assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before

    def test_runs_outside_the_main_thread(self):
        walk = Walk()
        thread = threading.Thread(target=lambda: Stage("walk", 1, {"walk": walk}).run(LOADERS["list"](), walk.step))
        thread.start()
        thread.join()
        assert len(walk.seen) == 3
