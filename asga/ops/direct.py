"""The sweeps on small CPU tensors, past PyTorch's dispatcher.

On the weight of a depthwise layer the sweep takes two microseconds and the call of an operator ten: boxed arguments,
a look-up by keys, an allocation through the stable interface. Where nothing can be looking at the operators, and the
tensors are contiguous, the eager gradients in `asga.ops.autograd` call the same sweeps on addresses instead, in one
thread. Results have the same bits.
"""

import torch
from torch import Tensor
from torch.nn import Parameter

from asga.ops import backends

if backends.unavailable("cpu") is None:
    from asga import _C

# Values times candidates up to which one thread, at once, beats the operator with all of them.
_LARGEST = 2**18
_PLAIN = (Tensor, Parameter)

# As csrc/direct.cpp numbers them. Scales, zero points and probabilities are in float32 here.
FORMATS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

# Outer, channels, inner, as in csrc/channel_layout.h, and the format of the values.
Layout = tuple[int, int, int, int]


def layout(candidates: int, axis: int | None, input: Tensor, *others: Tensor) -> Layout | None:
    """How the channels of `input` lie, if the functions below take these tensors; otherwise None."""
    numel = input.numel()
    if not 0 < numel * candidates <= _LARGEST or not backends.serves_cpu():
        return None
    dtype = input.dtype
    format = FORMATS.get(dtype)
    if format is None or not plain(input, dtype):
        return None
    # Modes, such as those of fake tensors and of counting operations, want to see operators, and so does a trace.
    if torch._C._len_torch_dispatch_stack() > 0 or torch._C._get_tracing_state() is not None:
        return None
    if not all(map(plain, others)):
        return None
    if axis is None or (channels := input.shape[axis]) == 1:
        return 1, 1, numel, format
    inner = input.stride(axis)
    return numel // (channels * inner), channels, inner, format


def fits(layout: Layout, grad: Tensor, input: Tensor, *others: Tensor) -> bool:
    """Whether the functions for backward take these tensors, with the layout that forward was run with."""
    dtype = input.dtype
    same_format = FORMATS.get(dtype) == layout[3]
    return same_format and plain(grad, dtype) and plain(input, dtype) and all(map(plain, others))


def plain(tensor: Tensor, dtype: torch.dtype = torch.float32) -> bool:
    """Whether the memory of a tensor holds its values in this dtype, in order.

    Subclasses may have no memory; lazily negated tensors and lazy zeros have other values in it.
    """
    return (
        type(tensor) in _PLAIN
        and tensor.dtype is dtype
        and tensor.is_contiguous()
        and tensor.is_cpu
        and not tensor.is_neg()
        and not tensor._is_zerotensor()
    )


def fake_quant(
    layout: Layout, input: Tensor, scale: Tensor, zero_point: Tensor | None, quant_min: int, quant_max: int
) -> Tensor:
    """As the operator of this name."""
    output = torch.empty_like(input)
    _C.fake_quant(
        input.data_ptr(),
        output.data_ptr(),
        scale.data_ptr(),
        0 if zero_point is None else zero_point.data_ptr(),
        quant_min,
        quant_max,
        *layout,
    )
    return output


def fake_quant_backward(
    layout: Layout,
    grad: Tensor,
    input: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    quant_min: int,
    quant_max: int,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """As the operator of this name, with None for a gradient that does not exist."""
    grad_input, grad_scale = torch.empty_like(input), torch.empty_like(scale)
    grad_zero_point = None if zero_point is None else torch.empty_like(zero_point)
    _C.fake_quant_backward(
        grad.data_ptr(),
        input.data_ptr(),
        grad_input.data_ptr(),
        grad_scale.data_ptr(),
        0 if grad_zero_point is None else grad_zero_point.data_ptr(),
        scale.data_ptr(),
        0 if zero_point is None else zero_point.data_ptr(),
        quant_min,
        quant_max,
        *layout,
    )
    return grad_input, grad_scale, grad_zero_point


def mixed_fake_quant(
    layout: Layout,
    input: Tensor,
    scales: Tensor,
    probs: Tensor,
    zero_points: Tensor | None,
    quant_mins: list[int],
    quant_maxs: list[int],
) -> Tensor:
    """As the operator of this name."""
    output = torch.empty_like(input)
    _C.mixed_fake_quant(
        input.data_ptr(),
        output.data_ptr(),
        scales.data_ptr(),
        probs.data_ptr(),
        0 if zero_points is None else zero_points.data_ptr(),
        quant_mins,
        quant_maxs,
        *layout,
    )
    return output


def mixed_fake_quant_backward(
    layout: Layout,
    grad: Tensor,
    input: Tensor,
    scales: Tensor,
    probs: Tensor,
    zero_points: Tensor | None,
    quant_mins: list[int],
    quant_maxs: list[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """As the operator of this name, with None for a gradient that does not exist."""
    grad_input, grad_scales, grad_probs = torch.empty_like(input), torch.empty_like(scales), torch.empty_like(probs)
    grad_zero_points = None if zero_points is None else torch.empty_like(zero_points)
    _C.mixed_fake_quant_backward(
        grad.data_ptr(),
        input.data_ptr(),
        grad_input.data_ptr(),
        grad_scales.data_ptr(),
        grad_probs.data_ptr(),
        0 if grad_zero_points is None else grad_zero_points.data_ptr(),
        scales.data_ptr(),
        probs.data_ptr(),
        0 if zero_points is None else zero_points.data_ptr(),
        quant_mins,
        quant_maxs,
        *layout,
    )
    return grad_input, grad_scales, grad_probs, grad_zero_points
