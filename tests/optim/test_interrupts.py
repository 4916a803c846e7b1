"""An exception or Ctrl-C between the passes leaves the weights as they were before the step."""

import os
import signal

import pytest
import torch

from asga.optim import ASGA

BASES = {
    "fused": {"base_optimizer": torch.optim.AdamW, "lr": 0.01},
    "unfused": {"base_optimizer": torch.optim.RMSprop, "lr": 0.01},
}


def ctrl_c():
    """What the terminal does."""
    os.kill(os.getpid(), signal.SIGINT)


def fail():
    raise RuntimeError("out of memory")


@pytest.fixture(params=BASES)
def started(request, make_problem):
    """A problem with BatchNorm, and its optimizer after two steps."""
    problem = make_problem(batchnorm=True)
    optimizer = ASGA(problem.params, model=problem.model, **BASES[request.param])
    for _ in range(2):
        optimizer.step(problem.closure(optimizer))
    return problem, optimizer


def copies(problem, optimizer):
    """Weights, the optimizer's state and the radius."""
    state = [v for moments in optimizer.state.values() for v in moments.values()]
    return [t.detach().clone() for t in (*problem.params, *state, optimizer.rho)]


def equal(left, right):
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


@pytest.mark.parametrize(("interrupt", "error"), [(ctrl_c, KeyboardInterrupt), (fail, RuntimeError)])
@pytest.mark.parametrize("moment", ["before the forward", "between forward and backward", "after the backward"])
def test_closure_protocol(started, interrupt, error, moment):
    problem, optimizer = started
    before, statistics = copies(problem, optimizer), []
    calls = 0

    def closure():
        nonlocal calls
        calls += 1
        now = moment if calls == 2 else None
        if now is not None:
            assert not equal(copies(problem, optimizer), before), "perturbed by now"
            statistics.extend(b.clone() for b in problem.model.buffers())
        optimizer.zero_grad()
        if now == "before the forward":
            interrupt()
        loss = problem.loss()
        if now == "between forward and backward":
            interrupt()
        loss.backward()
        if now == "after the backward":
            interrupt()
        return loss

    with pytest.raises(error):
        optimizer.step(closure)
    assert calls == 2
    assert equal(copies(problem, optimizer), before)
    assert equal(problem.model.buffers(), statistics), "as pass 1 left them"
    assert optimizer.diagnostics()["steps"] == 2


@pytest.mark.parametrize(("interrupt", "error"), [(ctrl_c, KeyboardInterrupt), (fail, RuntimeError)])
def test_two_calls_with_restore(started, interrupt, error):
    problem, optimizer = started
    before = problem.weights()

    def passes():
        problem.loss().backward()
        optimizer.first_step()
        assert not equal(problem.params, before)
        problem.loss().backward()
        interrupt()
        optimizer.second_step()

    def step():
        try:
            passes()
        finally:
            optimizer.restore()

    with pytest.raises(error):
        step()
    assert equal(problem.params, before)
    optimizer.restore()
    optimizer.step(problem.closure(optimizer))
    assert optimizer.diagnostics()["steps"] == 3


def test_a_step_after_an_interrupted_one_is_the_step_without_it(make_problem, same_bits):
    one, two = make_problem(), make_problem()
    interrupted, plain = ASGA(one.params, lr=0.1, momentum=0.9), ASGA(two.params, lr=0.1, momentum=0.9)
    calls = 0

    def closure():
        nonlocal calls
        calls += 1
        if calls == 2:
            ctrl_c()
        return one.closure(interrupted)()

    with pytest.raises(KeyboardInterrupt):
        interrupted.step(closure)
    for _ in range(3):
        interrupted.step(one.closure(interrupted))
        plain.step(two.closure(plain))
    assert same_bits(one.params, two.params)
    assert interrupted.rho.item() == plain.rho.item()
