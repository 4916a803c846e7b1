import pytest
import torch
from torch import nn

from asga.nn import MixedConv2d, MixedLinear, QuantLinear, calibrate, logits, parameter_groups
from asga.optim import ASGA


@pytest.fixture
def model():
    model = nn.Sequential(
        MixedConv2d(3, 4, 3, weight_bits=(2, 4), act_bits=(2, 4)),
        nn.BatchNorm2d(4),
        QuantLinear(4, 4, weight_bits=4, act_bits=4),
        MixedLinear(4, 4, bias=False, weight_bits=(2, 4), act_bits=None),
    )
    model[3].weight = model[2].weight  # tied
    return model


def names(model, group):
    known = {id(p): name for name, p in model.named_parameters()}
    return [known[id(p)] for p in group["params"]]


def test_every_trainable_parameter_but_the_logits_is_in_one_group(model):
    weights, others, scales = parameter_groups(model, weight_decay=1e-4, lr=0.1)
    assert names(model, weights) == ["0.weight", "2.weight"]
    assert names(model, others) == ["0.bias", "1.weight", "1.bias", "2.bias"]
    assert names(model, scales) == [
        "0.weight_quantizer.scales",
        "0.act_quantizer.scales",
        "2.weight_quantizer.scale",
        "2.act_quantizer.scale",
        "3.weight_quantizer.scales",
    ]
    settings = [{k: v for k, v in group.items() if k != "params"} for group in (weights, others, scales)]
    assert settings == [
        {"weight_decay": 1e-4, "rho_scale": 1.0, "lr": 0.1},
        {"weight_decay": 0.0, "rho_scale": 1.0, "lr": 0.1},
        {"weight_decay": 0.0, "rho_scale": 0.0, "lr": 0.1},
    ]


def test_scales_of_small_floats_are_among_the_scales():
    model = nn.Sequential(
        QuantLinear(20, 4, bias=False, weight_bits="fp4", act_bits=None),
        MixedLinear(4, 4, bias=False, weight_bits=(4, "fp4", "fp8"), act_bits=None),
    )
    weights, scales = parameter_groups(model, weight_decay=1e-4)
    assert names(model, weights) == ["0.weight", "1.weight"]
    assert names(model, scales) == [
        "0.weight_quantizer.scale",
        "1.weight_quantizer.scales",
        "1.weight_quantizer.fp4.scale",
        "1.weight_quantizer.fp8.scale",
    ]


def test_logits_in_the_order_of_the_layers(model):
    expected = [model[0].weight_quantizer, model[0].act_quantizer, model[3].weight_quantizer]
    assert [id(p) for p in logits(model)] == [id(q.logits) for q in expected]


def test_frozen_parameters_are_left_out(model):
    for name in ("0.weight", "2.weight", "2.weight_quantizer.scale", "1.bias"):
        model.get_parameter(name).requires_grad_(False)
    others, scales = parameter_groups(model, weight_decay=1e-4)
    assert "1.bias" not in names(model, others)
    assert "2.weight_quantizer.scale" not in names(model, scales)
    assert "lr" not in others


def test_a_torch_optimizer_takes_the_groups(model):
    optimizer = torch.optim.SGD(parameter_groups(model, weight_decay=1e-4), lr=0.1)
    assert [group["lr"] for group in optimizer.param_groups] == [0.1] * 3


def test_asga_perturbs_the_weights_but_not_the_scales(model):
    calibrate(model, [torch.randn(2, 3, 6, 6)])
    optimizer = ASGA(parameter_groups(model, weight_decay=0.0), torch.optim.SGD, lr=0.1)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    loss = model(torch.randn(2, 3, 6, 6)).square().mean()
    loss.backward()
    optimizer.first_step(loss)
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert "2.weight" in moved
    assert not any("_quantizer." in name for name in moved)


def test_float_model_has_no_scales():
    groups = parameter_groups(nn.Linear(2, 2), weight_decay=0.1)
    assert [group["rho_scale"] for group in groups] == [1.0, 1.0]
    assert logits(nn.Linear(2, 2)) == []
