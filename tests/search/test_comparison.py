import math

import pytest
from torch.nn import functional

from asga import SearchSpace, evaluate, prepare, quantize
from asga.nn import calibrate
from asga.search.comparison import Score, UniformComparison, score
from asga.steps import measure_batchnorm

SPACE = SearchSpace(weight_bits=(2, 4), act_bits=(3, 8))


def made(losses: tuple[float, ...]) -> Score:
    return Score(losses, 0.5, {"bitops": 0.9})


def compare(policy: tuple[float, ...], **pairs: tuple[float, ...]) -> UniformComparison:
    return UniformComparison(made(policy), {name: made(losses) for name, losses in pairs.items()})


class TestScore:
    @pytest.mark.parametrize(("weight_bits", "act_bits"), [(2, 8), (4, 3)])
    def test_is_that_of_the_quantized_model(self, tiny_net, labeled_batches, weight_bits, act_bits):
        """With the same scales and statistics of batch normalization; no batch measures both."""
        model, batches = tiny_net(), labeled_batches(4)
        mixed = prepare(model, SPACE)
        calibrate(mixed, batches)
        choices = SPACE.choices(model)
        policy = choices.uniform(weight_bits, act_bits)
        model.dropout.p = mixed.dropout.p = 0.0
        found = score(
            mixed,
            choices,
            policy,
            {"bitops": 0.5},
            batches,
            loss_fn=functional.cross_entropy,
            autocast=None,
        )
        quantized = quantize(model, policy)
        calibrate(quantized, batches)
        measure_batchnorm(quantized, batches[::2])
        expected = [evaluate(quantized, [batch]) for batch in batches[1::2]]
        assert found.losses == pytest.approx([one.loss for one in expected], rel=1e-3)
        assert found.top1 == pytest.approx(sum(one.top1 for one in expected) / 2)
        assert found.cost_shares == {"bitops": 0.5}

    def test_leaves_the_mixture_as_it_was(self, tiny_net, labeled_batches, bits_of):
        mixed, batches = prepare(tiny_net(), SPACE), labeled_batches(2)
        calibrate(mixed, batches)
        mixed.train()
        before = bits_of(mixed.state_dict())
        choices = SPACE.choices(tiny_net())
        score(mixed, choices, choices.uniform(2, 3), {}, batches, loss_fn=functional.cross_entropy, autocast=None)
        assert bits_of(mixed.state_dict()) == before
        assert mixed.training
        assert mixed.conv2.weight_quantizer.probs().tolist() == [0.5, 0.5]

    def test_labels_that_are_no_classes(self, tiny_net, labeled_batches):
        batches = [(x, y.float()) for x, y in labeled_batches(1)]
        mixed = prepare(tiny_net(), SPACE)
        calibrate(mixed, batches)
        choices = SPACE.choices(tiny_net())
        loss_fn = lambda outputs, labels: (outputs.mean(1) - labels).square().mean()  # noqa: E731
        found = score(mixed, choices, choices.uniform(2, 3), {}, batches, loss_fn=loss_fn, autocast=None)
        assert found.top1 is None
        assert math.isfinite(found.loss)


class TestComparison:
    def test_is_paired(self):
        """Batches differ by far more than policies; their difference does not."""
        comparison = compare((1.0, 5.0, 9.0), w2a4=(1.2, 5.3, 9.2), w4a2=(2.0, 6.0, 10.0))
        assert comparison.best == "w2a4"
        assert comparison.difference == pytest.approx(-0.7 / 3)
        assert comparison.error == pytest.approx(0.1 / 3)  # of (0.2, 0.3, 0.2): deviation 0.0577, by the root of 3
        assert comparison.better is True

    @pytest.mark.parametrize("policy", [(1.2, 5.3, 9.2), (1.1, 5.4, 9.2), (2.0, 6.0, 10.0)])
    def test_not_better(self, policy):
        assert compare(policy, w2a4=(1.2, 5.3, 9.2)).better is False

    def test_one_batch_tells_no_error(self):
        comparison = compare((1.0,), w2a4=(1.2,))
        assert comparison.difference == pytest.approx(-0.2)
        assert (comparison.error, comparison.better) == (None, None)
        assert "w2a4, 1.2000: a difference of -0.2000 (" in str(comparison)

    def test_no_pair(self):
        comparison = compare((1.0, 2.0))
        assert (comparison.best, comparison.difference, comparison.error, comparison.better) == (None,) * 4
        assert str(comparison) == "no uniform pair of bits fits the budget"

    def test_in_words(self):
        text = str(compare((1.0, 5.0, 9.0), w2a4=(1.2, 5.3, 9.2)))
        assert "loss on the proxy 5.0000, that of the best uniform pair, w2a4, 5.2333" in text
        assert "-0.2333 ± 0.0333 (standard error over 3 batches); bitops 90.0% against 90.0%" in text

    def test_round_trip(self):
        comparison = compare((1.0, 5.0), w2a4=(1.2, 5.3), w3a3=(2.0, 3.0))
        data = comparison.to_dict()
        assert UniformComparison.from_dict(data) == comparison
        assert (data["best"], data["better"]) == ("w3a3", False)
