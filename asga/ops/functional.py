"""The public operators: arguments are checked here, once and in the same words for every backend."""

from collections.abc import Sequence
from numbers import Integral

import torch
from torch import Tensor

import asga.ops.backends  # noqa: F401  (attaches the kernels to torch.ops.asga)
from asga.ops.autograd import fake_quant_function, mixed_fake_quant_function
from asga.ops.checks import INPUT_DTYPES, MAX_CANDIDATES, check_tensors
from asga.ops.transforms import transformable, transforming

# Grids reach this far from zero at most: sixteen bits, with either sign.
_LARGEST = 2**16


def fake_quant(
    input: Tensor,
    scale: Tensor,
    zero_point: Tensor | None = None,
    *,
    quant_min: int,
    quant_max: int,
    axis: int | None = None,
    group_size: int | None = None,
) -> Tensor:
    """Quantize to integers and back, in one sweep: ``(clamp(round(x / s) + z, quant_min, quant_max) - z) * s``.

    Rounds half to even, divides as IEEE does, propagates NaN, clamps infinities and never returns -0.0. Computes
    in float32 (float64 for float64 inputs). Differentiable in every floating argument with the straight-through
    gradients of LSQ; the gradient of the scale is the plain one, without LSQ's factor ``1/sqrt(n * quant_max)``.

    Scales are not checked, as that would stall a GPU. One that is no positive number is an error of the caller, without
    an exception or harm to memory: it takes the same arithmetic, with the same bits of result and input gradient on
    every backend. A scale of 0 gives 0, and NaN for values that are 0 (in `mixed_fake_quant` too, through 0 * inf); a
    negative one gives the range mirrored, and maybe -0.0; an infinite or NaN one gives NaN. So do NaN zero points.

    Autocast leaves the dtypes alone: the result has that of `input`, and scales should stay in float32. A second
    derivative does not exist: the backward of a backward raises RuntimeError. Under `torch.func`,
    grad and vjp work, vmap runs sample after sample, and forward mode raises torch's error.

    Args:
        input: Any shape, float32, bfloat16, float16 or float64.
        scale: One element (per tensor), shape ``[C]`` with ``C = input.shape[axis]`` (per channel), or
            ``[..., L / group_size]`` for an input ``[..., L]`` (per group); floating, positive.
        zero_point: Like `scale`; rounded half to even before use. None is zero. Its magnitude must stay below
            2**21.
        quant_min: Smallest integer of the grid.
        quant_max: Largest integer of the grid.
        axis: Dimension of the channels, or None for one scale in all or per group.
        group_size: Neighbors along the last dimension that share a scale, as for the weights of language models.
            An input that is not contiguous is copied, and the result is contiguous.

    Returns:
        A tensor with the shape, dtype and strides of ``torch.empty_like(input)``.

    Raises:
        TypeError: A tensor is not floating point or not dense, or none at all, or a setting is no integer.
        ValueError: A range, axis, group size, shape or device does not fit; the message names the argument.

    Source:
        Esser et al., "Learned Step Size Quantization", ICLR 2020, eq. 1-3; Bhalgat et al., "LSQ+", 2020, for the
        zero point.
    """
    try:
        axis = _check_input(input, axis)
        _check_range("quant_min", "quant_max", quant_min, quant_max)
        if group_size is not None:
            groups = _check_groups(input, axis, group_size)
            _check_scale("scale", scale, input, groups, grouped=True)
            if zero_point is not None:
                _check_scale("zero_point", zero_point, input, groups, grouped=True)
                zero_point = zero_point.reshape(-1)
            rows, scale = input.reshape(-1, group_size), scale.reshape(-1)
            output = fake_quant(rows, scale, zero_point, quant_min=quant_min, quant_max=quant_max, axis=0)
            return output.reshape(input.shape)
        shape = (1,) if axis is None else (input.shape[axis],)
        _check_scale("scale", scale, input, shape, axis)
        if zero_point is not None:
            _check_scale("zero_point", zero_point, input, shape, axis)
        if torch.compiler.is_compiling():
            return torch.ops.asga.fake_quant(input, scale, zero_point, quant_min, quant_max, axis)
        if transforming():
            return _transformable_fake_quant(input, scale, zero_point, quant_min, quant_max, axis)
        run = fake_quant_function(quant_min, quant_max, axis)
        return run(input, scale) if zero_point is None else run(input, scale, zero_point)
    except Exception:
        # Only now: on small tensors, asking before would cost a part of the call.
        check_tensors(input=input, scale=scale, zero_point=zero_point)
        raise


def mixed_fake_quant(
    input: Tensor,
    scales: Tensor,
    probs: Tensor,
    zero_points: Tensor | None = None,
    *,
    quant_mins: Sequence[int],
    quant_maxs: Sequence[int],
    axis: int | None = None,
    group_size: int | None = None,
) -> Tensor:
    """Mixture of K quantizers in one sweep: ``sum_k probs[k] * fake_quant(x; scales[k], z[k], min_k, max_k)``.

    Reads `input` once, writes the output once and keeps only `input` for backward, whatever K is. Multiplies by
    the reciprocal of each scale (`fake_quant` divides), so single values on a rounding boundary may differ from
    the sum of K calls of `fake_quant`. Differentiable in `input`, `scales`, `probs` and `zero_points`.

    Bad scales, autocast, second derivatives and `torch.func` are as in `fake_quant`: a candidate with a NaN or infinite
    scale makes the whole result NaN, whatever its probability.

    Args:
        input: Any shape, float32, bfloat16, float16 or float64.
        scales: ``[K]`` (per tensor), ``[K, C]`` with ``C = input.shape[axis]`` (per channel), or
            ``[K, ..., L / group_size]`` for an input ``[..., L]`` (per group); floating, positive.
        probs: ``[K]``, the weights of the candidates. They need not sum to one.
        zero_points: Like `scales`; rounded half to even before use. None is zero. Their magnitude must stay below
            2**21.
        quant_mins: K integers, the smallest of each grid.
        quant_maxs: K integers, the largest of each grid.
        axis: Dimension of the channels, or None for one scale per candidate, in all or per group.
        group_size: Neighbors along the last dimension that share scales; see `fake_quant`.

    Returns:
        A tensor with the shape, dtype and strides of ``torch.empty_like(input)``.

    Raises:
        TypeError: A tensor is not floating point or not dense, or none at all, or a setting is no integer.
        ValueError: A range, count, axis, group size, shape or device does not fit; the message names the argument.

    Source:
        Cai and Vasconcelos, "Rethinking Differentiable Search for Mixed-Precision Neural Networks" (EdMIPS),
        CVPR 2020, eq. 10: one convolution of the mixture; Bhalgat et al., "LSQ+", 2020, for the zero points.
    """
    try:
        axis = _check_input(input, axis)
        quant_mins, quant_maxs = _check_integers("quant_mins", quant_mins), _check_integers("quant_maxs", quant_maxs)
        candidates = len(quant_mins)
        if not 1 <= candidates <= MAX_CANDIDATES:
            raise ValueError(f"quant_mins has {candidates} candidates; between 1 and {MAX_CANDIDATES} are supported")
        if len(quant_maxs) != candidates:
            raise ValueError(f"quant_maxs has {len(quant_maxs)} entries but quant_mins has {candidates}")
        for k, (low, high) in enumerate(zip(quant_mins, quant_maxs, strict=True)):
            # Names take longer to make than the rest of the check.
            if not (type(low) is int is type(high) and -_LARGEST <= low < high <= _LARGEST):
                _check_range(f"quant_mins[{k}]", f"quant_maxs[{k}]", low, high)
        _check_scale("probs", probs, input, (candidates,))
        if group_size is not None:
            groups = _check_groups(input, axis, group_size)
            _check_scale("scales", scales, input, (candidates, *groups), grouped=True)
            if zero_points is not None:
                _check_scale("zero_points", zero_points, input, (candidates, *groups), grouped=True)
                zero_points = zero_points.reshape(candidates, -1)
            rows, scales = input.reshape(-1, group_size), scales.reshape(candidates, -1)
            output = mixed_fake_quant(
                rows, scales, probs, zero_points, quant_mins=quant_mins, quant_maxs=quant_maxs, axis=0
            )
            return output.reshape(input.shape)
        channels = () if axis is None else (input.shape[axis],)
        _check_scale("scales", scales, input, (candidates, *channels), axis)
        if zero_points is not None:
            _check_scale("zero_points", zero_points, input, (candidates, *channels), axis)
        if torch.compiler.is_compiling():
            return torch.ops.asga.mixed_fake_quant(input, scales, probs, zero_points, quant_mins, quant_maxs, axis)
        if transforming():
            return _transformable_mixed_fake_quant(input, scales, probs, zero_points, quant_mins, quant_maxs, axis)
        run = mixed_fake_quant_function(quant_mins, quant_maxs, axis)
        return run(input, scales, probs) if zero_points is None else run(input, scales, probs, zero_points)
    except Exception:
        check_tensors(input=input, scales=scales, probs=probs, zero_points=zero_points)
        raise


_transformable_fake_quant = transformable("fake_quant", tensors=3)
_transformable_mixed_fake_quant = transformable("mixed_fake_quant", tensors=4)


def _check_input(input: Tensor, axis: int | None) -> int | None:
    """Check dtype and axis; returns the axis counted from the front."""
    if input.dtype not in INPUT_DTYPES:
        raise TypeError(f"input has dtype {input.dtype}; float32, bfloat16, float16 and float64 are supported")
    if axis is None:
        return None
    _check_integer("axis", axis)
    dims = input.dim()
    if not -dims <= axis < dims:
        raise ValueError(f"axis is {axis}, out of range for an input with {dims} dimensions")
    return axis % dims


def _check_range(name_min: str, name_max: str, quant_min: int, quant_max: int) -> None:
    _check_integer(name_min, quant_min)
    _check_integer(name_max, quant_max)
    if quant_min >= quant_max:
        raise ValueError(f"{name_min} is {quant_min}, which is not below {name_max} = {quant_max}")
    if quant_min < -_LARGEST or quant_max > _LARGEST:
        raise ValueError(f"{name_min} = {quant_min}, {name_max} = {quant_max}: grids beyond 16 bits are not supported")


def _check_integer(name: str, value: int) -> None:
    """Refuses 7.0 and True, which equal 7 and 1 and so would be found in caches in their place."""
    if type(value) is int:  # takes a tenth of the time of what follows
        return
    if isinstance(value, bool) or not isinstance(value, (Integral, torch.SymInt)):
        raise TypeError(f"{name} is {value!r}, of type {type(value).__name__}; an integer is needed")


def _check_integers(name: str, values: Sequence[int]) -> tuple[int, ...]:
    try:
        return tuple(values)
    except TypeError:
        raise TypeError(f"{name} is {values!r}, of type {type(values).__name__}; integers are needed") from None


def _check_groups(input: Tensor, axis: int | None, group_size: int) -> tuple[int, ...]:
    """The shape of the scales of an input with one scale per group."""
    if axis is not None:
        raise ValueError(f"axis is {axis} and group_size is {group_size}; give one of them")
    _check_integer("group_size", group_size)
    length = input.shape[-1] if input.dim() > 0 else 1
    if group_size < 1 or length % group_size != 0:
        raise ValueError(f"group_size is {group_size}, which does not divide the last dimension of input, {length}")
    return (*input.shape[:-1], length // group_size)


def _check_scale(
    name: str, scale: Tensor, input: Tensor, shape: tuple[int, ...], axis: int | None = None, *, grouped: bool = False
) -> None:
    if not scale.is_floating_point():
        raise TypeError(f"{name} has dtype {scale.dtype}; a real floating-point tensor is needed")
    if scale.device != input.device:
        raise ValueError(f"{name} is on {scale.device} but input is on {input.device}")
    if scale.shape == shape or (axis is None and shape == (1,) and scale.numel() == 1 and not grouped):
        return
    of_input = f"of an input of shape {tuple(input.shape)}"
    where = f"for axis {axis} {of_input}" if axis is not None else "without an axis"
    where = f"for the groups {of_input}" if grouped else where
    raise ValueError(f"{name} has shape {tuple(scale.shape)}; {where} it must be {shape}")
