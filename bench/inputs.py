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


@dataclass(frozen=True)
class Inputs:
    """What the implementations are given.

    Attributes:
        case: Where they come from.
        x: Values, with the shape and dtype of the case; requires a gradient.
        scales: ``[1]`` or ``[C]``; for a mixture ``[K]`` or ``[K, C]``. Float32; requires a gradient.
        probs: ``[K]`` float32, requires a gradient; None for a single candidate.
        grad: Gradient of the output, like `x`.
        ranges: quant_min and quant_max of each candidate.
    """

    case: Case
    x: Tensor
    scales: Tensor
    probs: Tensor | None
    grad: Tensor
    ranges: tuple[tuple[int, int], ...]

    @property
    def differentiable(self) -> tuple[Tensor, ...]:
        """What gradients are computed for: x, scales and, in a mixture, probs."""
        return (self.x, self.scales) if self.probs is None else (self.x, self.scales, self.probs)


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
    pool = _unambiguous_values(base, ranges, case.dtype).to(device)
    x = pool[torch.randint(len(pool), case.shape, generator=generator, device=device)]
    scales = base.to(device)
    if case.axis is not None:
        # Powers of two: multiplying values and scales by them is exact in every dtype.
        channels = 2.0 ** torch.randint(-2, 3, (case.shape[0],), generator=generator, device=device)
        x *= channels.to(case.dtype).reshape(-1, *[1] * (x.dim() - 1))
        scales = scales[:, None] * channels
    # With the sign of x, so that the sums in the gradients of scales and probabilities do not cancel.
    grad = torch.sign(x) * (0.5 + torch.rand(case.shape, generator=generator, **like_x))
    mixed = len(case.bits) > 1
    if not mixed and case.axis is not None:
        scales = scales[0].clone()
    probs = (
        torch.softmax(torch.linspace(0.0, 1.0, len(case.bits), device=device), 0).requires_grad_() if mixed else None
    )
    return Inputs(case, x.requires_grad_(), scales.requires_grad_(), probs, grad, ranges)


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
