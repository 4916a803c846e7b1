import pytest
import torch

from asga.nn import MixedLinear
from asga.search.watches import ClassWatch, GradientWatch


class TestClasses:
    def test_gives_up_after_an_epoch_of_one_class(self):
        watch = ClassWatch(3)
        watch.see(torch.tensor([2, 2]))
        watch.see(torch.tensor([2]))
        with pytest.raises(ValueError, match="All labels are 2"):
            watch.see(torch.tensor([2, 2]))

    def test_says_who_has_the_class(self):
        with pytest.raises(ValueError, match=r"^the first batch has a single class"):
            ClassWatch(1, "the first batch has").see(torch.tensor([2, 2]))

    def test_two_classes_are_enough(self):
        watch = ClassWatch(2)
        watch.see(torch.tensor([2, 2]))
        watch.see(torch.tensor([1, 1]))
        watch.see(torch.tensor([1, 1]))

    @pytest.mark.parametrize(
        "labels", [torch.ones(2), torch.ones(2, 3, dtype=torch.int64), torch.ones(0, dtype=torch.int64)]
    )
    def test_what_is_no_class_passes(self, labels):
        ClassWatch(1).see(labels)


class TestGradients:
    @pytest.fixture
    def layers(self):
        sizes = {"a": {"weight_bits": (2, 3), "act_bits": (2, 3)}, "b": {"weight_bits": (2, 3), "act_bits": (4,)}}
        return {name: MixedLinear(4, 4, **bits) for name, bits in sizes.items()}

    def test_every_choice_needs_one(self, layers):
        """Also in different steps."""
        watch = GradientWatch(layers)
        watch.see()
        layers["b"].weight_quantizer.logits.grad = torch.ones(2)
        layers["a"].weight_quantizer.logits.grad = torch.ones(2)
        layers["a"].act_quantizer.logits.grad = torch.zeros(2)
        watch.see()
        with pytest.warns(UserWarning, match="the loss does not depend on the bits of 'a'"):
            assert watch.missing() == ["a"]
        layers["a"].act_quantizer.logits.grad = torch.ones(2)
        watch.see()
        assert watch.missing() == []

    def test_state(self, layers):
        watch, other = GradientWatch(layers), GradientWatch(layers)
        layers["b"].weight_quantizer.logits.grad = torch.ones(2)
        watch.see()
        other.load_state_dict(watch.state_dict())
        assert other.state_dict() == watch.state_dict() == {"missing": ["a"]}
