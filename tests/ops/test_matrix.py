"""Every backend, dtype, layout, granularity and size against the formula in float64.

`quantize` below is the published formula in plain torch, differentiated by autograd; it shares nothing with the
package. In float64 it gives the exact results; in the dtype of the input it is what a user would write, and its
error is the yardstick: the operators may be off by twice as much, as low-precision kernels are commonly judged, plus
a few roundings (`FLOOR`), without which a plain result that happens to be exact would demand the same of them.

The full product of layouts, granularities and sizes would be thousands of combinations. Covered are all pairs of a
layout and a granularity (`LAYOUTS` x `GRANULARITIES`, at an odd shape), in two dtypes each such that every layout
and every granularity meets all four; and each size with the granularities that it is about (`SIZES`), in four dtypes.
All of it without and with zero points, for both families. Interpreted Triton, a thousand times slower, gets a few
(`INTERPRETED`).

On small CPU tensors the functions go past the dispatcher (`asga.ops.direct`); all cases have the operators' bits there.
"""

import functools
import math
import zlib
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from asga.ops import backend, backends, direct, fake_quant, mixed_fake_quant

DTYPES = {str(dtype)[6:]: dtype for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64)}
QUANT_MINS, QUANT_MAXS = [-8, -2, 0], [7, 1, 7]
# Ranges and offsets leave integers up to this.
LARGEST = 10
# No value of the tests is nearer to a tie or to the end of a range, in units of the scale. In bfloat16 x * (1 / s) is
# off by three roundings of 2^-9, 0.06 for the largest in range, so no computation here rounds a value the other way.
MARGIN = 0.07
# Roundings beyond twice the error of the plain formula, relative to the largest result or to the sum of the absolute
# values of the terms: of the result to its dtype, of products with parameters, of partial sums; and as many of what
# they are compared with, which is no more exact than the operators for inputs in float64.
FLOOR = 8
COMPILED_OR_REFERENCE = [name for name in ("cpu", "reference") if backends.unavailable(name) is None]
RESULTS = ("result", "gradient of x", "of the scales", "of the zero points", "of the probabilities")


class Case(NamedTuple):
    """An input of `shape` in a layout; one scale in all, per channel along an axis, or per group."""

    shape: tuple[int, ...]
    granularity: Mapping[str, int] = MappingProxyType({})
    view: Callable[[Tensor], Tensor] = torch.clone
    view_of_grad: Callable[[Tensor], Tensor] | None = None  # where it is not the one of the input


def channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def transposed(x: Tensor) -> Tensor:
    return x.transpose(0, -1).contiguous().transpose(0, -1)


def permuted(x: Tensor) -> Tensor:
    return x.permute(1, 3, 0, 2).contiguous().permute(2, 0, 3, 1)


def sliced(x: Tensor) -> Tensor:
    """With a gap after every value and a row before the first."""
    wide = x.new_zeros(*x.shape[:-1], 2 * x.shape[-1] + 1)
    wide[..., 1::2] = x
    return wide[..., 1::2]


def unaligned(x: Tensor) -> Tensor:
    """One value after the start of its storage."""
    return torch.cat([x.new_zeros(1), x.reshape(-1)])[1:].view(x.shape)


def expanded(x: Tensor) -> Tensor:
    """The value at the front, everywhere: the strides are zero."""
    return x.reshape(-1)[:1].reshape([1] * x.dim()).expand(x.shape)


LAYOUTS = {
    "contiguous": (torch.clone, None),
    "channels_last": (channels_last, None),
    "transposed": (transposed, None),
    "permuted": (permuted, None),
    "sliced": (sliced, None),
    "unaligned": (unaligned, None),
    "expanded gradient": (torch.clone, expanded),
    "unaligned, its gradient channels_last": (unaligned, channels_last),
    "channels_last, its gradient sliced": (channels_last, sliced),
}
GRANULARITIES = {
    "per tensor": {},
    **{f"axis {axis}": {"axis": axis} for axis in (0, 1, 2, -1)},
    "groups of 6": {"group_size": 6},
}
# Around the width of a vector and the work of a thread, whatever these are: powers of two, their neighbors, primes.
SIZES = {
    "a scalar": Case(()),
    **{f"{size} values": Case((size,)) for size in (0, 1, 15, 16, 17, 127, 1009, 8191, 8193, 70_001)},
    "no channel": Case((3, 0, 2), {"axis": 1}),
    "channels without values": Case((3, 0, 2), {"axis": 0}),
    "one channel": Case((1, 131), {"axis": 0}),
    "a value per channel": Case((67,), {"axis": 0}),
    **{f"channels of {size}": Case((5, size), {"axis": 0}) for size in (9, 15, 16, 17, 31, 97, 8192, 8209)},
    "depthwise weight": Case((67, 1, 3, 3), {"axis": 0}),
    "depthwise weight, channels_last": Case((67, 1, 3, 3), {"axis": 0}, channels_last),
    "long channels": Case((2, 70_001), {"axis": 0}),
    "long channels in the middle": Case((3, 2, 11_003), {"axis": 1}),
    "narrow, channels last": Case((5000, 3), {"axis": -1}),
    "one channel last": Case((5000, 1), {"axis": -1}),
    "channels last, in a row longer than a vector": Case((301, 37), {"axis": -1}),
    "many rows of several vectors": Case((1031, 37), {"axis": -1}),
    "wide rows, channels last": Case((67, 2999), {"axis": -1}),
    "short rows of a few channels": Case((1031, 5, 3), {"axis": 1}),
    "pairs": Case((7, 41, 2), {"axis": 1}),
    "many channels": Case((3, 9001), {"axis": 1}),
    "many short channels": Case((9001, 3), {"axis": 0}),
    "groups of 1": Case((3, 8), {"group_size": 1}),
    "groups of 32": Case((7, 96), {"group_size": 32}),
    "groups of 32 in three dimensions": Case((2, 3, 64), {"group_size": 32}),
    "a group longer than a piece": Case((2, 8202), {"group_size": 8202}),
    "no groups": Case((0, 32), {"group_size": 32}),
    "transposed, in groups": Case((16, 12), {"group_size": 4}, transposed),
}
PAIRS = {
    f"{layout}, {granularity}": Case((3, 5, 7, 6), GRANULARITIES[granularity], *LAYOUTS[layout])
    for layout in LAYOUTS
    for granularity in GRANULARITIES
}
CASES = SIZES | PAIRS
INTERPRETED = (
    *("17 values", "depthwise weight", "channels last, in a row longer than a vector", "groups of 32"),
    *("permuted, axis 1", "channels_last, its gradient sliced, axis -1", "sliced, per tensor"),
)


def _runs() -> list:
    """(backend, case, dtype): compiled ones and the reference on everything, interpreted Triton on a little."""
    names = list(COMPILED_OR_REFERENCE)
    if torch.cuda.is_available():
        names += [name for name in ("cuda", "triton") if backends.unavailable(name) is None]
    runs = [(name, case, dtype) for case in SIZES for dtype in DTYPES for name in names]
    for index, case in enumerate(PAIRS):
        # Rows of six pairs: the second term moves the dtypes on from layout to layout.
        first = index + index // len(GRANULARITIES)
        runs += [(name, case, list(DTYPES)[(first + step) % 4]) for step in (0, 2) for name in names]
    if not torch.cuda.is_available() and backends.unavailable("triton") is None:
        # The interpreter's bfloat16 truncates where the definition rounds.
        runs += [("triton", case, dtype) for case in INTERPRETED for dtype in ("float32", "float16")]
    return [pytest.param(*run, id="-".join(run)) for run in runs]


def test_every_layout_and_granularity_meets_every_dtype():
    met = {(part, run.values[2]) for run in _runs() if run.values[1] in PAIRS for part in run.values[1].rsplit(", ", 1)}
    assert met == {(part, dtype) for part in (*LAYOUTS, *GRANULARITIES) for dtype in DTYPES}


@pytest.mark.usefixtures("one_thread")
@pytest.mark.filterwarnings("ignore:.*encountered in.*:RuntimeWarning")  # of NumPy, in the interpreter
@pytest.mark.parametrize("with_offset", [False, True], ids=["symmetric", "offset"])
@pytest.mark.parametrize(("name", "case", "dtype"), _runs())
class TestIsAsGoodAsThePlainFormula:
    def test_fake_quant(self, name, case, dtype, with_offset):
        _check(name, case, dtype, 1, with_offset)

    def test_mixed_fake_quant(self, name, case, dtype, with_offset):
        _check(name, case, dtype, 3, with_offset)


@pytest.mark.skipif("cpu" not in COMPILED_OR_REFERENCE, reason="no CPU kernels here")
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("candidates", [1, 3], ids=["fake_quant", "mixed_fake_quant"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_past_the_dispatcher_are_the_bits_of_the_operators(
    case, dtype, candidates, assert_same_bits, calls_past_the_dispatcher
):
    shape, granularity, view, view_of_grad = CASES[case]
    generator = torch.Generator().manual_seed(candidates)
    shape_of_scales = _shape_of_scales(CASES[case])
    if candidates > 1:
        shape_of_scales = (candidates, *(shape_of_scales if granularity else ()))
    # Multiples of a quarter at scales of 1/4, 1/2 and 3/4: ties everywhere.
    x = (torch.randn(shape, generator=generator) * 8).round() / 4
    scales = torch.randint(1, 4, shape_of_scales, generator=generator) / 4
    probs = torch.rand(candidates, generator=generator) if candidates > 1 else None
    zero_points = torch.randn(shape_of_scales, generator=generator)
    grad = (view_of_grad or view)(torch.randn(shape, generator=generator).to(DTYPES[dtype]))
    sweep = "fake_quant" if candidates == 1 else "mixed_fake_quant"
    for offset in (None, zero_points):
        wide = torch.promote_types(DTYPES[dtype], torch.float32)  # as autocast leaves parameters
        given = [view(x.to(DTYPES[dtype])), *(None if t is None else t.to(wide) for t in (scales, offset, probs))]
        given = [None if t is None else t.detach().requires_grad_() for t in given]
        with backend("cpu"):
            with calls_past_the_dispatcher() as calls:
                found = _run(*given, candidates, granularity)
                found = [found.detach(), *_gradients(found, given, grad)]
            expected = _run_operators(*given, candidates, granularity)
            expected = [expected.detach(), *_gradients(expected, given, grad)]
        size = granularity.get("group_size")
        used = [t if size is None else t.reshape(-1, size) for t in (given[0], grad)]
        plain = [
            dtype != "float64" and t.is_contiguous() and 0 < t.numel() * candidates <= direct._LARGEST for t in used
        ]
        assert calls == [sweep] * plain[0] + [f"{sweep}_backward"] * all(plain)
        for actual, wanted in zip(found, expected, strict=True):
            if wanted is not None:
                assert_same_bits(actual, wanted)


def test_some_of_every_kind_go_past_the_dispatcher():
    """Of the cases above: otherwise that test would compare the operators with themselves."""
    small = {name for name, case in CASES.items() if 0 < math.prod(case.shape) * 3 <= direct._LARGEST}
    plain = {name for name in small if CASES[name].view(torch.zeros(CASES[name].shape)).is_contiguous()}
    assert len(plain & set(SIZES)) > 30
    assert {f"contiguous, {granularity}" for granularity in GRANULARITIES} <= plain
    assert {"expanded gradient, axis 1", "unaligned, axis 0", "depthwise weight, channels_last"} <= plain


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("with_offset", [False, True], ids=["symmetric", "offset"])
@pytest.mark.parametrize("candidates", [1, 3], ids=["fake_quant", "mixed_fake_quant"])
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("name", COMPILED_OR_REFERENCE)
def test_gradients_are_those_of_the_formula_with_frozen_rounding(name, granularity, candidates, with_offset):
    """The derivative of a step function is zero; a straight-through gradient is that of another function: the same
    formula, in which what rounding adds to each value and to each zero point, round(v) - v, is a constant. That one
    is smooth between the ends of the ranges, so gradcheck can take its differences, for every argument.
    """
    case = Case((2, 3, 6), GRANULARITIES[granularity])
    x, _, parameters, _ = _problem_of(case, "differences", "float64", candidates, with_offset)
    present = [tensor is not None for tensor in (x, *parameters)]
    frozen = FrozenRounding()

    def arguments(tensors: tuple[Tensor, ...]) -> list[Tensor | None]:
        given = iter(tensors)
        return [next(given) if there else None for there in present]

    class Smooth(torch.autograd.Function):
        """The formula forward, the operator backward."""

        @staticmethod
        def forward(ctx, *tensors: Tensor) -> Tensor:
            ctx.save_for_backward(*tensors)
            x, *parameters = arguments(tensors)
            return _formula(x, *_apply(_spreads(case, candidates), parameters), frozen.again())

        @staticmethod
        def backward(ctx, grad: Tensor) -> tuple[Tensor, ...]:
            leaves = _leaves(*ctx.saved_tensors)
            with torch.enable_grad():
                return torch.autograd.grad(_run(*arguments(leaves), candidates, case.granularity), leaves, grad)

    with backend(name):
        assert torch.autograd.gradcheck(Smooth.apply, [t for t in _leaves(x, *parameters) if t is not None])


def _check(name: str, case: str, dtype: str, candidates: int, with_offset: bool) -> None:
    """Run the operator and compare the result and every gradient, each with its bound."""
    x, grad, parameters, bounds = _problem(case, dtype, candidates, with_offset)
    shape, granularity, view, view_of_grad = CASES[case]
    device = "cuda" if name in ("cuda", "triton") and torch.cuda.is_available() else "cpu"
    # Views after the copy to the device, which would undo them.
    given = [view(x.to(device)), *(None if p is None else p.to(device) for p in parameters)]
    given = [None if tensor is None else tensor.detach().requires_grad_() for tensor in given]
    with backend(name):
        y = _run(*given, candidates, granularity)
        gradients = _gradients(y, given, (view_of_grad or view)(grad.to(device)))
    assert y.dtype == x.dtype
    assert y.shape == shape
    assert y.stride() == (y if "group_size" in granularity else torch.empty_like(given[0])).stride()
    for argument, gradient in zip(given, gradients, strict=True):
        if argument is not None:
            assert (gradient.dtype, gradient.shape) == (argument.dtype, argument.shape)
    for what, found, bound in zip(RESULTS, [y.detach(), *gradients], bounds, strict=True):
        if bound is not None:
            error = (found.cpu().double() - bound.exact).abs()
            assert (error <= bound.error).all(), f"{what}: off by {error.max():.3g}, allowed {bound.error.max():.3g}"


def _run(
    x: Tensor,
    scales: Tensor,
    zero_points: Tensor | None,
    probs: Tensor | None,
    candidates: int,
    granularity: dict[str, int],
) -> Tensor:
    if probs is None:
        return fake_quant(x, scales, zero_points, quant_min=QUANT_MINS[0], quant_max=QUANT_MAXS[0], **granularity)
    ranges = {"quant_mins": QUANT_MINS[:candidates], "quant_maxs": QUANT_MAXS[:candidates]}
    return mixed_fake_quant(x, scales, probs, zero_points, **ranges, **granularity)


def _run_operators(
    x: Tensor,
    scales: Tensor,
    zero_points: Tensor | None,
    probs: Tensor | None,
    candidates: int,
    granularity: dict[str, int],
) -> Tensor:
    """As `_run`, by `torch.ops.asga` with the gradients that are registered for it."""
    axis, rows = granularity.get("axis"), x
    if "group_size" in granularity:
        axis, rows = 0, x.reshape(-1, granularity["group_size"])
        lead = () if probs is None else (candidates,)
        scales, zero_points = (None if p is None else p.reshape(*lead, -1) for p in (scales, zero_points))
    axis = axis if axis is None else axis % rows.dim()
    if probs is None:
        y = torch.ops.asga.fake_quant(rows, scales, zero_points, QUANT_MINS[0], QUANT_MAXS[0], axis)
    else:
        ranges = QUANT_MINS[:candidates], QUANT_MAXS[:candidates]
        y = torch.ops.asga.mixed_fake_quant(rows, scales, probs, zero_points, *ranges, axis)
    return y.reshape(x.shape)


class Bound(NamedTuple):
    """What is right, and how far off a result may be, value by value."""

    exact: Tensor
    error: Tensor


class Problem(NamedTuple):
    """Input, gradient of the result, (scales, zero points, probabilities), and bounds of all results in that order."""

    x: Tensor
    grad: Tensor
    parameters: tuple[Tensor, Tensor | None, Tensor | None]
    bounds: list[Bound | None]


@functools.lru_cache(maxsize=16)  # the backends of a case follow each other
def _problem(name: str, dtype: str, candidates: int, with_offset: bool) -> Problem:
    return _problem_of(CASES[name], name, dtype, candidates, with_offset)


def _problem_of(case: Case, name: str, dtype: str, candidates: int, with_offset: bool) -> Problem:
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()) + candidates)
    shape = _shape_of_scales(case)
    # Candidates of more bits have smaller steps. Everything is cast first: all computations see the same numbers.
    scales = 0.2 + 0.3 * torch.rand(candidates, *shape, generator=generator)
    scales *= torch.tensor([1.0, 3.0, 1.7])[:candidates].reshape(-1, *[1] * len(shape))
    # Near integers: where a zero point rounds to shall not depend on the dtype.
    zero_points = torch.randint(-2, 3, scales.shape, generator=generator)
    zero_points = zero_points + 0.4 * (torch.rand(scales.shape, generator=generator) - 0.5)
    if candidates == 1:
        scales, zero_points = scales[0], zero_points[0]
    elif not case.granularity:
        scales, zero_points = scales[:, 0], zero_points[:, 0]
    probs = torch.softmax(torch.randn(candidates, generator=generator), 0)
    wanted = (scales, zero_points if with_offset else None, probs if candidates > 1 else None)
    parameters = [None if parameter is None else parameter.to(DTYPES[dtype]) for parameter in wanted]
    x = _away_from_ties(case, parameters[0], candidates, generator)
    grad = torch.randn(case.shape, generator=generator).to(x.dtype)
    if case.view_of_grad is expanded:
        grad = expanded(grad).clone()
    return Problem(x, grad, tuple(parameters), _bounds(case, x, grad, parameters, candidates))


def _away_from_ties(case: Case, scales: Tensor, candidates: int, generator: torch.Generator) -> Tensor:
    """Values in and out of the ranges, drawn again until none is within `MARGIN` of a kink for any candidate."""
    steps = _spread(case, scales.double(), candidates).reshape(candidates, -1)
    x = torch.empty(steps.shape[1], dtype=scales.dtype)
    left = torch.arange(x.numel())
    for _ in range(100):
        x[left] = (1.5 * torch.randn(left.numel(), generator=generator)).to(x.dtype)
        halves = 2 * x[left].double() / steps[:, left]
        left = left[((halves - halves.round()).abs() < 2 * MARGIN).any(0)]
        if left.numel() == 0:
            return x.reshape(case.shape)
    raise AssertionError("no values away from the ties of all candidates")


def _shape_of_scales(case: Case) -> tuple[int, ...]:
    if "axis" in case.granularity:
        return (case.shape[case.granularity["axis"]],)
    if "group_size" in case.granularity:
        return (*case.shape[:-1], case.shape[-1] // case.granularity["group_size"])
    return (1,)


def _spread(case: Case, parameter: Tensor, candidates: int) -> Tensor:
    """Scales or zero points as [candidates, *shape of the input]: each beside the values that it is for."""
    parameter = parameter.reshape(candidates, *_shape_of_scales(case))
    if "group_size" in case.granularity:
        return parameter.repeat_interleave(case.granularity["group_size"], -1)
    shape = [1] * len(case.shape)
    if "axis" in case.granularity:
        shape[case.granularity["axis"]] = -1
    return parameter.reshape(candidates, *shape).expand(candidates, *case.shape)


def _spread_probs(case: Case, probs: Tensor, candidates: int) -> Tensor:
    return probs.reshape(candidates, *[1] * len(case.shape)).expand(candidates, *case.shape)


def _spreads(case: Case, candidates: int) -> list[Callable[[Tensor], Tensor]]:
    """For scales, zero points and probabilities."""
    return [functools.partial(spread, case, candidates=candidates) for spread in (_spread, _spread, _spread_probs)]


def quantize(
    x: Tensor, scale: Tensor, zero_point: Tensor | None, low: int, high: int, rounded: Callable[[Tensor], Tensor]
) -> Tensor:
    """(clamp(round(x/s) + z, low, high) - z) * s; the rounding decides about the gradients."""
    z = torch.zeros_like(scale) if zero_point is None else rounded(zero_point)
    # Clamped before it is rounded, which with integer bounds is the same, so that the gradient has LSQ's mask.
    clamped = torch.minimum(torch.maximum(x / scale, low - z), high - z)
    return rounded(clamped) * scale


def _round_straight_through(v: Tensor) -> Tensor:
    """With the derivative 1, which makes the gradients those of LSQ and LSQ+."""
    return v + (v.round() - v).detach()


class FrozenRounding:
    """Adds what rounding added in the first pass through a formula: smooth, and equal to rounding there."""

    def __init__(self) -> None:
        self.residuals: list[Tensor] = []
        self.calls = 0

    def __call__(self, v: Tensor) -> Tensor:
        if self.calls == len(self.residuals):
            self.residuals.append((v.round() - v).detach())
        self.calls += 1
        return v + self.residuals[self.calls - 1]

    def again(self) -> "FrozenRounding":
        """Begin another pass."""
        self.calls = 0
        return self


def _formula(
    x: Tensor,
    scales: Tensor,
    zero_points: Tensor | None,
    probs: Tensor | None,
    rounded: Callable[[Tensor], Tensor] = _round_straight_through,
) -> Tensor:
    """One quantizer, or the mixture of several; parameters as `_spread` gives them."""
    terms = [
        quantize(x, scales[k], None if zero_points is None else zero_points[k], QUANT_MINS[k], QUANT_MAXS[k], rounded)
        for k in range(len(scales))
    ]
    return terms[0] if probs is None else sum(p * term for p, term in zip(probs, terms, strict=True))


def _bounds(
    case: Case, x: Tensor, grad: Tensor, parameters: list[Tensor | None], candidates: int
) -> list[Bound | None]:
    """Of the result and of the gradients of x, scales, zero points and probabilities."""
    spreads = _spreads(case, candidates)
    plain = _leaves(x, *parameters)
    y = _formula(plain[0], *_apply(spreads, plain[1:]))
    plain_results = [y.detach(), *_gradients(y, plain, grad)]

    # In float64, with parameters of their own for every value: their gradients are the terms of the sums.
    small = _leaves(*(None if p is None else p.double() for p in parameters))
    spread = _apply(spreads, small)
    wide = _leaves(x.double(), *spread)
    probs_of = spread[2]
    y = _formula(*wide)
    values = [y.detach(), *_gradients(y, wide, grad.double())]

    # The gradient of spreading is the sum over what it was spread to.
    def add_up(terms: list[Tensor | None]) -> list[Tensor | None]:
        return [
            None if term is None else torch.autograd.grad(to, of, term, retain_graph=True)[0]
            for term, to, of in zip(terms, spread, small, strict=True)
        ]

    exact = values[:2] + add_up(values[2:])
    magnitudes = [v.abs().max() if v.numel() else v for v in values[:2]]
    # round(v) - v is small, its rounding error is that of v.
    of_scales = grad.double().abs() * (LARGEST if probs_of is None else LARGEST * probs_of.detach())
    magnitudes += add_up([of_scales.expand_as(values[2]), *(None if t is None else t.abs() for t in values[3:])])
    bounds: list[Bound | None] = []
    for found, right, magnitude in zip(plain_results, exact, magnitudes, strict=True):
        if found is None or found.numel() == 0:
            bounds.append(None)
            continue
        error = 2 * (found.double() - right).abs().max() + FLOOR * torch.finfo(x.dtype).eps / 2 * magnitude
        bounds.append(Bound(right, error))
    return bounds


def _leaves(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if tensor is None else tensor.detach().clone().requires_grad_() for tensor in tensors]


def _apply(functions: list[Callable[[Tensor], Tensor]], tensors: list[Tensor | None]) -> list[Tensor | None]:
    return [None if tensor is None else f(tensor) for f, tensor in zip(functions, tensors, strict=True)]


def _gradients(y: Tensor, leaves: list[Tensor | None], grad: Tensor) -> list[Tensor | None]:
    found = iter(torch.autograd.grad(y, [leaf for leaf in leaves if leaf is not None], grad))
    return [None if leaf is None else next(found) for leaf in leaves]
