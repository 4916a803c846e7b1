"""Who can make the step of a case: asga, the method as published, and what torch makes of it.

All make the same step with the same constants; some write into the gradient of pass 2, which then drifts from call to
call. The published methods step with torch's fastest base optimizer (``fused=True``).
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from asga.bench.steps import StepCase, Stepper
from asga.ops.sam_library import VARIANTS
from asga.ops.sam_traffic import CountTraffic
from asga.optim import ASGA

RHO, ALPHA, MOMENTUM, WEIGHT_DECAY = 0.05, 0.4, 0.9, 1e-4
BETAS, EPS = (0.9, 0.999), 1e-8
# Small, so that weights stay where they are however often a step is repeated.
LR = 1e-6

# Tensors in a graph of torch.compile. Twice as many made no pass faster and took longer to compile.
_COMPILED_TOGETHER = 16

_BASES: dict[str, tuple[type[torch.optim.Optimizer], dict[str, object]]] = {
    "sgd": (torch.optim.SGD, {"lr": LR, "momentum": MOMENTUM, "weight_decay": WEIGHT_DECAY}),
    "adamw": (torch.optim.AdamW, {"lr": LR, "betas": BETAS, "eps": EPS, "weight_decay": WEIGHT_DECAY}),
}


class Tensors:
    """Weights, gradients of both passes, moments and room for what a step keeps; the same on every call."""

    def __init__(self, case: StepCase, device: str) -> None:
        generator = torch.Generator(device).manual_seed(0)

        def make(scale: float = 1.0) -> list[Tensor]:
            options = {"generator": generator, "device": device, "dtype": case.dtype}
            return [scale * torch.randn(shape, **options) for shape in case.shapes]

        self.case = case
        self.params = [nn.Parameter(value) for value in make()]
        self.first, self.second = make(), make()
        self.moments = [[torch.zeros_like(p) for p in self.params] for _ in range({"sgd": 1, "adamw": 2}[case.base])]
        self.backups = [torch.empty_like(p) for p in self.params]

    def give(self, grads: list[Tensor]) -> None:
        """Make these the gradients, as a backward pass does."""
        for param, grad in zip(self.params, grads, strict=True):
            param.grad = grad

    def base(self, **options: object) -> torch.optim.Optimizer:
        """The base optimizer of torch."""
        kind, constants = _BASES[self.case.base]
        return kind(self.params, **constants, **options)


def build_steppers(case: StepCase, device: str, *, compiled: bool = True) -> tuple[list[Stepper], dict[str, str]]:
    """Everything that can make the step here, asga first, and why the others cannot.

    Raises:
        ValueError: The first steps of asga and of the eager method differ.
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
                raise ValueError(f"asga and eager {case.variant} differ by {worst:.2g} after one step")
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
    case = tensors.case
    kind, constants = _BASES[case.base]
    alpha = ALPHA if case.variant == "gsam" else None
    options = {"variant": case.variant, "alpha": alpha, "radius": "constant", "rho_max": RHO, "products": "none"}
    optimizer = ASGA(tensors.params, kind, **options, **constants)
    loss = 1.0
    ops, params, first, second = torch.ops.asga, tensors.params, tensors.first, tensors.second
    device = params[0].device
    rho = torch.tensor(RHO, dtype=torch.float64, device=device)
    counts = torch.zeros(5, dtype=torch.int64, device=device)
    losses = torch.ones(2, dtype=torch.float64, device=device)
    ones = [1.0] * len(params)
    steps = [torch.zeros((), device=device) for _ in params]
    state = {}

    @torch.no_grad()
    def pass_a() -> None:
        state["q0"] = ops.sam_norm.default(params, first, ones, False)
        state["step"] = ops.sam_ascent_step.default(state["q0"], rho, None, 0.0, True)
        ops.sam_perturb.default(params, tensors.backups, [], first, state["step"], ones, False)

    @torch.no_grad()
    def pass_b() -> None:
        dots = ops.sam_dots.default(tensors.backups, first, second, ones, False) if case.variant == "gsam" else None
        scalars = (state["q0"], state["step"], dots, losses, None, None, rho, counts)
        variant = VARIANTS.index(case.variant)
        coefficients = ops.sam_coefficients.default(*scalars, variant, alpha or 0.0, None, False, RHO, RHO)
        lists = (params, tensors.backups, first if case.variant == "gsam" else [], second, *tensors.moments)
        if case.base == "sgd":
            ops.sam_sgd.default(*lists, coefficients, None, LR, MOMENTUM, WEIGHT_DECAY, False)
        else:
            ops.sam_adam.default(*lists, steps, coefficients, None, LR, *BETAS, EPS, WEIGHT_DECAY, True)

    def step() -> None:
        tensors.give(first)
        if case.variant == "gsam":
            # As after a backward pass, nobody but the parameters holds g0: one that lives on elsewhere is copied.
            first.clear()
            optimizer.first_step(loss)
            first.extend(optimizer._pending.first_grads.values())
        else:
            optimizer.first_step(loss)
        tensors.give(second)
        optimizer.second_step(loss)

    # Either pass may be timed first; what the other one leaves for it is there.
    pass_a()
    pass_b()
    for values in (*tensors.moments, steps):
        torch._foreach_zero_(values)
    return Stepper("asga", {"pass A": pass_a, "pass B": pass_b, "step": step}, list(params), is_peer=False)


def _eager(tensors: Tensors) -> Stepper:
    """As published, a tensor at a time.

    Foret et al., "Sharpness-Aware Minimization", ICLR 2021, algorithm 1. Zhuang et al., "Surrogate Gap Minimization",
    ICLR 2022, algorithm 1.
    """
    params, variant = tensors.params, tensors.case.variant
    base = tensors.base(fused=True)
    kept: dict[str, list[Tensor]] = {}

    def norm(grads: list[Tensor]) -> Tensor:
        return torch.stack([g.norm() for g in grads]).norm()

    @torch.no_grad()
    def pass_a() -> None:
        scale = RHO / norm(tensors.first)
        kept["old"] = [p.clone() for p in params]
        if variant == "gsam":
            kept["g0"] = [g.clone() for g in tensors.first]
        for p, g in zip(params, tensors.first, strict=True):
            p.add_(g * scale)

    @torch.no_grad()
    def pass_b() -> None:
        for p, old in zip(params, kept["old"], strict=True):
            p.copy_(old)
        if variant == "gsam":
            inner = sum((a * b).sum() for a, b in zip(kept["g0"], tensors.second, strict=True))
            new = norm(tensors.second)
            share = inner / (new * new)
            for g0, g1 in zip(kept["g0"], tensors.second, strict=True):
                g1.sub_(ALPHA * (g0 - share * g1))
        tensors.give(tensors.second)
        base.step()

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


def _combined(first: list[Tensor], second: list[Tensor], weight: Tensor | None) -> list[Tensor]:
    """GSAM's gradient; SAM, which has no weight, steps with that of pass 2."""
    if weight is None:
        return second
    d = torch._foreach_mul(second, weight)
    torch._foreach_add_(d, first, alpha=-ALPHA)
    return d


def _sgd(
    params: list[Tensor],
    backups: list[Tensor],
    first: list[Tensor],
    second: list[Tensor],
    momentum: list[Tensor],
    weight: Tensor | None,
    count: Tensor,
) -> None:
    torch._foreach_copy_(params, backups)
    d = torch._foreach_add(_combined(first, second, weight), params, alpha=WEIGHT_DECAY)
    torch._foreach_mul_(momentum, MOMENTUM)
    torch._foreach_add_(momentum, d)
    torch._foreach_add_(params, momentum, alpha=-LR)


def _adamw(
    params: list[Tensor],
    backups: list[Tensor],
    first: list[Tensor],
    second: list[Tensor],
    averages: list[Tensor],
    squares: list[Tensor],
    weight: Tensor | None,
    count: Tensor,
) -> None:
    torch._foreach_copy_(params, backups)
    d = _combined(first, second, weight)
    torch._foreach_mul_(params, 1.0 - LR * WEIGHT_DECAY)
    torch._foreach_lerp_(averages, d, 1.0 - BETAS[0])
    torch._foreach_mul_(squares, BETAS[1])
    torch._foreach_addcmul_(squares, d, d, value=1.0 - BETAS[1])
    roots = torch._foreach_sqrt(squares)
    torch._foreach_div_(roots, torch.sqrt(1.0 - BETAS[1] ** count))
    torch._foreach_add_(roots, EPS)
    moves = torch._foreach_div(averages, roots)
    torch._foreach_mul_(moves, LR / (1.0 - BETAS[0] ** count))
    torch._foreach_sub_(params, moves)


def _foreach(tensors: Tensors) -> Stepper:
    """`torch._foreach_*` and torch's fused base optimizer; g0 is kept without a copy, as by asga."""
    params, first, second = [p.detach() for p in tensors.params], tensors.first, tensors.second
    base, gsam = tensors.base(fused=True), tensors.case.variant == "gsam"

    @torch.no_grad()
    def pass_a() -> None:
        _perturb(params, tensors.backups, first, RHO / _norm(first))

    @torch.no_grad()
    def pass_b() -> None:
        weight = None
        if gsam:
            inner, new = _products(first, second)
            weight = 1.0 + ALPHA * inner / new.square()
        torch._foreach_copy_(params, tensors.backups)
        tensors.give(_combined(first, second, weight))
        base.step()

    def step() -> None:
        pass_a()
        pass_b()

    return Stepper("foreach", {"pass A": pass_a, "pass B": pass_b, "step": step}, params)


def _compiled(tensors: Tensors) -> Stepper:
    """`torch._foreach_*` under torch.compile, the update of the base optimizer included: each function is one sweep.

    A graph of all tensors does not compile in reasonable time: there is one for so many tensors at a time.
    """
    gsam = tensors.case.variant == "gsam"
    lists = ([p.detach() for p in tensors.params], tensors.backups, tensors.first, tensors.second, *tensors.moments)
    starts = range(0, len(tensors.params), _COMPILED_TOGETHER)
    parts = [[values[start : start + _COMPILED_TOGETHER] for values in lists] for start in starts]
    count = torch.zeros((), device=tensors.params[0].device)
    torch.compiler.reset()
    functions: tuple[Callable, ...] = (_norm, _perturb, _products, {"sgd": _sgd, "adamw": _adamw}[tensors.case.base])
    norm, perturb, products, update = (torch.compile(f, fullgraph=True, dynamic=False) for f in functions)

    @torch.no_grad()
    def pass_a() -> None:
        scale = RHO / torch.stack([norm(first) for _, _, first, *_ in parts]).norm()
        for params, backups, first, *_ in parts:
            perturb(params, backups, first, scale)

    @torch.no_grad()
    def pass_b() -> None:
        weight = None
        if gsam:
            inner, new = zip(*(products(first, second) for _, _, first, second, *_ in parts), strict=True)
            weight = 1.0 + ALPHA * torch.stack(inner).sum() / torch.stack(new).square().sum()
        count.add_(1.0)
        for part in parts:
            update(*part, weight, count)

    def step() -> None:
        pass_a()
        pass_b()

    # To torch, each part is a recompilation of the first.
    with torch._dynamo.config.patch(recompile_limit=max(len(parts), torch._dynamo.config.recompile_limit)):
        step()
    for moment in tensors.moments:
        torch._foreach_zero_(moment)
    count.zero_()
    return Stepper("torch.compile", {"pass A": pass_a, "pass B": pass_b, "step": step}, lists[0])


def _pytorch_optimizer(tensors: Tensors, **options: object) -> Stepper:
    """Its SAM or GSAM as its documentation says; `options` are for the base optimizer."""
    from pytorch_optimizer import GSAM, SAM

    class Constant:
        def step(self) -> float:
            return RHO

    base = tensors.base(**options)
    if tensors.case.variant == "gsam":
        optimizer = GSAM(tensors.params, base, nn.Identity(), Constant(), alpha=ALPHA)
    else:
        kind, constants = _BASES[tensors.case.base]
        optimizer = SAM(tensors.params, kind, rho=RHO, **constants, **options)

    def gsam() -> None:
        tensors.give(tensors.first)
        optimizer.perturb_weights(optimizer.rho_t)
        tensors.give(tensors.second)
        optimizer.gradient_decompose(ALPHA)
        optimizer.un_perturb()
        base.step()

    def sam() -> None:
        tensors.give(tensors.first)
        optimizer.first_step()
        tensors.give(tensors.second)
        optimizer.second_step()

    name = "pytorch_optimizer, fused base" if options else "pytorch_optimizer"
    return Stepper(name, {"step": gsam if tensors.case.variant == "gsam" else sam}, list(tensors.params))


_BUILDERS: dict[str, Callable[[Tensors], Stepper]] = {
    "asga": _asga,
    "eager": _eager,
    "foreach": _foreach,
    "torch.compile": _compiled,
    "pytorch_optimizer": _pytorch_optimizer,
    "pytorch_optimizer, fused base": lambda tensors: _pytorch_optimizer(tensors, fused=True),
}
