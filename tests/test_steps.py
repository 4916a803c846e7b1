import math
from collections import namedtuple
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional

from asga.optim import ASGA
from asga.optim.guarded import GuardedSGD
from asga.steps import (
    TrainingError,
    batch_loss,
    check_labels,
    cosine_with_warmup,
    count_correct,
    evaluate,
    measure_batchnorm,
    model_logits,
    training_step,
)


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

    def test_modes_of_parts_are_kept(self):
        """A frozen norm stays frozen, whatever the rest of the model does."""
        model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2).eval(), nn.Dropout()).train()
        model[1].eval()
        evaluate(model, self.BATCHES[:1])
        measure_batchnorm(model, self.BATCHES[:1])
        assert [module.training for module in model] == [True, False, True]
        measure_batchnorm(model.eval(), self.BATCHES[:1])
        assert not any(module.training for module in model.modules())

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

    @pytest.mark.parametrize(
        ("loss_fn", "found"),
        [
            (lambda logits, _: logits, r"a tensor of shape \[3, 2\]"),
            (lambda *_: 1.0, "a float"),
            (lambda *_: None, "a NoneType"),
        ],
    )
    def test_a_loss_that_is_no_number(self, loss_fn, found):
        for run in (evaluate, lambda model, batches, **options: batch_loss(model, *batches[0], **options)):
            with pytest.raises(TrainingError, match=f"loss_fn gives {found}; a tensor of one number is needed"):
                run(Logits(), self.BATCHES, loss_fn=loss_fn)

    def test_a_loss_without_gradient(self):
        def detached(logits, labels):
            return functional.cross_entropy(logits, labels).detach()

        evaluate(Logits(), self.BATCHES, loss_fn=detached)
        with pytest.raises(TrainingError, match="loss_fn gives a loss without a gradient"):
            batch_loss(Logits(), *self.BATCHES[0], loss_fn=detached)

    def test_a_batch_without_samples(self):
        with pytest.raises(TrainingError, match="a batch holds no samples: leave it out of the loader"):
            evaluate(Logits(), [(torch.zeros(0, 2), torch.zeros(0, dtype=torch.int64))])

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


class TestModelLogits:
    class Gives(nn.Module):
        """Gives what `wrap` makes of its input."""

        def __init__(self, wrap) -> None:
            super().__init__()
            self.wrap, self.scale = wrap, nn.Parameter(torch.ones(()))

        def forward(self, x):
            return self.wrap(x * self.scale)

    @pytest.mark.parametrize(
        "wrap",
        [
            lambda x: x,
            lambda x: {"logits": x, "hidden_states": None},
            lambda x: SimpleNamespace(logits=x),
            lambda x: namedtuple("Output", "logits aux_logits")(x, None),
        ],
        ids=["tensor", "dict", "object", "named tuple"],
    )
    def test_forms(self, wrap):
        x = torch.tensor([[1.0, 2.0]], dtype=torch.float64)
        logits = model_logits(self.Gives(wrap), x, None)
        assert logits.dtype == torch.float32
        assert logits.tolist() == [[1, 2]]

    @pytest.mark.parametrize(
        "wrap",
        [lambda x: {"scores": x}, lambda x: (x, None), lambda x: {"logits": [x]}],
        ids=["dict", "tuple", "list of logits"],
    )
    def test_others_are_refused(self, wrap):
        with pytest.raises(TrainingError, match=r"the model gives a (dict|tuple); a tensor of logits is needed, or an"):
            model_logits(self.Gives(wrap), torch.zeros(1, 2), None)


class TestCountCorrect:
    @pytest.mark.parametrize(
        ("labels", "logits", "expected"),
        [
            ([0, 1], [[2.0, 1.0], [2.0, 1.0]], (1, 2)),
            ([[0, -100], [1, 1]], [[[2.0, 1.0], [2.0, 1.0]], [[2.0, 1.0], [1.0, 2.0]]], (2, 3)),
        ],
        ids=["one for each sample", "one for each token, some ignored"],
    )
    def test_classes(self, labels, logits, expected):
        assert count_correct(torch.tensor(logits), torch.tensor(labels)) == expected

    @pytest.mark.parametrize(
        ("labels", "logits"),
        [
            (torch.zeros(2), torch.zeros(2, 3)),
            (torch.zeros(2, 5, 5, dtype=torch.int64), torch.zeros(2, 3, 5, 5)),
            (torch.zeros(2, 3), torch.zeros(2, 3)),
        ],
        ids=["numbers", "segments", "one-hot"],
    )
    def test_others(self, labels, logits):
        assert count_correct(logits, labels) is None


def optimizer_of(method: str, model: nn.Module) -> torch.optim.Optimizer:
    kind = ASGA if method == "asga" else GuardedSGD
    return kind(list(model.parameters())[:2], lr=0.1, model=model)


@pytest.mark.parametrize("method", ["asga", "sgd"])
class TestTrainingStep:
    def test_loss_and_accuracy_are_those_before_the_step(self, tiny_net, labeled_batches, method):
        model, (inputs, labels) = tiny_net(), labeled_batches(1)[0]
        model.dropout.p = 0.0
        logits = model(inputs)
        expected = functional.cross_entropy(logits, labels).item(), (logits.argmax(1) == labels).float().mean().item()
        report = training_step(model, optimizer_of(method, model), inputs, labels)
        assert report.metrics == {"loss": expected[0], "accuracy": expected[1]}
        assert not report.skipped

    @pytest.mark.parametrize("where", ["loss", "gradient"])
    def test_says_whether_the_step_was_left_out(self, tiny_net, labeled_batches, bits_of, method, where):
        model, (inputs, labels) = tiny_net(), labeled_batches(1)[0]
        before = bits_of(model.state_dict())
        bad = {"loss": lambda x, y: x.sum() * math.nan, "gradient": lambda x, y: (x - x.detach()).sum().sqrt()}[where]
        optimizer = optimizer_of(method, model)
        assert training_step(model, optimizer, inputs, labels, loss_fn=bad).skipped
        assert bits_of(model.state_dict()) == before
        assert not training_step(model, optimizer, inputs, labels).skipped

    def test_gradients_of_other_parameters_are_those_of_the_last_pass(self, tiny_net, labeled_batches, method):
        """Not added up over passes and steps: another optimizer may hold them."""
        model, (inputs, labels) = tiny_net(), labeled_batches(1)[0]
        model.dropout.p = 0.0
        model.fc.weight.grad = torch.full_like(model.fc.weight, 1e6)
        training_step(model, optimizer_of(method, model), inputs, labels)
        assert model.fc.weight.grad.abs().max() < 1e3

    def test_labels_are_those_of_the_loss_function(self, method):
        """One label for each token, some of them ignored."""
        model = nn.Linear(4, 3)
        inputs, labels = torch.randn(2, 5, 4), torch.tensor([[0, 1, 2, 0, -100], [1, 1, -100, -100, 2]])

        def loss_fn(logits, labels):
            return functional.cross_entropy(logits.flatten(0, 1), labels.flatten())

        with pytest.raises(TrainingError, match=r"labels are torch.int64 \[2, 5\]; .* give a loss_fn of your own"):
            training_step(model, optimizer_of(method, model), inputs, labels)
        metrics = training_step(model, optimizer_of(method, model), inputs, labels, loss_fn=loss_fn).metrics
        assert metrics.keys() == {"loss", "accuracy"}
        found = evaluate(model, [(inputs, labels)], loss_fn=loss_fn)
        assert found.images == 2
        assert found.top1 in [i / 7 for i in range(8)]

    def test_labels_that_are_no_classes(self, method):
        model, inputs, labels = nn.Linear(4, 1), torch.randn(2, 4), torch.randn(2, 1)
        metrics = training_step(model, optimizer_of(method, model), inputs, labels, loss_fn=functional.mse_loss).metrics
        assert metrics.keys() == {"loss"}
        assert math.isnan(evaluate(model, [(inputs, labels)], loss_fn=functional.mse_loss).top1)


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
