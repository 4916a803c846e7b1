import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="the Triton kernels need triton")

from asga.kernels import fake_quant as kernels
from asga.kernels import layout
from asga.ops import reference

# NaN and Inf go through on purpose; the interpreter computes with NumPy, which warns.
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in.*:RuntimeWarning")

QUANT_MIN, QUANT_MAX = -8, 7


def _parameters(case, device: str) -> tuple[Tensor, Tensor]:
    """Scales, the first 1/4 so that the special values hold exact ties, and zero points between integers."""
    channels = case.channels(device)
    generator = torch.Generator().manual_seed(channels)
    scale = 0.05 + 0.3 * torch.rand(channels, generator=generator)
    scale[:1] = 0.25
    zero_point = 4 * torch.rand(channels, generator=generator) - 2
    return scale.to(device), zero_point.to(device)


def _sums_of_magnitudes(grad: Tensor, x: Tensor, scale: Tensor, zero_point: Tensor | None, axis: int | None):
    """sum |terms| of the gradients of scale and zero point, in float64, for the bound of their error."""
    shape = [-1 if d == axis else 1 for d in range(x.dim())]
    grad, x, scale = grad.double().abs(), x.double(), scale.double().reshape(shape)
    offset = torch.zeros_like(scale) if zero_point is None else zero_point.double().round().reshape(shape)
    v = x / scale
    clamped = v.clamp(QUANT_MIN - offset, QUANT_MAX - offset)
    inside = v == clamped
    others = [d for d in range(x.dim()) if d != axis]
    scale_terms = grad * torch.where(inside, (v.round() - v).abs(), clamped.abs())
    zero_point_terms = torch.where(inside, 0.0, grad * scale)
    # sum over no dimension at all means all of them to torch
    return [terms.sum(others) if others else terms for terms in (scale_terms, zero_point_terms)]


@pytest.mark.parametrize("offset", [False, True], ids=["symmetric", "zero point"])
def test_forward_and_input_gradient_are_the_reference_bit_for_bit(case, offset, device, assert_same_bits):
    x = case.input(device, special=True)
    scale, zero_point = _parameters(case, device)
    arguments = (x, scale, zero_point if offset else None, QUANT_MIN, QUANT_MAX, case.axis)
    assert_same_bits(kernels.fake_quant(*arguments), reference.fake_quant(*arguments))
    grad = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(device)
    actual = kernels.fake_quant_backward(grad, *arguments)[0]
    assert_same_bits(actual, reference.fake_quant_backward(grad, *arguments)[0])


@pytest.mark.parametrize("offset", [False, True], ids=["symmetric", "zero point"])
def test_sums_are_the_reference_but_for_their_order(case, offset, device, assert_same_sum):
    x = case.input(device)
    scale, zero_point = _parameters(case, device)
    zero_point = zero_point if offset else None
    grad = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(device)
    arguments = (grad, x, scale, zero_point, QUANT_MIN, QUANT_MAX, case.axis)
    _, grad_scale, grad_zero_point = kernels.fake_quant_backward(*arguments)
    _, expected_scale, expected_zero_point = reference.fake_quant_backward(*arguments)
    magnitudes = _sums_of_magnitudes(grad, x, scale, zero_point, case.axis)
    assert_same_sum(grad_scale, expected_scale, magnitudes[0])
    if offset:
        assert_same_sum(grad_zero_point, expected_zero_point, magnitudes[1])
    else:
        assert grad_zero_point.shape == (0,)


@pytest.mark.parametrize("name", ["4099 values", "wide rows", "channels innermost"])
def test_a_program_that_adds_up_many_tiles(name, cases, device, assert_same_bits, assert_same_sum, monkeypatch):
    monkeypatch.setattr(layout, "_TARGET_PROGRAMS", 2)
    case = cases[name]
    x = case.input(device)
    scale, _ = _parameters(case, device)
    arguments = (torch.ones_like(x), x, scale, None, QUANT_MIN, QUANT_MAX, case.axis)
    grad_input, grad_scale, _ = kernels.fake_quant_backward(*arguments)
    expected_input, expected_scale, _ = reference.fake_quant_backward(*arguments)
    assert_same_bits(grad_input, expected_input)
    magnitudes = _sums_of_magnitudes(*arguments[:4], case.axis)
    assert_same_sum(grad_scale, expected_scale, magnitudes[0])


def test_values_next_to_ties_divide_as_the_reference_does(next_to_ties, assert_same_bits):
    x, scale = next_to_ties
    arguments = (x, scale, None, -128, 127, 0)
    assert_same_bits(kernels.fake_quant(*arguments), reference.fake_quant(*arguments))


def test_ties_go_to_the_even_integer_and_no_zero_is_negative(device, assert_same_bits):
    scale = torch.tensor([0.25], device=device)
    x = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 7.5, -8.5, -0.1], device=device) * 0.25
    expected = torch.tensor([0.0, 2.0, 2.0, 0.0, -2.0, -2.0, 7.0, -8.0, 0.0], device=device) * 0.25
    assert_same_bits(kernels.fake_quant(x, scale, None, QUANT_MIN, QUANT_MAX, None), expected)


def test_nan_stays_and_infinities_clamp(device, assert_same_bits):
    scale = torch.tensor([0.5], device=device)
    x = torch.tensor([float("nan"), float("inf"), -float("inf")], device=device)
    output = kernels.fake_quant(x, scale, None, QUANT_MIN, QUANT_MAX, None)
    assert_same_bits(output, torch.tensor([float("nan"), 3.5, -4.0], device=device))
    grad_input, grad_scale, _ = kernels.fake_quant_backward(
        torch.ones_like(x[1:]), x[1:], scale, None, QUANT_MIN, QUANT_MAX, None
    )
    assert grad_input.tolist() == [0.0, 0.0]
    assert grad_scale.tolist() == [QUANT_MAX + QUANT_MIN]


@pytest.mark.parametrize("offset", [False, True], ids=["symmetric", "zero point"])
@pytest.mark.parametrize("scale", [0.0, -0.5, float("nan"), float("inf"), 1e-45], ids=str)
@pytest.mark.parametrize("name", ["1025 values", "depthwise weight", "channels innermost"])
def test_scales_that_mean_nothing_do_no_harm(name, scale, offset, cases, device, assert_same_bits):
    """They are not checked, as that would stall a GPU; they still take the arithmetic of the definition."""
    case = cases[name]
    x = case.input(device, special=True)
    scales, zero_point = _parameters(case, device)
    arguments = (x, torch.full_like(scales, scale), zero_point if offset else None, QUANT_MIN, QUANT_MAX, case.axis)
    assert_same_bits(kernels.fake_quant(*arguments), reference.fake_quant(*arguments))
    actual = kernels.fake_quant_backward(torch.ones_like(x), *arguments)
    expected = reference.fake_quant_backward(torch.ones_like(x), *arguments)
    assert_same_bits(actual[0], expected[0])
    assert [t.shape for t in actual] == [t.shape for t in expected]


def test_the_range_includes_its_bounds_before_rounding(device):
    scale = torch.tensor([1.0], device=device)
    x = torch.tensor([-8.0, -8.25, 7.0, 7.25], device=device)
    grads = kernels.fake_quant_backward(torch.ones_like(x), x, scale, None, QUANT_MIN, QUANT_MAX, None)
    assert grads[0].tolist() == [1.0, 0.0, 1.0, 0.0]
    assert grads[1].tolist() == [0.0 - 8.0 + 0.0 + 7.0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("name", ["4099 values", "wide rows", "channels innermost"])
def test_other_dtypes(name, dtype, cases, device, assert_same_bits, assert_same_rounded, assert_same_sum):
    case = cases[name]
    x = case.input(device, dtype)
    scale, zero_point = _parameters(case, device)
    arguments = (x, scale, zero_point, QUANT_MIN, QUANT_MAX, case.axis)
    assert_same_rounded(kernels.fake_quant(*arguments), reference.fake_quant(*arguments))
    grads = kernels.fake_quant_backward(torch.ones_like(x), *arguments)
    expected_grads = reference.fake_quant_backward(torch.ones_like(x), *arguments)
    assert_same_bits(grads[0], expected_grads[0])
    magnitudes = _sums_of_magnitudes(torch.ones_like(x), x, scale, zero_point, case.axis)
    for actual, wanted, magnitude in zip(grads[1:], expected_grads[1:], magnitudes, strict=True):
        assert_same_sum(actual, wanted, magnitude)


@pytest.mark.parametrize(
    ("scale_dtype", "zero_point_dtype"),
    [(torch.bfloat16, torch.float32), (torch.float64, torch.bfloat16), (torch.float32, torch.float64)],
    ids=str,
)
def test_scale_and_zero_point_of_other_dtypes(scale_dtype, zero_point_dtype, cases, device, assert_same_bits):
    case = cases["wide rows"]
    x = case.input(device)
    scale, zero_point = _parameters(case, device)
    arguments = (x, scale.to(scale_dtype), zero_point.to(zero_point_dtype), QUANT_MIN, QUANT_MAX, case.axis)
    assert_same_bits(kernels.fake_quant(*arguments), reference.fake_quant(*arguments))
    grads = kernels.fake_quant_backward(x, *arguments)
    assert (grads[1].dtype, grads[2].dtype) == (scale_dtype, zero_point_dtype)


def test_a_gradient_in_another_memory_order(cases, device, assert_same_bits, assert_same_sum):
    case = cases["channels_last activation"]
    x = case.input(device)
    scale, _ = _parameters(case, device)
    grad = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(device)
    assert grad.stride() != x.stride()
    arguments = (grad, x, scale, None, QUANT_MIN, QUANT_MAX, case.axis)
    grad_input, grad_scale, _ = kernels.fake_quant_backward(*arguments)
    expected_input, expected_scale, _ = reference.fake_quant_backward(*arguments)
    assert_same_bits(grad_input, expected_input)
    assert_same_sum(grad_scale, expected_scale, _sums_of_magnitudes(*arguments[:4], case.axis)[0])


def test_a_scale_with_strides(cases, device, assert_same_bits):
    case = cases["wide rows"]
    x = case.input(device)
    scale = torch.tensor([[0.1, 9.0], [0.2, 9.0], [0.3, 9.0]], device=device)[:, 0]
    arguments = (x, scale, None, QUANT_MIN, QUANT_MAX, case.axis)
    assert_same_bits(kernels.fake_quant(*arguments), reference.fake_quant(*arguments))
    assert kernels.fake_quant_backward(x, *arguments)[1].shape == scale.shape


def test_two_runs_give_the_same_bits(cases, device, assert_same_bits):
    case = cases["channels innermost"]
    x = case.input(device)
    scale, zero_point = _parameters(case, device)
    runs = [kernels.fake_quant_backward(x, x, scale, zero_point, QUANT_MIN, QUANT_MAX, case.axis) for _ in range(2)]
    for first, second in zip(*runs, strict=True):
        assert_same_bits(first, second)
