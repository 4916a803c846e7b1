"""The implementations that are compared, each built for the tensors of a case and checked against the reference.

All do the same work: forward, and the gradients of the input, the scales and, where there are any, of the
probabilities of a mixture and of the zero points. Peers that know no groups get them as the channels of a matrix. In
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

# From x, one scale (a tensor of [1] or [C]), quant_min, quant_max and the zero point (like the scale, or None) to the
# quantized x.
Quantizer = Callable[[Tensor, Tensor, int, int, Tensor | None], Tensor]


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
    granularity = {"axis": inputs.case.axis, "group_size": inputs.case.group_size}
    if inputs.probs is None:
        forward = partial(
            asga.ops.fake_quant,
            *(inputs.x, inputs.scales, inputs.zero_points),
            **{"quant_min": lows[0], "quant_max": highs[0], **granularity},
        )
    else:
        forward = partial(
            asga.ops.mixed_fake_quant,
            *(inputs.x, inputs.scales, inputs.probs, inputs.zero_points),
            **{"quant_mins": lows, "quant_maxs": highs, **granularity},
        )
    return Contestant(name, forward, inputs.differentiable, inputs.grad, is_peer=False, context=context)


def _peer(name: str, inputs: Inputs, *, quantizer: Callable[[Inputs], Quantizer], compiled: bool = False) -> Contestant:
    """A quantizer, or the mixture of K copies as EdMIPS computes it, eagerly or compiled."""
    quantize, ranges, case = quantizer(inputs), inputs.ranges, inputs.case
    rows = case.rows.shape

    def single(x: Tensor, scale: Tensor, zero_point: Tensor | None = None) -> Tensor:
        if case.group_size is None:
            return quantize(x, scale, *ranges[0], zero_point)
        flat = zero_point if zero_point is None else zero_point.reshape(-1)
        return quantize(x.reshape(rows), scale.reshape(-1), *ranges[0], flat).reshape(x.shape)

    def mixture(x: Tensor, scales: Tensor, probs: Tensor, zero_points: Tensor | None = None) -> Tensor:
        output, shape = None, x.shape
        if case.group_size is not None:
            x, scales = x.reshape(rows), scales.reshape(len(ranges), -1)
            zero_points = zero_points if zero_points is None else zero_points.reshape(len(ranges), -1)
        offsets = [None] * len(ranges) if zero_points is None else zero_points.unbind(0)
        for scale, prob, bounds, offset in zip(scales.unbind(0), probs.unbind(0), ranges, offsets, strict=True):
            term = prob * quantize(x, scale, *bounds, offset)
            output = term if output is None else output + term
        return output.reshape(shape)

    function = single if inputs.probs is None else mixture
    if compiled:
        # Functions of earlier cases share this code: without the reset, torch would soon stop compiling it.
        torch.compiler.reset()
        function = torch.compile(function, fullgraph=True, dynamic=False)
    return Contestant(name, partial(function, *inputs.differentiable), inputs.differentiable, inputs.grad)


def _lsq(inputs: Inputs) -> Quantizer:
    """The formulas of Esser et al., "Learned Step Size Quantization", ICLR 2020, and of LSQ+, in torch's operators."""
    shape = _channel_shape(inputs)

    def quantize(x: Tensor, scale: Tensor, low: int, high: int, zero_point: Tensor | None) -> Tensor:
        offset = zero_point if zero_point is None else zero_point.reshape(shape)
        return lsq(x.float(), scale.reshape(shape), low, high, offset).to(x.dtype)

    return quantize


def lsq(x: Tensor, scale: Tensor, low: int, high: int, zero_point: Tensor | None = None) -> Tensor:
    """One quantizer in plain torch; `scale` and `zero_point` broadcast against `x`."""
    if zero_point is not None:
        offset = _RoundStraightThrough.apply(zero_point)
        return _RoundStraightThrough.apply(torch.clamp(x / scale, low - offset, high - offset)) * scale
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
    x, case, (low, high) = inputs.x, inputs.case, inputs.ranges[0]
    scales, rows = inputs.scales.detach().reshape(-1), case.rows
    zero_points = torch.zeros_like(scales) if inputs.zero_points is None else inputs.zero_points.detach().reshape(-1)
    zero_points = zero_points.int()
    less_work = "computes no gradient of the scale" + (" or the zero point" if case.offset else "")
    if rows.axis is None:
        forward = partial(torch.fake_quantize_per_tensor_affine, x, scales.item(), int(zero_points.item()), low, high)
    elif case.group_size is None:
        forward = partial(torch.fake_quantize_per_channel_affine, x, scales, zero_points, rows.axis, low, high)
    else:

        def forward() -> Tensor:
            groups = x.reshape(rows.shape)
            return torch.fake_quantize_per_channel_affine(groups, scales, zero_points, 0, low, high).reshape(x.shape)

    return Contestant(name, forward, (x,), inputs.grad, less_work=less_work)


def _torch_learnable(inputs: Inputs) -> Quantizer:
    rows = inputs.case.rows
    zeros = torch.zeros(1 if rows.axis is None else rows.shape[0], device=inputs.x.device)

    def quantize(x: Tensor, scale: Tensor, low: int, high: int, zero_point: Tensor | None) -> Tensor:
        offset = zeros if zero_point is None else zero_point.reshape(-1)
        if rows.axis is None:
            return torch._fake_quantize_learnable_per_tensor_affine(x, scale.reshape(1), offset, low, high, 1.0)
        return torch._fake_quantize_learnable_per_channel_affine(x, scale, offset, rows.axis, low, high, 1.0)

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

    def quantize(x: Tensor, scale: Tensor, low: int, high: int, zero_point: Tensor | None) -> Tensor:
        offset = zero if zero_point is None else zero_point.reshape(shape)
        return quant(scale.reshape(shape), offset, bits[high], x.float()).to(x.dtype)

    return quantize


def _torchao(inputs: Inputs) -> Quantizer:
    """What torchao's fake quantizers with a learned range call; they themselves accept only matrices."""
    from torchao.quantization.quant_primitives import ZeroPointDomain, _fake_quantize_affine

    rows = inputs.case.rows
    block = rows.shape if rows.axis is None else (1, *rows.shape[1:])

    def quantize(x: Tensor, scale: Tensor, low: int, high: int, zero_point: Tensor | None) -> Tensor:
        domain = ZeroPointDomain.NONE if zero_point is None else ZeroPointDomain.INT
        return _fake_quantize_affine(x, block, scale, zero_point, torch.int32, low, high, domain)

    return quantize


def _channel_shape(inputs: Inputs) -> tuple[int, ...]:
    """The shape in which one scale broadcasts against x, or against its groups as rows."""
    rows = inputs.case.rows
    return (1,) if rows.axis is None else (-1, *[1] * (len(rows.shape) - 1))


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
    """Output and gradients as `asga.ops.reference` defines them, in the order of `Inputs.differentiable`."""
    lows, highs = (list(bounds) for bounds in zip(*inputs.ranges, strict=True))
    rows, lead = inputs.case.rows, () if inputs.probs is None else (len(lows),)
    x, grad = (tensor.detach().reshape(rows.shape) for tensor in (inputs.x, inputs.grad))
    scales, zero_points = (
        None if t is None else t.detach().reshape(*lead, -1) if rows.axis == 0 else t.detach()
        for t in (inputs.scales, inputs.zero_points)
    )
    if inputs.probs is None:
        arguments = (x, scales, zero_points, lows[0], highs[0], rows.axis)
        found = reference.fake_quant(*arguments), *reference.fake_quant_backward(grad, *arguments)
    else:
        arguments = (x, scales, inputs.probs.detach(), zero_points, lows, highs, rows.axis)
        found = reference.mixed_fake_quant(*arguments), *reference.mixed_fake_quant_backward(grad, *arguments)
    # Without zero points their gradient is an empty tensor, the last.
    like = (inputs.x, *inputs.differentiable)
    return tuple(tensor.reshape(shape.shape) for tensor, shape in zip(found, like, strict=False))


def _check(contestant: Contestant, inputs: Inputs, expected: tuple[Tensor, ...]) -> None:
    """Compare output and gradients with the reference."""
    with contestant.context():
        output = contestant.forward()
        actual = (output.detach(), *contestant.backward(output))
    names = ["output", "gradient of the input", "gradient of the scales"]
    names += [] if inputs.probs is None else ["gradient of the probabilities"]
    names += [] if inputs.zero_points is None else ["gradient of the zero points"]
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
    rows = inputs.case.rows
    grad, x = (tensor.detach().reshape(rows.shape).float().abs() for tensor in (inputs.grad, inputs.x))
    dims = [dim for dim in range(x.dim()) if dim != rows.axis]
    scales, weights = inputs.scales.detach(), [1.0]
    if inputs.probs is None:
        scales = scales[None]
    else:
        weights = inputs.probs.tolist()
    of_scales, of_probs, of_zero_points = [], [], []
    for scale, weight in zip(scales, weights, strict=True):
        terms = grad * (x / scale.reshape(_channel_shape(inputs)) + 1)
        bound = eps * torch.linalg.vector_norm(terms, dim=dims) + eps_sum * terms.sum(dims)
        of_scales.append(weight * bound)
        of_products = bound * scale.reshape(bound.shape)
        of_probs.append(of_products.sum())
        of_zero_points.append(weight * of_products)
    yield 8 * (torch.stack(of_scales).reshape(inputs.scales.shape) + eps * expected[2].abs())
    if inputs.probs is not None:
        yield 8 * (torch.stack(of_probs) + eps * expected[3].abs())
    if inputs.zero_points is not None:
        yield 8 * (torch.stack(of_zero_points).reshape(inputs.scales.shape) + eps * expected[-1].abs())
