"""Fake quantization to small floats: E4M3 (fp8) and E2M1 (fp4).

In plain torch on every device, unlike the integer quantizers: small floats are for weights alone, and `torch.compile`
makes one kernel of these elementwise operations. Eagerly on a CPU, forward and backward of 590,000 weights take 4 ms of
one core (EPYC Zen 3), five times what an integer takes in its kernel, and little beside the convolutions.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from asga.ops.checks import INPUT_DTYPES, check_tensors
from asga.ops.library import no_second_derivative


@dataclass(frozen=True)
class FloatGrid:
    """The finite values of a float format without infinities.

    Args:
        mantissa_bits: Stored bits of the mantissa.
        smallest_exponent: Of the normal numbers; below them lie evenly spaced subnormal ones.
        largest: The largest value.
    """

    mantissa_bits: int
    smallest_exponent: int
    largest: float

    @property
    def smallest(self) -> float:
        """The smallest positive value."""
        return 2.0 ** (self.smallest_exponent - self.mantissa_bits)


def float_grid(format: str) -> FloatGrid:
    """The grid of ``"fp4"`` or ``"fp8"``.

    Its numbers stand in code, because torch.compile with dynamic=True makes symbols of those that it finds in objects,
    and fails when two autograd functions read the same one.
    """
    if format == "fp4":
        return FloatGrid(mantissa_bits=1, smallest_exponent=0, largest=6.0)  # E2M1
    if format == "fp8":
        return FloatGrid(mantissa_bits=3, smallest_exponent=-6, largest=448.0)  # E4M3
    raise KeyError(format)


# Open Compute Project: "OCP 8-bit Floating Point Specification (OFP8)", revision 1.0, for E4M3, and "OCP Microscaling
# Formats (MX) Specification", version 1.0, for E2M1:
# https://www.opencompute.org/documents/ocp-microscaling-formats-mx-v1-0-spec-final-pdf
FLOAT_GRIDS = {format: float_grid(format) for format in ("fp4", "fp8")}

# An integer type of the same width, and where the exponent is.
_EXPONENTS = {torch.float32: (torch.int32, 0x7F80_0000), torch.float64: (torch.int64, 0x7FF0_0000_0000_0000)}


def float_fake_quant(input: Tensor, scale: Tensor, format: str) -> Tensor:
    """Round to a small float and back: ``nearest(input / scale) * scale``.

    Rounds to the nearest value of the format, half to even, subnormal values included; saturates, infinities too;
    propagates NaN and never returns -0.0. Computes in float32 (float64 for float64 inputs). Differentiable in
    both tensors with the straight-through gradients of `asga.ops.fake_quant`: with ``v = input / scale``,
    ``d input = g`` and ``d scale = g * (nearest(v) - v)`` where v is within the format's range, and 0 and
    ``g * nearest(v)`` beyond.

    Args:
        input: Any shape, float32, bfloat16, float16 or float64.
        scale: Broadcastable to `input`, floating, positive.
        format: ``"fp4"`` (E2M1: 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives) or ``"fp8"`` (E4M3, up to 448).

    Returns:
        A tensor with the shape, dtype and strides of ``torch.empty_like(input)``.

    Raises:
        TypeError: A tensor is not floating point or not dense, or none at all.
        ValueError: `format` is unknown, or `scale` does not broadcast to the shape of `input`.
    """
    if format not in FLOAT_GRIDS:
        raise ValueError(f"format is {format!r}; it must be one of {', '.join(map(repr, FLOAT_GRIDS))}")
    check_tensors(input, scale=scale)
    if input.dtype not in INPUT_DTYPES:
        raise TypeError(f"input has dtype {input.dtype}; float32, bfloat16, float16 and float64 are supported")
    if not scale.is_floating_point():
        raise TypeError(f"scale has dtype {scale.dtype}; a real floating-point tensor is needed")
    try:
        fits = torch.broadcast_shapes(scale.shape, input.shape) == input.shape
    except RuntimeError:
        fits = False
    if not fits:
        raise ValueError(f"scale has shape {tuple(scale.shape)}, which does not broadcast to {tuple(input.shape)}")
    return _FloatFakeQuant.apply(input, scale, format)


def nearest_float(values: Tensor, format: str) -> Tensor:
    """The nearest values of a format, half to even: saturating, NaN kept, 0.0 for -0.0. float32 or float64."""
    grid = float_grid(format)
    integer, exponent = _EXPONENTS[values.dtype]
    clamped = values.clamp(-grid.largest, grid.largest)
    # 2 to the exponent, exactly: a value's other bits set to zero. Its neighbors lie one step apart; that division
    # by a power of two and the product are exact as well, so the only rounding is the one that is meant. In place: on
    # a CPU, fresh memory costs more time than the arithmetic.
    power = (clamped.view(integer) & exponent).view(values.dtype).clamp(min=2.0**grid.smallest_exponent)
    step = power.mul_(2.0**-grid.mantissa_bits)
    return clamped.div_(step).round_().mul_(step).add_(0.0)


class _FloatFakeQuant(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(input: Tensor, scale: Tensor, format: str) -> Tensor:
        scaled, wide_scale = _scaled(input, scale)
        return torch.empty_like(input).copy_(nearest_float(scaled, format).mul_(wide_scale))

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        input, scale, ctx.format = inputs
        ctx.save_for_backward(input, scale)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        return *_FloatFakeQuantBackward.apply(grad, *ctx.saved_tensors, ctx.format), None


class _FloatFakeQuantBackward(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(grad: Tensor, input: Tensor, scale: Tensor, format: str) -> tuple[Tensor, Tensor]:
        largest = float_grid(format).largest
        scaled, _ = _scaled(input, scale)
        inside = (scaled >= -largest) & (scaled <= largest)
        passed = torch.where(inside, scaled, 0.0)
        # No copy_ into memory like that of the input: vmap may have many gradients for one input.
        grad_input = torch.where(inside, grad, 0.0).to(input.dtype)
        terms = grad.to(scaled.dtype) * nearest_float(scaled, format).sub_(passed)
        return grad_input, _sum_to(terms, scale)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        pass

    backward = staticmethod(no_second_derivative)


def _scaled(input: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """``input / scale`` and the scale, in the dtype of the computation."""
    dtype = torch.float64 if input.dtype == torch.float64 else torch.float32
    scale = scale.to(dtype)
    return input.to(dtype) / scale, scale


def _sum_to(terms: Tensor, scale: Tensor) -> Tensor:
    """Sum over the dimensions along which the scale was broadcast, in float64."""
    if terms.shape != scale.shape:
        missing = terms.dim() - scale.dim()
        dims = [d for d in range(terms.dim()) if d < missing or scale.shape[d - missing] != terms.shape[d]]
        terms = terms.sum(dims, keepdim=True, dtype=torch.float64).reshape(scale.shape)
    return terms.to(scale.dtype)
