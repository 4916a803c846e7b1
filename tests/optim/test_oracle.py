"""Trajectories against the SAM and GSAM of the pytorch_optimizer package, which knows nothing of this one."""

import pytest
import torch

from asga.optim import ASGA

oracle = pytest.importorskip("pytorch_optimizer")

STEPS, RHO, LR = 50, 0.1, 0.05

# Theirs takes norms in float32, adds 1e-12 to those that it divides by, and restores weights by subtracting.
TOLERANCE = {"rtol": 1e-5, "atol": 1e-6}


class Constant:
    """What GSAM asks for its radius."""

    def step(self) -> float:
        return RHO


def follow(make_problem, theirs, **options):
    ours_problem, their_problem = make_problem(torch.float64), make_problem(torch.float64)
    base = torch.optim.SGD(their_problem.params, lr=LR, momentum=0.9)
    ours = ASGA(ours_problem.params, radius="constant", rho_max=RHO, lr=LR, momentum=0.9, **options)
    step = theirs(their_problem, base)
    for _ in range(STEPS):
        ours.step(ours_problem.closure(ours))
        step()
        torch.testing.assert_close(ours_problem.weights(), their_problem.weights(), **TOLERANCE)
    assert ours_problem.loss() < 0.5 * make_problem(torch.float64).loss()


@pytest.mark.parametrize("adaptive", [False, True], ids=["GSAM", "adaptive GSAM"])
def test_gsam(make_problem, adaptive):
    def theirs(problem, base):
        optimizer = oracle.GSAM(
            problem.params, base, problem.model, Constant(), alpha=0.3, adaptive=adaptive, perturb_eps=1e-12
        )
        optimizer.set_closure(torch.nn.MSELoss(), problem.x, problem.y)
        return optimizer.step

    # For them, |theta|^2 g is divided by ||theta g||; so it is here.
    follow(make_problem, theirs, variant="gsam", alpha=0.3, adaptive=adaptive)


@pytest.mark.parametrize("adaptive", [False, True], ids=["SAM", "ASAM"])
def test_sam(make_problem, adaptive):
    def theirs(problem, base):
        optimizer = oracle.SAM(
            problem.params, torch.optim.SGD, rho=RHO, adaptive=adaptive, perturb_eps=1e-12, lr=LR, momentum=0.9
        )

        def step():
            problem.loss().backward()
            optimizer.first_step(zero_grad=True)
            problem.loss().backward()
            optimizer.second_step(zero_grad=True)

        return step

    follow(make_problem, theirs, variant="sam", adaptive=adaptive)
