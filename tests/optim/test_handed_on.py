import math

import numpy as np
import pytest
import torch
from torch import nn

from asga.nn import QuantLinear
from asga.optim.handed_on import check_optimizer_options, check_suits_model


def check(options, method: str = "asga", **changes):
    given = {"two_passes": method == "asga", "momentum": 0.9, "lr": 0.1, **changes}
    return check_optimizer_options(method, options, **given)


@pytest.mark.parametrize(
    ("options", "method"),
    [
        ({}, "asga"),
        ({}, "sgd"),
        ({"rho_max": 0.2, "variant": "gsam", "max_norm": 1.0}, "asga"),
        ({"perturb": "quantized"}, "asga"),  # which needs the model
        ({"maximize": True}, "sgd"),
    ],
    ids=str,
)
def test_accepts_options_of_the_optimizer(options, method):
    before, random = dict(options), torch.get_rng_state()
    assert check(options, method) == options == before
    assert torch.get_rng_state().equal(random)


@pytest.mark.parametrize(
    ("options", "method", "message"),
    [
        ({"rho_mx": 0.2}, "asga", "'rho_mx', which is no option of method 'asga'; did you mean 'rho_max'"),
        ({"qqq": 1}, "sgd", "'qqq', which is no option of method 'sgd'; those are dampening, "),
        ({"rho_max": 0.2}, "sgd", "'rho_max', which is no option of method 'sgd'"),
        ({"lr": 0.2}, "asga", "optimizer_options has 'lr', an argument of its own: lr=0.2"),
        ({"weight_decay": 0.2}, "sgd", "optimizer_options has 'weight_decay', an argument of its own"),
        ({"model": None}, "asga", "'model', which is no option"),
        ({"nesterov": False}, "sgd", "'nesterov', which is no option"),
        ({"rho_max": -1}, "asga", "rho_max is -1; it must be finite and not negative"),
        ({"alpha": math.nan}, "asga", "alpha is nan"),
        ({"variant": "gsan"}, "asga", "variant is 'gsan'; it must be one of"),
        ({"perturb": "weights"}, "asga", "perturb is 'weights'; it must be one of"),
        ({"dampening": 0.1}, "sgd", "Nesterov"),
        ({"maximize": True}, "asga", "maximize is True"),
        ({"perturb": "quantized", "adaptive": True}, "asga", "perturb 'quantized' and adaptive; give one of them"),
    ],
    ids=str,
)
def test_values_out_of_range(options, method, message):
    with pytest.raises(ValueError, match=message):
        check(options, method)


@pytest.mark.parametrize("options", [[0.2], [], "rho_max", 3, None], ids=str)
def test_no_mapping(options):
    with pytest.raises(TypeError, match=r"optimizer_options is .*; a mapping such as {'rho_max': 0.2} is needed"):
        check(options)


def test_without_momentum_there_is_no_nesterov_to_refuse_dampening():
    check({"dampening": 0.1}, "sgd", momentum=0.0)


def test_numbers_of_numpy_become_those_of_python():
    assert type(check({"rho_max": np.float64(0.2)})["rho_max"]) is float


def test_quantized_weights_must_be_there_to_be_perturbed():
    options = {"perturb": "quantized"}
    check_suits_model(options, QuantLinear(2, 2, weight_bits=4, act_bits=4))
    check_suits_model({}, nn.Linear(2, 2))
    with pytest.raises(ValueError, match="perturb 'quantized', but the model has no quantized weight"):
        check_suits_model(options, nn.Linear(2, 2))
