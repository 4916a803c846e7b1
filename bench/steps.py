"""Steps of a sharpness-aware optimizer: lists of parameters of real networks, and who can make the same step.

What is timed is the part of the optimizer: gradients of both passes are given. Pass A is everything between the two
backward passes (norm, backup, perturbation), pass B everything after the second (projection, restore, SGD with
momentum), "step" both with all that a user's call costs. All make GSAM's step with the same constants; some write into
the gradient of pass 2, which then drifts from call to call.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from asga.ops.sam_traffic import CountTraffic
from asga.optim import ASGA

PASSES = ("pass A", "pass B", "step")

RHO, ALPHA, MOMENTUM, WEIGHT_DECAY = 0.05, 0.4, 0.9, 1e-4
# Small, so that weights stay where they are however often a step is repeated.
LR = 1e-6


@dataclass(frozen=True)
class StepCase:
    """The parameters of a network.

    Attributes:
        network: Such as "resnet50".
        shapes: Of its parameters.
        dtype: Of all of them.
    """

    network: str
    shapes: tuple[tuple[int, ...], ...]
    dtype: torch.dtype = torch.float32

    @property
    def name(self) -> str:
        """Such as ``step/resnet50/gsam-sgd/float32``."""
        return f"step/{self.network}/gsam-sgd/{str(self.dtype).removeprefix('torch.')}"

    @property
    def nbytes(self) -> int:
        """Bytes of all parameters."""
        return self.dtype.itemsize * sum(torch.Size(shape).numel() for shape in self.shapes)

    def traffic(self, passes: str) -> int:
        """Bytes that must be moved, see method.md: pass A 5 (g0 twice, weights in and out, backup), pass B 8."""
        return {"pass A": 5, "pass B": 8, "step": 13}[passes] * self.nbytes


def select_steps(patterns: Sequence[str], device: str) -> list[StepCase]:
    """The cases whose name matches one of the patterns; the largest only on a GPU."""
    found = [case for case in _cases() if any(fnmatchcase(case.name, pattern) for pattern in patterns)]
    return [case for case in found if case.network != "gpt_1b3" or device.startswith("cuda")]


def _cases() -> Iterator[StepCase]:
    for network, shapes in (
        ("resnet18", _resnet(18)),
        ("resnet50", _resnet(50)),
        ("vit_b", _transformer(768, 12, [(768, 3, 16, 16), (768,), (1, 1, 768), (1, 197, 768), (1000, 768), (1000,)])),
        ("gpt_1b3", _transformer(2048, 24, [(50257, 2048), (2048, 2048)])),
    ):
        yield StepCase(network, tuple(shapes))


def _resnet(depth: int) -> list[tuple[int, ...]]:
    """He et al., "Deep Residual Learning", CVPR 2016, table 1: convolutions, each with its BatchNorm, and the head."""
    shapes: list[tuple[int, ...]] = []

    def conv(out: int, inputs: int, side: int) -> None:
        shapes.extend([(out, inputs, side, side), (out,), (out,)])

    conv(64, 3, 7)
    inputs = 64
    for width, blocks in zip((64, 128, 256, 512), (2, 2, 2, 2) if depth == 18 else (3, 4, 6, 3), strict=True):
        for block in range(blocks):
            out = width if depth == 18 else 4 * width
            if depth == 18:
                conv(width, inputs, 3)
                conv(width, width, 3)
            else:
                conv(width, inputs, 1)
                conv(width, width, 3)
                conv(out, width, 1)
            if block == 0 and inputs != out:
                conv(out, inputs, 1)
            inputs = out
    return [*shapes, (1000, inputs), (1000,)]


def _transformer(width: int, layers: int, rest: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """Attention and a hidden layer of four times the width, each with biases and a LayerNorm."""
    attention = [(3 * width, width), (3 * width,), (width, width), (width,)]
    hidden = [(4 * width, width), (4 * width,), (width, 4 * width), (width,)]
    return [*rest, *(layers * [*attention, *hidden, *4 * [(width,)]]), (width,), (width,)]


@dataclass(frozen=True)
class Stepper:
    """One implementation on the tensors of a case.

    Attributes:
        name: For tables.
        run: By passes what is timed; an implementation may lack the single passes.
        weights: What it moves.
        is_peer: False for asga itself.
    """

    name: str
    run: dict[str, Callable[[], None]]
    weights: list[Tensor]
    is_peer: bool = True


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
        self.kept = [torch.empty_like(p) for p in self.params]

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


def _foreach_functions(tensors: Tensors) -> tuple[Callable[..., None], Callable[..., None]]:
    """The same in `torch._foreach_*`, momentum included."""

    def pass_a(params: list[Tensor], first: list[Tensor], backups: list[Tensor], kept: list[Tensor]) -> None:
        scale = RHO / torch.stack(torch._foreach_norm(first)).norm()
        torch._foreach_copy_(backups, params)
        torch._foreach_copy_(kept, first)
        torch._foreach_add_(params, torch._foreach_mul(first, scale))

    def pass_b(
        params: list[Tensor], backups: list[Tensor], kept: list[Tensor], second: list[Tensor], momentum: list[Tensor]
    ) -> None:
        inner = torch.stack([p.sum() for p in torch._foreach_mul(kept, second)]).sum()
        new = torch.stack(torch._foreach_norm(second)).norm()
        d = torch._foreach_mul(second, 1.0 + ALPHA * inner / (new * new))
        torch._foreach_add_(d, kept, alpha=-ALPHA)
        torch._foreach_copy_(params, backups)
        torch._foreach_add_(d, params, alpha=WEIGHT_DECAY)
        torch._foreach_mul_(momentum, MOMENTUM)
        torch._foreach_add_(momentum, d)
        torch._foreach_add_(params, momentum, alpha=-LR)

    return pass_a, pass_b


def _foreach(tensors: Tensors, *, compiled: bool = False) -> Stepper:
    pass_a, pass_b = _foreach_functions(tensors)
    if compiled:
        torch.compiler.reset()
        pass_a, pass_b = (torch.compile(f, fullgraph=True, dynamic=False) for f in (pass_a, pass_b))
    params = [p.detach() for p in tensors.params]

    @torch.no_grad()
    def first() -> None:
        pass_a(params, tensors.first, tensors.backups, tensors.kept)

    @torch.no_grad()
    def second() -> None:
        pass_b(params, tensors.backups, tensors.kept, tensors.second, tensors.momentum)

    def step() -> None:
        first()
        second()

    runs = {"pass A": first, "pass B": second, "step": step}
    return Stepper("torch.compile" if compiled else "foreach", runs, params)


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
