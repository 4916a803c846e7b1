import itertools

import pytest
from torch import nn

from asga.targets import TARGETS, check_target, find_target

LAYERS = {"conv": nn.Conv2d(16, 16, 3), "fc": nn.Linear(32, 48), "odd": nn.Linear(30, 48)}
EVERYTHING = (2, 3, 4, "fp4", 5, 6, 7, 8, "fp8", None)


def runs(target: str, layer: str, weight: object, act: object) -> bool:
    try:
        check_target(target, LAYERS, {layer: ((weight,), (act,))})
    except ValueError:
        return False
    return True


class TestTable:
    @pytest.mark.parametrize("target", TARGETS)
    def test_every_claim_has_a_source(self, target):
        assert TARGETS[target].sources
        assert all(source.startswith("https://") for source in TARGETS[target].sources)

    @pytest.mark.parametrize("target", ["any", *TARGETS])
    @pytest.mark.parametrize("layer", LAYERS)
    def test_float_layers_and_8_bits_run_everywhere(self, target, layer):
        assert runs(target, layer, None, None)
        assert runs(target, layer, 8, 8)

    @pytest.mark.parametrize(
        ("target", "layer", "expected"),
        [
            ("onnxruntime-cpu", "conv", {(8, 8)}),
            ("onnxruntime-cpu", "fc", {(8, 8), (2, None), (4, None), (8, None)}),
            ("tensorrt", "conv", {(8, 8)}),
            ("tensorrt", "fc", {(8, 8), (4, None), ("fp4", None), ("fp8", None)}),
            ("tensorrt", "odd", {(8, 8), (4, None), ("fp8", None)}),
            ("openvino-cpu", "conv", {(8, 8), (8, None)}),
            ("openvino-cpu", "fc", {(8, 8), (4, None), (8, None)}),
            ("executorch-xnnpack", "fc", {(8, 8)}),
        ],
    )
    def test_what_runs_and_nothing_else(self, target, layer, expected):
        pairs = itertools.product(EVERYTHING, (2, 4, 8, None))
        assert {pair for pair in pairs if runs(target, layer, *pair)} == expected | {(None, None)}

    def test_any_restricts_nothing(self):
        assert find_target("any") is None
        assert all(runs("any", "conv", w, a) for w, a in itertools.product(EVERYTHING, (2, 8, None)))


class TestMessage:
    def test_lists_what_is_refused_and_what_runs(self):
        candidates = {"conv": ((4, 8), (4, 8)), "fc": (("fp4", "fp8"), (None,)), "odd": (("fp4",), (None, 8))}
        with pytest.raises(ValueError, match="cannot run") as error:
            check_target("tensorrt", LAYERS, candidates)
        assert str(error.value).splitlines()[:-1] == [
            "tensorrt cannot run, as weights x inputs:",
            "  Conv2d: int4 x int4/int8, int8 x int4, for 'conv'",
            "  Linear: fp4 x float/int8 (weight (48, 30), multiples of 16 are needed), for 'odd'",
            "It runs:",
            "  Conv2d: int8 x int8",
            "  Linear: int8 x int8, int4 x float, fp4 x float, fp8 x float",
        ]
        assert "https://docs.nvidia.com" in str(error.value).splitlines()[-1]

    def test_layers_of_one_kind_are_listed_together(self):
        layers = {f"conv{k}": nn.Conv2d(2, 2, 1) for k in range(6)}
        with pytest.raises(ValueError, match="int2 x int8, for 'conv0', 'conv1', 'conv2' and 3 more\n"):
            check_target("onnxruntime-cpu", layers, dict.fromkeys(layers, ((2,), (8,))))

    @pytest.mark.parametrize("name", ["TensorRT", "", None, "onnxruntime"])
    def test_unknown_target(self, name):
        with pytest.raises(ValueError, match=f"target is {name!r}; it must be one of 'any', 'onnxruntime-cpu'"):
            find_target(name)
