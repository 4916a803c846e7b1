"""The CPU kernels against the reference on generated shapes, layouts and values: what nobody thought of.

The examples are the same on every run, so that a failure is one of the code and not of the day.
"""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from asga.ops import backends, fake_quant, mixed_fake_quant, reference

ops = torch.ops.asga

pytestmark = [
    pytest.mark.skipif(
        backends.unavailable("cpu") is not None, reason=f"no CPU kernels: {backends.unavailable('cpu')}"
    ),
    pytest.mark.usefixtures("one_thread"),
]
repeatable = settings(max_examples=150, deadline=None, derandomize=True, database=None)

NUMBERS = [0.0, -0.0, 1e-45, -1e-45, 1e-38, 0.25, -0.75, 1.25, 3.5, -4.0, 7.5, 8.0, 1e20, 3e38, -3e38]
SPECIAL = [*NUMBERS, *map(float, ("nan", "inf", "-inf"))]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
MINS, MAXS = [-8, -2, 0, -128, -(2**16)], [7, 1, 15, 127, 2**16]


class Example(NamedTuple):
    x: Tensor
    grad: Tensor
    scales: Tensor  # [K, channels]
    zero_points: Tensor | None  # the same
    probs: Tensor
    axis: int | None


def _numbers(values: list[float], magnitude: float) -> st.SearchStrategy[float]:
    return st.sampled_from(values) | st.floats(-magnitude, magnitude, width=32)


@st.composite
def examples(draw: st.DrawFn, special: bool) -> Example:
    """An example of up to three candidates; with or without NaN, infinities and overflow."""
    # Up to four short dimensions, or one of several vectors or several pieces of work with short ones around it.
    shape = draw(st.lists(st.integers(0, 9) | st.sampled_from([16, 17]), max_size=4))
    if draw(st.booleans()):
        long, around = draw(st.integers(30, 300) | st.sampled_from([2049, 8195])), shape[:2]
        shape = [min(size, 3) for size in around] if long > 300 else around
        shape.insert(draw(st.integers(0, len(shape))), long)
    axis = draw(st.none() | st.integers(0, len(shape) - 1)) if shape else None
    dtype = draw(st.sampled_from(DTYPES))
    # For sums, numbers whose products do not overflow float32.
    values = _numbers(SPECIAL, 1e4) if special else _numbers([v for v in NUMBERS if abs(v) < 10], 1e3)
    x, grad = (_filled(shape, draw(st.lists(values, min_size=1, max_size=23)), dtype) for _ in range(2))
    # The order of the dimensions in memory; gaps, and a start that is not aligned.
    order = draw(st.permutations(range(len(shape))))
    gap, start = draw(st.sampled_from([1, 1, 2])), draw(st.integers(0, 3))
    candidates, channels = draw(st.integers(1, 3)), 1 if axis is None else shape[axis]
    positive = st.sampled_from([0.5, 0.25, 1.0]) | st.floats(0.015625, 64, width=32)
    scales = draw(st.lists(positive, min_size=1, max_size=7))
    if special:
        scales += draw(st.lists(st.sampled_from([1e-40, 1e-30, 1e30, 3e38, 0.0, -0.5]), max_size=1))
    offsets = draw(st.none() | st.lists(st.floats(-40, 40, width=32), min_size=1, max_size=7))
    parameter_dtype = draw(st.sampled_from([torch.float32, dtype]))
    return Example(
        _laid_out(x, order, gap, start),
        _laid_out(grad, draw(st.sampled_from([order, list(range(len(shape)))])), 1, 0),
        _filled([candidates, channels], scales, parameter_dtype),
        None if offsets is None else _filled([candidates, channels], offsets, parameter_dtype),
        _filled([candidates], draw(st.lists(st.floats(-1, 2, width=32), min_size=1, max_size=3)), torch.float32),
        axis,
    )


def _filled(shape: list[int], values: list[float], dtype: torch.dtype) -> Tensor:
    """The values over and over, changing places so that no channel always gets the same."""
    index = torch.arange(torch.Size(shape).numel())
    return torch.tensor(values, dtype=torch.float64).to(dtype)[(index + index // len(values)) % len(values)].view(shape)


def _laid_out(x: Tensor, order: list[int], gap: int, start: int) -> Tensor:
    """The same tensor, its dimensions from slowest to fastest in `order`, `gap` values apart, `start` into memory."""
    if x.numel() == 0:
        return x
    strides, stride = [0] * x.dim(), gap
    for dim in reversed(order):
        strides[dim] = stride
        stride *= x.shape[dim]
    memory = x.new_full((start + stride + gap,), 77.0)
    return memory.as_strided(x.shape, strides, start).copy_(x)


def _one(example: Example) -> tuple:
    """The arguments of `fake_quant` for the first candidate."""
    offset = None if example.zero_points is None else example.zero_points[0]
    return example.x, example.scales[0], offset, -8, 7, example.axis


def _several(example: Example) -> tuple:
    """The arguments of `mixed_fake_quant`."""
    x, _, scales, zero_points, probs, axis = example
    if axis is None:
        scales, zero_points = scales[:, 0], None if zero_points is None else zero_points[:, 0]
    return x, scales, probs, zero_points, MINS[: len(scales)], MAXS[: len(scales)], axis


def _plainly(example: Example) -> Example:
    """The example as tensors that need no dispatcher: at most float32, parameters in float32; in order, no gaps."""
    x, grad, *parameters, axis = example
    values = [(t.float() if t.dtype == torch.float64 else t).contiguous() for t in (x, grad)]
    return Example(*values, *(None if t is None else t.float().contiguous() for t in parameters), axis)


def _with_gradients(run: Callable[..., Tensor], tensors: list[Tensor | None], grad: Tensor) -> list[Tensor]:
    """What `run` returns, and the gradients of the tensors that there are."""
    leaves = [None if t is None else t.detach().contiguous().requires_grad_() for t in tensors]
    y = run(*leaves)
    return [y.detach(), *torch.autograd.grad(y, [leaf for leaf in leaves if leaf is not None], grad)]


class TestBits:
    @repeatable
    @given(example=examples(special=True))
    def test_fake_quant(self, assert_same_bits, example):
        arguments = _one(example)
        assert_same_bits(ops.fake_quant(*arguments), reference.fake_quant(*arguments))
        found = ops.fake_quant_backward(example.grad, *arguments)
        assert_same_bits(found[0], reference.fake_quant_backward(example.grad, *arguments)[0])

    @repeatable
    @given(example=examples(special=True))
    def test_mixed_fake_quant(self, assert_same_bits, example):
        arguments = _several(example)
        assert_same_bits(ops.mixed_fake_quant(*arguments), reference.mixed_fake_quant(*arguments))
        found = ops.mixed_fake_quant_backward(example.grad, *arguments)
        assert_same_bits(found[0], reference.mixed_fake_quant_backward(example.grad, *arguments)[0])


class TestPastTheDispatcher:
    """On small contiguous tensors the functions call the sweeps themselves, with the bits of the operators."""

    @repeatable
    @given(example=examples(special=True).map(_plainly))
    def test_fake_quant(self, assert_same_bits, calls_past_the_dispatcher, example):
        *tensors, low, high, axis = _one(example)

        def directly(*given: Tensor) -> Tensor:
            return fake_quant(*given, quant_min=low, quant_max=high, axis=axis)

        with calls_past_the_dispatcher() as calls:
            found = _with_gradients(directly, tensors, example.grad)
        assert calls == (["fake_quant", "fake_quant_backward"] if example.x.numel() else [])
        expected = _with_gradients(lambda *given: ops.fake_quant(*given, low, high, axis), tensors, example.grad)
        for actual, wanted in zip(found, expected, strict=True):
            assert_same_bits(actual, wanted)

    @repeatable
    @given(example=examples(special=True).map(_plainly))
    def test_mixed_fake_quant(self, assert_same_bits, calls_past_the_dispatcher, example):
        *tensors, mins, maxs, axis = _several(example)

        def directly(*given: Tensor) -> Tensor:
            return mixed_fake_quant(*given, quant_mins=mins, quant_maxs=maxs, axis=axis)

        with calls_past_the_dispatcher() as calls:
            found = _with_gradients(directly, tensors, example.grad)
        assert calls == (["mixed_fake_quant", "mixed_fake_quant_backward"] if example.x.numel() else [])
        expected = _with_gradients(lambda *given: ops.mixed_fake_quant(*given, mins, maxs, axis), tensors, example.grad)
        for actual, wanted in zip(found, expected, strict=True):
            assert_same_bits(actual, wanted)


class TestSums:
    """Any order of adding n terms is off by at most n * u * sum |terms|, with u the relative error of one addition."""

    @repeatable
    @given(example=examples(special=False))
    def test_fake_quant(self, example):
        arguments = _one(example)
        found = ops.fake_quant_backward(example.grad, *arguments)
        expected = reference.fake_quant_backward(example.grad, *arguments)
        x, scale, offset, low, high, _ = arguments
        terms = reference.fake_quant_backward(
            example.grad.reshape(-1), x.reshape(-1), *(_per_value(example, p) for p in (scale, offset)), low, high, 0
        )
        for index in (1, 2):
            _assert_same_sum(found[index], expected[index], terms[index], example)

    @repeatable
    @given(example=examples(special=False))
    def test_mixed_fake_quant(self, example):
        arguments = _several(example)
        found = ops.mixed_fake_quant_backward(example.grad, *arguments)
        expected = reference.mixed_fake_quant_backward(example.grad, *arguments)
        x, scales, probs, offsets, mins, maxs, _ = arguments
        grad, x = example.grad.reshape(-1), x.reshape(-1)
        for k in range(len(scales)):
            scale, offset = (None if p is None else _per_value(example, p[k])[None] for p in (scales, offsets))
            one = ([mins[k]], [maxs[k]], 0)
            terms = reference.mixed_fake_quant_backward(grad, x, scale, probs[k : k + 1], offset, *one)
            _assert_same_sum(found[1][k], expected[1][k], terms[1], example)
            if offset is not None:
                _assert_same_sum(found[3][k], expected[3][k], terms[3], example)
            values = reference.mixed_fake_quant(x, scale, torch.ones(1), offset, *one)
            _assert_same_sum(found[2][k], expected[2][k], grad.double() * values.double(), example)


def _per_value(example: Example, parameter: Tensor | None) -> Tensor | None:
    """A scale or offset for every value: the gradients of the reference are then the terms of the sums."""
    if parameter is None:
        return None
    shape = [-1 if dim == example.axis else 1 for dim in range(example.x.dim())]
    dtype = torch.float64 if example.x.dtype == torch.float64 else torch.float32
    return parameter.to(dtype).reshape(shape).expand(example.x.shape).reshape(-1)


def _assert_same_sum(actual: Tensor, expected: Tensor, terms: Tensor, example: Example) -> None:
    """`terms`, one per value of the input, are summed to the shape of a scale or to a scalar."""
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    if expected.numel() == 0:
        return
    magnitude = terms.double().abs().reshape(example.x.shape)
    if expected.dim() > 0 and example.axis is not None:
        others = [dim for dim in range(magnitude.dim()) if dim != example.axis]
        magnitude = magnitude.sum(others) if others else magnitude
    else:
        magnitude = magnitude.sum().reshape(expected.shape)
    arithmetic = torch.finfo(torch.float64 if example.x.dtype == torch.float64 else torch.float32)
    own = torch.finfo(expected.dtype)
    # Eight more: products, with scale and probability too. Both results are rounded to their dtype, maybe to infinity.
    bound = (example.x.numel() + 8) * arithmetic.eps / 2 * magnitude + own.eps * expected.double().abs() + own.tiny
    error = (actual.double() - expected.double()).abs()
    assert ((error <= bound) | (actual == expected)).all(), f"off by {error.max():.3g}, allowed {bound.max():.3g}"
