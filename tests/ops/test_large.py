"""Tensors of more than 2^31 values: indices that need 64 bits."""

import os

import pytest
import torch
from torch import Tensor

from asga.ops import backends, reference, sam_reference
from asga.ops.sam_library import VARIANTS

ops = torch.ops.asga

COUNT = 2**31 + 8194
# Both ends, and the first values whose index is no 32-bit integer. All begin and end between rows of three.
PLACES = [slice(0, 4098), slice(2**31 - 4100, 2**31 + 4099), slice(COUNT - 3000, COUNT)]
# Input, and result or gradient, in 16 bits; what else the process needs. A step has two more lists.
NEEDED = 2 * 2 * COUNT + 2**30
NEEDED_BY_A_STEP = NEEDED + 2 * 2 * COUNT


def _available_memory() -> int:
    """Bytes that can be had without swapping; 0 where the system does not say."""
    try:
        with open("/proc/meminfo") as file:
            sizes = dict(line.split(":") for line in file)
    except OSError:
        return 0
    return 1024 * int(sizes["MemAvailable"].split()[0])


pytestmark = [
    pytest.mark.skipif(
        os.environ.get("ASGA_TEST_LARGE") != "1", reason="takes a minute and 9 GiB of memory; ASGA_TEST_LARGE=1 runs it"
    ),
    pytest.mark.skipif(
        backends.unavailable("cpu") is not None, reason=f"no CPU kernels: {backends.unavailable('cpu')}"
    ),
    pytest.mark.skipif(
        _available_memory() < NEEDED, reason=f"needs {NEEDED / 2**30:.0f} GiB of memory, that are not available"
    ),
]


@pytest.fixture(scope="module")
def x() -> Tensor:
    """Zero but for the places."""
    x = torch.zeros(COUNT, dtype=torch.bfloat16)
    for place in PLACES:
        x[place] = torch.randn(place.stop - place.start, generator=torch.Generator().manual_seed(0)).mul(3).bfloat16()
    return x


def _check(x: Tensor, forward, backward) -> None:
    """Compare with what `forward` and `backward` of the reference give for the places alone.

    The input is the gradient as well; zeros add nothing to the sums, as they lie on the grid.
    """
    small = _at_places(x).view(-1, *x.shape[1:])
    _compare(forward(ops, x), forward(reference, small))
    gradient, *sums = backward(ops, x, x)
    expected, *expected_sums = backward(reference, small, small)
    _compare(gradient, expected)
    for actual, wanted in zip(sums, expected_sums, strict=True):
        # About 15,000 terms of magnitude 10 and of both signs, the partial sums in float32.
        torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-1)


def _at_places(x: Tensor) -> Tensor:
    return torch.cat([x.view(-1)[place] for place in PLACES])


def _compare(found: Tensor, expected: Tensor) -> None:
    """The same at the places, and zero elsewhere."""
    assert torch.equal(_at_places(found), expected.view(-1))
    assert torch.count_nonzero(found) == torch.count_nonzero(expected)


def test_fake_quant(x):
    settings = (torch.tensor([0.5]), None, -8, 7, None)
    _check(
        x,
        lambda room, x: room.fake_quant(x, *settings),
        lambda room, grad, x: room.fake_quant_backward(grad, x, *settings),
    )


def test_mixed_fake_quant(x):
    """Per channel, the channels last."""
    settings = (torch.tensor([[0.5, 0.25, 0.75], [0.125, 0.5, 1.0]]), torch.tensor([0.25, 0.75]), None)
    settings = (*settings, [-8, -2], [7, 1], 1)
    _check(
        x.view(-1, 3),
        lambda room, x: room.mixed_fake_quant(x, *settings),
        lambda room, grad, x: room.mixed_fake_quant_backward(grad, x, *settings),
    )


@pytest.mark.skipif(
    _available_memory() < NEEDED_BY_A_STEP, reason=f"needs {NEEDED_BY_A_STEP / 2**30:.0f} GiB of memory"
)
def test_sam(x):
    """A step of GSAM and SGD; the input is both gradients."""
    small = _at_places(x)
    # The norm is about 370: a step of 0.3, more than bfloat16 rounds away.
    rho, ones = torch.tensor(100.0, dtype=torch.float64), [1.0]
    losses, counts = torch.zeros(0, dtype=torch.float64), torch.zeros(5, dtype=torch.int64)
    found = []
    for room, g, places in ((ops, x, _at_places), (sam_reference, small, torch.clone)):
        theta, backup, momentum = g.clone(), torch.zeros_like(g), torch.zeros_like(g)
        q0 = room.sam_norm([theta], [g], ones, False)
        step = room.sam_ascent_step(q0, rho, None, 0.0, True)
        room.sam_perturb([theta], [backup], [], [g], step, ones, False)
        perturbed = places(theta)
        dots = room.sam_dots([backup], [g], [g], ones, False)
        scalars = (q0, step, dots, losses, None, None, rho, counts)
        coefficients = room.sam_coefficients(*scalars, VARIANTS.index("gsam"), 0.4, None, False, 0.1, 1.0)
        room.sam_sgd([theta], [backup], [g], [g], [momentum], coefficients, None, 0.1, 0.9, 0.01, False)
        found.append((q0, dots, perturbed, theta, backup, momentum))
    (q0, dots, perturbed, *tensors), (small_q0, small_dots, small_perturbed, *expected) = found
    torch.testing.assert_close(q0, small_q0, rtol=1e-6, atol=0)
    torch.testing.assert_close(dots, small_dots, rtol=1e-6, atol=0)
    # Scalars that differ in their last bits may round a weight the other way.
    torch.testing.assert_close(perturbed, small_perturbed, rtol=1e-2, atol=0)
    torch.testing.assert_close(perturbed, 1.27 * small, rtol=2e-2, atol=0)
    for large, wanted in zip(tensors, expected, strict=True):
        torch.testing.assert_close(_at_places(large), wanted, rtol=1e-2, atol=0)
        assert torch.count_nonzero(large) == torch.count_nonzero(wanted)
    assert not torch.equal(tensors[0], x)
