from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn


class TwiceNet(nn.Module):
    """A layer that is called twice, one whose output the loss never sees, and operations that write in place."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, padding=1)
        self.twice = nn.Conv2d(4, 4, 3, padding=1)
        self.side = nn.Linear(4, 4)
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu_()
        x = self.twice(self.twice(x).relu_()).relu_()
        x = x.mean((2, 3))
        self.side(x)
        return self.fc(x)


@pytest.fixture(scope="session")
def twice_net() -> Callable[[], nn.Module]:
    """A function that makes the same `TwiceNet` every time; without changing the global random state."""

    def make() -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return TwiceNet()

    return make
