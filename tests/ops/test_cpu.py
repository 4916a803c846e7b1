"""The compiled CPU kernels against the reference, which is the definition."""

import hashlib
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from asga.ops import backends, reference

ops = torch.ops.asga

pytestmark = [
    pytest.mark.skipif(
        backends.unavailable("cpu") is not None, reason=f"no CPU kernels: {backends.unavailable('cpu')}"
    ),
    pytest.mark.usefixtures("one_thread"),
]

QUANT_MIN, QUANT_MAX = -8, 7
QUANT_MINS, QUANT_MAXS = [-2, -4, -8, -32, 0, 0, -128, 0], [1, 3, 7, 31, 3, 15, 127, 255]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
# Multiples of 1/4 at a scale of 1/2: ties, bounds of the range, zeros of both signs; then what is not a number.
SPECIAL = (
    *(0.25, -0.25, 0.75, -1.25, 3.5, 3.75, -4.0, -4.25, -0.0, 0.0, 1e-40, -1e-40),
    *map(float, ("nan", "inf", "-inf")),
)


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


# Name: shape, axis, and what turns a contiguous tensor of that shape into the input. The sizes lie around the 16 lanes
# of a vector and the 8,192 values of a piece of work, and take both ways through the loops (csrc/cpu/work.h).
CASES: dict[str, tuple[tuple[int, ...], int | None, Callable[[Tensor], Tensor]]] = {
    **{f"{size} values": ((size,), None, lambda x: x) for size in (0, 1, 7, 16, 17, 1025, 8192, 20_003)},
    **{f"7x3x5 axis {axis}": ((7, 3, 5), axis, lambda x: x) for axis in range(3)},
    "activation": ((2, 19, 5, 7), 1, lambda x: x),
    **{f"channels_last axis {axis}": ((2, 19, 5, 7), axis, _channels_last) for axis in (None, 0, 1, 2, 3)},
    "a scalar": ((), None, lambda x: x),
    "one channel": ((1, 40), 0, lambda x: x),
    "no channel": ((3, 0, 2), 1, lambda x: x),
    "empty channels": ((3, 0, 2), 0, lambda x: x),
    "depthwise weight": ((70, 1, 3, 3), 0, lambda x: x),
    "depthwise weight, channels_last": ((70, 1, 3, 3), 0, _channels_last),
    "long rows": ((2, 10_003), 0, lambda x: x),
    "one column": ((9000, 1), 1, lambda x: x),
    "few columns": ((9000, 3), 1, lambda x: x),
    "many columns": ((37, 130), 1, lambda x: x),
    "more columns than a piece": ((3, 8200), 1, lambda x: x),
    "transposed": ((13, 37), 1, lambda x: x.t()),
    "permuted": ((3, 5, 7), 0, lambda x: x.permute(2, 0, 1)),
    "strided": ((13, 40), 0, lambda x: x[:, ::2]),
    "expanded": ((13, 1), 0, lambda x: x.expand(13, 21)),
    "unaligned": ((1025,), None, lambda x: x[1:]),
}
# Work for several threads, in all the ways that it is cut.
LARGE_CASES = {
    "200003 values": ((200_003,), None, lambda x: x),
    "long rows, many pieces": ((3, 70_001), 0, lambda x: x),
    "few columns, many rows": ((70_001, 3), 1, lambda x: x),
    "wide columns": ((97, 2999), 1, lambda x: x),
}
cases = pytest.mark.parametrize("case", CASES)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
zero_points = pytest.mark.parametrize("with_zero_point", [False, True], ids=["symmetric", "zero point"])
candidates = pytest.mark.parametrize("count", range(1, 9), ids=lambda count: f"K={count}")


@cases
@dtypes
@zero_points
class TestFakeQuant:
    def test_forward_and_input_gradient_have_the_bits_of_the_reference(
        self, case, dtype, with_zero_point, assert_same_bits
    ):
        x, grad, axis = _tensors(case, dtype, special=True)
        arguments = (x, *_parameters(x, axis, with_zero_point), QUANT_MIN, QUANT_MAX, axis)
        assert_same_bits(ops.fake_quant(*arguments), reference.fake_quant(*arguments))
        actual = ops.fake_quant_backward(grad, *arguments)[0]
        assert_same_bits(actual, reference.fake_quant_backward(grad, *arguments)[0])

    def test_sums_are_those_of_the_reference_but_for_their_order(self, case, dtype, with_zero_point):
        x, grad, axis = _tensors(case, dtype)
        scale, zero_point = _parameters(x, axis, with_zero_point)
        arguments = (grad, x, scale, zero_point, QUANT_MIN, QUANT_MAX, axis)
        expected = reference.fake_quant_backward(*arguments)
        terms = reference.fake_quant_backward(
            *_per_value(grad, x, scale, zero_point, axis=axis), QUANT_MIN, QUANT_MAX, 0
        )
        for actual, wanted, values in zip(
            ops.fake_quant_backward(*arguments)[1:], expected[1:], terms[1:], strict=True
        ):
            _assert_same_sum(actual, wanted, values, x, axis)

    def test_exact_sums_are_equal(self, case, dtype, with_zero_point):
        """Terms that are small multiples of 2^-5 add up without rounding: one missing or doubled would show."""
        x, grad, axis = _dyadic(case, dtype)
        scale, zero_point = _parameters(x, axis, with_zero_point)
        arguments = (grad, x, torch.full_like(scale, 0.5), zero_point, QUANT_MIN, QUANT_MAX, axis)
        expected = reference.fake_quant_backward(*arguments)
        for actual, wanted in zip(ops.fake_quant_backward(*arguments), expected, strict=True):
            assert torch.equal(actual, wanted)


@cases
@dtypes
class TestMixedFakeQuant:
    def test_forward_and_input_gradient_have_the_bits_of_the_reference(self, case, dtype, assert_same_bits):
        x, grad, axis = _tensors(case, dtype, special=True)
        arguments = (x, *_mixture(x, axis, 5), None, QUANT_MINS[:5], QUANT_MAXS[:5], axis)
        assert_same_bits(ops.mixed_fake_quant(*arguments), reference.mixed_fake_quant(*arguments))
        actual = ops.mixed_fake_quant_backward(grad, *arguments)[0]
        assert_same_bits(actual, reference.mixed_fake_quant_backward(grad, *arguments)[0])

    def test_exact_sums_are_equal(self, case, dtype):
        x, grad, axis = _dyadic(case, dtype)
        scales, probs = _mixture(x, axis, 3)
        scales = torch.tensor([0.5, 0.25, 0.5]).to(scales).reshape(-1, *[1] * (scales.dim() - 1)).expand_as(scales)
        arguments = (grad, x, scales, torch.full_like(probs, 0.5), None, QUANT_MINS[:3], QUANT_MAXS[:3], axis)
        expected = reference.mixed_fake_quant_backward(*arguments)
        for actual, wanted in zip(ops.mixed_fake_quant_backward(*arguments), expected, strict=True):
            assert torch.equal(actual, wanted)


@candidates
@dtypes
@pytest.mark.parametrize("case", ["1025 values", "depthwise weight", "few columns", "many columns"])
def test_every_number_of_candidates(case, dtype, count, assert_same_bits):
    x, grad, axis = _tensors(case, dtype)
    scales, probs = _mixture(x, axis, count)
    settings = (None, QUANT_MINS[:count], QUANT_MAXS[:count])
    output = ops.mixed_fake_quant(x, scales, probs, *settings, axis)
    assert_same_bits(output, reference.mixed_fake_quant(x, scales, probs, *settings, axis))
    actual = ops.mixed_fake_quant_backward(grad, x, scales, probs, *settings, axis)
    expected = reference.mixed_fake_quant_backward(grad, x, scales, probs, *settings, axis)
    assert_same_bits(actual[0], expected[0])
    per_value = _per_value(grad, x, *scales, axis=axis)
    for k in range(count):
        terms = reference.mixed_fake_quant_backward(
            *per_value[:2],
            per_value[2 + k][None],
            probs[k : k + 1],
            None,
            QUANT_MINS[k : k + 1],
            QUANT_MAXS[k : k + 1],
            0,
        )[1]
        _assert_same_sum(actual[1][k], expected[1][k], terms[0], x, axis)
        magnitude = (
            grad.double().abs() * reference.fake_quant(x.double(), scales[k], None, -256, 256, axis).abs()
        ).sum()
        assert (actual[2][k] - expected[2][k]).abs() <= _rounding(x) * min(x.numel(), 8192) * magnitude


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("scale", [2.0**-22, 3e-5, 0.3, 97.0, 3e4], ids=str)
def test_every_16_bit_value(dtype, scale, assert_same_bits):
    """Loads and stores convert: subnormals, overflow, ties of the conversion, every NaN."""
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    arguments = (x, torch.tensor([scale]), None, -(2**16), 2**16, None)
    assert_same_bits(ops.fake_quant(*arguments), reference.fake_quant(*arguments))
    one = (torch.tensor([0.7]), None, [-(2**16)], [2**16], None)
    assert_same_bits(
        ops.mixed_fake_quant(x, torch.tensor([scale]), *one), reference.mixed_fake_quant(x, torch.tensor([scale]), *one)
    )


class TestArguments:
    @pytest.mark.parametrize("scale", [0.0, -0.5, float("nan"), float("inf"), 1e-45], ids=str)
    @pytest.mark.parametrize("case", ["17 values", "few columns", "depthwise weight"])
    def test_scales_that_mean_nothing_do_no_harm(self, case, scale, assert_same_bits):
        """They are not checked, as that would stall a GPU; they still take the arithmetic of the definition."""
        x, grad, axis = _tensors(case, torch.float32, special=True)
        scales = torch.full_like(_parameters(x, axis, False)[0], scale)
        arguments = (x, scales, None, QUANT_MIN, QUANT_MAX, axis)
        assert_same_bits(ops.fake_quant(*arguments), reference.fake_quant(*arguments))
        assert_same_bits(
            ops.fake_quant_backward(grad, *arguments)[0], reference.fake_quant_backward(grad, *arguments)[0]
        )
        mixture = (x, torch.stack([scales, scales]), torch.ones(2), None, [-8, -2], [7, 1], axis)
        if axis is None:
            mixture = (x, torch.cat([scales, scales]), *mixture[2:])
        assert_same_bits(ops.mixed_fake_quant(*mixture), reference.mixed_fake_quant(*mixture))

    def test_nan_zero_points_do_no_harm(self):
        x, grad, axis = _tensors("depthwise weight", torch.float32)
        scale, zero_point = _parameters(x, axis, True)
        arguments = (x, scale, torch.full_like(zero_point, float("nan")), QUANT_MIN, QUANT_MAX, axis)
        assert ops.fake_quant(*arguments).shape == x.shape
        assert ops.fake_quant_backward(grad, *arguments)[2].shape == zero_point.shape

    def test_nan_in_the_input_reaches_the_sums(self):
        x, grad, axis = _tensors("few columns", torch.float32)
        x[4321, 1] = float("nan")
        scale, zero_point = _parameters(x, axis, True)
        _, grad_scale, grad_zero_point = ops.fake_quant_backward(grad, x, scale, zero_point, QUANT_MIN, QUANT_MAX, axis)
        assert grad_scale.isnan().tolist() == [False, True, False]
        assert not grad_zero_point.isnan().any()

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_parameters_of_any_floating_dtype(self, dtype, assert_same_bits):
        x, grad, axis = _tensors("few columns", torch.float32)
        scale, zero_point = (parameter.to(dtype) for parameter in _parameters(x, axis, True))
        arguments = (x, scale, zero_point, QUANT_MIN, QUANT_MAX, axis)
        assert_same_bits(ops.fake_quant(*arguments), reference.fake_quant(*arguments))
        grads = ops.fake_quant_backward(grad, *arguments)
        assert [g.dtype for g in grads] == [torch.float32, dtype, dtype]

    @pytest.mark.parametrize("layout", ["expanded", "transposed", "channels_last"])
    def test_a_gradient_in_another_layout(self, layout, assert_same_bits):
        x, _, axis = _tensors("activation", torch.float32)
        grad = {
            "expanded": torch.ones(()).expand(x.shape),
            "transposed": torch.randn(7, 5, 19, 2).permute(3, 2, 1, 0),
            "channels_last": _channels_last(torch.randn(x.shape)),
        }[layout]
        arguments = (x, *_parameters(x, axis, False), QUANT_MIN, QUANT_MAX, axis)
        actual = ops.fake_quant_backward(grad, *arguments)
        expected = ops.fake_quant_backward(grad.contiguous(), *arguments)
        for got, wanted in zip(actual, expected, strict=True):
            assert_same_bits(got, wanted)

    def test_parameters_with_strides(self, assert_same_bits):
        x, _, axis = _tensors("activation", torch.float32)
        scale = torch.rand(19, 2)[:, 0] + 0.1
        scales = (torch.rand(19, 3) + 0.1).t()
        actual = ops.fake_quant(x, scale, None, QUANT_MIN, QUANT_MAX, axis)
        assert_same_bits(actual, reference.fake_quant(x, scale, None, QUANT_MIN, QUANT_MAX, axis))
        mixture = (x, scales, torch.linspace(0.1, 1, 6)[::2], None, [-2, -4, -8], [1, 3, 7], axis)
        assert_same_bits(ops.mixed_fake_quant(*mixture), reference.mixed_fake_quant(*mixture))
        assert ops.mixed_fake_quant_backward(x, *mixture)[1].stride() == scales.stride()


class TestTheSameBitsEverywhere:
    def test_on_every_run_and_for_any_number_of_threads(self):
        digests = set()
        for count in (1, 2, 3, 3, 1):
            torch.set_num_threads(count)
            digests.add(digest_of_all_results())
        assert len(digests) == 1

    @pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
    def test_for_every_instruction_set(self, isa, run_python):
        """The variable is read once per process."""
        if not _has(isa):
            pytest.skip(f"this processor has no {isa}")
        code = f"import runpy; print(runpy.run_path({__file__!r})['digest_of_all_results']())"
        assert run_python(code, ASGA_CPU_ISA=isa) == digest_of_all_results()


def digest_of_all_results() -> str:
    """A hash of everything that the four operators return, sums included, over cases and dtypes."""
    digest = hashlib.sha256()
    several_threads = ("200003 values", "long rows, many pieces", "few columns, many rows", "wide columns")
    cases = ("20003 values", "depthwise weight", "few columns", "many columns", "channels_last axis 1", "unaligned")
    for case in cases + several_threads:
        for dtype in DTYPES if case in cases else [torch.float32, torch.bfloat16]:
            x, grad, axis = _tensors(case, dtype)
            one = (x, *_parameters(x, axis, True), QUANT_MIN, QUANT_MAX, axis)
            results = [ops.fake_quant(*one), *ops.fake_quant_backward(grad, *one)]
            scales, probs = _mixture(x, axis, 8)
            for offsets in (None, torch.linspace(-3, 3, scales.numel()).view(scales.shape)):
                several = (x, scales, probs, offsets, QUANT_MINS, QUANT_MAXS, axis)
                results += [ops.mixed_fake_quant(*several), *ops.mixed_fake_quant_backward(grad, *several)]
            for result in results:
                assert not result.isnan().any()  # whose bits would be free
                digest.update(result.contiguous().view(torch.uint8).numpy().tobytes())
    for dtype in (torch.bfloat16, torch.float16):
        x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
        y = ops.fake_quant(x[~x.isnan()], torch.tensor([3e-5]), None, -(2**16), 2**16, None)
        digest.update(y.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _has(isa: str) -> bool:
    """Whether the processor has an instruction set, as far as the system says so."""
    if isa == "baseline":
        return True
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    return re.search(rf"\b{isa}{'f' if isa == 'avx512' else ''}\b", flags) is not None


def _tensors(case: str, dtype: torch.dtype, special: bool = False) -> tuple[Tensor, Tensor, int | None]:
    """Input, gradient with the input's strides, and axis of a case; with or without `SPECIAL` values in both."""
    shape, axis, view = (CASES | LARGE_CASES)[case]
    generator = torch.Generator().manual_seed(sum(shape))
    x, grad = 2 * torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)
    if special:
        values = torch.tensor(SPECIAL)[: x.numel()]
        x.view(-1)[: values.numel()] = values
        grad.view(-1)[-values.numel() :] = values.flip(0)
    x = view(x.to(dtype))
    return x, torch.empty_like(x).copy_(view(grad.to(dtype))), axis


def _dyadic(case: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, int | None]:
    """Like `_tensors`, with inputs that are multiples of 1/8 in [-6, 6] and gradients of -1, 0 and 1."""
    x, grad, axis = _tensors(case, torch.float32)
    x, grad = torch.round(8 * x).clamp(-48, 48) / 8, torch.round(grad).clamp(-1, 1)
    return x.to(dtype), grad.to(dtype), axis


def _channels(x: Tensor, axis: int | None) -> tuple[int, ...]:
    return () if axis is None else (x.shape[axis],)


def _parameters(x: Tensor, axis: int | None, with_zero_point: bool) -> tuple[Tensor, Tensor | None]:
    """Scales, the first 1/2 so that `SPECIAL` holds exact ties, and zero points between integers."""
    channels = _channels(x, axis) or (1,)
    generator = torch.Generator().manual_seed(channels[0])
    scale = 0.1 + torch.rand(channels, generator=generator)
    scale[:1] = 0.5
    zero_point = 4 * torch.rand(channels, generator=generator) - 2
    return scale, zero_point if with_zero_point else None


def _mixture(x: Tensor, axis: int | None, count: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(count)
    scales = 0.1 + torch.rand((count, *_channels(x, axis)), generator=generator)
    return scales, torch.softmax(torch.randn(count, generator=generator), 0)


def _per_value(grad: Tensor, x: Tensor, *parameters: Tensor | None, axis: int | None) -> list[Tensor | None]:
    """Everything as [numel], one channel per value: the reference then returns the terms of a sum one by one."""
    shape = [-1 if d == axis else 1 for d in range(x.dim())]
    spread = [None if p is None else p.reshape(shape).expand(x.shape).reshape(-1) for p in parameters]
    return [grad.reshape(-1), x.reshape(-1), *spread]


def _rounding(x: Tensor) -> float:
    """Largest relative error of one operation in the dtype of the arithmetic."""
    return torch.finfo(torch.float64 if x.dtype == torch.float64 else torch.float32).eps / 2


def _assert_same_sum(actual: Tensor, expected: Tensor, terms: Tensor, x: Tensor, axis: int | None) -> None:
    """Any order of adding n terms is off by at most n * u * sum(|terms|), u the relative error of one addition.

    The kernel adds at most the 8,192 values of a piece in the dtype of the arithmetic, the pieces in float64, and
    the reference all in float64. Four more roundings: of products with parameters, and of the result.
    """
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    if actual.numel() == 0:
        return
    others = [d for d in range(x.dim()) if d != axis]
    magnitude = terms.double().abs().reshape(x.shape)
    magnitude = magnitude.sum(others) if others else magnitude
    additions = min(x.numel() // max(expected.numel(), 1), 8192) + 4
    error = (actual.double() - expected.double()).abs()
    assert (error <= additions * _rounding(x) * magnitude.reshape(expected.shape)).all()
