"""Scales: the range of a bit-width, good initial values, and what keeps a learned scale positive."""

from collections.abc import Callable

import torch
from torch import Tensor

from asga.ops import fake_quant
from asga.ops.autograd import apply_of
from asga.ops.transforms import transforming

INITS = ("lsq", "mse")

# A learned scale is used at no less than this share of its initial value. At 1/50 of it nearly all values are
# clamped, so no useful scale is cut off, while 1/scale stays far from overflow.
FLOOR_RATIO = 0.02

# Below this a scale times FLOOR_RATIO would be denormal, and its reciprocal could overflow.
_SMALLEST_SCALE = torch.finfo(torch.float32).tiny / FLOOR_RATIO


def quant_range(bits: int, *, signed: bool) -> tuple[int, int]:
    """Smallest and largest integer of a grid: two's complement when signed, from 0 otherwise."""
    return (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)


def effective_scale(scale: Tensor, floor: Tensor, grad_factor: Tensor, elements: int) -> Tensor:
    """The scale that is used: `scale`, or `floor` where that is larger or `scale` is NaN.

    The gradient is multiplied by ``grad_factor / sqrt(elements)``. Where the floor is used it passes only if
    it raises the scale (a negative gradient): a scale below the floor can return but not sink further.

    Args:
        scale: The parameter, any shape.
        floor: Smallest value in use, positive, the shape of `scale`.
        grad_factor: Broadcastable to `scale`; LSQ has ``1 / sqrt(quant_max)``.
        elements: Number of values that share one scale.

    Returns:
        A tensor like `scale`.

    Source:
        Esser et al., "Learned Step Size Quantization", ICLR 2020, section 2.2, for the factor
        ``1 / sqrt(elements * quant_max)``, which brings scale updates to the relative size of weight updates.
        The floor is this package's: without it a scale can be driven to zero or through it, after which every
        output is NaN or has lost its meaning.
    """
    apply = _EffectiveScale.apply if torch.compiler.is_compiling() or transforming() else _apply
    return apply(scale, floor, grad_factor, elements)


class _EffectiveScale(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(scale: Tensor, floor: Tensor, grad_factor: Tensor, elements: int) -> Tensor:
        return torch.fmax(scale, floor)  # the floor where the scale is NaN

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        scale, floor, grad_factor, ctx.elements = inputs
        ctx.save_for_backward(scale, floor, grad_factor)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None, None]:
        scale, floor, grad_factor = ctx.saved_tensors
        scaled = grad * (grad_factor * max(ctx.elements, 1) ** -0.5)
        return torch.where((scale >= floor) | (grad < 0), scaled, 0.0), None, None, None


# Every quantizer runs it in every pass, on a few values: the call is what takes time.
_apply = apply_of(_EffectiveScale)


def lsq_scale(mean_abs: Tensor, quant_max: float) -> Tensor:
    """LSQ's initial scale, ``2 * mean|x| / sqrt(quant_max)`` (Esser et al. 2020, section 2.1), made positive.

    Args:
        mean_abs: Mean absolute value per scale, ``[]`` or ``[C]``.
        quant_max: Largest value of the grid.

    Returns:
        Scales of the shape of `mean_abs`, float32, positive.
    """
    return _positive(2 * mean_abs.to(torch.float32) / quant_max**0.5, quant_max)


def mse_scale(values: Tensor, quant_min: int, quant_max: int, *, axis: int | None = None) -> Tensor:
    """The scale of an integer grid with the least squared error; see `least_error_scale`.

    Args:
        values: The tensor to quantize, floating point.
        quant_min: Smallest integer of the grid.
        quant_max: Largest integer of the grid.
        axis: Dimension of the channels, or None for one scale.

    Returns:
        Scales ``[C]`` or ``[]``, float32, positive.
    """

    def quantize(values: Tensor, scale: Tensor) -> Tensor:
        return fake_quant(values, scale, quant_min=quant_min, quant_max=quant_max, axis=axis)

    return least_error_scale(values, quant_max, quantize, axis=axis)


def least_error_scale(
    values: Tensor, quant_max: float, quantize: Callable[[Tensor, Tensor], Tensor], *, axis: int | None = None
) -> Tensor:
    """The scale with the least squared quantization error, found on a grid (OMSE: Kravchik et al. 2019).

    A coarse geometric grid from the scale that clips nothing down to a hundredth of it (steps of 16 %), then
    a fine one between the neighbors of the best (steps of 2 %, which are 4 % of the squared rounding error).

    Args:
        values: The tensor to quantize, floating point.
        quant_max: Largest value of the grid.
        quantize: Fake quantization of float32 values with given scales; returns a new tensor.
        axis: Dimension of the channels, or None for one scale.

    Returns:
        Scales ``[C]`` or ``[]``, float32, positive.
    """
    values = values.detach().to(torch.float32)
    others = [d for d in range(values.dim()) if d != axis]
    largest = values.abs().amax(others) if others else values.abs()
    best, least = largest / quant_max, torch.full_like(largest, torch.inf)
    step = 100 ** (1 / 31)
    for factors in ([step**-i for i in range(32)], [step ** (i / 8) for i in range(-7, 8)]):
        center = best
        for factor in factors:
            scale = center * factor
            error = quantize(values, scale).sub_(values).square_()
            error = error.sum(others) if others else error
            better = error < least
            best, least = torch.where(better, scale, best), torch.where(better, error, least)
    return _positive(best, quant_max)


def _positive(scale: Tensor, quant_max: float) -> Tensor:
    """Replace unusable scales (zero channels): by the mean of the others, else so that the grid ends at 1."""
    usable = torch.isfinite(scale) & (scale > _SMALLEST_SCALE)
    mean = torch.where(usable, scale, 0.0).sum() / usable.sum().clamp(min=1)
    return torch.where(usable, scale, torch.where(mean > 0, mean, 1.0 / quant_max))
