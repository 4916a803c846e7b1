import pytest
import torch

from asga import Policy, SearchSpace, prepare, quantize
from asga.cli.options import load_weights, model_factory, parse_group, parse_pins
from asga.data import Batches, ImageTensor
from asga.search import Group


@pytest.fixture
def net(factories) -> torch.nn.Module:
    """``asga_test_factory:net`` for three classes of 8x8 images."""
    images = ImageTensor(torch.zeros(3, 3, 8, 8, dtype=torch.uint8), torch.arange(3), ("a", "b", "c"))
    batches = Batches(images, 3, shuffle=False, augment=False)
    return model_factory("asga_test_factory:net", batches, "cpu")(0)


class TestLayout:
    """Of the weights of convolutions, and so of all activations between them."""

    def _check(self, model: torch.nn.Module) -> None:
        layouts = []
        for module in model.modules():
            if isinstance(module, torch.nn.Conv2d):
                assert module.weight.is_contiguous(memory_format=torch.channels_last)
                module.register_forward_hook(lambda _module, _inputs, output: layouts.append(output.stride(1)))
        model.train()(torch.randn(2, 3, 8, 8))
        assert layouts == [1, 1, 1]

    def test_of_a_new_model(self, net):
        self._check(net)

    def test_stays_when_layers_are_replaced(self, net, policy_file):
        self._check(quantize(net, Policy.load(policy_file)))
        self._check(prepare(net, SearchSpace()))

    def test_stays_when_weights_are_loaded(self, net, tmp_path):
        state = {name: value.contiguous() for name, value in net.state_dict().items()}
        torch.save(state, tmp_path / "float.pt")
        load_weights(net, tmp_path / "float.pt")
        self._check(net)


def test_pins():
    texts = ["conv1=8", "layer1.* = 4/6", "fc=fp8/none", "a=b=int4 / 8"]
    assert parse_pins(texts) == {"conv1": 8, "layer1.*": (4, 6), "fc": ("fp8", None), "a=b": ("int4", 8)}
    assert parse_pins([]) == {}


def test_groups():
    assert parse_group("conv1, conv2") == Group(("conv1", "conv2"))
    assert parse_group("layer1.*,fc = act") == Group(("layer1.*", "fc"), "act")
