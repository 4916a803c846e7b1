"""The cases: names, bytes, and whether the tables of shapes are those of the networks."""

import pytest
import torch
from torch import nn

from asga.bench.shapes import Case, select
from asga.models import mobilenet_v2, resnet18


def _case(kind: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Case:
    return Case("core", kind, shape, (4,), dtype)


class TestCase:
    def test_traffic_is_two_tensors_forward_and_three_backward(self):
        case = _case("act", (64, 64, 56, 56))
        assert case.traffic("forward") == 2 * 4 * 64 * 64 * 56 * 56
        assert case.traffic("forward+backward") == 5 * 4 * 64 * 64 * 56 * 56

    def test_traffic_of_a_mixture_is_that_of_one_quantizer(self):
        mixture = Case("core", "act", (1000,), (2, 3, 4, 6, 8), torch.float32)
        assert mixture.traffic("forward+backward") == 20_000

    def test_traffic_halves_in_bfloat16(self):
        assert _case("weight", (64, 9), torch.bfloat16).traffic("forward") == 2 * 2 * 64 * 9

    def test_name(self):
        mixture = Case("vit_b", "weight", (768, 768), (2, 3, 4, 6, 8), torch.bfloat16)
        assert mixture.name == "vit_b/weight-768x768/k5/bfloat16"

    def test_weights_have_channels_and_activations_have_none(self):
        assert _case("weight", (64, 9)).axis == 0
        assert _case("act", (64, 9)).axis is None


class TestSelect:
    def test_takes_what_matches(self):
        names = [case.name for case in select(["core/act-*/k1/*", "core/weight-32x*/k5/float32"], 8)]
        assert names == [
            "core/act-8x64x56x56/k1/float32",
            "core/act-8x64x56x56/k1/bfloat16",
            "core/weight-32x1x3x3/k5/float32",
        ]

    def test_takes_a_tensor_of_several_networks_once(self):
        cases = select(["*"], 64)
        assert len({(case.kind, case.shape, case.bits, case.dtype) for case in cases}) == len(cases)
        assert len({case.name for case in cases}) == len(cases)

    def test_names_the_suites_if_nothing_matches(self):
        with pytest.raises(ValueError, match=r"'resnet19/\*'.*resnet18, resnet50"):
            select(["resnet19/*"], 64)


@pytest.mark.parametrize("model", [resnet18, mobilenet_v2], ids=lambda model: model.__name__)
def test_shapes_of_networks(model):
    weights, inputs = set(), set()

    def record(layer: nn.Module, arguments: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        weights.add(tuple(layer.weight.shape))
        inputs.add((8, *arguments[0].shape[1:]))

    with torch.device("meta"):
        network = model(1000)
        for layer in network.modules():
            if isinstance(layer, nn.Conv2d | nn.Linear):
                layer.register_forward_hook(record)
        network(torch.empty(2, 3, 224, 224))
    cases = select([f"{model.__name__}/*/k1/float32"], batch_size=8)
    assert {case.shape for case in cases if case.kind == "weight"} == weights
    assert {case.shape for case in cases if case.kind == "act"} == inputs
