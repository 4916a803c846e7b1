import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="the Triton kernels need triton")

from asga.kernels import layout
from asga.kernels import mixed_fake_quant as kernels
from asga.ops import reference

# NaN and Inf go through on purpose; the interpreter computes with NumPy, which warns.
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in.*:RuntimeWarning")

# Bits 2, 4, 8 signed, 3 unsigned, and so on up to eight candidates.
QUANT_MINS = [-2, -8, -128, 0, -4, 0, -32, 0]
QUANT_MAXS = [1, 7, 127, 7, 3, 15, 31, 255]


offsets = pytest.mark.parametrize("offset", [False, True], ids=["symmetric", "zero points"])


def _arguments(x: Tensor, axis: int | None, candidates: int, *, offset: bool = False) -> tuple:
    """`x`, scales (the first channel's 1/4, so that ties are exact), probabilities, zero points, ranges, axis."""
    generator = torch.Generator().manual_seed(candidates)
    shape = (candidates,) if axis is None else (candidates, x.shape[axis])
    scales = 0.05 + 0.3 * torch.rand(shape, generator=generator)
    scales[..., :1] = 0.25
    probs = torch.rand(candidates, generator=generator).softmax(0)
    ranges = (QUANT_MINS[:candidates], QUANT_MAXS[:candidates])
    zero_points = (6 * torch.rand(shape, generator=generator) - 3).to(x.device) if offset else None
    return x, scales.to(x.device), probs.to(x.device), zero_points, *ranges, axis


def _sums_of_magnitudes(grad: Tensor, x: Tensor, scales: Tensor, probs: Tensor, zero_points, mins, maxs, axis):
    """sum |terms| of the gradients of scales, probabilities and zero points, in float64, to bound their error."""
    shape = [-1 if d == axis else 1 for d in range(x.dim())]
    others = [d for d in range(x.dim()) if d != axis]
    of_scales, of_probs, of_zero_points = [], [], []
    grad, offsets = grad.double().abs(), torch.zeros_like(scales) if zero_points is None else zero_points
    for scale, prob, zero_point, low, high in zip(
        scales.double(), probs.double(), offsets.double(), mins, maxs, strict=True
    ):
        scale, offset = scale.reshape(shape), zero_point.round().reshape(shape)
        v = x.double() / scale
        clamped = v.clamp(low - offset, high - offset)
        inside = v == clamped
        terms = grad * torch.where(inside, (v.round() - v).abs(), clamped.abs()) * prob
        outside = torch.where(inside, 0.0, grad) * scale * prob
        # sum over no dimension at all means all of them to torch
        of_scales.append(terms.sum(others) if others else terms)
        of_zero_points.append(outside.sum(others) if others else outside)
        of_probs.append((grad * clamped.round().abs() * scale).sum())
    return torch.stack(of_scales), torch.stack(of_probs), torch.stack(of_zero_points)


def _random_like(x: Tensor) -> Tensor:
    return torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(x.device, x.dtype)


def _check_sums(actual: tuple, expected: tuple, grad: Tensor, arguments: tuple, assert_same_sum) -> None:
    """Gradients of scales, probabilities and, if there are any, zero points."""
    count = 2 if arguments[3] is None else 3
    magnitudes = _sums_of_magnitudes(grad, *arguments)[:count]
    for ours, wanted, magnitude in zip(actual[1 : count + 1], expected[1 : count + 1], magnitudes, strict=True):
        assert_same_sum(ours, wanted, magnitude)
    if count == 2:
        assert actual[3].shape == (0,)


def _check_backward(grad: Tensor, arguments: tuple, assert_same_bits, assert_same_sum) -> None:
    actual = kernels.mixed_fake_quant_backward(grad, *arguments)
    expected = reference.mixed_fake_quant_backward(grad, *arguments)
    assert_same_bits(actual[0], expected[0])
    _check_sums(actual, expected, grad, arguments, assert_same_sum)


@offsets
def test_forward_and_input_gradient_are_the_reference_bit_for_bit(case, offset, device, assert_same_bits):
    arguments = _arguments(case.input(device, special=True), case.axis, 3, offset=offset)
    assert_same_bits(kernels.mixed_fake_quant(*arguments), reference.mixed_fake_quant(*arguments))
    grad = _random_like(arguments[0])
    actual = kernels.mixed_fake_quant_backward(grad, *arguments)[0]
    assert_same_bits(actual, reference.mixed_fake_quant_backward(grad, *arguments)[0])


def test_sums_are_the_reference_but_for_their_order(case, device, assert_same_bits, assert_same_sum):
    arguments = _arguments(case.input(device), case.axis, 3, offset=True)
    _check_backward(_random_like(arguments[0]), arguments, assert_same_bits, assert_same_sum)


@pytest.mark.parametrize("name", ["1025 values", "wide rows"])
@pytest.mark.parametrize("candidates", range(1, 9))
def test_every_number_of_candidates(candidates, name, cases, device, assert_same_bits, assert_same_sum):
    case = cases[name]
    arguments = _arguments(case.input(device), case.axis, candidates, offset=candidates % 2 == 0)
    assert_same_bits(kernels.mixed_fake_quant(*arguments), reference.mixed_fake_quant(*arguments))
    _check_backward(_random_like(arguments[0]), arguments, assert_same_bits, assert_same_sum)


@offsets
@pytest.mark.parametrize("scale", [0.0, -0.5, float("nan"), float("inf"), 1e-45], ids=str)
@pytest.mark.parametrize("name", ["1025 values", "depthwise weight", "channels innermost"])
def test_scales_that_mean_nothing_do_no_harm(name, scale, offset, cases, device, assert_same_bits):
    """They are not checked, as that would stall a GPU; they still take the arithmetic of the definition."""
    case = cases[name]
    x, scales, *others = _arguments(case.input(device, special=True), case.axis, 2, offset=offset)
    scales[-1] = scale  # beside a good candidate
    arguments = (x, scales, *others)
    assert_same_bits(kernels.mixed_fake_quant(*arguments), reference.mixed_fake_quant(*arguments))
    actual = kernels.mixed_fake_quant_backward(_random_like(x), *arguments)
    expected = reference.mixed_fake_quant_backward(_random_like(x), *arguments)
    assert_same_bits(actual[0], expected[0])
    assert [t.shape for t in actual] == [t.shape for t in expected]


@pytest.mark.parametrize("name", ["4099 values", "wide rows", "channels innermost"])
def test_a_program_that_adds_up_many_tiles(name, cases, device, assert_same_bits, assert_same_sum, monkeypatch):
    monkeypatch.setattr(layout, "_TARGET_PROGRAMS", 2)
    case = cases[name]
    arguments = _arguments(case.input(device), case.axis, 2, offset=True)
    _check_backward(_random_like(arguments[0]), arguments, assert_same_bits, assert_same_sum)


def test_values_next_to_ties_multiply_as_the_reference_does(next_to_ties, assert_same_bits):
    x, scale = next_to_ties
    scales, probs = torch.stack([scale, 2 * scale]), torch.tensor([0.25, 0.75], device=x.device)
    arguments = (x, scales, probs, None, [-128, -8], [127, 7], 0)
    assert_same_bits(kernels.mixed_fake_quant(*arguments), reference.mixed_fake_quant(*arguments))


def test_negative_and_zero_probabilities(device, assert_same_bits, assert_same_sum):
    x = torch.linspace(-3, 3, 25, device=device)
    _, scales, _, *rest = _arguments(x, None, 3)
    arguments = (x, scales, torch.tensor([-0.5, 0.0, 1.5], device=device), *rest)
    assert_same_bits(kernels.mixed_fake_quant(*arguments), reference.mixed_fake_quant(*arguments))
    grads = kernels.mixed_fake_quant_backward(x, *arguments)
    expected = reference.mixed_fake_quant_backward(x, *arguments)
    assert_same_bits(grads[0], expected[0])
    assert grads[1][1] == 0
    magnitudes = _sums_of_magnitudes(x, *arguments)
    assert_same_sum(grads[2], expected[2], magnitudes[1])


def test_nan_stays_and_infinities_clamp(device, assert_same_bits):
    x = torch.tensor([float("nan"), float("inf"), -float("inf")], device=device)
    scales = torch.tensor([0.5, 0.25], device=device)
    probs = torch.tensor([0.25, 0.75], device=device)
    output = kernels.mixed_fake_quant(x, scales, probs, None, [-2, -8], [1, 7], None)
    expected = [float("nan"), 0.25 * 0.5 * 1 + 0.75 * 0.25 * 7, -0.25 * 0.5 * 2 - 0.75 * 0.25 * 8]
    assert_same_bits(output, torch.tensor(expected, device=device))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("name", ["4099 values", "wide rows", "channels innermost"])
def test_other_dtypes(name, dtype, cases, device, assert_same_rounded, assert_same_sum):
    case = cases[name]
    arguments = _arguments(case.input(device, dtype), case.axis, 3, offset=dtype == torch.bfloat16)
    assert_same_rounded(kernels.mixed_fake_quant(*arguments), reference.mixed_fake_quant(*arguments))
    grad = _random_like(arguments[0])
    actual = kernels.mixed_fake_quant_backward(grad, *arguments)
    expected = reference.mixed_fake_quant_backward(grad, *arguments)
    assert_same_rounded(actual[0], expected[0])
    _check_sums(actual, expected, grad, arguments, assert_same_sum)


def test_scales_and_probs_of_other_dtypes(cases, device, assert_same_bits):
    case = cases["wide rows"]
    x, scales, probs, zero_points, *rest = _arguments(case.input(device), case.axis, 3, offset=True)
    arguments = (x, scales.bfloat16(), probs.double(), zero_points.half(), *rest)
    assert_same_bits(kernels.mixed_fake_quant(*arguments), reference.mixed_fake_quant(*arguments))
    grads = kernels.mixed_fake_quant_backward(x, *arguments)
    assert [grad.dtype for grad in grads] == [torch.float32, torch.bfloat16, torch.float64, torch.float16]


def test_a_gradient_in_another_memory_order(cases, device, assert_same_bits, assert_same_sum):
    case = cases["channels_last activation"]
    arguments = _arguments(case.input(device), case.axis, 2)
    grad = _random_like(arguments[0])
    assert grad.stride() != arguments[0].stride()
    _check_backward(grad, arguments, assert_same_bits, assert_same_sum)


def test_scales_with_strides(cases, device, assert_same_bits, assert_same_sum):
    case = cases["wide rows"]
    x, scales, *rest = _arguments(case.input(device), case.axis, 2)
    arguments = (x, scales.t().contiguous().t(), *rest)
    assert not arguments[1].is_contiguous()
    assert_same_bits(kernels.mixed_fake_quant(*arguments), reference.mixed_fake_quant(*arguments))
    _check_backward(_random_like(x), arguments, assert_same_bits, assert_same_sum)


def test_two_runs_give_the_same_bits(cases, device, assert_same_bits):
    case = cases["channels innermost"]
    arguments = _arguments(case.input(device), case.axis, 3)
    runs = [kernels.mixed_fake_quant_backward(arguments[0], *arguments) for _ in range(2)]
    for first, second in zip(*runs, strict=True):
        assert_same_bits(first, second)
