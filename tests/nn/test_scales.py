import math

import pytest
import torch

from asga.nn.scales import FLOOR_RATIO, effective_scale, lsq_scale, mse_scale, quant_range
from asga.ops import fake_quant


@pytest.mark.parametrize(
    ("bits", "signed", "expected"),
    [(2, True, (-2, 1)), (2, False, (0, 3)), (8, True, (-128, 127)), (8, False, (0, 255))],
)
def test_quant_range(bits, signed, expected):
    assert quant_range(bits, signed=signed) == expected


class TestEffectiveScale:
    def use(self, scale, floor, upstream, grad_factor, elements):
        scale = torch.tensor(scale, requires_grad=True)
        used = effective_scale(scale, torch.tensor(floor), torch.tensor(grad_factor), elements)
        used.backward(torch.tensor(upstream))
        return used.detach(), scale.grad

    def test_floor_replaces_small_negative_and_nan_scales(self):
        used, _ = self.use([0.5, 0.1, 0.05, 0.0, -3.0, math.nan], [0.1] * 6, [1.0] * 6, 1.0, 1)
        assert torch.equal(used, torch.tensor([0.5, 0.1, 0.1, 0.1, 0.1, 0.1]))

    def test_gradient_above_the_floor_has_the_factor_of_lsq(self):
        # 36 values, quant_max 7: 1 / sqrt(36 * 7)
        _, grad = self.use([0.5, 0.5], [0.1, 0.1], [2.0, -3.0], 7**-0.5, 36)
        torch.testing.assert_close(grad, torch.tensor([2.0, -3.0]) / math.sqrt(36 * 7))

    def test_gradient_below_the_floor_passes_only_if_it_raises_the_scale(self):
        _, grad = self.use([0.01, 0.01, -1.0, math.nan], [0.1] * 4, [2.0, -2.0, -2.0, 2.0], 1.0, 4)
        assert grad.tolist() == [0.0, -1.0, -1.0, 0.0]

    def test_each_candidate_has_its_own_factor(self):
        factors = [[1.0], [7**-0.5]]
        _, grad = self.use([[1.0, 1.0], [1.0, 1.0]], [[0.1, 0.1], [0.1, 0.1]], [[1.0, 2.0], [3.0, 4.0]], factors, 9)
        expected = torch.tensor([[1.0, 2.0], [3 / math.sqrt(7), 4 / math.sqrt(7)]]) / 3
        torch.testing.assert_close(grad, expected)

    def test_gradient_descent_cannot_push_a_scale_through_zero(self):
        scale = torch.tensor(1.0, requires_grad=True)
        floor = torch.tensor(FLOOR_RATIO)
        for _ in range(50):
            used = effective_scale(scale, floor, torch.tensor(1.0), 1)
            used.backward()
            with torch.no_grad():
                scale -= 0.3 * scale.grad
            scale.grad = None
            assert used >= floor
        assert scale > -0.3  # one step past the floor at most, from where it can return

    def test_an_empty_batch_gives_a_finite_gradient(self):
        _, grad = self.use(0.5, 0.1, 1.0, 1.0, 0)
        assert grad == 1.0


class TestLsqScale:
    def test_formula(self):
        scale = lsq_scale(torch.tensor([0.5, 2.0]), 7)
        torch.testing.assert_close(scale, torch.tensor([1.0, 4.0]) / math.sqrt(7))

    def test_zero_channels_get_the_mean_of_the_others(self):
        scale = lsq_scale(torch.tensor([1.0, 0.0, 3.0]), 1)
        assert scale.tolist() == [2.0, 4.0, 6.0]

    @pytest.mark.parametrize("mean_abs", [0.0, 1e-40, math.nan, math.inf], ids=str)
    def test_without_a_usable_value_the_grid_reaches_one(self, mean_abs):
        assert lsq_scale(torch.tensor(mean_abs), 7) == torch.tensor(1 / 7)

    def test_reciprocal_of_the_floor_of_the_smallest_scale_is_finite(self):
        smallest = lsq_scale(torch.tensor(1e-36), 1)
        assert torch.isfinite(1 / (smallest * FLOOR_RATIO))


class TestMseScale:
    @pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
    @pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])
    def test_is_as_good_as_exhaustive_search(self, bits, signed):
        generator = torch.Generator().manual_seed(bits)
        values = torch.randn(2000, generator=generator)
        values = values if signed else values.relu()
        low, high = quant_range(bits, signed=signed)

        def error(scale):
            return float(((fake_quant(values, scale, quant_min=low, quant_max=high) - values) ** 2).sum())

        dense = torch.linspace(0.005, 1.0, 1000) * values.abs().max() / high
        best = min(error(scale) for scale in dense)
        # Rounding errors go with the square of the scale, which is searched in steps of 2 %.
        assert error(mse_scale(values, low, high)) <= 1.04 * best

    def test_channels_are_searched_independently(self):
        generator = torch.Generator().manual_seed(0)
        weight = torch.randn(3, 4, 5, 5, generator=generator) * torch.tensor([1e-3, 1.0, 50.0]).reshape(3, 1, 1, 1)
        together = mse_scale(weight, -8, 7, axis=0)
        alone = torch.stack([mse_scale(channel, -8, 7) for channel in weight])
        # Only the order of the sums differs, which may move the choice by one step of the fine grid.
        torch.testing.assert_close(together, alone, rtol=0.03, atol=0)

    def test_values_on_a_grid_are_reproduced(self):
        values = 0.25 * torch.arange(-7, 8)
        scale = mse_scale(values, -8, 7)
        torch.testing.assert_close(fake_quant(values, scale, quant_min=-8, quant_max=7), values)

    def test_zero_channel_gets_the_mean_of_the_others(self):
        weight = torch.tensor([[1.0, -1.0], [0.0, 0.0]])
        scale = mse_scale(weight, -2, 1, axis=0)
        assert scale[1] == scale[0] > 0

    def test_one_value_per_channel(self):
        assert mse_scale(torch.tensor([0.5, 2.0]), -8, 7, axis=0).shape == (2,)
