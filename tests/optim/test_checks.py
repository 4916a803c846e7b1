"""Bad input: a clear error, and every weight and every state as it was."""

import copy
import math
import warnings

import pytest
import torch
from torch import nn

from asga.optim import ASGA


def parameter(*shape, dtype=torch.float32):
    return nn.Parameter(torch.ones(*shape, dtype=dtype))


BAD_OPTIONS = [
    ({"rho_max": -0.1}, "rho_max is -0.1"),
    ({"rho_max": 0.0}, "rho_max is 0.0"),
    ({"rho_max": math.nan}, "rho_max is nan"),
    ({"rho_max": math.inf}, "rho_max is inf"),
    ({"rho_min": -0.1}, "rho_min is -0.1"),
    ({"rho_min": 0.0}, "rho_min is 0.0"),
    ({"rho_min": math.nan}, "rho_min is nan"),
    ({"rho_min": 0.2, "rho_max": 0.1}, "rho_min is 0.2; it must be at most rho_max = 0.1"),
    ({"rho_min": math.nan, "radius": "constant"}, "rho_min is nan"),
    ({"rho_min": -0.1, "radius": "constant"}, "rho_min is -0.1"),
    ({"variant": "sagm"}, "variant is 'sagm'; it must be one of 'sam', 'aligned', 'conflict', 'gsam'"),
    ({"radius": "fixed"}, "radius is 'fixed'"),
    ({"alpha_mode": "abs"}, "alpha_mode is 'abs'"),
    ({"alpha": -0.1}, "alpha is -0.1"),
    ({"alpha": math.nan}, "alpha is nan"),
    ({"alpha": 1.0}, "alpha is 1.0; as a share"),
    ({"alpha": 0.1, "variant": "sam"}, "variant 'sam' has none"),
    ({"max_norm": 0.0}, "max_norm is 0.0"),
    ({"max_norm": math.nan}, "max_norm is nan"),
    ({"maximize": True}, "maximize is True"),
    ({"lr": -1.0}, "learning rate"),
    ({"lr": 0.0, "radius": "proportional"}, "lr is 0.0; a radius proportional to it"),
]


@pytest.mark.parametrize(("options", "message"), BAD_OPTIONS, ids=[str(options) for options, _ in BAD_OPTIONS])
def test_option_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        ASGA([parameter(2)], **options)


def test_constant_radius_below_the_default_rho_min_is_fine():
    assert ASGA([parameter(2)], radius="constant", rho_max=0.001).rho == 0.001


@pytest.mark.parametrize(
    ("name", "value"), [("rho_max", "0.5"), ("rho_max", True), ("rho_min", None), ("alpha", "a"), ("max_norm", [1.0])]
)
def test_option_of_another_type(name, value):
    with pytest.raises(TypeError, match=f"{name} is .*; a number is needed"):
        ASGA([parameter(2)], **{name: value})


def test_values_that_share_their_place_are_refused():
    """The backup of one would hold the perturbation of the other."""
    first = parameter(3)
    with pytest.raises(ValueError, match=r"parameter 0 of shape \(3,\) and parameter 1 .* share their memory"):
        ASGA([first, nn.Parameter(first.data)])
    with pytest.raises(ValueError, match=r"parameter 0 of shape \(5,\) has several values in one place"):
        ASGA([nn.Parameter(torch.ones(1).expand(5))])
    optimizer = ASGA([first])
    with pytest.raises(ValueError, match="share their memory"):
        optimizer.add_param_group({"params": [nn.Parameter(first.data)]})
    assert len(optimizer.param_groups) == 1
    whole = torch.ones(6)
    ASGA([nn.Parameter(whole[:2]), nn.Parameter(whole[2:]), parameter(0), parameter(0)])
    without_memory = [parameter(3), parameter(3)]
    for param in without_memory:
        param.untyped_storage().resize_(0)
    ASGA(without_memory)


@pytest.mark.parametrize("params", [[], [{"params": []}]], ids=["no parameters", "an empty group"])
def test_empty_parameter_list(params):
    with pytest.raises(ValueError, match=r"no parameter|empty parameter list"):
        ASGA(params)


@pytest.mark.parametrize("rho_scale", [-1.0, math.nan, math.inf])
def test_rho_scale_out_of_range(rho_scale):
    with pytest.raises(ValueError, match="rho_scale is"):
        ASGA([{"params": [parameter(2)], "rho_scale": rho_scale}])


@pytest.mark.parametrize(
    "base",
    [torch.optim.SGD([parameter(1)]), nn.Linear, "SGD"],
    ids=["an instance", "a class of something else", "a name"],
)
def test_base_optimizer_must_be_an_optimizer_class(base):
    with pytest.raises(TypeError, match="base_optimizer is"):
        ASGA([parameter(2)], base)


def test_base_optimizer_that_needs_a_closure():
    with pytest.raises(TypeError, match="LBFGS cannot step without a closure"):
        ASGA([parameter(2)], torch.optim.LBFGS)


def test_model_must_be_a_module():
    with pytest.raises(TypeError, match="model is a list"):
        ASGA([parameter(2)], model=[nn.Linear(2, 2)])


def test_complex_parameter_is_named():
    with pytest.raises(TypeError, match=r"parameter 1 of shape \(2,\) has layout .*complex64"):
        ASGA([parameter(3), parameter(2, dtype=torch.complex64)])


def test_sparse_parameter_is_named():
    sparse = nn.Parameter(torch.eye(3).to_sparse())
    with pytest.raises(TypeError, match=r"parameter table of shape \(3, 3\) has layout torch.sparse_coo"):
        ASGA([("weight", parameter(3)), ("table", sparse)])


def test_refused_group_is_not_added(problem):
    optimizer = ASGA(problem.params)
    with pytest.raises(TypeError, match="complex64"):
        optimizer.add_param_group({"params": [parameter(2, dtype=torch.complex64)]})
    assert len(optimizer.param_groups) == len(optimizer.base_optimizer.param_groups) == 1


def test_low_precision_weights_are_warned_about():
    with pytest.warns(UserWarning, match=r"torch.bfloat16: most of a perturbation rounds away"):
        ASGA([parameter(2, dtype=torch.bfloat16)])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ASGA([{"params": [parameter(2, dtype=torch.bfloat16)], "rho_scale": 0.0}])


@pytest.mark.parametrize("failing_pass", [1, 2])
def test_sparse_gradient_is_refused_and_weights_are_untouched(failing_pass, same_bits):
    table = nn.Embedding(5, 3, sparse=True)
    dense = nn.Embedding(5, 3)
    tables = {True: table, False: dense}
    params = [table.weight, dense.weight]
    before = [p.detach().clone() for p in params]
    optimizer = ASGA(params, lr=0.1)
    calls = 0

    def closure():
        nonlocal calls
        calls += 1
        optimizer.zero_grad()
        loss = tables[calls == failing_pass](torch.tensor([1, 2])).square().sum()
        loss.backward()
        return loss

    with pytest.raises(TypeError, match=r"gradient of parameter 0 .*sparse"):
        optimizer.step(closure)
    assert calls == failing_pass
    assert same_bits(params, before)


def test_step_without_closure(problem, same_bits):
    before = problem.weights()
    with pytest.raises(TypeError, match="needs a closure"):
        ASGA(problem.params).step()
    assert same_bits(problem.params, before)


@pytest.mark.parametrize(
    ("returned", "error"),
    [(None, TypeError), (True, TypeError), ("0.5", TypeError), (torch.ones(2), ValueError)],
    ids=["None", "a bool", "a string", "two values"],
)
@pytest.mark.parametrize("failing_pass", [1, 2])
def test_closure_that_does_not_return_its_loss(problem, same_bits, returned, error, failing_pass):
    before = problem.weights()
    optimizer = ASGA(problem.params)
    closure, calls = problem.closure(optimizer), 0

    def forgetful():
        nonlocal calls
        calls += 1
        loss = closure()
        return returned if calls == failing_pass else loss

    with pytest.raises(error, match="the value the closure returned"):
        optimizer.step(forgetful)
    assert calls == failing_pass
    assert same_bits(problem.params, before)


@pytest.mark.parametrize("failing_pass", [1, 2])
def test_no_gradient_at_all(problem, same_bits, failing_pass):
    before = problem.weights()
    optimizer = ASGA(problem.params)
    closure, calls = problem.closure(optimizer), 0

    def forgets_backward():
        nonlocal calls
        calls += 1
        if calls < failing_pass:
            return closure()
        optimizer.zero_grad()
        return problem.loss()

    with pytest.raises(RuntimeError, match="no parameter has a gradient"):
        optimizer.step(forgets_backward)
    assert same_bits(problem.params, before)


def test_second_step_without_first_step(problem):
    with pytest.raises(RuntimeError, match=r"second_step\(\) without first_step"):
        ASGA(problem.params).second_step()


@pytest.mark.parametrize(
    "act",
    [
        pytest.param(lambda o, p: o.first_step(), id="first_step"),
        pytest.param(lambda o, p: o.step(p.closure(o)), id="step"),
        pytest.param(lambda o, p: o.add_param_group({"params": [parameter(2)]}), id="add_param_group"),
        pytest.param(lambda o, p: o.state_dict(), id="state_dict"),
        pytest.param(lambda o, p: o.load_state_dict({}), id="load_state_dict"),
    ],
)
def test_refused_between_the_passes(problem, same_bits, act):
    before = problem.weights()
    optimizer = ASGA(problem.params)
    problem.loss().backward()
    optimizer.first_step()
    perturbed = problem.weights()
    with pytest.raises(RuntimeError, match=r"between first_step\(\) and second_step\(\)"):
        act(optimizer, problem)
    assert same_bits(problem.params, perturbed)
    optimizer.restore()
    assert same_bits(problem.params, before)
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize(
    ("params", "message"),
    [
        (
            [parameter(2, 3), parameter(3)],
            r"parameter 0 of group 0 has shape \(3, 2\) there and \(2, 3\) here",
        ),
        ([parameter(3, 2)], "2 parameters in group 0, this optimizer 1"),
        ([{"params": [parameter(3, 2)]}, {"params": [parameter(3)]}], "1 parameter groups, this optimizer 2"),
    ],
    ids=["shapes", "number of parameters", "number of groups"],
)
def test_state_dict_of_another_model(params, message):
    saved = ASGA([parameter(3, 2), parameter(3)], lr=0.7).state_dict()
    optimizer = ASGA(params, lr=0.1)
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["lr"] == 0.1


def _with_base(base):
    return lambda problem: ASGA(problem.params, base).state_dict()


def _without(problem, *path):
    saved = inside = ASGA(problem.params, momentum=0.9).state_dict()
    for key in path[:-1]:
        inside = inside[key]
    del inside[path[-1]]
    return saved


def _with(problem, value, *path):
    saved = ASGA(problem.params, momentum=0.9).state_dict()
    saved[path[0]][path[1]] = torch.tensor(value)
    return saved


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: torch.optim.SGD(p.params).state_dict(), "not from an ASGA optimizer"),
        (_with_base(torch.optim.AdamW), "lacks dampening, momentum, nesterov in .* the same base_optimizer, here SGD"),
        (_with_base(torch.optim.RMSprop), "state_dict lacks dampening, .*nesterov in parameter group 0"),
        (lambda p: _without(p, "state"), r"state_dict lacks \['state'\]"),
        (lambda p: _without(p, "asga", "rho"), r"its entry 'asga' lacks \['rho'\]"),
        (lambda p: _with(p, math.nan, "asga", "rho"), "rho = nan in its entry 'asga'; it must be finite"),
        (lambda p: _without(p, "param_groups", 0, "momentum"), "state_dict lacks momentum in parameter group 0"),
    ],
    ids=["SGD of torch", "AdamW inside", "RMSprop inside", "no state", "no radius", "a bad radius", "no momentum"],
)
def test_state_dict_of_another_optimizer(problem, same_bits, make, message):
    """Nothing changes, and the optimizer still steps."""
    optimizer = ASGA(problem.params, lr=0.1, momentum=0.5)
    optimizer.step(problem.closure(optimizer))
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(make(problem))
    torch.testing.assert_close(optimizer.state_dict(), before, rtol=0, atol=0)
    optimizer.step(problem.closure(optimizer))


@pytest.mark.parametrize(("name", "value"), [("rho_scale", -1.0), ("rho_scale", math.nan), ("maximize", True)])
def test_option_of_a_group_that_is_set_out_of_range_later(problem, same_bits, name, value):
    """Groups are open to their owner; nothing has been perturbed when a step finds out."""
    optimizer = ASGA(problem.params, lr=0.1)
    before, good = problem.weights(), optimizer.param_groups[0][name]
    optimizer.param_groups[0][name] = value
    with pytest.raises(ValueError, match=f"{name} is {value} in a parameter group"):
        optimizer.step(problem.closure(optimizer))
    assert same_bits(problem.params, before)
    optimizer.param_groups[0][name] = good
    optimizer.step(problem.closure(optimizer))
    assert not same_bits(problem.params, before)
