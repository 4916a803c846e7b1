"""Tensors of more than 2^31 values: indices that need 64 bits."""

import pytest
import torch
from torch import Tensor

from asga.ops import backends, reference

ops = torch.ops.asga

COUNT = 2**31 + 8195
# Both ends, and the first values whose index is no 32-bit integer; in units of the scale, in and out of range.
PLACES = [slice(0, 4097), slice(2**31 - 4100, 2**31 + 4100), slice(COUNT - 3000, COUNT)]
# Input, and result or gradient, in 16 bits; what else the process needs.
NEEDED = 2 * 2 * COUNT + 2**30


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
    y = forward(ops, x)
    small = torch.cat([x[place] for place in PLACES])
    expected = forward(reference, small)
    assert torch.equal(torch.cat([y[place] for place in PLACES]), expected)
    assert torch.count_nonzero(y) == torch.count_nonzero(expected)
    del y
    gradient, *sums = backward(ops, x, x)
    expected, *expected_sums = backward(reference, small, small)
    assert torch.equal(torch.cat([gradient[place] for place in PLACES]), expected)
    assert torch.count_nonzero(gradient) == torch.count_nonzero(expected)
    for actual, wanted in zip(sums, expected_sums, strict=True):
        # Sums of 15,295 terms of both signs, the partial ones in float32.
        torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-2)


def test_fake_quant(x):
    settings = (torch.tensor([0.5]), None, -8, 7, None)
    _check(
        x,
        lambda room, x: room.fake_quant(x, *settings),
        lambda room, grad, x: room.fake_quant_backward(grad, x, *settings),
    )


def test_mixed_fake_quant(x):
    """Per channel, with the channels in the last dimension of 3; the places begin with the first channel."""
    settings = (torch.tensor([[0.5, 0.25, 0.75], [0.125, 0.5, 1.0]]), torch.tensor([0.25, 0.75]), None)
    settings = (*settings, [-8, -2], [7, 1], 1)
    _check(
        x.view(-1, 3),
        lambda room, x: room.mixed_fake_quant(x, *settings),
        lambda room, grad, x: room.mixed_fake_quant_backward(grad, x, *settings),
    )
