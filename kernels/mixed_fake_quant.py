"""Mixture of K quantizers: ``y = sum_k p_k s_k clamp(round(x / s_k), min_k, max_k)``.

One sweep forward, one sweep backward, whatever K is. With v_k = x * (1 / s_k) and q_k the same clamped and
rounded: dx = g sum_k p_k [inside_k], ds_k = p_k sum g (q_k - v_k [inside_k]), dp_k = sum g q_k s_k. A zero
point z_k moves the range: q_k is clamped to min_k - z_k and max_k - z_k, and dz_k = -p_k s_k sum g [outside_k].
One reciprocal per scale instead of one division per value and candidate keeps the sweep bound by memory.
`asga.ops.reference` defines the arithmetic.

Source: Cai and Vasconcelos, "Rethinking Differentiable Search for Mixed-Precision Neural Networks" (EdMIPS),
CVPR 2020, eq. 10; the gradients of each candidate are LSQ's (Esser et al., ICLR 2020, eq. 2-3) and
LSQ+'s (Bhalgat et al., 2020).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from asga.kernels.layout import (
    NUM_WARPS,
    Layout,
    accumulator,
    blocks,
    dense_like,
    finish_blocks,
    fold,
    layout_of,
    partial_sums,
    sum_partials,
    tile_base,
    tile_offsets,
)
from asga.kernels.quant_math import clamp, divide, round_half_even, widen


def mixed_fake_quant(
    input: Tensor,
    scales: Tensor,
    probs: Tensor,
    zero_points: Tensor | None,
    quant_mins: list[int],
    quant_maxs: list[int],
    axis: int | None,
) -> Tensor:
    """Sum of K quantized copies of `input`, weighted by `probs`, without making the copies.

    The ranges are compiled in: a model has few different lists of candidates, and reading them costs nothing.

    Args:
        input: Any shape and strides; float32, bfloat16, float16 or float64.
        scales: ``[K]``, or ``[K, C]`` with ``C = input.shape[axis]``; any floating dtype.
        probs: ``[K]``, the weights of the candidates.
        zero_points: Like `scales`, or None for zero.
        quant_mins: K integers, the smallest of each grid.
        quant_maxs: K integers, the largest of each grid.
        axis: Dimension of the channels, counted from the front, or None for one scale per candidate.

    Returns:
        A tensor with the shape, dtype and strides of ``torch.empty_like(input)``.
    """
    output = torch.empty_like(input)
    if input.numel() == 0:
        return output
    input, scales, probs = dense_like(input, output), scales.contiguous(), probs.contiguous()
    zero_points = None if zero_points is None else zero_points.contiguous()
    layout = _layout(input, axis, len(quant_mins), zero_points)
    with torch.cuda.device_of(input):
        _mixed_fake_quant_kernel[(layout.channel_blocks * layout.tiles,)](
            input,
            scales,
            probs,
            zero_points,
            output,
            layout.channels,
            layout.length,
            *layout.strides,
            QUANT_MINS=tuple(quant_mins),
            QUANT_MAXS=tuple(quant_maxs),
            K=len(quant_mins),
            BLOCK_C=layout.block_c,
            BLOCK_L=layout.block_l,
            num_warps=NUM_WARPS,
            enable_fp_fusion=False,
        )
    return output


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

    Deterministic: no atomics, and the order of all additions depends on sizes and dtype alone.

    Args:
        grad: Gradient of the output; shaped like `input`, any strides.
        input: As in `mixed_fake_quant`, like all that follow.
        scales: See `mixed_fake_quant`.
        probs: See `mixed_fake_quant`.
        zero_points: See `mixed_fake_quant`.
        quant_mins: See `mixed_fake_quant`.
        quant_maxs: See `mixed_fake_quant`.
        axis: See `mixed_fake_quant`.

    Returns:
        Gradients of `input`, `scales`, `probs` and `zero_points`, each with the shape, dtype and strides that
        ``torch.empty_like`` of it has.
    """
    grad_input = torch.empty_like(input)
    if not (scales.is_contiguous() and (zero_points is None or zero_points.is_contiguous())):
        contiguous = (scales.contiguous(), probs, None if zero_points is None else zero_points.contiguous())
        grads = mixed_fake_quant_backward(grad, input, *contiguous, quant_mins, quant_maxs, axis)
        grad_zero_points = grads[3] if zero_points is None else torch.empty_like(zero_points).copy_(grads[3])
        return grads[0], torch.empty_like(scales).copy_(grads[1]), grads[2], grad_zero_points
    probs = probs.contiguous()
    grad_scales, grad_probs = torch.empty_like(scales), torch.empty_like(probs)
    grad_zero_points = scales.new_empty(0) if zero_points is None else torch.empty_like(zero_points)
    if input.numel() == 0:
        return grad_input, grad_scales.zero_(), grad_probs.zero_(), grad_zero_points.zero_()
    grad, input = dense_like(grad, grad_input), dense_like(input, grad_input)
    layout = _layout(input, axis, len(quant_mins), zero_points)
    candidates, terms = len(quant_mins), 1 if zero_points is None else 2
    splits = layout.splits(candidates * terms * accumulator(input).itemsize)
    programs = layout.channel_blocks * splits
    scale_partials = partial_sums(input, candidates, splits, layout.channels)
    prob_partials = partial_sums(input, candidates, programs)
    zero_point_partials = None if zero_points is None else torch.empty_like(scale_partials)
    with torch.cuda.device_of(input):
        _mixed_fake_quant_backward_kernel[(programs,)](
            grad,
            input,
            scales,
            probs,
            zero_points,
            grad_input,
            scale_partials,
            prob_partials,
            zero_point_partials,
            layout.tiles,
            splits,
            layout.channels,
            layout.length,
            *layout.strides,
            QUANT_MINS=tuple(quant_mins),
            QUANT_MAXS=tuple(quant_maxs),
            K=candidates,
            BLOCK_C=layout.block_c,
            BLOCK_L=layout.block_l,
            FOLD=layout.fold,
            num_warps=NUM_WARPS,
            maxnreg=_most_registers(candidates, zero_points),
            enable_fp_fusion=False,
        )
        block_splits, block_c = finish_blocks(layout.channels)
        _mixed_fake_quant_finish_kernel[(triton.cdiv(layout.channels, block_c), candidates)](
            scales,
            probs,
            scale_partials,
            prob_partials,
            zero_point_partials,
            grad_scales,
            grad_probs,
            grad_zero_points,
            splits,
            programs,
            layout.channels,
            BLOCK_SPLITS=block_splits,
            BLOCK_C=block_c,
            num_warps=NUM_WARPS,
            enable_fp_fusion=False,
        )
    return grad_input, grad_scales, grad_probs, grad_zero_points


def _layout(input: Tensor, axis: int | None, candidates: int, zero_points: Tensor | None) -> Layout:
    """Tiles half as large with zero points or many candidates, whose bounds and sums take registers."""
    return layout_of(input, axis, vectors=2 if zero_points is None and candidates < 7 else 1)


def _most_registers(candidates: int, zero_points: Tensor | None) -> int | None:
    """For a thread of the backward kernel; None leaves the choice to the compiler, which spills in these cases.

    Elsewhere it finds a number with more threads on a multiprocessor than when it may use all registers.
    """
    return 240 if (candidates, zero_points is not None) in ((2, False), (5, True), (7, False)) else None


@triton.jit
def _mixed_fake_quant_kernel(
    input_ptr,  # x[loops][channels][length]
    scales_ptr,  # [K][channels]
    probs_ptr,  # [K]
    zero_points_ptr,  # [K][channels] or None
    output_ptr,  # like input
    channels,
    length,
    loop_stride,
    channel_stride,
    length_stride,
    QUANT_MINS: tl.constexpr,
    QUANT_MAXS: tl.constexpr,
    K: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    channel_blocks = blocks(channels, BLOCK_C)
    first_channel = tl.program_id(0) % channel_blocks * BLOCK_C
    tile = tl.program_id(0) // channel_blocks
    base, left = tile_base(tile, first_channel, length, loop_stride, channel_stride, length_stride, BLOCK_L)
    offsets = tile_offsets(channel_stride, length_stride, BLOCK_C, BLOCK_L)
    channel = first_channel + tl.arange(0, BLOCK_C)
    mask = (channel < channels)[:, None] & (tl.arange(0, BLOCK_L)[None, :] < left)

    x = widen(tl.load(input_ptr + base + offsets, mask, other=0.0))
    y = _term(x, scales_ptr, probs_ptr, zero_points_ptr, channel, channels, QUANT_MINS, QUANT_MAXS, 0)
    for k in tl.static_range(1, K):
        y += _term(x, scales_ptr, probs_ptr, zero_points_ptr, channel, channels, QUANT_MINS, QUANT_MAXS, k)
    tl.store(output_ptr + base + offsets, y, mask)


@triton.jit(do_not_specialize=["tiles", "splits"])
def _mixed_fake_quant_backward_kernel(
    grad_ptr,  # like input
    input_ptr,  # x[loops][channels][length]
    scales_ptr,  # [K][channels]
    probs_ptr,  # [K]
    zero_points_ptr,  # [K][channels] or None
    grad_input_ptr,  # like input
    scale_partials_ptr,  # [K][splits][channels]
    prob_partials_ptr,  # [K][programs]
    zero_point_partials_ptr,  # [K][splits][channels] or None
    tiles,
    splits,
    channels,
    length,
    loop_stride,
    channel_stride,
    length_stride,
    QUANT_MINS: tl.constexpr,
    QUANT_MAXS: tl.constexpr,
    K: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_L: tl.constexpr,
    FOLD: tl.constexpr,
):
    compute = scale_partials_ptr.dtype.element_ty
    channel_blocks = blocks(channels, BLOCK_C)
    first_channel = tl.program_id(0) % channel_blocks * BLOCK_C
    split = tl.program_id(0) // channel_blocks
    offsets = tile_offsets(channel_stride, length_stride, BLOCK_C, BLOCK_L)
    channel = first_channel + tl.arange(0, BLOCK_C)

    # Tuples with one entry per candidate: registers, once the loops over K are unrolled.
    inverses, probs, scale_sums, prob_sums, outside_sums = (), (), (), (), ()
    for k in tl.static_range(K):
        scale, inverse = _scale_and_inverse(scales_ptr, k, channel, channels, compute)
        inverses += (inverse,)
        probs += (tl.load(probs_ptr + k).to(compute),)
        scale_sums += (tl.zeros([BLOCK_C, BLOCK_L // FOLD], compute),)
        prob_sums += (tl.zeros([BLOCK_C, BLOCK_L // FOLD], compute),)
        if zero_points_ptr is not None:
            outside_sums += (tl.zeros([BLOCK_C, BLOCK_L // FOLD], compute),)

    for tile in range(split, tiles, splits):
        base, left = tile_base(tile, first_channel, length, loop_stride, channel_stride, length_stride, BLOCK_L)
        mask = (channel < channels)[:, None] & (tl.arange(0, BLOCK_L)[None, :] < left)
        x = tl.load(input_ptr + base + offsets, mask, other=0.0).to(compute)
        grad = tl.load(grad_ptr + base + offsets, mask, other=0.0).to(compute)
        passed = tl.zeros_like(x)
        new_scale_sums, new_prob_sums, new_outside_sums = (), (), ()
        for k in tl.static_range(K):
            scaled = x * inverses[k]
            # Inside the loop: bounds of their own come from the cache for each tile, for lack of registers.
            low, high = _bounds(zero_points_ptr, k, channel, channels, QUANT_MINS[k], QUANT_MAXS[k], compute)
            clamped = clamp(scaled, low, high)
            inside = scaled == clamped
            rounded = round_half_even(clamped)
            passed += tl.where(inside, probs[k], 0.0)
            residual = grad * (rounded - tl.where(inside, scaled, 0.0))
            new_scale_sums += (scale_sums[k] + fold(residual, FOLD),)
            new_prob_sums += (prob_sums[k] + fold(grad * rounded, FOLD),)
            if zero_points_ptr is not None:
                new_outside_sums += (outside_sums[k] + fold(tl.where(inside, 0.0, grad), FOLD),)
        scale_sums, prob_sums, outside_sums = new_scale_sums, new_prob_sums, new_outside_sums
        tl.store(grad_input_ptr + base + offsets, grad * passed, mask)

    for k in tl.static_range(K):
        row = (k * splits + split).to(tl.int64) * channels
        tl.store(scale_partials_ptr + row + channel, tl.sum(scale_sums[k], axis=1), channel < channels)
        if zero_points_ptr is not None:
            outside = tl.sum(outside_sums[k], axis=1)
            tl.store(zero_point_partials_ptr + row + channel, outside, channel < channels)
        scale, inverse = _scale_and_inverse(scales_ptr, k, channel, channels, compute)
        products = tl.sum(prob_sums[k], axis=1)[:, None] * scale
        tl.store(prob_partials_ptr + k * tl.num_programs(0) + tl.program_id(0), tl.sum(products))


@triton.jit(do_not_specialize=["splits", "programs", "channels"])
def _mixed_fake_quant_finish_kernel(
    scales_ptr,  # [K][channels]
    probs_ptr,  # [K]
    scale_partials_ptr,  # [K][splits][channels]
    prob_partials_ptr,  # [K][programs]
    zero_point_partials_ptr,  # [K][splits][channels] or None
    grad_scales_ptr,  # [K][channels]
    grad_probs_ptr,  # [K]
    grad_zero_points_ptr,  # [K][channels], or empty
    splits,
    programs,
    channels,
    BLOCK_SPLITS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    k = tl.program_id(1)
    channel = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    first = (k * splits).to(tl.int64) * channels
    mine, mask = k * channels + channel, channel < channels
    prob = tl.load(probs_ptr + k).to(tl.float64)
    total = sum_partials(scale_partials_ptr + first, channel, channels, splits, BLOCK_SPLITS)
    tl.store(grad_scales_ptr + mine, total * prob, mask)
    if zero_point_partials_ptr is not None:
        total = sum_partials(zero_point_partials_ptr + first, channel, channels, splits, BLOCK_SPLITS)
        total *= -prob * tl.load(scales_ptr + mine, mask, other=1.0).to(tl.float64)
        tl.store(grad_zero_points_ptr + mine, total, mask)
    if tl.program_id(0) == 0:
        one = tl.arange(0, 1)
        prob_total = sum_partials(prob_partials_ptr + k * programs, one, 1, programs, BLOCK_SPLITS * BLOCK_C)
        tl.store(grad_probs_ptr + k + one, prob_total)


@triton.jit
def _term(
    x,
    scales_ptr,
    probs_ptr,
    zero_points_ptr,
    channel,
    channels,
    QUANT_MINS: tl.constexpr,
    QUANT_MAXS: tl.constexpr,
    k: tl.constexpr,
):
    """What candidate k adds to the output."""
    scale, inverse = _scale_and_inverse(scales_ptr, k, channel, channels, x.dtype)
    weight = scale * tl.load(probs_ptr + k).to(x.dtype)
    low, high = _bounds(zero_points_ptr, k, channel, channels, QUANT_MINS[k], QUANT_MAXS[k], x.dtype)
    return round_half_even(clamp(x * inverse, low, high)) * weight


@triton.jit
def _bounds(
    zero_points_ptr,
    k,
    channel,
    channels,
    QUANT_MIN: tl.constexpr,
    QUANT_MAX: tl.constexpr,
    compute: tl.constexpr,
):
    """The range of candidate k minus the zero points of a block of channels; constants without zero points."""
    if zero_points_ptr is None:
        return tl.full([1, 1], QUANT_MIN, compute), tl.full([1, 1], QUANT_MAX, compute)
    else:
        zero_point = tl.load(zero_points_ptr + k * channels + channel, channel < channels, other=0.0).to(compute)
        offset = round_half_even(zero_point)[:, None]
        return QUANT_MIN - offset, QUANT_MAX - offset


@triton.jit
def _scale_and_inverse(scales_ptr, k, channel, channels, compute: tl.constexpr):
    """Scale of candidate k for a block of channels and its reciprocal, to broadcast along the length."""
    scale = tl.load(scales_ptr + k * channels + channel, channel < channels, other=1.0).to(compute)[:, None]
    return scale, divide(tl.full(scale.shape, 1.0, compute), scale)
