"""Without a CUDA device the kernels run in Triton's interpreter, on CPU tensors; with one, compiled.

See ../conftest.py for the switch.
"""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

# NaN, infinities, zeros, subnormals, large values; the last row: ties and a value above the range at scale
# 1/4.
_SPECIAL = (
    *(float("nan"), float("inf"), -float("inf"), -0.0, 0.0, 1e-40, -1e-40, 3e38, -3e38),
    *(0.125, 0.375, 0.625, -0.125, -0.375, 1.875),
)


class Case(NamedTuple):
    """An input of `shape`, seen through `view`, quantized along `axis`."""

    shape: tuple[int, ...]
    axis: int | None = None
    view: Callable[[Tensor], Tensor] = lambda x: x

    def input(self, device: str, dtype: torch.dtype = torch.float32, special: bool = False) -> Tensor:
        generator = torch.Generator().manual_seed(sum(self.shape))
        x = torch.randn(self.shape, generator=generator)
        if special:
            values = torch.tensor(_SPECIAL)[: x.numel()]
            x.view(-1)[: values.numel()] = values
        return self.view(x.to(device, dtype))

    def channels(self, device: str) -> int:
        return 1 if self.axis is None else self.input(device).shape[self.axis]


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


_SIZES = {f"{size} values": Case((size,)) for size in (0, 1, 3, 7, 1024, 1025, 4099)}
_AXES = {
    f"{'x'.join(map(str, shape))} axis {axis}": Case(shape, axis)
    for shape in [(7, 3, 5), (2, 1, 3), (3, 0, 2), (5,)]
    for axis in range(len(shape))
}
_LAYOUTS = {
    "a scalar": Case(()),
    "depthwise weight": Case((70, 1, 3, 3), 0),
    "wide rows": Case((3, 1111), 0),
    "many rows, channels in the middle": Case((35, 3, 20), 1),
    "channels innermost": Case((37, 130), 1),
    "channels_last weight": Case((6, 5, 3, 3), 0, _channels_last),
    "channels_last activation": Case((2, 19, 5, 7), 1, _channels_last),
    "channels_last per tensor": Case((2, 19, 5, 7), None, _channels_last),
    "transposed": Case((13, 37), 1, lambda x: x.t()),
    "permuted": Case((3, 5, 7), 0, lambda x: x.permute(2, 0, 1)),
    "strided": Case((13, 40), 0, lambda x: x[:, ::2]),
    "expanded": Case((13, 1), 0, lambda x: x.expand(13, 21)),
    "unaligned": Case((1025,), None, lambda x: x[1:]),
}
_CASES = _SIZES | _AXES | _LAYOUTS


@pytest.fixture(scope="session")
def cases() -> dict[str, Case]:
    return _CASES


@pytest.fixture(params=_CASES.values(), ids=list(_CASES))
def case(request: pytest.FixtureRequest) -> Case:
    return request.param


@pytest.fixture(scope="session")
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(scope="session")
def next_to_ties(device) -> tuple[Tensor, Tensor]:
    """Values [64, 64] at (k + 1/2) * scale, as float32 rounds that, and scales [64].

    Here ``x / scale`` and ``x * (1 / scale)`` often fall on different sides of a tie.
    """
    scale = 0.05 + 0.3 * torch.rand(64, generator=torch.Generator().manual_seed(0))
    x = (torch.arange(-32, 32) + 0.5) * scale[:, None]
    assert ((x / scale[:, None]).round() != (x * (1 / scale)[:, None]).round()).sum() > 100
    return x.to(device), scale.to(device)


@pytest.fixture(scope="session")
def assert_same_rounded(assert_same_bits, device) -> Callable[[Tensor, Tensor], None]:
    """The same bits, but for bfloat16 in the interpreter: it truncates where the definition rounds."""

    def check(actual: Tensor, expected: Tensor) -> None:
        if actual.dtype != torch.bfloat16 or device == "cuda":
            return assert_same_bits(actual, expected)
        assert actual.dtype == expected.dtype
        assert actual.stride() == expected.stride()
        one_ulp = torch.finfo(actual.dtype).eps * expected.double().abs()
        assert ((actual.double() - expected.double()).abs() <= one_ulp).all()

    return check


@pytest.fixture(scope="session")
def assert_same_sum() -> Callable[[Tensor, Tensor, Tensor], None]:
    """Sums of the same float32 terms in another order: the error is at most depth * eps * sum(|terms|).

    Depth is the longest chain of additions that a term goes through. Within a program: at most 3 in the fold,
    a few tiles in these tests, 10 halvings of a tile of 1024 elements; beyond it, float64. The products with
    scale and probability and the last rounding add four. 32 bounds them all.
    """

    def check(actual: Tensor, expected: Tensor, sum_of_magnitudes: Tensor) -> None:
        assert actual.dtype == expected.dtype
        assert actual.shape == expected.shape
        error = (actual.double() - expected.double()).abs()
        eps = max(torch.finfo(torch.float32).eps, torch.finfo(actual.dtype).eps)
        assert (error <= 32 * eps * sum_of_magnitudes.reshape(error.shape)).all(), f"off by {error.max()}"

    return check
