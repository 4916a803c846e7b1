"""A GradScaler around the step: gradients carry its factor through both passes."""

import math

import pytest
import torch

from asga.optim import ASGA


def scaler(scale=1024.0, **options):
    return torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=3, **options)


def step(problem, optimizer, scale, *, protocol="closure", spoil=None):
    """One step with the scaled loss; `spoil` is the number of a pass whose gradient overflows."""
    number = 0

    def backward():
        nonlocal number
        number += 1
        optimizer.zero_grad()
        loss = problem.loss()
        scale.scale(loss).backward()
        if number == spoil:
            problem.params[0].grad[0, 0] = math.inf
        return loss

    if protocol == "closure":
        optimizer.step(backward)
    else:
        optimizer.first_step(backward())
        optimizer.second_step(backward())
    scale.update()


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "unfused"])
@pytest.mark.parametrize("protocol", ["closure", "two calls"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"variant": "gsam", "max_norm": 0.05},
        {"alpha_mode": "absolute", "alpha": 0.02},
        {"adaptive": True, "variant": "sam"},
    ],
    ids=str,
)
def test_a_power_of_two_changes_no_bit(make_problem, same_bits, options, protocol, fused):
    """Scaling by it is exact, so that everything but the factor has to come out the same."""
    one, two = make_problem(torch.float64), make_problem(torch.float64)
    factor = scaler()
    scaled = ASGA(one.params, lr=0.1, momentum=0.9, scaler=factor, fused=fused, **options)
    plain = ASGA(two.params, lr=0.1, momentum=0.9, fused=fused, **options)
    for _ in range(5):
        step(one, scaled, factor, protocol=protocol)
        plain.step(two.closure(plain))
    tolerance = {"rtol": 1e-9, "atol": 1e-12} if "max_norm" in options else {"rtol": 1e-13, "atol": 1e-15}
    torch.testing.assert_close(one.weights(), two.weights(), **tolerance)
    mine, theirs = scaled.diagnostics(), plain.diagnostics()
    assert mine == pytest.approx(theirs, rel=1e-9)
    assert factor.get_scale() == 2048.0, "three good steps let it grow"


@pytest.mark.parametrize("spoil", [1, 2], ids=["pass 1", "pass 2"])
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "unfused"])
def test_an_overflow_in_either_pass_skips_the_step_and_lowers_the_factor(problem, same_bits, spoil, fused):
    factor = scaler()
    optimizer = ASGA(problem.params, lr=0.1, scaler=factor, fused=fused)
    before = problem.weights()
    step(problem, optimizer, factor, spoil=spoil)
    assert same_bits(problem.params, before)
    assert factor.get_scale() == 512.0
    step(problem, optimizer, factor)
    assert not same_bits(problem.params, before)
    assert optimizer.diagnostics()["skipped"] == 1


def test_a_forgotten_update_is_an_error(problem, same_bits):
    factor = scaler()
    optimizer = ASGA(problem.params, lr=0.1, scaler=factor)
    step(problem, optimizer, factor)
    closure = problem.closure(optimizer)
    optimizer.step(closure)
    before = problem.weights()
    with pytest.raises(RuntimeError, match=r"scaler.update\(\) has not been called"):
        optimizer.step(closure)
    assert same_bits(problem.params, before)


def test_gradients_that_were_divided_already_are_refused(problem, same_bits):
    """The usual recipe for clipping would divide by the factor twice."""
    factor, before = scaler(), problem.weights()
    optimizer = ASGA(problem.params, lr=0.1, scaler=factor)
    factor.scale(problem.loss()).backward()
    factor.unscale_(optimizer)
    with pytest.raises(RuntimeError, match=r"unscale_\(\) has been called"):
        optimizer.first_step()
    assert same_bits(problem.params, before)
    factor.update()
    optimizer.zero_grad()
    step(problem, optimizer, factor)
    assert not same_bits(problem.params, before)


def test_a_disabled_scaler_does_nothing(make_problem, same_bits):
    one, two = make_problem(), make_problem()
    factor = scaler(enabled=False)
    scaled, plain = ASGA(one.params, lr=0.1, scaler=factor), ASGA(two.params, lr=0.1)
    step(one, scaled, factor)
    plain.step(two.closure(plain))
    assert same_bits(one.params, two.params)


def test_gradients_of_micro_batches_add_up(make_problem):
    """K of them, each with its share of the loss, in each pass: the step of the whole batch."""
    whole, parts = make_problem(torch.float64), make_problem(torch.float64)
    one, two = ASGA(whole.params, lr=0.1, variant="gsam"), ASGA(parts.params, lr=0.1, variant="gsam")

    def accumulate():
        two.zero_grad()
        total = 0.0
        for x, y in zip(parts.x.chunk(4), parts.y.chunk(4), strict=True):
            loss = (parts.model(x) - y).square().mean() / 4
            loss.backward()
            total += loss.detach()
        return total

    for _ in range(5):
        one.step(whole.closure(one))
        two.step(accumulate)
    torch.testing.assert_close(whole.weights(), parts.weights(), rtol=1e-10, atol=1e-12)
