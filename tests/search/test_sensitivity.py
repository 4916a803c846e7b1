import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

from asga import SearchSpace, evaluate, prepare
from asga.nn import calibrate
from asga.search import gradient_sensitivity, measured_sensitivity
from asga.steps import TrainingError

SPACE = SearchSpace(weight_bits=(2, 3, 8), act_bits=(2, 4), first_last=None)
BOTH = pytest.mark.parametrize("sensitivity", [gradient_sensitivity, measured_sensitivity])


class TestGradient:
    def test_is_the_formula_sample_by_sample(self, twice_net, labeled_batches):
        """``1/2 sum_i (g_i e_i)^2``, a mean over samples; both calls of a layer that is called twice count."""
        model, batches = twice_net().eval(), labeled_batches(2, 4)
        found = gradient_sensitivity(model, SPACE, batches)
        mixed = prepare(model, SPACE).eval()
        calibrate(mixed, batches)
        quantizers = mixed.get_submodule("twice")
        expected = {"weight": torch.zeros(3), "act": torch.zeros(2)}
        for image, label in ((x[i : i + 1], y[i : i + 1]) for x, y in batches for i in range(4)):
            h = model.stem(image).relu()
            outputs, inputs = [], []
            for _ in range(2):
                inputs.append(h)
                outputs.append(model.twice(h))
                h = outputs[-1].relu()
            loss = functional.cross_entropy(model.fc(h.mean((2, 3))), label)
            for x, g in zip(inputs, torch.autograd.grad(loss, outputs), strict=True):
                for side, original, other in (("weight", model.twice.weight, x), ("act", x, model.twice.weight)):
                    for k in range(len(expected[side])):
                        quantized = getattr(quantizers, f"{side}_quantizer").candidate(original, k).detach()
                        pair = (other, quantized - original) if side == "weight" else (quantized - original, other)
                        e = functional.conv2d(*pair, padding=1)
                        expected[side][k] += (g * e).square().sum().detach() / 2 / 8
        assert found["twice"].weight == pytest.approx(expected["weight"].tolist(), rel=1e-4)
        assert found["twice"].act == pytest.approx(expected["act"].tolist(), rel=1e-4)

    def test_zero_where_the_loss_sees_nothing(self, twice_net, labeled_batches):
        found = gradient_sensitivity(twice_net(), SPACE, labeled_batches(1))
        assert found["side"] == ((0, 0, 0), (0, 0))
        assert all(value > 0 for name in ("stem", "twice", "fc") for side in found[name] for value in side)

    def test_bfloat16(self, tiny_net, labeled_batches):
        model, batches = tiny_net(), labeled_batches()
        exact = gradient_sensitivity(model, SPACE, batches)["conv2"].weight
        assert gradient_sensitivity(model, SPACE, batches, autocast=torch.bfloat16)["conv2"].weight == pytest.approx(
            exact, rel=0.1
        )


class TestMeasured:
    def test_is_the_loss_with_one_tensor_quantized(self, tiny_net, labeled_batches):
        model, batches = tiny_net(), labeled_batches()
        found = measured_sensitivity(model, SPACE, batches)["conv2"].weight
        mixed = prepare(model, SPACE)
        other = copy.deepcopy(model)
        with torch.no_grad():
            other.conv2.weight.copy_(mixed.conv2.weight_quantizer.candidate(other.conv2.weight, 0))
        assert found[0] == pytest.approx(evaluate(other, batches).loss - evaluate(model, batches).loss, rel=1e-4)
        assert found[0] != 0

    def test_a_tied_weight_is_quantized_in_one_place(self, labeled_batches):
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64), nn.Linear(64, 3))
        model[3].weight = model[1].weight
        batches = labeled_batches(2)
        tied = measured_sensitivity(model, SPACE, batches)["1"].weight
        model[3].weight = nn.Parameter(model[1].weight.detach().clone())
        assert tied == pytest.approx(measured_sensitivity(model, SPACE, batches)["1"].weight)


@BOTH
class TestBoth:
    def test_falls_with_the_bits(self, tiny_net, labeled_batches, sensitivity):
        """By a factor of four a bit, in theory; 8 bits are as good as float."""
        found = sensitivity(tiny_net(), SearchSpace(weight_bits=(2, 4, 8), act_bits=(2, 4, 8)), labeled_batches())
        for name in ("conv2", "conv3"):
            for side in found[name]:
                assert abs(side[0]) > 8 * abs(side[2])

    def test_pinned_and_excluded_layers(self, tiny_net, labeled_batches, sensitivity):
        space = SearchSpace(weight_bits=(2, 4), act_bits=(2, 4, 8), exclude=["conv3"])
        found = sensitivity(tiny_net(), space, labeled_batches(1))
        assert {name: tuple(map(len, sides)) for name, sides in found.items()} == {
            "conv1": (1, 1),
            "conv2": (2, 3),
            "fc": (1, 1),
        }
        assert found["conv1"] == found["fc"] == ((0.0,), (0.0,))

    def test_the_model_is_left_alone(self, tiny_net, labeled_batches, bits_of, sensitivity):
        model = tiny_net()
        model.conv2.requires_grad_(False)
        before = bits_of(model.state_dict())
        sensitivity(model, SPACE, labeled_batches(1))
        assert bits_of(model.state_dict()) == before
        assert model.training
        assert all(p.grad is None for p in model.parameters())
        assert [p.requires_grad for p in model.conv2.parameters()] == [False]
        assert not model.conv2._forward_hooks

    def test_keyword_arguments(self, tiny_net, labeled_batches, sensitivity):
        pairs = labeled_batches(2)
        mappings = [({"x": inputs}, labels) for inputs, labels in pairs]
        assert sensitivity(tiny_net(), SPACE, mappings) == sensitivity(tiny_net(), SPACE, pairs)

    def test_labels_exceed_the_classes(self, tiny_net, labeled_batches, sensitivity):
        with pytest.raises(TrainingError, match="the label 2, but the model has 2 classes"):
            sensitivity(tiny_net(num_classes=2), SPACE, labeled_batches())
