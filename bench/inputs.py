"""The tensors of a case, such that every correct implementation gives the same results on them."""

from dataclasses import dataclass

import torch
from torch import Tensor

from asga.bench.shapes import Case

# Distinct values, of which each tensor is a random selection.
_POOL = 2**16
# The ranges of all candidates end near here; values are normal with deviation 1, so that some percent are clamped.
_CLAMP_AT = 1.9
# In steps. What is nearer to a rounding boundary may round either way: some multiply by 1/scale, some divide.
_MARGIN = 1e-3
# An integer: some round zero points, some add them to x/scale before they round that.
_ZERO_POINT = 1


@dataclass(frozen=True)
class Inputs:
    """What the implementations are given.

    Attributes:
        case: Where they come from.
        x: Values, with the shape and dtype of the case; requires a gradient.
        scales: ``[1]``, ``[C]`` or, of groups, ``[..., L / group_size]``; for a mixture ``[K]``, ``[K, C]`` or
            ``[K, ..., L / group_size]``. Float32; requires a gradient.
        probs: ``[K]`` float32, requires a gradient; None for a single candidate.
        zero_points: Integers like `scales`, requires a gradient; None for a case without offset.
        grad: Gradient of the output, like `x`.
        ranges: quant_min and quant_max of each candidate.
    """

    case: Case
    x: Tensor
    scales: Tensor
    probs: Tensor | None
    zero_points: Tensor | None
    grad: Tensor
    ranges: tuple[tuple[int, int], ...]

    @property
    def differentiable(self) -> tuple[Tensor, ...]:
        """What gradients are computed for: x, scales, in a mixture probs, with an offset zero_points."""
        found = (self.x, self.scales, self.probs, self.zero_points)
        return tuple(tensor for tensor in found if tensor is not None)


def make_inputs(case: Case, device: torch.device | str) -> Inputs:
    """Random tensors for a case, the same on every call.

    Implementations legitimately differ on rounding boundaries (see `_MARGIN`) and up to half a step outside of the
    range, where LSQ has no gradient and torch's built-in operators, whose mask comes after rounding, have one. There
    are no values in these places, so that all others can be compared strictly.
    """
    generator = torch.Generator(device).manual_seed(0)
    like_x = {"device": device, "dtype": case.dtype}
    base = torch.tensor([_CLAMP_AT / 2 ** (bits - 1) for bits in case.bits])
    ranges = tuple((-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) for bits in case.bits)
    zero_point = _ZERO_POINT if case.offset else 0
    reach = tuple((low - zero_point, high - zero_point) for low, high in ranges)
    pool = _unambiguous_values(base, reach, case.dtype).to(device)
    x = pool[torch.randint(len(pool), case.shape, generator=generator, device=device)]
    scales = base.to(device)
    rows = case.rows
    if rows.axis is not None:
        # Powers of two: multiplying values and scales by them is exact in every dtype.
        channels = 2.0 ** torch.randint(-2, 3, (rows.shape[0],), generator=generator, device=device)
        x.view(rows.shape).mul_(channels.to(case.dtype).reshape(-1, *[1] * (len(rows.shape) - 1)))
        scales = scales[:, None] * channels
    if case.group_size is not None:
        scales = scales.reshape(-1, *case.shape[:-1], case.shape[-1] // case.group_size)
    # With the sign of x, so that the sums in the gradients of scales and probabilities do not cancel.
    grad = torch.sign(x) * (0.5 + torch.rand(case.shape, generator=generator, **like_x))
    if case.channels_last:
        x, grad = (tensor.contiguous(memory_format=torch.channels_last) for tensor in (x, grad))
    mixed = len(case.bits) > 1
    if not mixed and rows.axis is not None:
        scales = scales[0].clone()
    probs = (
        torch.softmax(torch.linspace(0.0, 1.0, len(case.bits), device=device), 0).requires_grad_() if mixed else None
    )
    zero_points = torch.full_like(scales, zero_point).requires_grad_() if case.offset else None
    return Inputs(case, x.requires_grad_(), scales.requires_grad_(), probs, zero_points, grad, ranges)


def _unambiguous_values(scales: Tensor, ranges: tuple[tuple[int, int], ...], dtype: torch.dtype) -> Tensor:
    """Normal values, none of them at a place where implementations may differ for any candidate."""
    values = torch.randn(2 * _POOL, generator=torch.Generator().manual_seed(0)).to(dtype)
    good = torch.ones_like(values, dtype=torch.bool)
    for scale, (low, high) in zip(scales, ranges, strict=True):
        steps = values.double() / scale
        good &= (steps - steps.floor() - 0.5).abs() > _MARGIN
        good &= (steps < high - _MARGIN) | (steps > high + 0.5 + _MARGIN)
        good &= (steps > low + _MARGIN) | (steps < low - 0.5 - _MARGIN)
    return values[good][:_POOL]
