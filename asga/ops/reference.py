"""The quantizers in plain torch: the definition that every other backend is tested against.

The arithmetic below is the contract. In float32 a kernel must give the same bits for every forward result and
for the gradient of the input; sums (gradients of scales, probabilities, zero points) may differ only by the
order of their additions. The computation runs in float32, or in float64 for float64 inputs.

`asga.ops.functional` checks all arguments before; what direct calls of `torch.ops.asga` need is in `asga.ops.checks`.
"""

import torch
from torch import Tensor

from asga.ops.checks import check_grad, check_mixture, check_quantizer


def fake_quant(
    input: Tensor, scale: Tensor, zero_point: Tensor | None, quant_min: int, quant_max: int, axis: int | None
) -> Tensor:
    """Round `input` to the grid of `scale` and clamp it to the range; see `asga.ops.fake_quant`."""
    scaled, clamped, scale = _scale_and_clamp(input, scale, zero_point, quant_min, quant_max, axis)
    del scaled
    return _like(input, _round(clamped) * scale)


def fake_quant_backward(
    grad: Tensor,
    input: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    quant_min: int,
    quant_max: int,
    axis: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `fake_quant`: (input, scale, zero_point), the last one empty without a zero point.

    Straight-through as in LSQ (Esser et al. 2020, eq. 2-3): with v = input / scale, inside the range dx = g and
    ds = g (round(v) - v); outside dx = 0, ds = g (bound - zero_point), dz = -g scale.
    """
    check_grad(grad, input)
    scaled, clamped, wide_scale = _scale_and_clamp(input, scale, zero_point, quant_min, quant_max, axis)
    grad = grad.to(scaled.dtype)
    inside = scaled == clamped
    rounded = _round(clamped)
    grad_input = _like(input, torch.where(inside, grad, 0.0))
    grad_scale = _sum_to(scale, grad * (rounded - torch.where(inside, scaled, 0.0)), axis)
    if zero_point is None:
        return grad_input, grad_scale, scale.new_empty(0)
    grad_zero_point = _sum_to(zero_point, torch.where(inside, 0.0, -(grad * wide_scale)), axis)
    return grad_input, grad_scale, grad_zero_point


def mixed_fake_quant(
    input: Tensor,
    scales: Tensor,
    probs: Tensor,
    zero_points: Tensor | None,
    quant_mins: list[int],
    quant_maxs: list[int],
    axis: int | None,
) -> Tensor:
    """Sum of K quantized copies of `input`, weighted by `probs`; see `asga.ops.mixed_fake_quant`."""
    check_mixture(input, scales, probs, zero_points, quant_mins, quant_maxs, axis)
    x, inverse, weight = _prepare_mixture(input, scales, probs, axis)
    output = None
    for k, (low, high) in enumerate(_mixture_bounds(x, zero_points, quant_mins, quant_maxs, axis)):
        term = _round(torch.clamp(x * inverse[k], low, high)) * weight[k]
        output = term if output is None else output + term
    return _like(input, output)


def mixed_fake_quant_backward(
    grad: Tensor,
    input: Tensor,
    scales: Tensor,
    probs: Tensor,
    zero_points: Tensor | None,
    quant_mins: list[int],
    quant_maxs: list[int],
    axis: int | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `mixed_fake_quant`: (input, scales, probs, zero_points), the last one empty without zero points.

    With v_k = x * (1 / s_k) and q_k the same clamped and rounded, relative to the zero point: dx = g sum_k p_k
    [inside_k], ds_k = p_k sum g (q_k - v_k [inside_k]), dp_k = sum g q_k s_k, dz_k = -p_k s_k sum g [outside_k].
    """
    check_grad(grad, input)
    check_mixture(input, scales, probs, zero_points, quant_mins, quant_maxs, axis)
    x, inverse, _ = _prepare_mixture(input, scales, probs, axis)
    grad = grad.to(x.dtype)
    probs_wide = probs.to(x.dtype)
    passed = torch.zeros_like(x)
    grad_scales, grad_probs, grad_zero_points = [], [], []
    for k, (low, high) in enumerate(_mixture_bounds(x, zero_points, quant_mins, quant_maxs, axis)):
        scaled = x * inverse[k]
        clamped = torch.clamp(scaled, low, high)
        inside = scaled == clamped
        rounded = _round(clamped)
        passed = passed + torch.where(inside, probs_wide[k], 0.0)
        residual = grad * (rounded - torch.where(inside, scaled, 0.0))
        grad_scales.append(_sum_to(scales[k], residual, axis, torch.float64) * probs[k])
        grad_probs.append((_sum_to(scales[k], grad * rounded, axis, torch.float64) * scales[k]).sum())
        if zero_points is not None:
            outside = _sum_to(scales[k], torch.where(inside, 0.0, grad), axis, torch.float64)
            grad_zero_points.append(outside * scales[k] * -probs[k])
    return (
        _like(input, grad * passed),
        _like(scales, torch.stack(grad_scales)),
        _like(probs, torch.stack(grad_probs)),
        scales.new_empty(0) if zero_points is None else _like(zero_points, torch.stack(grad_zero_points)),
    )


def _scale_and_clamp(
    input: Tensor, scale: Tensor, zero_point: Tensor | None, quant_min: int, quant_max: int, axis: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    """`input / scale`, the same clamped to the range, and the scale, broadcastable, in the dtype of the sums.

    Bounds are integers once the zero point is rounded, so clamping before rounding equals clamping after, and the
    mask for the gradient (LSQ: before rounding) is the comparison of the two.
    """
    check_quantizer(input, scale, zero_point, axis)
    dtype = _compute_dtype(input)
    scale = _broadcast(scale.to(dtype), input, axis)
    low: Tensor | int = quant_min
    high: Tensor | int = quant_max
    if zero_point is not None:
        offset = _broadcast(torch.round(zero_point.to(dtype)), input, axis)
        low, high = quant_min - offset, quant_max - offset
    scaled = input.to(dtype) / scale
    return scaled, torch.clamp(scaled, low, high), scale


def _prepare_mixture(
    input: Tensor, scales: Tensor, probs: Tensor, axis: int | None
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """The input, and per candidate 1/s and p*s: one division per scale instead of one per value and candidate."""
    dtype = _compute_dtype(input)
    scales, probs = scales.to(dtype), probs.to(dtype)
    inverse = [_broadcast(1.0 / scale, input, axis) for scale in scales]
    weight = [_broadcast(scale * prob, input, axis) for scale, prob in zip(scales, probs, strict=True)]
    return input.to(dtype), inverse, weight


def _mixture_bounds(
    x: Tensor, zero_points: Tensor | None, quant_mins: list[int], quant_maxs: list[int], axis: int | None
) -> list[tuple[Tensor, Tensor]] | list[tuple[int, int]]:
    """Per candidate the range minus the rounded zero point: clamping to it before rounding equals clamping after."""
    ranges = list(zip(quant_mins, quant_maxs, strict=True))
    if zero_points is None:
        return ranges
    offsets = [_broadcast(torch.round(offset), x, axis) for offset in zero_points.to(x.dtype)]
    return [(low - offset, high - offset) for (low, high), offset in zip(ranges, offsets, strict=True)]


def _round(x: Tensor) -> Tensor:
    """Round half to even; adding zero turns -0.0 into 0.0."""
    return torch.round(x) + 0.0


def _compute_dtype(input: Tensor) -> torch.dtype:
    return torch.float64 if input.dtype == torch.float64 else torch.float32


def _broadcast(per_channel: Tensor, input: Tensor, axis: int | None) -> Tensor:
    if axis is None:
        return per_channel.reshape(())
    shape = [1] * input.dim()
    shape[axis] = -1
    return per_channel.reshape(shape)


def _sum_to(like: Tensor, terms: Tensor, axis: int | None, dtype: torch.dtype | None = None) -> Tensor:
    """Sum `terms` over all dimensions but `axis`, in float64, to the shape (and, by default, dtype) of `like`."""
    dims = [d for d in range(terms.dim()) if d != axis]
    total = terms.to(torch.float64)
    if dims:
        total = total.sum(dims)
    return total.reshape(like.shape).to(dtype or like.dtype)


def _like(tensor: Tensor, values: Tensor) -> Tensor:
    """`values` with the dtype and strides that `torch.empty_like(tensor)` would have."""
    return torch.empty_like(tensor).copy_(values)
