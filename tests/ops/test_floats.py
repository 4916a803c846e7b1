import math

import pytest
import torch

from asga.ops import float_fake_quant
from asga.ops.floats import FLOAT_GRIDS, nearest_float
from asga.policy import SMALL_FLOATS

FORMATS = ("fp4", "fp8")
FP4_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
# Between two values of fp4 the one whose last bit of the mantissa is 0: 0, 1, 2 and 4 have it.
FP4_TIES = {0.25: 0.0, 0.75: 1.0, 1.25: 1.0, 1.75: 2.0, 2.5: 2.0, 3.5: 4.0, 5.0: 4.0}


def fp8_values() -> torch.Tensor:
    """All finite values of E4M3, ascending, as torch decodes its bytes."""
    values = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    return values[values.isfinite()].unique()


def cast(values: torch.Tensor) -> torch.Tensor:
    """E4M3 as torch casts it, which has no saturation."""
    return values.clamp(-448, 448).to(torch.float8_e4m3fn).to(values.dtype) + 0.0


def surrogate(input: torch.Tensor, scale: torch.Tensor, format: str) -> torch.Tensor:
    """A function whose derivatives are the straight-through ones."""
    largest = FLOAT_GRIDS[format].largest
    clamped = (input / scale).clamp(-largest, largest)
    return (clamped + (nearest_float(clamped, format) - clamped).detach()) * scale


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


class TestNearest:
    def test_fp8_is_the_cast_of_torch_bit_by_bit(self, assert_same_bits):
        # One pattern of float32 in 997, a prime: every exponent and all kinds of mantissas, both signs, NaN, Inf.
        patterns = torch.arange(-(2**31), 2**31, 997).to(torch.int32).view(torch.float32)
        assert_same_bits(nearest_float(patterns, "fp8"), cast(patterns))

    def test_fp8_at_and_around_every_value_and_every_tie(self, assert_same_bits):
        values = fp8_values()
        assert len(values) == 253  # 2 of 256 patterns are NaN, two are zero
        special = torch.cat([values, (values[1:] + values[:-1]) / 2])
        up, down = (torch.nextafter(special, torch.tensor(x)) for x in (math.inf, -math.inf))
        points = torch.cat([special, up, down])
        assert_same_bits(nearest_float(points, "fp8"), cast(points))
        assert torch.equal(nearest_float(values, "fp8"), values)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
    @pytest.mark.parametrize("sign", [1, -1])
    def test_fp4_has_sixteen_values(self, sign, dtype):
        values = torch.tensor(FP4_VALUES, dtype=dtype)
        assert torch.equal(nearest_float(sign * values, "fp4"), sign * values)
        for tie, expected in FP4_TIES.items():
            point = torch.tensor(sign * tie, dtype=dtype)
            lower, upper = (max(v for v in FP4_VALUES if v < tie), min(v for v in FP4_VALUES if v > tie))
            assert nearest_float(point, "fp4") == sign * expected
            assert nearest_float(torch.nextafter(point, torch.zeros_like(point)), "fp4") == sign * lower
            assert nearest_float(torch.nextafter(point, 10 * point), "fp4") == sign * upper

    def test_fp4_is_the_closest_of_its_values(self, generator):
        points = 8 * torch.randn(10_000, generator=generator)
        signed = torch.tensor([*FP4_VALUES, *(-v for v in FP4_VALUES)])
        closest = signed[(points[:, None] - signed).abs().argmin(1)]
        assert torch.equal(nearest_float(points, "fp4"), closest)

    def test_float64_rounds_once(self):
        """In float32 first, this would be a tie."""
        above = torch.tensor(2.5 + 2**-40, dtype=torch.float64)
        assert nearest_float(above, "fp4") == 3
        assert nearest_float(above.float(), "fp4") == 2

    @pytest.mark.parametrize("format", FORMATS)
    def test_extremes(self, format):
        grid = FLOAT_GRIDS[format]
        points = torch.tensor([math.inf, -math.inf, 3e38, math.nan, -0.0, -1e-42, grid.smallest, grid.smallest / 2])
        found = nearest_float(points, format)
        assert found[:3].tolist() == [grid.largest, -grid.largest, grid.largest]
        assert found[3].isnan()
        assert found[4:].tolist() == [0.0, 0.0, grid.smallest, 0.0]  # half of the smallest is a tie: to zero
        assert not found[4:].signbit().any()

    def test_costs_know_the_same_formats(self):
        assert SMALL_FLOATS.keys() == FLOAT_GRIDS.keys()
        exponents = {"fp4": 2, "fp8": 4}
        for name, grid in FLOAT_GRIDS.items():
            assert SMALL_FLOATS[name] == 1 + exponents[name] + grid.mantissa_bits


@pytest.mark.parametrize("format", FORMATS)
class TestFakeQuant:
    def test_rounds_in_units_of_the_scale(self, generator, format):
        x, scale = torch.randn(5, 7, generator=generator), torch.rand(5, 1, generator=generator) + 0.1
        assert torch.equal(float_fake_quant(x, scale, format), nearest_float(x / scale, format) * scale)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
    def test_other_dtypes_compute_wide_and_round_once(self, generator, format, dtype):
        x, scale = torch.randn(50, generator=generator).to(dtype), torch.tensor(0.3)
        wide = x.to(torch.promote_types(dtype, torch.float32))
        expected = (nearest_float(wide / scale.to(wide.dtype), format) * scale.to(wide.dtype)).to(dtype)
        assert torch.equal(float_fake_quant(x, scale, format), expected)

    def test_strides_are_those_of_empty_like(self, generator, format):
        x = torch.randn(2, 3, 4, 5, generator=generator).to(memory_format=torch.channels_last)
        for given in (x, x[:, :, ::2], x.permute(3, 0, 1, 2), x[:0]):
            found = float_fake_quant(given, torch.ones(()), format)
            assert (found.shape, found.stride()) == (given.shape, torch.empty_like(given).stride())

    @pytest.mark.parametrize("shape", [(), (4, 1, 1), (1, 3, 1), (4, 3, 5)], ids=str)
    def test_gradients_are_those_of_the_surrogate(self, generator, format, shape):
        x = torch.randn(4, 3, 5, generator=generator, dtype=torch.float64)
        scale = (torch.rand(shape, generator=generator, dtype=torch.float64) + 0.5) / FLOAT_GRIDS[format].largest
        upstream = torch.randn(4, 3, 5, generator=generator, dtype=torch.float64)
        inputs = [x.requires_grad_(), scale.requires_grad_()]
        expected = torch.autograd.grad(surrogate(*inputs, format), inputs, upstream)
        beyond = (expected[0] == 0).float().mean()
        assert 0 < beyond < 1
        found = torch.autograd.grad(float_fake_quant(*inputs, format), inputs, upstream)
        for actual, reference in zip(found, expected, strict=True):
            torch.testing.assert_close(actual, reference, rtol=1e-12, atol=1e-12)

    def test_gradients_in_bfloat16(self, generator, format):
        x = torch.randn(6, 40, generator=generator).bfloat16().requires_grad_()
        scale = (torch.rand(6, 1, generator=generator) / FLOAT_GRIDS[format].largest).requires_grad_()
        upstream = torch.randn(6, 40, generator=generator).bfloat16()
        found = torch.autograd.grad(float_fake_quant(x, scale, format), (x, scale), upstream)
        wide = [x.detach().double().requires_grad_(), scale.detach().double().requires_grad_()]
        expected = torch.autograd.grad(surrogate(*wide, format), wide, upstream.double())
        assert [g.dtype for g in found] == [torch.bfloat16, torch.float32]
        assert torch.equal(found[0].double(), expected[0])  # the upstream gradient or 0
        torch.testing.assert_close(found[1].double(), expected[1], rtol=1e-5, atol=1e-3)

    def test_beyond_the_range_the_input_has_no_gradient(self, format):
        largest = FLOAT_GRIDS[format].largest
        x = torch.tensor([largest, -largest, 1.01 * largest, -math.inf, math.nan]).requires_grad_()
        scale = torch.ones(5, requires_grad=True)
        float_fake_quant(x, scale, format).sum().backward()
        assert x.grad.tolist() == [1, 1, 0, 0, 0]
        assert scale.grad[:4].tolist() == [0, 0, largest, -largest]

    def test_compiles_to_one_graph(self, generator, format):
        x = torch.randn(4, 33, generator=generator).requires_grad_()
        scale = (torch.rand(4, 1, generator=generator) + 0.1).requires_grad_()

        def loss(x, scale):
            return (float_fake_quant(x, scale, format) * x.detach()).sum()

        torch._dynamo.reset()
        compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
        found = torch.autograd.grad(compiled(x, scale), (x, scale))
        expected = torch.autograd.grad(loss(x, scale), (x, scale))
        assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))

    def test_transforms(self, generator, format):
        x, scale = torch.randn(3, 8, generator=generator), torch.tensor([0.1, 0.2, 0.3])

        def loss(x, scale):
            return float_fake_quant(x, scale, format).square().sum()

        found = torch.func.vmap(torch.func.grad(loss, argnums=(0, 1)))(x, scale)
        for k in range(3):
            row = [x[k].clone().requires_grad_(), scale[k].clone().requires_grad_()]
            expected = torch.autograd.grad(loss(*row), row)
            assert torch.equal(found[0][k], expected[0])
            torch.testing.assert_close(found[1][k], expected[1])

    def test_vmap_of_many_gradients_for_one_input(self, generator, format):
        x, factors = torch.randn(8, generator=generator), torch.randn(3, 8, generator=generator)
        gradient = torch.func.grad(lambda x, factor: (float_fake_quant(x, torch.tensor(0.1), format) * factor).sum())
        found = torch.func.vmap(gradient, in_dims=(None, 0))(x, factors)
        assert torch.equal(found, torch.stack([gradient(x, factor) for factor in factors]))

    def test_has_no_second_derivative(self, format):
        x = torch.ones(3, requires_grad=True)
        (grad,) = torch.autograd.grad(float_fake_quant(x, x, format).sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="no second derivative"):
            grad.sum().backward()


class TestChecks:
    @pytest.mark.parametrize(
        ("arguments", "error", "message"),
        [
            ((torch.ones(2), torch.ones(()), "fp6"), ValueError, "format is 'fp6'; it must be one of 'fp4', 'fp8'"),
            ((torch.ones(2, dtype=torch.int32), torch.ones(()), "fp4"), TypeError, "input has dtype torch.int32"),
            ((torch.ones(2), 0.5, "fp4"), TypeError, r"scale is 0\.5, of type float; a tensor is needed"),
            ((torch.ones(2), torch.ones((), dtype=torch.int32), "fp4"), TypeError, "scale has dtype torch.int32"),
            ((torch.ones(2, 3), torch.ones(2), "fp4"), ValueError, r"scale has shape \(2,\), which does not broadcast"),
            ((torch.ones(3), torch.ones(2, 3), "fp4"), ValueError, r"does not broadcast to \(3,\)"),
        ],
    )
    def test_what_is_wrong_is_named(self, arguments, error, message):
        with pytest.raises(error, match=message):
            float_fake_quant(*arguments)
