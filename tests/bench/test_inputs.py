"""The tensors of a case: reproducible, and without the values that implementations may treat differently."""

from dataclasses import replace

import pytest
import torch

from asga.bench.inputs import make_inputs
from asga.bench.shapes import MIXED_BITS, Case

CASES = [
    Case("test", kind, (6, 500), bits, dtype)
    for kind in ("act", "weight")
    for bits in ((4,), MIXED_BITS)
    for dtype in (torch.float32, torch.bfloat16)
]
OFFSETS = [replace(case, offset=True) for case in CASES]
cases = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


@cases
def test_shapes_and_dtypes(case):
    inputs = make_inputs(case, "cpu")
    channels = (6,) if case.kind == "weight" else ()
    assert inputs.x.shape == inputs.grad.shape == (6, 500)
    assert inputs.x.dtype == inputs.grad.dtype == case.dtype
    assert inputs.scales.shape == ((5, *channels) if len(case.bits) > 1 else channels or (1,))
    assert inputs.scales.dtype == torch.float32
    assert (inputs.probs is None) == (len(case.bits) == 1)
    assert all(tensor.requires_grad and tensor.is_leaf for tensor in inputs.differentiable)


def test_groups_have_scales_and_zero_points_of_their_own():
    inputs = make_inputs(Case("test", "weight", (6, 500), MIXED_BITS, torch.float32, group_size=50, offset=True), "cpu")
    assert inputs.scales.shape == inputs.zero_points.shape == (5, 6, 10)
    assert len(inputs.scales[0].unique()) > 1
    assert [id(t) for t in inputs.differentiable[2:]] == [id(inputs.probs), id(inputs.zero_points)]


def test_channels_last_tensors_are_so():
    inputs = make_inputs(Case("test", "act", (2, 3, 4, 5), (4,), torch.float32, channels_last=True), "cpu")
    for tensor in (inputs.x, inputs.grad):
        assert tensor.is_contiguous(memory_format=torch.channels_last)
        assert not tensor.is_contiguous()


@pytest.mark.parametrize("case", CASES + OFFSETS, ids=lambda case: case.name)
def test_no_value_is_where_definitions_differ(case):
    inputs = make_inputs(case, "cpu")
    scales = inputs.scales.detach().reshape(len(case.bits), -1, 1).double()
    offset = 0 if inputs.zero_points is None else inputs.zero_points.unique().item()
    for scale, (low, high) in zip(scales, inputs.ranges, strict=True):
        steps = inputs.x.detach().double() / scale + offset
        assert ((steps - steps.floor() - 0.5).abs() > 5e-4).all()
        assert not ((steps >= high) & (steps <= high + 0.5)).any()
        assert not ((steps <= low) & (steps >= low - 0.5)).any()
        # Otherwise the gradients of clamped values would go unchecked.
        assert (steps > high).any()
        assert (steps < low).any()


def test_the_same_every_time():
    first, second = make_inputs(CASES[-1], "cpu"), make_inputs(CASES[-1], "cpu")
    for a, b in zip((*first.differentiable, first.grad), (*second.differentiable, second.grad), strict=True):
        assert torch.equal(a, b)
