from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn


class Problem:
    """A small regression: a network, one batch, and the closure that a training loop would write."""

    def __init__(self, dtype: torch.dtype = torch.float32, *, batchnorm: bool = False) -> None:
        generator = torch.Generator().manual_seed(1)
        layers = [nn.Linear(6, 8), nn.BatchNorm1d(8)] if batchnorm else [nn.Linear(6, 8)]
        self.model = nn.Sequential(*layers, nn.Tanh(), nn.Linear(8, 3)).to(dtype)
        with torch.no_grad():
            for p in self.model.parameters():
                p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64) * 0.5)
        self.x = torch.randn(16, 6, generator=generator, dtype=torch.float64).to(dtype)
        self.y = torch.randn(16, 3, generator=generator, dtype=torch.float64).to(dtype)

    @property
    def params(self) -> list[nn.Parameter]:
        return list(self.model.parameters())

    def loss(self) -> Tensor:
        return (self.model(self.x) - self.y).square().mean()

    def closure(self, optimizer: torch.optim.Optimizer) -> Callable[[], Tensor]:
        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = self.loss()
            loss.backward()
            return loss

        return closure

    def weights(self) -> list[Tensor]:
        return [p.detach().clone() for p in self.params]


@pytest.fixture
def make_problem() -> type[Problem]:
    return Problem


@pytest.fixture
def problem() -> Problem:
    return Problem()


def identical(left: list[Tensor], right: list[Tensor]) -> bool:
    """Same bits: integers compare NaN payloads and the sign of zero too."""
    views = {torch.float32: torch.int32, torch.float64: torch.int64, torch.bfloat16: torch.int16}
    return all(
        torch.equal(a.detach().view(views[a.dtype]), b.detach().view(views[b.dtype]))
        for a, b in zip(left, right, strict=True)
    )


@pytest.fixture
def same_bits() -> Callable[[list[Tensor], list[Tensor]], bool]:
    return identical
