import copy
import io
import math

import pytest
import torch
from torch import nn

import asga
from asga import SearchSpace
from asga.policy import LayerPolicy, Policy
from asga.search.groups import Group


def network(*, tied: bool = True) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(4)))
    if tied:
        model[2].weight = model[1].weight
    return model


def quantized(*, tied: bool = True, bits: int = 4) -> nn.Module:
    layers = {name: LayerPolicy(4, 4) for name in "0123"} | {"2": LayerPolicy(bits, 4)}
    return asga.quantize(network(tied=tied), Policy(layers))


def test_one_set_of_values_is_loaded(bits_of):
    model = quantized()
    state = model.state_dict()
    state["1.weight_quantizer.scale"] = state["2.weight_quantizer.scale"] = torch.tensor([1, 2, 3, math.nan])
    model.load_state_dict(state)
    assert bits_of(model[1].weight_quantizer.scale) == bits_of(state["1.weight_quantizer.scale"])


def test_only_one_of_the_names_is_loaded():
    """As libraries write it that keep what is shared once."""
    model = quantized()
    state = {name: value * 0 + 2 for name, value in model.state_dict().items() if not name.startswith("2.weight")}
    model.load_state_dict(state, strict=False)
    assert model[2].weight_quantizer.scale.tolist() == [2, 2, 2, 2]


@pytest.mark.parametrize("through", ["itself", "a copy", "a file", "a part of another", "other values of the weight"])
def test_two_sets_of_scales_are_refused(through, bits_of):
    model, state = quantized(), quantized(tied=False).state_dict()
    if through == "a copy":
        model = copy.deepcopy(model)
    if through == "a file":
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        model = torch.load(file, weights_only=False)
    if through != "other values of the weight":
        state["2.weight"] = state["1.weight"]
    if through == "a part of another":
        model, state = nn.ModuleDict({"part": model}), {f"part.{name}": value for name, value in state.items()}
    before = bits_of(model.state_dict())
    with pytest.raises(ValueError, match=r"different values .*(\n.*)*1\.weight_quantizer\.scale' and '.*2\.weight_q"):
        model.load_state_dict(state)
    assert bits_of(model.state_dict()) == before


def test_scales_of_their_own_are_loaded():
    """Tied layers of other bits share the weight alone."""
    model = quantized(bits=2)
    state = model.state_dict()
    state["2.weight_quantizer.scale"] = torch.full((4,), 7.0)
    model.load_state_dict(state)
    assert model[1].weight_quantizer.scale[0] != 7


def test_logits_of_a_group():
    model = asga.prepare(network(tied=False), SearchSpace(groups=(Group(("1", "2"), "weight"),)))
    state = model.state_dict()
    state["2.weight_quantizer.logits"] = torch.ones(5)
    with pytest.raises(ValueError, match=r"'1\.weight_quantizer\.logits' and '2\.weight_quantizer\.logits'"):
        model.load_state_dict(state)
