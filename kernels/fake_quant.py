"""Fake quantization: ``y = (clamp(round(x / s) + z, quant_min, quant_max) - z) * s``.

One sweep forward, one sweep backward. With v = x / s, inside the range dx = g and ds = g (round(v) - v);
outside dx = 0, ds = g (bound - z) and dz = -g s. `asga.ops.reference` defines the arithmetic.

Source: Esser et al., "Learned Step Size Quantization", ICLR 2020, eq. 1-3; for z, Bhalgat et al., "LSQ+",
2020.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from asga.kernels.layout import (
    NUM_WARPS,
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


def fake_quant(
    input: Tensor, scale: Tensor, zero_point: Tensor | None, quant_min: int, quant_max: int, axis: int | None
) -> Tensor:
    """Round `input` to the grid of `scale` and clamp it to the range.

    Args:
        input: Any shape and strides; float32, bfloat16, float16 or float64.
        scale: One element, or ``[C]`` with ``C = input.shape[axis]``; any floating dtype.
        zero_point: Like `scale`, or None for zero.
        quant_min: Smallest integer of the grid.
        quant_max: Largest integer of the grid.
        axis: Dimension of the channels, counted from the front, or None for one scale in all.

    Returns:
        A tensor with the shape, dtype and strides of ``torch.empty_like(input)``.
    """
    output = torch.empty_like(input)
    if input.numel() == 0:
        return output
    input, scale = dense_like(input, output), scale.contiguous()
    zero_point = None if zero_point is None else zero_point.contiguous()
    layout = layout_of(input, axis)
    with torch.cuda.device_of(input):
        _fake_quant_kernel[(layout.channel_blocks * layout.tiles,)](
            input,
            scale,
            zero_point,
            output,
            quant_min,
            quant_max,
            layout.channels,
            layout.length,
            *layout.strides,
            BLOCK_C=layout.block_c,
            BLOCK_L=layout.block_l,
            num_warps=NUM_WARPS,
            enable_fp_fusion=False,
        )
    return output


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

    Deterministic: no atomics, and the order of all additions depends on sizes and dtype alone.

    Args:
        grad: Gradient of the output; shaped like `input`, any strides.
        input: As in `fake_quant`, like all that follow.
        scale: See `fake_quant`.
        zero_point: See `fake_quant`.
        quant_min: See `fake_quant`.
        quant_max: See `fake_quant`.
        axis: See `fake_quant`.

    Returns:
        The gradient of `input` with the strides of ``torch.empty_like(input)``, the others contiguous; each
        with the shape and dtype of what it belongs to.
    """
    grad_input = torch.empty_like(input)
    scale = scale.contiguous()
    grad_scale = torch.empty_like(scale)
    grad_zero_point = None
    if zero_point is not None:
        zero_point = zero_point.contiguous()
        grad_zero_point = torch.empty_like(zero_point)
    if input.numel() == 0:
        grad_scale.zero_()
        return (
            grad_input,
            grad_scale,
            scale.new_empty(0) if grad_zero_point is None else grad_zero_point.zero_(),
        )
    grad, input = dense_like(grad, grad_input), dense_like(input, grad_input)
    layout = layout_of(input, axis)
    splits = layout.splits((1 if zero_point is None else 2) * accumulator(input).itemsize)
    scale_partials = partial_sums(input, splits, layout.channels)
    zero_point_partials = None if zero_point is None else torch.empty_like(scale_partials)
    with torch.cuda.device_of(input):
        _fake_quant_backward_kernel[(layout.channel_blocks * splits,)](
            grad,
            input,
            scale,
            zero_point,
            grad_input,
            scale_partials,
            zero_point_partials,
            quant_min,
            quant_max,
            layout.tiles,
            splits,
            layout.channels,
            layout.length,
            *layout.strides,
            BLOCK_C=layout.block_c,
            BLOCK_L=layout.block_l,
            FOLD=layout.fold,
            num_warps=NUM_WARPS,
            enable_fp_fusion=False,
        )
        block_splits, block_c = finish_blocks(layout.channels)
        _fake_quant_finish_kernel[(triton.cdiv(layout.channels, block_c),)](
            scale_partials,
            zero_point_partials,
            grad_scale,
            grad_zero_point,
            splits,
            layout.channels,
            BLOCK_SPLITS=block_splits,
            BLOCK_C=block_c,
            num_warps=NUM_WARPS,
            enable_fp_fusion=False,
        )
    return grad_input, grad_scale, scale.new_empty(0) if grad_zero_point is None else grad_zero_point


# The range changes from layer to layer: specializing on its values would compile one kernel for each.
@triton.jit(do_not_specialize=["quant_min", "quant_max"])
def _fake_quant_kernel(
    input_ptr,  # x[loops][channels][length]
    scale_ptr,  # [channels]
    zero_point_ptr,  # [channels] or None
    output_ptr,  # like input
    quant_min,
    quant_max,
    channels,
    length,
    loop_stride,
    channel_stride,
    length_stride,
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
    scale, low, high = _grid(scale_ptr, zero_point_ptr, quant_min, quant_max, channel, channels, x.dtype)
    y = round_half_even(clamp(divide(x, scale), low, high)) * scale
    tl.store(output_ptr + base + offsets, y, mask)


@triton.jit(do_not_specialize=["quant_min", "quant_max", "tiles", "splits"])
def _fake_quant_backward_kernel(
    grad_ptr,  # like input
    input_ptr,  # x[loops][channels][length]
    scale_ptr,  # [channels]
    zero_point_ptr,  # [channels] or None
    grad_input_ptr,  # like input
    scale_partials_ptr,  # [splits][channels]
    zero_point_partials_ptr,  # [splits][channels] or None
    quant_min,
    quant_max,
    tiles,
    splits,
    channels,
    length,
    loop_stride,
    channel_stride,
    length_stride,
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
    scale, low, high = _grid(scale_ptr, zero_point_ptr, quant_min, quant_max, channel, channels, compute)

    scale_sum = tl.zeros([BLOCK_C, BLOCK_L // FOLD], compute)
    zero_point_sum = tl.zeros([BLOCK_C, BLOCK_L // FOLD], compute)
    for tile in range(split, tiles, splits):
        base, left = tile_base(tile, first_channel, length, loop_stride, channel_stride, length_stride, BLOCK_L)
        mask = (channel < channels)[:, None] & (tl.arange(0, BLOCK_L)[None, :] < left)
        x = tl.load(input_ptr + base + offsets, mask, other=0.0).to(compute)
        grad = tl.load(grad_ptr + base + offsets, mask, other=0.0).to(compute)
        scaled = divide(x, scale)
        clamped = clamp(scaled, low, high)
        inside = scaled == clamped
        tl.store(grad_input_ptr + base + offsets, tl.where(inside, grad, 0.0), mask)
        scale_sum += fold(grad * (round_half_even(clamped) - tl.where(inside, scaled, 0.0)), FOLD)
        if zero_point_ptr is not None:
            zero_point_sum += fold(tl.where(inside, 0.0, -(grad * scale)), FOLD)

    partial = split.to(tl.int64) * channels + channel
    tl.store(scale_partials_ptr + partial, tl.sum(scale_sum, axis=1), channel < channels)
    if zero_point_ptr is not None:
        tl.store(zero_point_partials_ptr + partial, tl.sum(zero_point_sum, axis=1), channel < channels)


@triton.jit(do_not_specialize=["splits", "channels"])
def _fake_quant_finish_kernel(
    scale_partials_ptr,  # [splits][channels]
    zero_point_partials_ptr,  # [splits][channels] or None
    grad_scale_ptr,  # [channels]
    grad_zero_point_ptr,  # [channels] or None
    splits,
    channels,
    BLOCK_SPLITS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    channel = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    total = sum_partials(scale_partials_ptr, channel, channels, splits, BLOCK_SPLITS)
    tl.store(grad_scale_ptr + channel, total, channel < channels)
    if zero_point_partials_ptr is not None:
        total = sum_partials(zero_point_partials_ptr, channel, channels, splits, BLOCK_SPLITS)
        tl.store(grad_zero_point_ptr + channel, total, channel < channels)


@triton.jit
def _grid(scale_ptr, zero_point_ptr, quant_min, quant_max, channel, channels, compute: tl.constexpr):
    """Scale and bounds, minus the zero point, of a block of channels, to broadcast along the length.

    The bounds are integers, so clamping before rounding equals clamping after.
    """
    scale = tl.load(scale_ptr + channel, channel < channels, other=1.0).to(compute)[:, None]
    low = tl.zeros_like(scale) + quant_min
    high = tl.zeros_like(scale) + quant_max
    if zero_point_ptr is not None:
        zero_point = tl.load(zero_point_ptr + channel, channel < channels, other=0.0).to(compute)
        offset = round_half_even(zero_point)[:, None]
        low -= offset
        high -= offset
    return scale, low, high
