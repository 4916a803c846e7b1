"""The cases: names, bytes, and whether the tables of shapes are those of the networks."""

from dataclasses import replace

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

    @pytest.mark.parametrize(("offset", "bits", "parameters"), [(False, (4,), 1), (True, (2, 3, 4, 6, 8), 10)])
    def test_traffic_counts_the_parameters_of_groups(self, offset, bits, parameters):
        case = Case("options", "weight", (64, 256), bits, torch.bfloat16, group_size=128, offset=offset)
        of_parameters = 4 * parameters * 64 * 2
        assert case.traffic("forward") == 2 * 2 * 64 * 256 + of_parameters
        assert case.traffic("forward+backward") == 5 * 2 * 64 * 256 + 3 * of_parameters

    def test_groups_are_the_channels_of_a_matrix(self):
        grouped = Case("options", "weight", (4, 3, 256), (4,), torch.float32, group_size=128)
        assert grouped.axis is None
        assert (grouped.rows.shape, grouped.rows.axis) == ((24, 128), 0)
        assert _case("weight", (64, 9)).rows == _case("weight", (64, 9))

    def test_name(self):
        mixture = Case("vit_b", "weight", (768, 768), (2, 3, 4, 6, 8), torch.bfloat16)
        assert mixture.name == "vit_b/weight-768x768/k5/bfloat16"
        options = {"group_size": 128, "offset": True, "channels_last": True}
        every = Case("options", "act", (2, 3, 4, 128), (4,), torch.float32, **options)
        assert every.name == "options/act-2x3x4x128-g128-offset-channels_last/k1/float32"

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
        assert len({replace(case, suite="") for case in cases}) == len(cases)
        assert len({case.name for case in cases}) == len(cases)

    @pytest.mark.parametrize(
        "suite", ["resnet18", "resnet50", "mobilenet_v2", "vit_b", "llama3_8b", "sweep", "options"]
    )
    def test_takes_a_whole_suite_in_one_dtype(self, suite):
        cases = select([f"{suite}/*/bfloat16"], 8)
        assert {(case.suite, case.dtype) for case in cases} == {(suite, torch.bfloat16)}
        assert {case.kind for case in cases} == {"act", "weight"}
        assert {len(case.bits) for case in cases} == {1, 5}

    def test_options_have_groups_offsets_and_channels_last(self):
        names = [case.name for case in select(["options/*/k1/float32"], 64)]
        assert names == [
            "options/weight-1024x1024-g128/k1/float32",
            "options/weight-1024x1024-g128-offset/k1/float32",
            "options/weight-4096x4096-g128/k1/float32",
            "options/weight-4096x4096-g128-offset/k1/float32",
            "options/act-64x64x56x56-offset/k1/float32",
            "options/act-64x64x56x56-channels_last/k1/float32",
            "options/weight-512x512x3x3-offset/k1/float32",
            "options/weight-512x512x3x3-channels_last/k1/float32",
        ]

    def test_names_the_suites_if_nothing_matches(self):
        with pytest.raises(ValueError, match=r"'resnet19/\*'.*resnet18, resnet50.*options"):
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
