"""The implementations that are compared, each built for the tensors of a case and checked against the reference.

All do the same work: forward, and the gradients of the input, the scales and, in a mixture, the probabilities. In
bfloat16 the formulas in plain torch compute in float32, as asga does; what is built in does as it does.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

import asga
from asga.bench.inputs import Inputs
from asga.bench.shapes import Case
from asga.ops import backends, reference

# From x, one scale (a tensor of [1] or [C]), quant_min and quant_max to the quantized x.
Quantizer = Callable[[Tensor, Tensor, int, int], Tensor]


class UnequalResultsError(Exception):
    """An implementation computes something else than the reference."""


@dataclass(frozen=True)
class Contestant:
    """One implementation, ready to run on the tensors of a case.

    Attributes:
        name: For tables.
        forward: Returns the quantized tensor.
        differentiable: What gradients are asked for.
        grad: Gradient of the output.
        is_peer: False for asga itself.
        less_work: What it leaves out, or None.
        context: Entered around every use of it.
    """

    name: str
    forward: Callable[[], Tensor]
    differentiable: tuple[Tensor, ...]
    grad: Tensor
    is_peer: bool = True
    less_work: str | None = None
    context: Callable[[], AbstractContextManager] = nullcontext

    def backward(self, output: Tensor) -> tuple[Tensor, ...]:
        """The gradients, from what `forward` returned."""
        return torch.autograd.grad(output, self.differentiable, self.grad)

    def forward_backward(self) -> None:
        """Both, dropping the results."""
        self.backward(self.forward())


def names(case: Case, device: str, *, compiled: bool = True) -> list[str]:
    """The implementations of the operator of a case, asga first, installed or not.

    Args:
        case: One or several candidates decide the operator.
        device: On a GPU each backend of asga has a name.
        compiled: Whether to take torch.compile along; compiling takes seconds.
    """
    found = list(_BUILDERS)
    if torch.device(device).type != "cuda":
        found = [name for name in found if name not in _BACKENDS]
    if len(case.bits) > 1:
        found.remove("torch fake_quantize")
    if not compiled:
        found.remove("torch.compile")
    return found


def build(name: str, inputs: Inputs) -> Contestant:
    """One implementation, checked.

    Args:
        name: One of `names`.
        inputs: The tensors.

    Raises:
        ImportError: It is not installed.
        UnequalResultsError: It disagrees with the reference.
        RuntimeError: A backend of asga is not available; peers raise what they raise.
    """
    return _build(name, inputs, _reference(inputs))


def build_all(inputs: Inputs, *, compiled: bool = True) -> tuple[list[Contestant], dict[str, str]]:
    """Everything that can run a case here and gives the right results.

    Args:
        inputs: The tensors.
        compiled: As in `names`.

    Returns:
        The contestants, asga first, and the reason for each that was left out.

    Raises:
        UnequalResultsError: asga itself disagrees with the reference.
    """
    expected = _reference(inputs)
    found, left_out = [], {}
    for name in names(inputs.case, inputs.x.device.type, compiled=compiled):
        if name in _BACKENDS and (reason := backends.unavailable(_BACKENDS[name])) is not None:
            left_out[name] = reason
            continue
        try:
            found.append(_build(name, inputs, expected))
        except ImportError:
            left_out[name] = "not installed"
        except Exception as error:
            # Whatever goes wrong in the code of others must not end the run.
            if name.startswith("asga"):
                raise
            left_out[name] = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    return found, left_out


def _build(name: str, inputs: Inputs, expected: tuple[Tensor, ...]) -> Contestant:
    contestant = _BUILDERS[name](name, inputs)
    _check(contestant, inputs, expected)
    return contestant


def _asga(name: str, inputs: Inputs, context: Callable[[], AbstractContextManager] = nullcontext) -> Contestant:
    lows, highs = zip(*inputs.ranges, strict=True)
    axis = inputs.case.axis
    if inputs.probs is None:

        def forward() -> Tensor:
            return asga.ops.fake_quant(inputs.x, inputs.scales, quant_min=lows[0], quant_max=highs[0], axis=axis)

    else:

        def forward() -> Tensor:
            return asga.ops.mixed_fake_quant(
                inputs.x, inputs.scales, inputs.probs, quant_mins=lows, quant_maxs=highs, axis=axis
            )

    return Contestant(name, forward, inputs.differentiable, inputs.grad, is_peer=False, context=context)


def _peer(name: str, inputs: Inputs, *, quantizer: Callable[[Inputs], Quantizer], compiled: bool = False) -> Contestant:
    """A quantizer, or the mixture of K copies as EdMIPS computes it, eagerly or compiled."""
    quantize, ranges = quantizer(inputs), inputs.ranges

    def single(x: Tensor, scale: Tensor) -> Tensor:
        return quantize(x, scale, *ranges[0])

    def mixture(x: Tensor, scales: Tensor, probs: Tensor) -> Tensor:
        output = None
        for scale, prob, (low, high) in zip(scales.unbind(0), probs.unbind(0), ranges, strict=True):
            term = prob * quantize(x, scale, low, high)
            output = term if output is None else output + term
        return output

    function = single if inputs.probs is None else mixture
    if compiled:
        # Functions of earlier cases share this code: without the reset, torch would soon stop compiling it.
        torch.compiler.reset()
        function = torch.compile(function, fullgraph=True, dynamic=False)
    return Contestant(name, partial(function, *inputs.differentiable), inputs.differentiable, inputs.grad)


def _lsq(inputs: Inputs) -> Quantizer:
    """The formula of Esser et al., "Learned Step Size Quantization", ICLR 2020, in torch's operators."""
    shape = _channel_shape(inputs)

    def quantize(x: Tensor, scale: Tensor, low: int, high: int) -> Tensor:
        return lsq(x.float(), scale.reshape(shape), low, high).to(x.dtype)

    return quantize


def lsq(x: Tensor, scale: Tensor, low: int, high: int) -> Tensor:
    """One quantizer in plain torch; `scale` broadcasts against `x`."""
    return _RoundStraightThrough.apply(torch.clamp(x / scale, low, high)) * scale


class _RoundStraightThrough(torch.autograd.Function):
    """Cheaper than ``(round(x) - x).detach() + x``, and exact."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return torch.round(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return grad


def _fixed_scale(name: str, inputs: Inputs) -> Contestant:
    x, axis, (low, high) = inputs.x, inputs.case.axis, inputs.ranges[0]
    scales = inputs.scales.detach()
    if axis is None:
        forward = partial(torch.fake_quantize_per_tensor_affine, x, scales.item(), 0, low, high)
    else:
        zeros = torch.zeros_like(scales, dtype=torch.int32)
        forward = partial(torch.fake_quantize_per_channel_affine, x, scales, zeros, axis, low, high)
    return Contestant(name, forward, (x,), inputs.grad, less_work="computes no gradient of the scale")


def _torch_learnable(inputs: Inputs) -> Quantizer:
    axis, channels = inputs.case.axis, inputs.scales.shape[-1:] if inputs.case.axis is not None else (1,)
    zeros = torch.zeros(channels, device=inputs.x.device)

    def quantize(x: Tensor, scale: Tensor, low: int, high: int) -> Tensor:
        if axis is None:
            return torch._fake_quantize_learnable_per_tensor_affine(x, scale.reshape(1), zeros, low, high, 1.0)
        return torch._fake_quantize_learnable_per_channel_affine(x, scale, zeros, axis, low, high, 1.0)

    return quantize


def _brevitas(inputs: Inputs) -> Quantizer:
    from brevitas.core.function_wrapper import Identity
    from brevitas.core.quant.int_base import IntQuant

    shape = _channel_shape(inputs)
    quant = IntQuant(narrow_range=False, signed=True, input_view_impl=Identity())
    zero = torch.zeros((), device=inputs.x.device)
    bits = {
        high: torch.tensor(float(width), device=inputs.x.device)
        for (_, high), width in zip(inputs.ranges, inputs.case.bits, strict=True)
    }

    def quantize(x: Tensor, scale: Tensor, low: int, high: int) -> Tensor:
        return quant(scale.reshape(shape), zero, bits[high], x.float()).to(x.dtype)

    return quantize


def _torchao(inputs: Inputs) -> Quantizer:
    """What torchao's fake quantizers with a learned range call; they themselves accept only matrices."""
    from torchao.quantization.quant_primitives import ZeroPointDomain, _fake_quantize_affine

    shape = inputs.case.shape
    block = shape if inputs.case.axis is None else (1, *shape[1:])

    def quantize(x: Tensor, scale: Tensor, low: int, high: int) -> Tensor:
        return _fake_quantize_affine(x, block, scale, None, torch.int32, low, high, ZeroPointDomain.NONE)

    return quantize


def _channel_shape(inputs: Inputs) -> tuple[int, ...]:
    """The shape in which one scale broadcasts against x."""
    return (1,) if inputs.case.axis is None else (-1, *[1] * (inputs.x.dim() - 1))


_BACKENDS = {"asga (cuda)": "cuda", "asga (triton)": "triton"}
_BUILDERS: dict[str, Callable[[str, Inputs], Contestant]] = {
    "asga": _asga,
    **{name: partial(_asga, context=partial(asga.backend, backend)) for name, backend in _BACKENDS.items()},
    "eager LSQ": partial(_peer, quantizer=_lsq),
    "torch fake_quantize": _fixed_scale,
    "torch learnable": partial(_peer, quantizer=_torch_learnable),
    "brevitas": partial(_peer, quantizer=_brevitas),
    "torchao": partial(_peer, quantizer=_torchao),
    "torch.compile": partial(_peer, quantizer=_lsq, compiled=True),
}


def _reference(inputs: Inputs) -> tuple[Tensor, ...]:
    """Output and gradients as `asga.ops.reference` defines them."""
    tensors = tuple(tensor.detach() for tensor in inputs.differentiable)
    lows, highs = (list(bounds) for bounds in zip(*inputs.ranges, strict=True))
    if inputs.probs is None:
        settings = (None, lows[0], highs[0], inputs.case.axis)
        output = reference.fake_quant(*tensors, *settings)
        return output, *reference.fake_quant_backward(inputs.grad, *tensors, *settings)[:2]
    settings = (None, lows, highs, inputs.case.axis)
    return (
        reference.mixed_fake_quant(*tensors, *settings),
        *reference.mixed_fake_quant_backward(inputs.grad, *tensors, *settings)[:3],
    )


def _check(contestant: Contestant, inputs: Inputs, expected: tuple[Tensor, ...]) -> None:
    """Compare output and gradients with the reference."""
    with contestant.context():
        output = contestant.forward()
        actual = (output.detach(), *contestant.backward(output))
    names = ("output", "gradient of the input", "gradient of the scales", "gradient of the probabilities")
    # Fewer gradients than names where an implementation does less work.
    for name, got, wanted, bound in zip(names, actual, expected, _tolerances(inputs, expected), strict=False):
        if (got.shape, got.dtype) != (wanted.shape, wanted.dtype):
            raise UnequalResultsError(f"{name} is {got.dtype}{list(got.shape)}, not {wanted.dtype}{list(wanted.shape)}")
        worst = ((got - wanted).abs() / bound).max().item()
        if not worst <= 1:
            raise UnequalResultsError(f"{name} differs from the reference by {worst:.3g} times the tolerance")


def _tolerances(inputs: Inputs, expected: tuple[Tensor, ...]) -> Iterator[Tensor]:
    """What the output and each gradient may differ by: 8 times a bound on the rounding errors of a plain formula.

    Values, and at the end sums, are rounded to the dtype a few times. Within sums, roundings of terms to the dtype are
    independent and grow with the root of the sum of squares; those of an accumulation in float32 grow with the sum of
    magnitudes. The terms are what autograd adds up: g q and g v, whose difference is LSQ's term and much smaller.
    """
    eps, eps_sum = (torch.finfo(dtype).eps for dtype in (inputs.case.dtype, torch.float32))
    for values in expected[:2]:
        yield 8 * eps * values.abs().max()
    grad, x = inputs.grad.float().abs(), inputs.x.detach().float().abs()
    dims = [dim for dim in range(x.dim()) if dim != inputs.case.axis]
    scales, weights = inputs.scales.detach(), [1.0]
    if inputs.probs is None:
        scales = scales[None]
    else:
        weights = inputs.probs.tolist()
    of_scales, of_probs = [], []
    for scale, weight in zip(scales, weights, strict=True):
        terms = grad * (x / scale.reshape(_channel_shape(inputs)) + 1)
        bound = eps * torch.linalg.vector_norm(terms, dim=dims) + eps_sum * terms.sum(dims)
        of_scales.append(weight * bound)
        of_probs.append((bound * scale.reshape(bound.shape)).sum())
    yield 8 * (torch.stack(of_scales).reshape(inputs.scales.shape) + eps * expected[2].abs())
    if inputs.probs is not None:
        yield 8 * (torch.stack(of_probs) + eps * expected[3].abs())
