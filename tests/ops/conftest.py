from collections.abc import Callable, Iterator
from dataclasses import dataclass

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


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


# Shape, and how weight and gradient lie in memory. The sizes lie around a vector and around the blocks of the kernels.
LAYOUTS: dict[str, tuple[tuple[int, ...], Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    **{f"{size} values": ((size,), lambda x: x, lambda x: x) for size in (1, 7, 16, 1025)},
    "a scalar": ((), lambda x: x, lambda x: x),
    "empty": ((0, 3), lambda x: x, lambda x: x),
    "several blocks": ((3, 11_003), lambda x: x, lambda x: x),
    "channels_last": ((4, 3, 5, 7), _channels_last, _channels_last),
    "gradient of other strides": ((4, 3, 5, 7), _channels_last, lambda x: x),
    "weight with gaps": ((13, 40), lambda x: x[:, ::2], lambda x: x.contiguous()[:, ::2]),
    "gradient with gaps": ((70, 130), lambda x: x[:, 1::2].contiguous(), lambda x: x[:, ::2]),
    "expanded gradient": ((5, 6), lambda x: x.contiguous(), lambda x: x[:, :1].expand(5, 6)),
    "transposed": ((13, 37), lambda x: x.t(), lambda x: x.t()),
    "unaligned": ((1025,), lambda x: x[1:], lambda x: x[1:]),
}


# `sam_combine` writes gradients, which an expanded one does not allow.
WRITABLE = tuple(name for name in LAYOUTS if name != "expanded gradient")


@dataclass
class Step:
    """What the operators of one step are given, random; every entry of `LAYOUTS` is one parameter."""

    params: list[Tensor]
    backups: list[Tensor]
    first_grads: list[Tensor]
    grads: list[Tensor]
    momentum_buffers: list[Tensor]
    exp_avg_sqs: list[Tensor]
    steps: list[Tensor]
    rho_scales: list[float]

    def clone(self) -> "Step":
        """A copy with the same strides."""
        return Step(*([_clone(t) if isinstance(t, Tensor) else t for t in values] for values in vars(self).values()))


def _clone(tensor: Tensor) -> Tensor:
    """`clone` makes a tensor with gaps dense; this keeps its strides."""
    copy = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)
    # An expanded tensor has one value in several places.
    return tensor.clone() if 0 in tensor.stride() and tensor.numel() > 1 else copy.copy_(tensor)


@pytest.fixture(scope="session")
def make_step() -> Callable[..., Step]:
    """A function that makes the lists of a step; the same every time."""

    def make(
        dtype: torch.dtype = torch.float32,
        grad_dtype: torch.dtype | None = None,
        *,
        layouts: tuple[str, ...] | None = None,
        writable: bool = True,
        device: str = "cpu",
    ) -> Step:
        generator = torch.Generator().manual_seed(0)

        def random(shape: tuple[int, ...], kind: torch.dtype) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, kind)

        lists: dict[str, list] = {name: [] for name in Step.__annotations__}
        for index, name in enumerate(layouts or (WRITABLE if writable else tuple(LAYOUTS))):
            shape, of_weight, of_grad = LAYOUTS[name]
            lists["params"].append(of_weight(random(shape, dtype)))
            lists["backups"].append(of_weight(random(shape, dtype)).clone())
            lists["first_grads"].append(of_grad(random(shape, grad_dtype or dtype)).clone())
            lists["grads"].append(of_grad(random(shape, grad_dtype or dtype)))
            lists["momentum_buffers"].append(of_weight(random(shape, dtype)).clone())
            lists["exp_avg_sqs"].append(of_weight(random(shape, dtype).square()).clone())
            lists["steps"].append(torch.tensor(float(index % 4), device=device))
            lists["rho_scales"].append((1.0, 0.5, 0.0, 2.0)[index % 4])
        return Step(**lists)

    return make
