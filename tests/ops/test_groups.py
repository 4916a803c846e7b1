"""One scale per group along the last dimension."""

import pytest
import torch

from asga.ops import backend, fake_quant, mixed_fake_quant

RANGE = {"quant_min": -8, "quant_max": 7}
RANGES = {"quant_mins": [-2, -8], "quant_maxs": [1, 7]}


@pytest.mark.parametrize("shape", [(6, 32), (2, 3, 16), (8,)], ids=str)
def test_equals_the_groups_one_by_one(shape):
    torch.manual_seed(0)
    x = torch.randn(shape)
    scale = torch.rand(*shape[:-1], shape[-1] // 8) + 0.1
    offset = torch.randint(-2, 3, scale.shape).float()
    found = fake_quant(x, scale, offset, **RANGE, group_size=8)
    assert found.shape == x.shape
    for group, s, z, y in zip(x.view(-1, 8), scale.view(-1), offset.view(-1), found.view(-1, 8), strict=True):
        assert torch.equal(y, fake_quant(group, s, z, **RANGE))


def test_mixture_equals_the_groups_one_by_one():
    torch.manual_seed(0)
    x, scales, probs = torch.randn(3, 16), torch.rand(2, 3, 4) + 0.1, torch.tensor([0.3, 0.7])
    found = mixed_fake_quant(x, scales, probs, **RANGES, group_size=4)
    for k, (group, y) in enumerate(zip(x.view(-1, 4), found.view(-1, 4), strict=True)):
        assert torch.equal(y, mixed_fake_quant(group, scales.view(2, -1)[:, k], probs, **RANGES))


def test_mixture_with_zero_points_equals_the_groups_one_by_one():
    torch.manual_seed(0)
    x, scales, probs = torch.randn(3, 16), torch.rand(2, 3, 4) + 0.1, torch.tensor([0.3, 0.7])
    zero_points = torch.randint(-2, 3, scales.shape).float()
    with backend("reference"):
        found = mixed_fake_quant(x, scales, probs, zero_points, **RANGES, group_size=4)
        for k, (group, y) in enumerate(zip(x.view(-1, 4), found.view(-1, 4), strict=True)):
            of_group = [parameter.view(2, -1)[:, k] for parameter in (scales, zero_points)]
            assert torch.equal(y, mixed_fake_quant(group, of_group[0], probs, of_group[1], **RANGES))


def test_gradients_have_the_shapes_of_their_tensors():
    x = torch.randn(4, 16, requires_grad=True)
    scale = torch.full((4, 2), 0.1, requires_grad=True)
    zero_point = torch.zeros(4, 2, requires_grad=True)
    fake_quant(x, scale, zero_point, **RANGE, group_size=8).sum().backward()
    assert (x.grad.shape, scale.grad.shape, zero_point.grad.shape) == (x.shape, scale.shape, zero_point.shape)


def test_transposed_weight_gives_a_contiguous_result():
    x = torch.randn(16, 6).t()
    scale = torch.rand(6, 2) + 0.1
    found = fake_quant(x, scale, **RANGE, group_size=8)
    assert found.is_contiguous()
    assert torch.equal(found, fake_quant(x.contiguous(), scale, **RANGE, group_size=8))


@pytest.mark.parametrize(
    ("x", "scale", "options", "message"),
    [
        pytest.param(
            (4, 10), (4, 1), {"group_size": 8}, "group_size is 8, which does not divide .* 10", id="does-not-divide"
        ),
        pytest.param((4, 8), (4, 1), {"group_size": 0}, "group_size is 0", id="zero"),
        pytest.param((4, 8), (4, 1), {"group_size": 8, "axis": 0}, "axis is 0 and group_size is 8", id="with-an-axis"),
        pytest.param((4, 8), (4,), {"group_size": 8}, r"scale has shape \(4,\); for the groups", id="shape"),
    ],
)
def test_errors_name_the_argument(x, scale, options, message):
    with pytest.raises(ValueError, match=message):
        fake_quant(torch.randn(x), torch.ones(scale), **RANGE, **options)
