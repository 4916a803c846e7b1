"""The definition itself: against the formula and torch's own operator, its gradients by hand and by differences."""

import pytest
import torch
from torch import Tensor

from asga.ops import backend, backends, reference

ops = torch.ops.asga

# Both computations in double precision that are at hand: their gradients are checked in the same way.
double_backends = pytest.mark.parametrize(
    "name", ["reference", *(["cpu"] if backends.unavailable("cpu") is None else [])]
)


class TestForward:
    @pytest.mark.parametrize("axis", [None, 0, 1, 2], ids=lambda axis: f"axis {axis}")
    @pytest.mark.parametrize("with_zero_point", [False, True], ids=["symmetric", "zero point"])
    def test_is_the_published_formula(self, axis, with_zero_point):
        """(clamp(round(x/s) + z, qmin, qmax) - z) * s clamps after rounding, where the code clamps before."""
        x, scale, zero_point = _random(axis, torch.float32)
        s = _spread(scale, x, axis)
        z = _spread(zero_point, x, axis).round() if with_zero_point else 0.0
        expected = ((x / s).round().add(z).clamp(-8, 7) - z) * s
        actual = reference.fake_quant(x, scale, zero_point if with_zero_point else None, -8, 7, axis)
        assert torch.equal(actual, expected)

    def test_agrees_with_torch_where_dividing_and_multiplying_by_the_reciprocal_are_the_same(self):
        x, _, _ = _random(None, torch.float32)
        expected = torch.fake_quantize_per_tensor_affine(x, 0.25, 3, -8, 7)
        actual = reference.fake_quant(x, torch.tensor([0.25]), torch.tensor([3.0]), -8, 7, None)
        assert torch.equal(actual, expected)

    def test_ties_go_to_the_even_integer_and_no_zero_is_negative(self):
        x = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, -2.5, -0.0, -0.1])
        y = reference.fake_quant(x, torch.ones(1), None, -8, 7, None)
        assert y.tolist() == [0, 2, 2, 0, -2, -2, 0, 0]
        assert y.signbit().tolist() == [False, False, False, False, True, True, False, False]

    def test_nan_stays_and_infinities_clamp(self):
        x = torch.tensor([float("nan"), float("inf"), -float("inf")])
        y = reference.fake_quant(x, torch.tensor([0.5]), None, -8, 7, None)
        assert y[0].isnan()
        assert y[1:].tolist() == [3.5, -4.0]

    def test_a_zero_point_is_rounded_half_to_even(self):
        x = torch.linspace(-3, 3, 25)
        for given, used in [(0.5, 0.0), (1.5, 2.0), (-2.6, -3.0)]:
            settings = (-2, 2, None)
            actual = reference.fake_quant(x, torch.ones(1), torch.tensor([given]), *settings)
            assert torch.equal(actual, reference.fake_quant(x, torch.ones(1), torch.tensor([used]), *settings))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
    def test_low_precision_is_the_float32_result_rounded_once(self, dtype):
        x, scale, zero_point = _random(1, torch.float32)
        x = x.to(dtype)
        one = (scale, zero_point, -8, 7, 1)
        assert torch.equal(reference.fake_quant(x, *one), reference.fake_quant(x.float(), *one).to(dtype))
        several = (torch.stack([scale, 2 * scale]), torch.tensor([0.3, 0.7]), None, [-8, -2], [7, 1], 1)
        expected = reference.mixed_fake_quant(x.float(), *several).to(dtype)
        assert torch.equal(reference.mixed_fake_quant(x, *several), expected)


class TestMixture:
    def test_is_the_weighted_sum_of_fake_quant(self):
        """Exactly so where scales are powers of two: their reciprocals, and products with them, are exact."""
        x, _, _ = _random(0, torch.float32)
        scales = 2.0 ** torch.randint(-4, 1, (3, x.shape[0]), generator=torch.Generator().manual_seed(0))
        probs = torch.tensor([0.5, 0.25, 0.25])
        mins, maxs = [-2, -4, -8], [1, 3, 7]
        terms = [
            p * reference.fake_quant(x, s, None, low, high, 0)
            for p, s, low, high in zip(probs, scales, mins, maxs, strict=True)
        ]
        assert torch.equal(
            reference.mixed_fake_quant(x, scales, probs, None, mins, maxs, 0), terms[0] + terms[1] + terms[2]
        )

    @pytest.mark.parametrize("axis", [None, 0, 1, 2], ids=lambda axis: f"axis {axis}")
    def test_is_the_weighted_sum_of_fake_quant_with_zero_points(self, axis):
        """Scales are powers of two, as above. The zero points differ between candidates and are no integers."""
        x, scale, zero_point = _random(axis, torch.float32)
        scales, probs = torch.stack([scale, 2 * scale]), torch.tensor([0.25, 0.75])
        zero_points = torch.stack([zero_point, 1 - 2 * zero_point])
        mins, maxs = [-3, 0], [4, 15]
        several = (scales, probs, zero_points, mins, maxs, axis)
        each = list(zip(scales, zero_points, mins, maxs, strict=True))
        first, second = (p * reference.fake_quant(x, *one, axis) for p, one in zip(probs, each, strict=True))
        assert torch.equal(reference.mixed_fake_quant(x, *several), first + second)

        grad = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
        actual = reference.mixed_fake_quant_backward(grad, x, *several)
        expected = [reference.fake_quant_backward(grad, x, *one, axis) for one in each]
        assert torch.equal(actual[0], grad * sum(p * (e[0] != 0) for p, e in zip(probs, expected, strict=True)))
        for k, (prob, wanted) in enumerate(zip(probs, expected, strict=True)):
            # Probabilities and scales are powers of two times small integers: only the sums round, in float64.
            torch.testing.assert_close(actual[1][k], prob * wanted[1], rtol=2e-7, atol=0)
            torch.testing.assert_close(actual[3][k], prob * wanted[2], rtol=2e-7, atol=0)

    def test_zero_points_of_zero_change_nothing(self):
        x, scale, _ = _random(1, torch.float32)
        scales, probs = torch.stack([scale, 2 * scale]), torch.tensor([0.3, 0.7])
        ranges = ([-2, 0], [1, 7], 1)
        given = (scales, probs, torch.zeros_like(scales), *ranges)
        none = (scales, probs, None, *ranges)
        assert torch.equal(reference.mixed_fake_quant(x, *given), reference.mixed_fake_quant(x, *none))
        actual, expected = (reference.mixed_fake_quant_backward(x, x, *arguments) for arguments in (given, none))
        assert all(map(torch.equal, actual[:3], expected[:3]))
        assert expected[3].shape == (0,)

    def test_is_linear_in_the_probabilities(self):
        """The derivative by a probability is the sum of gradient times that candidate's values."""
        x, scale, _ = _random(1, torch.float64)
        grad = torch.randn(x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        scales = torch.stack([scale, 0.5 * scale])
        settings = (None, [-2, -8], [1, 7], 1)
        actual = reference.mixed_fake_quant_backward(grad, x, scales, torch.zeros(2).double(), *settings)[2]
        for k in range(2):
            only = torch.eye(2, dtype=torch.float64)[k]
            expected = (grad * reference.mixed_fake_quant(x, scales, only, *settings)).sum()
            # 105 products and sums in float64
            torch.testing.assert_close(actual[k], expected, rtol=1e-12, atol=1e-12)


class TestGradientsByHand:
    """scale 1/2, range -8..7, zero point 2: the grid is -10..5, the range of x is [-5, 2.5]; the gradient is 3."""

    @pytest.mark.parametrize(
        ("x", "y", "grad_x", "grad_scale", "grad_zero_point"),
        [
            pytest.param(0.625, 0.5, 3.0, 3 * (1 - 1.25), 0.0, id="inside"),
            pytest.param(-6.0, -5.0, 0.0, 3 * -10.0, 3 * -0.5, id="below"),
            pytest.param(4.0, 2.5, 0.0, 3 * 5.0, 3 * -0.5, id="above"),
            pytest.param(-5.0, -5.0, 3.0, 0.0, 0.0, id="on the lower bound"),
            pytest.param(2.5, 2.5, 3.0, 0.0, 0.0, id="on the upper bound"),
            pytest.param(2.625, 2.5, 0.0, 3 * 5.0, 3 * -0.5, id="above, though it rounds to the bound"),
        ],
    )
    @double_backends
    def test_fake_quant(self, x, y, grad_x, grad_scale, grad_zero_point, name):
        values = [torch.tensor([v], dtype=torch.float64, requires_grad=True) for v in (x, 0.5, 2.0)]
        with backend(name):
            output = ops.fake_quant(*values, -8, 7, None)
            output.backward(torch.tensor([3.0], dtype=torch.float64))
        assert output.item() == y
        assert [v.grad.item() for v in values] == [grad_x, grad_scale, grad_zero_point]

    @double_backends
    def test_mixed_fake_quant(self, name):
        """x = 0.875 is 1.75, above -2..1, at scale 1/2; 3.5, above -4..3, at 1/4; and 7, inside -8..7, at 1/8."""
        x = torch.tensor([0.875], dtype=torch.float64, requires_grad=True)
        scales = torch.tensor([0.5, 0.25, 0.125], dtype=torch.float64, requires_grad=True)
        probs = torch.tensor([0.5, 0.25, 2.0], dtype=torch.float64, requires_grad=True)
        with backend(name):
            output = ops.mixed_fake_quant(x, scales, probs, None, [-2, -4, -8], [1, 3, 7], None)
            output.backward(torch.tensor([3.0], dtype=torch.float64))
        assert output.item() == 0.5 * 0.5 + 0.25 * 0.75 + 2 * 0.875
        assert x.grad.item() == 3 * 2.0
        assert scales.grad.tolist() == [3 * 0.5 * 1, 3 * 0.25 * 3, 0.0]
        assert probs.grad.tolist() == [3 * 0.5, 3 * 0.75, 3 * 0.875]

    def test_mixed_fake_quant_with_zero_points(self):
        """Grids of -10..5 at scale 1/2, where x = 3 is 6, above; and of 1..16 at 1/4, where it is 12, inside."""
        x = torch.tensor([3.0], dtype=torch.float64, requires_grad=True)
        scales = torch.tensor([0.5, 0.25], dtype=torch.float64, requires_grad=True)
        probs = torch.tensor([0.5, 2.0], dtype=torch.float64, requires_grad=True)
        zero_points = torch.tensor([2.0, -1.0], dtype=torch.float64, requires_grad=True)
        with backend("reference"):
            output = ops.mixed_fake_quant(x, scales, probs, zero_points, [-8, 0], [7, 15], None)
            output.backward(torch.tensor([3.0], dtype=torch.float64))
        assert output.item() == 0.5 * 2.5 + 2 * 3.0
        assert x.grad.item() == 3 * 2.0
        assert scales.grad.tolist() == [3 * 0.5 * 5, 0.0]
        assert probs.grad.tolist() == [3 * 2.5, 3 * 3.0]
        assert zero_points.grad.tolist() == [3 * 0.5 * -0.5, 0.0]


def _random(axis: int | None, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Values in and out of the range, with their scales and zero points.

    All x / scale are multiples of 1/8 plus 0.055 to 0.44, so none is within 0.05 of a tie or a bound.
    """
    generator = torch.Generator().manual_seed(0)
    channels = 1 if axis is None else (7, 3, 5)[axis]
    scale = 0.25 * 2.0 ** torch.randint(-1, 2, (channels,), generator=generator)
    steps = torch.randint(-40, 40, (7, 3, 5), generator=generator) / 4 + 0.11
    x = steps * 0.25
    zero_point = torch.randint(-2, 3, (channels,), generator=generator) + 0.3
    return x.to(dtype), scale.to(dtype), zero_point.to(dtype)


def _spread(parameter: Tensor, x: Tensor, axis: int | None) -> Tensor:
    return parameter.reshape([-1 if d == axis else 1 for d in range(x.dim())])
