import copy
import math

import pytest
import torch
from torch import nn

from asga.optim.guarded import GuardedSGD

OPTIONS = {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 1e-2}


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))


def closure_of(model, optimizer, inputs, factor=1.0):
    def closure():
        optimizer.zero_grad()
        loss = model(inputs).square().mean() * factor
        loss.backward()
        return loss

    return closure


def test_steps_as_plain_sgd(bits_of):
    guarded, plain = network(), network()
    optimizers = (
        GuardedSGD(guarded.parameters(), model=guarded, **OPTIONS),
        torch.optim.SGD(plain.parameters(), **OPTIONS),
    )
    for step in range(5):
        inputs = torch.randn(6, 3, generator=torch.Generator().manual_seed(step))
        losses = [
            optimizer.step(closure_of(model, optimizer, inputs))
            for model, optimizer in zip((guarded, plain), optimizers, strict=True)
        ]
        assert torch.equal(*losses)
    assert bits_of(guarded.state_dict()) == bits_of(plain.state_dict())
    assert bits_of(optimizers[0].state_dict()) == bits_of(optimizers[1].state_dict())


@pytest.mark.parametrize("where", ["input", "loss", "gradient"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_leaves_everything_where_something_is_not_finite(bits_of, where, value):
    model = network()
    optimizer = GuardedSGD(model.parameters(), model=model, **OPTIONS)
    inputs = torch.randn(6, 3)
    optimizer.step(closure_of(model, optimizer, inputs))
    before = bits_of([copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())])
    if where == "gradient":
        model[2].weight.register_hook(lambda grad: torch.full_like(grad, value))
    if where == "input":
        inputs = inputs.clone()
        inputs[0, 0] = value
    loss = optimizer.step(closure_of(model, optimizer, inputs, factor=value if where == "loss" else 1.0))
    assert torch.isfinite(loss) == (where == "gradient")
    assert bits_of([model.state_dict(), optimizer.state_dict()]) == before
    assert optimizer.last_skipped


def test_says_of_a_step_that_was_made_that_it_was():
    model = network()
    optimizer = GuardedSGD(model.parameters(), model=model, **OPTIONS)
    assert not optimizer.last_skipped
    for factor, skipped in ((math.nan, True), (1.0, False)):
        optimizer.step(closure_of(model, optimizer, torch.ones(6, 3), factor))
        assert optimizer.last_skipped is skipped


def test_parameters_without_gradient_are_no_obstacle():
    model = network()
    unused = nn.Parameter(torch.ones(2))
    optimizer = GuardedSGD([*model.parameters(), unused], model=model, lr=0.1)
    before = model[0].weight.clone()
    optimizer.step(closure_of(model, optimizer, torch.randn(6, 3)))
    assert not torch.equal(model[0].weight, before)
    assert torch.equal(unused, torch.ones(2))
