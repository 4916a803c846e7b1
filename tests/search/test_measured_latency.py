"""What is measured and how often; the times themselves are not looked at."""

import copy

import pytest
import torch
from torch import nn

from asga.search import measured_latency
from asga.search.latency import LatencyTable
from asga.search.measured_latency import measure_layers
from asga.search.space import SearchSpace


class Net(nn.Module):
    """Two equal layers, one called twice with inputs of two sizes, and a padding that oneDNN has not."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.one, self.two = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.twice = nn.Conv2d(8, 8, 1, bias=False)
        self.reflect = nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect")
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        x = self.two(self.one(self.stem(x)))
        x = self.twice(self.twice(x)[:, :, ::2, ::2])
        return self.head(self.reflect(x).mean((2, 3)))


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(measured_latency, "_SECONDS", 1e-4)


IMAGE = torch.zeros(2, 3, 16, 16)


def test_every_pair_of_a_space_has_a_time(monkeypatch):
    choices = SearchSpace(weight_bits=(2, 8, "fp8"), act_bits=(4, 8), exclude=["two"]).choices(Net())
    steps = []
    table = LatencyTable.measure(Net(), choices, IMAGE, progress=lambda done, total: steps.append((done, total)))
    table.check(choices)
    assert set(table.times) == set(table.kernels)
    assert all(time > 0 for time in table.times.values())
    assert table.times["one", 2, 4] == table.times["one", 8, 8]  # there is no kernel below 8 bits
    assert table.kernels["two", None, None] == "float32"
    assert {kernel for (_, bits, _), kernel in table.kernels.items() if bits == "fp8"} <= {"bfloat16", "float32"}
    assert set(table.kernels.values()) <= {"int8", "bfloat16", "float32"}
    # stem, one and two as the same, twice with two inputs, reflect, head; three kernels each.
    assert steps == [(done, 18) for done in range(1, 19)]


class TestArguments:
    """What can be left out, and in which order the rest may stand."""

    @pytest.fixture(autouse=True)
    def measured(self, monkeypatch) -> list[dict[str, object]]:
        """What `measure_layers` was asked for."""
        asked: list[dict[str, object]] = []

        def measure_layers(model, example_inputs, pairs, *, device, progress):
            asked.append({"inputs": example_inputs, "pairs": pairs, "device": device})
            return {(name, *pair): (1, "float32") for name, wished in pairs.items() for pair in wished}

        monkeypatch.setattr("asga.search.latency.measure_layers", measure_layers)
        return asked

    @pytest.mark.parametrize("device", ["cpu", torch.device("cpu")], ids=["name", "device"])
    def test_model_and_device(self, measured, device):
        model = Net()
        model.example_input_array = IMAGE
        LatencyTable.measure(model, device).check(SearchSpace().choices(model))
        assert measured[0]["inputs"] is IMAGE
        assert measured[0]["device"] == device

    def test_model_and_inputs(self, measured):
        LatencyTable.measure(Net(), example_inputs=IMAGE).check(SearchSpace().choices(Net()))
        assert measured[0]["device"] is None

    def test_a_space(self, measured):
        space = SearchSpace(weight_bits=(4, 8), act_bits=(8,), groups=["residual"])
        LatencyTable.measure(Net(), space, IMAGE, device="cpu").check(space.choices(Net(), IMAGE))
        assert measured[0]["pairs"]["one"] == [(4, 8), (8, 8)]

    def test_shapes_are_not_known(self):
        with pytest.raises(ValueError, match="example_inputs is needed: times depend on the shapes"):
            LatencyTable.measure(Net(), "cpu")

    def test_device_twice(self):
        with pytest.raises(TypeError, match="device is 'cuda', and choices is 'cpu', a device, too; give one"):
            LatencyTable.measure(Net(), "cpu", IMAGE, device="cuda")

    def test_no_space(self):
        with pytest.raises(TypeError, match="choices is 8; a SearchSpace or what"):
            LatencyTable.measure(Net(), 8, IMAGE)


def test_a_layer_called_twice_takes_both_times(monkeypatch):
    monkeypatch.setattr(measured_latency, "_time", lambda run: 5 if run is not None else None)
    found = measure_layers(Net(), IMAGE, {"one": [(None, None)], "twice": [(None, None)]})
    assert found == {("one", None, None): (5, "float32"), ("twice", None, None): (10, "float32")}


@pytest.mark.parametrize(
    ("times", "pair", "expected"),
    [
        ({"int8": 3, "bfloat16": 2, "own": 4}, (2, 8), (2, "bfloat16")),
        ({"int8": 1, "bfloat16": 2, "own": 4}, (2, 8), (1, "int8")),
        ({"int8": 1, "bfloat16": 2, "own": 4}, ("fp8", 8), (2, "bfloat16")),
        ({"int8": 1, "bfloat16": 2, "own": 4}, (8, None), (4, "float32")),
        ({"int8": None, "bfloat16": None, "own": 4}, (2, 2), (4, "float32")),
    ],
)
def test_the_fastest_kernel_that_holds_the_bits(monkeypatch, times, pair, expected):
    kernels = {name: lambda layer, input, name=name: name for name in times}
    monkeypatch.setattr(measured_latency, "_KERNELS", kernels)
    monkeypatch.setattr(measured_latency, "_time", times.get)
    assert measure_layers(Net(), IMAGE, {"one": [pair]}) == {("one", *pair): expected}


def test_a_kernel_that_fails_is_left_out(monkeypatch):
    def broken():
        raise RuntimeError("no such kernel")

    monkeypatch.setitem(measured_latency._KERNELS, "int8", lambda layer, input: broken)
    monkeypatch.setitem(measured_latency._KERNELS, "bfloat16", lambda layer, input: broken)
    assert measure_layers(Net(), IMAGE, {"one": [(2, 2)]})["one", 2, 2][1] == "float32"


@pytest.mark.parametrize("layer", ["one", "twice", "head"])
def test_int8_computes_what_the_layer_does(layer):
    """Its shapes, that is: the numbers are zeros."""
    net, shape = Net(), {"head": (2, 8)}.get(layer, (2, 8, 6, 5))
    module = net.get_submodule(layer)
    run = measured_latency._int8(module, torch.zeros(shape))
    if run is None:
        pytest.skip("this PyTorch has no int8 kernels for CPUs")
    result = run()
    assert result.shape == module(torch.zeros(shape)).shape
    assert result.dtype == torch.uint8


def test_the_model_is_left_as_it_was():
    model = Net()
    before = copy.deepcopy(model.state_dict())
    measure_layers(model, IMAGE, {"one": [(8, 8)]}, device="cpu")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not model.one._forward_pre_hooks


def test_a_layer_that_is_not_called():
    model = Net()
    model.spare = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="never called by the model's forward: 'spare'"):
        measure_layers(model, IMAGE, {"one": [(8, 8)], "spare": [(8, 8)]})
    measured = measure_layers(model, IMAGE, {"one": [(8, 8)], "spare": [(None, None)]})
    assert measured["spare", None, None] == (0, "float32")
