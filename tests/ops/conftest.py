from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Tensors as small as most here gain nothing from more, and the machine may have other work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def assert_same_bits() -> Callable[[Tensor, Tensor], None]:
    """Equal dtype, shape, strides and values, -0.0 unlike 0.0; any two NaNs are equal (IEEE leaves their bits open)."""

    def check(actual: Tensor, expected: Tensor) -> None:
        assert actual.dtype == expected.dtype
        assert actual.shape == expected.shape
        assert actual.stride() == expected.stride()
        torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)
        assert torch.equal(actual.signbit() & ~actual.isnan(), expected.signbit() & ~expected.isnan())

    return check
