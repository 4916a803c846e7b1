import pytest
import torch
from torch import nn

from asga import SearchSpace, prepare
from asga.nn import MixedActQuantizer, MixedWeightQuantizer, calibrate
from asga.search.relaxation import Relaxation


@pytest.fixture
def mixed(tiny_net, labeled_batches):
    """Candidates in different numbers, and logits that differ."""
    model = prepare(tiny_net(), SearchSpace(weight_bits=(2, 3, 4), act_bits=(2, 3, 4, 6, 8)))
    calibrate(model, labeled_batches(1))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for mixture in mixtures(model):
            mixture.logits.copy_(torch.randn(len(mixture.bits), generator=generator))
    return model.eval()


def mixtures(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, MixedWeightQuantizer | MixedActQuantizer)]


@pytest.fixture
def images(labeled_batches):
    return labeled_batches(1)[0][0]


class TestSoftmax:
    def test_network_and_gradients_are_those_without_it(self, mixed, images):
        """The same bits: stacked rows are computed like single ones."""

        def outcome() -> tuple[torch.Tensor, ...]:
            mixed.zero_grad()
            outputs = mixed(images)
            outputs.square().sum().backward()
            return outputs.detach(), *(mixture.logits.grad.clone() for mixture in mixtures(mixed))

        alone = outcome()
        relaxation = Relaxation(mixed, "softmax")
        relaxation.draw()
        together = outcome()
        assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))
        assert all(mixture.logits.grad.any() for mixture in mixtures(mixed))

    def test_beliefs(self, mixed):
        relaxation = Relaxation(mixed, "softmax")
        relaxation.set_temperature(0.5)
        probs, log_probs = relaxation.probs(), relaxation.log_probs()
        assert list(log_probs) == relaxation.logits == [mixture.logits for mixture in mixtures(mixed)]
        for logits in relaxation.logits:
            expected = torch.softmax(logits / 0.5, 0)
            torch.testing.assert_close(probs[logits], expected)
            torch.testing.assert_close(torch.tensor(log_probs[logits]).exp(), expected.detach())

    def test_temperature_is_that_of_all_mixtures_and_part_of_the_state(self, mixed):
        Relaxation(mixed, "softmax").set_temperature(0.25)
        state = mixed.state_dict()
        kept = [value.item() for name, value in state.items() if name.endswith(".temperature")]
        assert kept == [0.25] * 4
        mixed.load_state_dict({name: value.clone() for name, value in state.items()})
        assert {mixture.temperature.item() for mixture in mixtures(mixed)} == {0.25}

    def test_shared_logits_are_one_choice(self, mixed, images):
        first, second = (m for m in mixtures(mixed) if isinstance(m, MixedWeightQuantizer))
        second.logits = first.logits
        relaxation = Relaxation(mixed, "softmax")
        assert len(relaxation.logits) == 3
        mixed(images).square().sum().backward()
        shared = first.logits.grad.clone()
        relaxation.remove()
        mixed.zero_grad()
        mixed(images).square().sum().backward()
        torch.testing.assert_close(shared, first.logits.grad)


class TestGumbel:
    def test_noise_is_that_of_the_step(self, mixed, images):
        relaxation = Relaxation(mixed, "gumbel")
        torch.manual_seed(0)
        relaxation.draw()
        first = mixed(images)
        assert torch.equal(mixed(images), first)
        relaxation.draw()
        assert not torch.equal(mixed(images), first)
        torch.manual_seed(0)
        relaxation.draw()
        assert torch.equal(mixed(images), first)

    def test_cold_samples_are_candidates_drawn_with_their_probabilities(self, mixed):
        relaxation = Relaxation(mixed, "gumbel")
        relaxation.set_temperature(1e-4)
        logits = relaxation.logits[0]
        mixture = next(m for m in mixtures(mixed) if m.logits is logits)
        torch.manual_seed(0)
        count, drawn = 4000, torch.zeros(len(logits))
        for _ in range(count):
            relaxation.draw()
            relaxation._weigh()
            drawn += mixture.probs().detach()
        relaxation._release()
        probs = relaxation.probs()[logits].detach()
        torch.testing.assert_close(probs, torch.softmax(logits.detach(), 0))
        # Four standard deviations of a count.
        assert ((drawn / count - probs).abs() < 4 * (probs * (1 - probs) / count).sqrt()).all()

    def test_logits_get_a_gradient(self, mixed, images):
        relaxation = Relaxation(mixed, "gumbel")
        relaxation.draw()
        mixed(images).square().sum().backward()
        assert all(logits.grad.any() for logits in relaxation.logits)


def test_an_error_in_the_model_leaves_its_mixtures_to_themselves(mixed, images):
    Relaxation(mixed, "softmax")
    before = [mixture.probs() for mixture in mixtures(mixed)]
    with pytest.raises(RuntimeError):
        mixed(images[:, :, :, :0])
    assert all(torch.equal(m.probs(), probs) for m, probs in zip(mixtures(mixed), before, strict=True))


def test_unknown_kind(mixed):
    with pytest.raises(ValueError, match="relaxation is 'hard'; it must be one of 'gumbel', 'softmax'"):
        Relaxation(mixed, "hard")
