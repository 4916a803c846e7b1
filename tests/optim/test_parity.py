"""Trajectories against the published equations, written here from the papers, one tensor at a time."""

import math

import pytest
import torch

from asga.optim import ASGA

STEPS = 50
LR, RHO = 0.05, 0.1

# Both sides compute the same real numbers in float64 in another order. A rounding error of 1e-16 grows along
# 50 steps of this smooth problem by less than 1e4.
TOLERANCE = {"rtol": 1e-12, "atol": 1e-12}


def gradients(problem, at):
    """grad L at the weights `at`, by torch.func so that no `.grad` and no in-place change is involved."""
    names = [name for name, _ in problem.model.named_parameters()]

    def loss(weights):
        named = dict(zip(names, weights, strict=True))
        output = torch.func.functional_call(problem.model, named, problem.x)
        return (output - problem.y).square().mean()

    grads, value = torch.func.grad_and_value(loss)(tuple(at))
    return list(grads), value


def inner(left, right):
    return sum((a * b).sum() for a, b in zip(left, right, strict=True))


def norm(tensors):
    return inner(tensors, tensors).sqrt()


def sam(problem, w):
    """Foret et al. 2021 with p = 2: w <- w - lr grad L(w + rho g / ||g||)."""
    g, _ = gradients(problem, w)
    g_adv, _ = gradients(problem, [p + RHO * d / norm(g) for p, d in zip(w, g, strict=True)])
    return [p - LR * d for p, d in zip(w, g_adv, strict=True)]


def asam(problem, w):
    """Kwon et al. 2021 with T_w = diag|w|, p = 2: epsilon = rho T^2 g / ||T g||."""
    g, _ = gradients(problem, w)
    t_g = [p.abs() * d for p, d in zip(w, g, strict=True)]
    ahead = [p + RHO * p.abs() * d / norm(t_g) for p, d in zip(w, t_g, strict=True)]
    g_adv, _ = gradients(problem, ahead)
    return [p - LR * d for p, d in zip(w, g_adv, strict=True)]


def gsam(problem, w, alpha=0.3):
    """Zhuang et al. 2022, algorithm 1: decompose g along g_p, step with g_p - alpha g_orthogonal."""
    g, _ = gradients(problem, w)
    g_p, _ = gradients(problem, [p + RHO * d / norm(g) for p, d in zip(w, g, strict=True)])
    direction = [d / norm(g_p) for d in g_p]
    along = inner(g, direction)
    orthogonal = [d - along * u for d, u in zip(g, direction, strict=True)]
    return [p - LR * (a - alpha * o) for p, a, o in zip(w, g_p, orthogonal, strict=True)]


def sagm(problem, w, alpha=0.02):
    """Wang et al. 2023: minimize L(w) + L(w + rho g/||g|| - alpha g) with g held constant.

    The objective is a sum and ASGA takes the mean of the two gradients: here the rate is half as large.
    """
    g, _ = gradients(problem, w)
    ahead = [p + RHO * d / norm(g) - alpha * d for p, d in zip(w, g, strict=True)]
    g_ahead, _ = gradients(problem, ahead)
    return [p - LR / 2 * (a + b) for p, a, b in zip(w, g, g_ahead, strict=True)]


def conflict(problem, w):
    """PCGrad (Yu et al. 2020, algorithm 1) applied to g0 alone, then the mean."""
    g, _ = gradients(problem, w)
    g_ahead, _ = gradients(problem, [p + RHO * d / norm(g) for p, d in zip(w, g, strict=True)])
    if inner(g, g_ahead) < 0:
        g = [a - inner(g, g_ahead) / inner(g_ahead, g_ahead) * b for a, b in zip(g, g_ahead, strict=True)]
    return [p - LR * (a + b) / 2 for p, a, b in zip(w, g, g_ahead, strict=True)]


@pytest.mark.parametrize(
    ("equations", "options"),
    [
        pytest.param(sam, {"variant": "sam"}, id="SAM"),
        pytest.param(asam, {"variant": "sam", "adaptive": True}, id="ASAM"),
        pytest.param(gsam, {"variant": "gsam", "alpha": 0.3}, id="GSAM"),
        pytest.param(sagm, {"variant": "aligned", "alpha": 0.02, "alpha_mode": "absolute"}, id="SAGM"),
        pytest.param(conflict, {"variant": "conflict", "alpha": 0.0}, id="conflict"),
    ],
)
def test_50_steps_follow_the_published_equations(make_problem, equations, options):
    problem = make_problem(torch.float64)
    expected = problem.weights()
    optimizer = ASGA(problem.params, torch.optim.SGD, radius="constant", rho_max=RHO, lr=LR, **options)
    closure = problem.closure(optimizer)
    start = problem.loss().item()
    for _ in range(STEPS):
        optimizer.step(closure)
        expected = equations(problem, expected)
        torch.testing.assert_close(problem.weights(), expected, **TOLERANCE)
    assert problem.loss().item() < 0.5 * start


def test_conflicting_gradients_are_projected():
    """A radius that throws the weights across the valley: g1 points against g0 and the projection acts."""
    w = torch.nn.Parameter(torch.tensor([1.0, 1.0], dtype=torch.float64))
    curvature = torch.tensor([1.0, -3.0], dtype=torch.float64)
    optimizer = ASGA([w], variant="conflict", alpha=0.0, radius="constant", rho_max=2.0, lr=1.0)
    start = w.detach().clone()

    def closure():
        optimizer.zero_grad()
        loss = (curvature * w.square() / 2).sum() * (1 - w[0]).exp()
        loss.backward()
        return loss

    def gradient(at):
        at = at.clone().requires_grad_()
        return torch.autograd.grad((curvature * at.square() / 2).sum() * (1 - at[0]).exp(), at)[0]

    g0 = gradient(start)
    g1 = gradient(start + 2.0 * g0 / g0.norm())
    if g0 @ g1 >= 0:
        pytest.fail("the example no longer conflicts")
    projected = g0 - (g0 @ g1) / (g1 @ g1) * g1
    optimizer.step(closure)
    torch.testing.assert_close(w.detach(), start - (projected + g1) / 2, **TOLERANCE)


@pytest.mark.parametrize("losses_given", [True, False], ids=["h from the losses", "h from the gradients"])
def test_radius_follows_log_1_plus_h_for_50_steps(make_problem, losses_given):
    problem = make_problem(torch.float64)
    optimizer = ASGA(problem.params, lr=LR, alpha=0.1, rho_min=0.02, rho_max=0.2)
    expected, rho, clamped, free = problem.weights(), math.sqrt(0.02 * 0.2), 0, 0
    for _ in range(STEPS):
        g0, loss0 = gradients(problem, expected)
        s = 0.9 * rho / norm(g0)
        g1, loss1 = gradients(problem, [p + s * d for p, d in zip(expected, g0, strict=True)])
        expected = [p - LR * (a + b) / 2 for p, a, b in zip(expected, g0, g1, strict=True)]
        h = loss1 - loss0 if losses_given else s * (inner(g0, g0) + inner(g0, g1)) / 2
        target = math.log(1 + h.item())
        rho = min(max(target, 0.02), 0.2)
        clamped, free = clamped + (rho != target), free + (rho == target)
        for take in (optimizer.first_step, optimizer.second_step):
            loss = problem.loss()
            loss.backward()
            take(loss if losses_given else None)
        torch.testing.assert_close(problem.weights(), expected, **TOLERANCE)
        assert optimizer.rho.item() == pytest.approx(rho, rel=1e-9)
    assert clamped > 0, "no bound was tried"
    assert free > 0, "the radius never moved freely"


@pytest.mark.parametrize(
    ("base", "options"),
    [
        pytest.param(torch.optim.SGD, {"lr": 0.05, "momentum": 0.9, "nesterov": True}, id="SGD-Nesterov"),
        pytest.param(torch.optim.Adam, {"lr": 0.01}, id="Adam"),
        pytest.param(torch.optim.AdamW, {"lr": 0.01, "weight_decay": 0.1}, id="AdamW"),
        pytest.param(torch.optim.RMSprop, {"lr": 0.01}, id="RMSprop"),
    ],
)
def test_any_base_optimizer_receives_the_combined_gradient(make_problem, base, options):
    problem, twin = make_problem(torch.float64), make_problem(torch.float64)
    optimizer = ASGA(problem.params, base, radius="constant", rho_max=RHO, alpha=0.0, **options)
    plain = base(twin.params, **options)
    closure = problem.closure(optimizer)
    for _ in range(STEPS):
        weights = twin.weights()
        g0, _ = gradients(twin, weights)
        g1, _ = gradients(twin, [p + RHO * d / norm(g0) for p, d in zip(weights, g0, strict=True)])
        for p, a, b in zip(twin.params, g0, g1, strict=True):
            p.grad = (a + b) / 2
        plain.step()
        optimizer.step(closure)
    # Adam divides by the root of the second moment, which amplifies rounding where gradients are small.
    torch.testing.assert_close(problem.weights(), twin.weights(), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("variant", ["sam", "aligned", "gsam", "conflict"])
def test_clipping_equals_clip_grad_norm(make_problem, variant):
    problem, twin = make_problem(torch.float64), make_problem(torch.float64)
    optimizer = ASGA(problem.params, variant=variant, lr=1.0, max_norm=0.05)
    unclipped = ASGA(twin.params, variant=variant, lr=0.0, fused=False)  # leaves d in .grad
    optimizer.step(problem.closure(optimizer))
    unclipped.step(twin.closure(unclipped))
    before = torch.nn.utils.clip_grad_norm_(twin.params, 0.05)
    assert before > 0.05, "nothing to clip"
    expected = [p - p.grad for p in twin.params]
    torch.testing.assert_close(problem.weights(), [w.detach() for w in expected], **TOLERANCE)


def test_rho_scale_is_the_radius_of_a_group_in_units_of_rho(make_problem):
    """With T = rho_scale, epsilon = s T^2 g0 and s = rho / ||T g0||: checked against the equation."""
    problem = make_problem(torch.float64)
    weights = problem.weights()
    scales = [2.0, 2.0, 0.0, 0.5]
    groups = [
        {"params": problem.params[:2], "rho_scale": 2.0},
        {"params": problem.params[2:3], "rho_scale": 0.0},
        {"params": problem.params[3:], "rho_scale": 0.5},
    ]
    optimizer = ASGA(groups, lr=0.1, alpha=0.0, radius="constant", rho_max=RHO)
    loss = problem.loss()
    loss.backward()
    g0 = [p.grad.clone() for p in problem.params]
    optimizer.first_step(loss)
    q0 = sum(t * t * g.square().sum() for t, g in zip(scales, g0, strict=True))
    expected = [w + RHO / q0.sqrt() * t * t * g for w, t, g in zip(weights, scales, g0, strict=True)]
    torch.testing.assert_close(problem.weights(), expected, **TOLERANCE)
    assert torch.equal(problem.weights()[2], weights[2])
