import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune, weight_norm

from asga.nn import MixedConv2d, QuantLinear, find_quantizable
from asga.nn.quantizable import second_names


class OwnForward(nn.Linear):
    def forward(self, input):
        return super().forward(input) * 2


class OwnConvolution(nn.Conv2d):
    def _conv_forward(self, input, weight, bias):
        return super()._conv_forward(input, weight * 2, bias)


class OwnConstructor(nn.Conv2d):
    def __init__(self, channels):
        super().__init__(channels, channels, 3, padding=1, groups=channels)


def patched():
    layer = nn.Linear(2, 2)
    layer.forward = lambda input: input
    return layer


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(2, 2, 1),
        nn.Linear(2, 2),
        nn.Linear(2, 2, dtype=torch.bfloat16),
        OwnConstructor(2),
        MixedConv2d(2, 2, 1, weight_bits=[2, 4], act_bits=[2, 4]),
        QuantLinear(2, 2, weight_bits=4, act_bits=4),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_layers_that_are_found(layer):
    assert find_quantizable(nn.Sequential(layer)) == ({"0": layer}, {})
    assert find_quantizable(layer) == ({"": layer}, {})


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: nn.Conv1d(2, 2, 1), "Conv1d: only Conv2d and Linear are quantized"),
        (lambda: nn.ConvTranspose2d(2, 2, 1), "ConvTranspose2d: only"),
        (lambda: nn.Embedding(2, 2), "Embedding: only"),
        (lambda: nn.LSTM(2, 2), "LSTM: only"),
        (lambda: nn.Bilinear(2, 2, 2), "Bilinear: only"),
        (lambda: nn.LazyConv1d(2, 1), "LazyConv1d: only"),
        (lambda: nn.LazyLinear(2), "LazyLinear: not initialized yet; run one batch"),
        (
            lambda: parametrizations.weight_norm(nn.Linear(2, 2)),
            "ParametrizedLinear: its parameters are parametrized",
        ),
        (
            lambda: prune.l1_unstructured(nn.Linear(2, 2), "weight", 1),
            "Linear: its weight is not a parameter",
        ),
        (lambda: OwnForward(2, 2), "OwnForward: its forward is not that of Linear"),
        (lambda: OwnConvolution(2, 2, 1), "OwnConvolution: its forward is not that of Conv2d"),
        (patched, "Linear: its forward is not that of Linear"),
        (
            lambda: nn.Linear(2, 2, dtype=torch.complex64),
            "Linear: weights of torch.complex64 are not supported",
        ),
        (lambda: nn.Linear(2, 2).to(torch.float8_e4m3fn), "Linear: weights of torch.float8_e4m3fn are not"),
        (lambda: nn.Linear(0, 2), "Linear: its weight is empty"),
    ],
    ids=lambda value: value.split(":")[0] if isinstance(value, str) else "",
)
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors:UserWarning")
def test_reasons_to_skip(make, reason):
    layers, skipped = find_quantizable(nn.ModuleDict({"layer": make()}))
    assert layers == {}
    assert list(skipped) == ["layer"]
    assert skipped["layer"].startswith(reason)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_old_weight_norm_is_skipped():
    _, skipped = find_quantizable(nn.Sequential(weight_norm(nn.Linear(2, 2))))
    assert "not a parameter (weight norm" in skipped["0"]


def test_weights_that_their_owner_uses_directly_are_skipped():
    block = nn.TransformerEncoderLayer(4, 2, 8)
    layers, skipped = find_quantizable(block)
    assert layers == {}
    assert list(skipped) == ["self_attn", "self_attn.out_proj", "linear1", "linear2"]
    assert "MultiheadAttention reads this weight" in skipped["self_attn.out_proj"]
    assert "TransformerEncoderLayer reads this weight" in skipped["linear1"]


def test_norms_are_not_mentioned():
    model = nn.Sequential(nn.BatchNorm2d(2), nn.LayerNorm((2, 2)), nn.GroupNorm(1, 2), nn.PReLU(2))
    assert find_quantizable(model) == ({}, {})


def test_registration_order_and_the_first_name_of_a_shared_module():
    shared = nn.Linear(2, 2)
    model = nn.ModuleDict({"b": shared, "a": nn.Sequential(nn.Linear(2, 2), shared), "again": shared})
    layers, skipped = find_quantizable(model)
    assert list(layers) == ["b", "a.0"]
    assert skipped == {}


def test_second_names():
    shared = nn.Sequential(nn.Linear(2, 2))
    model = nn.ModuleDict({"a": shared, "b": nn.Linear(2, 2), "c": shared})
    model["d"] = shared[0]
    assert second_names(model) == {"c": "a", "c.0": "a.0", "d": "a.0"}
    assert second_names(nn.Linear(2, 2)) == {}
