"""Who can make the step of a case: asga, the method as published, and what torch makes of it.

All make GSAM's step with the same constants; some write into the gradient of pass 2, which then drifts from call to
call.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from asga.bench.steps import StepCase, Stepper
from asga.ops.sam_traffic import CountTraffic
from asga.optim import ASGA

RHO, ALPHA, MOMENTUM, WEIGHT_DECAY = 0.05, 0.4, 0.9, 1e-4
# Small, so that weights stay where they are however often a step is repeated.
LR = 1e-6

# Tensors in a graph of torch.compile. Twice as many made no pass faster and took longer to compile.
_COMPILED_TOGETHER = 16


class Tensors:
    """Weights, gradients of both passes, momentum and room for what a step keeps; the same on every call."""

    def __init__(self, case: StepCase, device: str) -> None:
        generator = torch.Generator(device).manual_seed(0)

        def make(scale: float = 1.0) -> list[Tensor]:
            options = {"generator": generator, "device": device, "dtype": case.dtype}
            return [scale * torch.randn(shape, **options) for shape in case.shapes]

        self.params = [nn.Parameter(value) for value in make()]
        self.first, self.second = make(), make()
        self.momentum = [torch.zeros_like(p) for p in self.params]
        self.backups = [torch.empty_like(p) for p in self.params]

    def give(self, grads: list[Tensor]) -> None:
        """Make these the gradients, as a backward pass does."""
        for param, grad in zip(self.params, grads, strict=True):
            param.grad = grad


def build_steppers(case: StepCase, device: str, *, compiled: bool = True) -> tuple[list[Stepper], dict[str, str]]:
    """Everything that can make the step here, asga first, and why the others cannot.

    Raises:
        ValueError: The first steps of asga and of eager GSAM differ.
    """
    found, left_out = [], {}
    builders = dict(_BUILDERS)
    if not compiled:
        del builders["torch.compile"]
    for name, build in builders.items():
        try:
            stepper = build(Tensors(case, device))
            start = [w.detach().clone() for w in stepper.weights]
            stepper.run["step"]()
            moves = [w.detach() - s for w, s in zip(stepper.weights, start, strict=True)]
        except ImportError:
            left_out[name] = "not installed"
            continue
        if not found:
            expected = moves
        # A weight of 1 and a step of 1e-6: the difference keeps about two digits, all the same ones.
        worst = max((a - b).abs().max().item() for a, b in zip(moves, expected, strict=True))
        if worst > 5e-7:
            if name == "eager":
                raise ValueError(f"asga and eager GSAM differ by {worst:.2g} after one step")
            left_out[name] = f"makes another step: differs by {worst:.2g}"
            continue
        found.append(stepper)
    return found, left_out


def count_calls(case: StepCase) -> tuple[int, int]:
    """Bytes and calls of operators of one step of asga, counted."""
    stepper = _asga(Tensors(case, "cpu"))
    with CountTraffic() as counted:
        stepper.run["step"]()
    return counted.bytes, sum(counted.calls.values())


def _asga(tensors: Tensors) -> Stepper:
    options = {"lr": LR, "momentum": MOMENTUM, "weight_decay": WEIGHT_DECAY, "radius": "constant", "rho_max": RHO}
    optimizer = ASGA(tensors.params, variant="gsam", alpha=ALPHA, products="none", **options)
    loss = 1.0
    ops, params, second = torch.ops.asga, tensors.params, tensors.second
    device = params[0].device
    rho = torch.tensor(RHO, dtype=torch.float64, device=device)
    counts = torch.zeros(5, dtype=torch.int64, device=device)
    losses = torch.ones(2, dtype=torch.float64, device=device)
    ones = [1.0] * len(params)
    state = {}

    @torch.no_grad()
    def pass_a() -> None:
        state["q0"] = ops.sam_norm.default(params, tensors.first, ones, False)
        state["step"] = ops.sam_ascent_step.default(state["q0"], rho, None, 0.0, True)
        ops.sam_perturb.default(params, tensors.backups, [], tensors.first, state["step"], ones, False)

    @torch.no_grad()
    def pass_b() -> None:
        dots = ops.sam_dots.default(tensors.backups, tensors.first, second, ones, False)
        scalars = (state["q0"], state["step"], dots, losses, None, None, rho, counts)
        coefficients = ops.sam_coefficients.default(*scalars, 2, ALPHA, None, False, RHO, RHO)
        lists = (params, tensors.backups, tensors.first, second, tensors.momentum)
        ops.sam_sgd.default(*lists, coefficients, None, LR, MOMENTUM, WEIGHT_DECAY, False)

    def step() -> None:
        # These gradients live on, so asga copies g0: one write more than after a backward pass.
        tensors.give(tensors.first)
        optimizer.first_step(loss)
        tensors.give(tensors.second)
        optimizer.second_step(loss)

    pass_a()
    pass_b()
    return Stepper("asga", {"pass A": pass_a, "pass B": pass_b, "step": step}, list(params), is_peer=False)


def _eager(tensors: Tensors) -> Stepper:
    """Zhuang et al., "Surrogate Gap Minimization", ICLR 2022, algorithm 1, a tensor at a time."""
    params = tensors.params
    sgd = torch.optim.SGD(params, lr=LR, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY)
    kept: dict[str, list[Tensor]] = {}

    def norm(grads: list[Tensor]) -> Tensor:
        return torch.stack([g.norm() for g in grads]).norm()

    @torch.no_grad()
    def pass_a() -> None:
        scale = RHO / norm(tensors.first)
        kept["old"] = [p.clone() for p in params]
        kept["g0"] = [g.clone() for g in tensors.first]
        for p, g in zip(params, tensors.first, strict=True):
            p.add_(g * scale)

    @torch.no_grad()
    def pass_b() -> None:
        inner = sum((a * b).sum() for a, b in zip(kept["g0"], tensors.second, strict=True))
        new = norm(tensors.second)
        share = inner / (new * new)
        for p, old, g0, g1 in zip(params, kept["old"], kept["g0"], tensors.second, strict=True):
            p.copy_(old)
            g1.sub_(ALPHA * (g0 - share * g1))
            p.grad = g1
        sgd.step()

    def step() -> None:
        pass_a()
        pass_b()

    return Stepper("eager", {"pass A": pass_a, "pass B": pass_b, "step": step}, list(params))


def _norm(grads: list[Tensor]) -> Tensor:
    return torch.stack(torch._foreach_norm(grads)).norm()


def _perturb(params: list[Tensor], backups: list[Tensor], grads: list[Tensor], scale: Tensor) -> None:
    torch._foreach_copy_(backups, params)
    torch._foreach_add_(params, torch._foreach_mul(grads, scale))


def _products(first: list[Tensor], second: list[Tensor]) -> tuple[Tensor, Tensor]:
    """<g0, g1> and ||g1||."""
    return torch.stack([p.sum() for p in torch._foreach_mul(first, second)]).sum(), _norm(second)


def _update(
    params: list[Tensor],
    backups: list[Tensor],
    first: list[Tensor],
    second: list[Tensor],
    momentum: list[Tensor],
    weight: Tensor,
) -> None:
    d = torch._foreach_mul(second, weight)
    torch._foreach_add_(d, first, alpha=-ALPHA)
    torch._foreach_copy_(params, backups)
    torch._foreach_add_(d, params, alpha=WEIGHT_DECAY)
    torch._foreach_mul_(momentum, MOMENTUM)
    torch._foreach_add_(momentum, d)
    torch._foreach_add_(params, momentum, alpha=-LR)


def _foreach(tensors: Tensors, *, compiled: bool = False) -> Stepper:
    """The same in `torch._foreach_*`, momentum included; g0 is kept without a copy, as by asga.

    Compiled, each function becomes one sweep over the memory. A graph of all tensors does not compile in reasonable
    time: there is one for so many tensors at a time.
    """
    functions: tuple[Callable, ...] = (_norm, _perturb, _products, _update)
    lists = ([p.detach() for p in tensors.params], tensors.backups, tensors.first, tensors.second, tensors.momentum)
    together = _COMPILED_TOGETHER if compiled else len(tensors.params)
    starts = range(0, len(tensors.params), together)
    parts = [[values[start : start + together] for values in lists] for start in starts]
    if compiled:
        torch.compiler.reset()
        functions = tuple(torch.compile(function, fullgraph=True, dynamic=False) for function in functions)
    norm, perturb, products, update = functions

    @torch.no_grad()
    def pass_a() -> None:
        scale = RHO / torch.stack([norm(first) for _, _, first, _, _ in parts]).norm()
        for params, backups, first, _, _ in parts:
            perturb(params, backups, first, scale)

    @torch.no_grad()
    def pass_b() -> None:
        inner, new = zip(*(products(first, second) for _, _, first, second, _ in parts), strict=True)
        weight = 1.0 + ALPHA * torch.stack(inner).sum() / torch.stack(new).square().sum()
        for params, backups, first, second, momentum in parts:
            update(params, backups, first, second, momentum, weight)

    def step() -> None:
        pass_a()
        pass_b()

    if compiled:
        # To torch, each part is a recompilation of the first.
        with torch._dynamo.config.patch(recompile_limit=max(len(parts), torch._dynamo.config.recompile_limit)):
            step()
        torch._foreach_zero_(tensors.momentum)
    runs = {"pass A": pass_a, "pass B": pass_b, "step": step}
    return Stepper("torch.compile" if compiled else "foreach", runs, lists[0])


def _pytorch_optimizer(tensors: Tensors) -> Stepper:
    from pytorch_optimizer import GSAM

    class Constant:
        def step(self) -> float:
            return RHO

    sgd = torch.optim.SGD(tensors.params, lr=LR, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY)
    optimizer = GSAM(tensors.params, sgd, nn.Identity(), Constant(), alpha=ALPHA)

    def step() -> None:
        tensors.give(tensors.first)
        optimizer.perturb_weights(optimizer.rho_t)
        tensors.give(tensors.second)
        optimizer.gradient_decompose(ALPHA)
        optimizer.un_perturb()
        sgd.step()

    return Stepper("pytorch_optimizer", {"step": step}, list(tensors.params))


_BUILDERS: dict[str, Callable[[Tensors], Stepper]] = {
    "asga": _asga,
    "eager": _eager,
    "foreach": _foreach,
    "torch.compile": lambda tensors: _foreach(tensors, compiled=True),
    "pytorch_optimizer": _pytorch_optimizer,
}
