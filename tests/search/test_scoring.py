import math

import pytest
import torch

from asga import Budget, PolicySearcher, SearchSpace, evaluate, prepare, quantize
from asga.nn import calibrate
from asga.search.scoring import Scorer
from asga.steps import TrainingError, measure_batchnorm

SPACE = SearchSpace(weight_bits=(2, 4), act_bits=(3, 8))


@pytest.fixture
def make_scorer(tiny_net):
    """A function from batches and options to a scorer and its mixture; without dropout."""

    def make(batches, method: str = "random", **options: object):
        model = tiny_net()
        model.dropout.p = 0.0
        searcher = PolicySearcher(model, SPACE, budget=Budget(bitops="w4a8"), method=method, **options)
        mixed = None if method == "uniform" else prepare(model, SPACE)
        if mixed is not None:
            calibrate(mixed, batches)
        return Scorer(searcher, mixed, searcher.check(batches)[0], batches), mixed, searcher

    return make


class TestChoice:
    @pytest.mark.parametrize(("weight_bits", "act_bits"), [(2, 8), (4, 3)])
    def test_is_that_of_the_quantized_model(self, make_scorer, labeled_batches, weight_bits, act_bits):
        """With the same scales; no batch measures both the loss and batch normalization."""
        batches = labeled_batches(4)
        scorer, _, searcher = make_scorer(batches)
        policy = searcher.choices.uniform(weight_bits, act_bits)
        found = scorer(policy)
        quantized = quantize(searcher.model, policy)
        calibrate(quantized, batches)
        measure_batchnorm(quantized, batches[::2])
        expected = [evaluate(quantized, [batch]) for batch in batches[1::2]]
        assert found.losses == pytest.approx([one.loss for one in expected], rel=1e-3)
        assert found.top1 == pytest.approx(sum(one.top1 for one in expected) / 2)
        # 2/8 cost half of 4/8, but pinned layers cost the same.
        assert 0.4 < found.cost_shares["bitops"] < 0.7

    def test_leaves_the_mixture_as_it_was(self, make_scorer, labeled_batches, bits_of):
        scorer, mixed, searcher = make_scorer(labeled_batches(2))
        mixed.train()
        before = bits_of(mixed.state_dict())
        scorer(searcher.choices.uniform(2, 3))
        assert bits_of(mixed.state_dict()) == before
        assert mixed.training
        assert mixed.conv2.weight_quantizer.probs().tolist() == [0.5, 0.5]

    def test_one_batch_does_for_both(self, make_scorer, labeled_batches):
        scorer, _, searcher = make_scorer(labeled_batches(3), measure_batches=1)
        assert len(scorer(searcher.choices.uniform(2, 3)).losses) == 1

    def test_labels_that_are_no_classes(self, make_scorer, labeled_batches):
        batches = [(x, y.float()) for x, y in labeled_batches(2)]
        scorer, _, searcher = make_scorer(
            batches, loss_fn=lambda outputs, labels: (outputs.mean(1) - labels).square().mean()
        )
        found = scorer(searcher.choices.uniform(2, 3))
        assert found.top1 is None
        assert math.isfinite(found.loss)


class TestTuned:
    def test_is_trained_and_leaves_the_float_model_alone(self, make_scorer, labeled_batches, bits_of):
        batches = labeled_batches(6)
        at_once, _, searcher = make_scorer(batches)
        tuned, _, uniform = make_scorer(batches, "uniform", lr=0.05)
        policy = searcher.choices.uniform(4, 8)
        before = bits_of(uniform.model.state_dict())
        assert tuned(policy).loss < 0.9 * at_once(policy).loss
        assert bits_of(uniform.model.state_dict()) == before

    def test_one_that_diverges(self, make_scorer, labeled_batches):
        """The float model is only seen in eval mode, where this loss has no gradient and is finite."""

        def loss_fn(logits, labels):
            return logits.sum() * (math.nan if logits.requires_grad else 1.0)

        scorer, _, searcher = make_scorer(labeled_batches(3), "uniform", loss_fn=loss_fn)
        message = "the loss is nan for 10 steps in a row, up to step 10 of fine-tuning a policy of w2a3/w8a8. lr=0.01 "
        with pytest.raises(TrainingError, match=message):
            scorer(searcher.choices.uniform(2, 3))


def test_each_policy_is_scored_once(make_scorer, labeled_batches, monkeypatch):
    scorer, _, searcher = make_scorer(labeled_batches(2))
    first = scorer(searcher.choices.uniform(2, 3))
    monkeypatch.setattr("asga.search.scoring.evaluate", pytest.fail)
    assert scorer(searcher.choices.uniform(2, 3)) is first


def test_bfloat16(make_scorer, labeled_batches):
    scorer, _, searcher = make_scorer(labeled_batches(2), autocast=torch.bfloat16)
    assert math.isfinite(scorer(searcher.choices.uniform(2, 3)).loss)
