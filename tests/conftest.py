import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

# Without a GPU, Triton's kernels run in its interpreter. It reads this when it decorates a kernel, so it must stand
# before the first import of asga.kernels, whichever test that comes from.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

RunPython = Callable[..., str]
LabeledBatches = Callable[..., list[tuple[Tensor, Tensor]]]


@pytest.fixture(scope="session")
def run_python() -> RunPython:
    """Run code in a Python process of its own and return what it prints; a failure shows its output.

    For what is decided once per process: settings read at import, libraries that load or do not. The process has
    none of this one's settings for asga and Triton, only those that are given.
    """

    def run(code: str, *, python: str | Path = sys.executable, cwd: Path | None = None, **env: str) -> str:
        outer = {k: v for k, v in os.environ.items() if not k.startswith(("ASGA_", "TRITON_", "PYTHONPATH"))}
        done = subprocess.run(
            [python, "-c", code], capture_output=True, text=True, cwd=cwd, env={**outer, **env}, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout.strip()

    return run


class TinyNet(nn.Module):
    """Three convolutions and a head; BatchNorm and dropout, so that buffers and random numbers matter."""

    def __init__(self, num_classes: int = 3, in_channels: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, 4, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(4)
        self.conv2 = nn.Conv2d(4, 8, 3, stride=2, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(8)
        self.conv3 = nn.Conv2d(8, 8, 3, padding=1)
        self.dropout = nn.Dropout(0.1)
        self.fc = nn.Linear(8, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn1(self.conv1(x)))
        x = torch.relu(self.bn2(self.conv2(x)))
        x = torch.relu(self.conv3(x))
        return self.fc(self.dropout(x.mean((2, 3))))


@pytest.fixture(scope="session")
def tiny_net() -> Callable[..., nn.Module]:
    """A function that makes the same `TinyNet` every time; without changing the global random state."""

    def make(**options: int) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return TinyNet(**options)

    return make


@pytest.fixture(scope="session")
def labeled_batches() -> LabeledBatches:
    """A function that makes a list of batches that can be learned: a class is a bright column."""

    def make(count: int = 6, batch: int = 8, *, side: int = 8, channels: int = 1, classes: int = 3) -> list:
        generator = torch.Generator().manual_seed(0)
        batches = []
        for _ in range(count):
            labels = torch.randint(classes, (batch,), generator=generator)
            images = torch.randn(batch, channels, side, side, generator=generator)
            images[torch.arange(batch), :, :, labels] += 3
            batches.append((images, labels))
        return batches

    return make


@pytest.fixture(scope="session")
def bits_of() -> Callable[[object], object]:
    """A function that turns tensors in containers into their bytes, so that ``==`` compares bit for bit."""

    def convert(value: object) -> object:
        if isinstance(value, Tensor):
            values = value.detach().contiguous().reshape(-1).view(torch.uint8)  # NumPy has no bfloat16
            return str(value.dtype), tuple(value.shape), values.numpy().tobytes()
        if isinstance(value, dict):
            return {key: convert(item) for key, item in value.items() if key != "seconds"}
        if isinstance(value, list | tuple):
            return [convert(item) for item in value]
        return value

    return convert


@pytest.fixture(scope="session")
def run_contents(bits_of: Callable[[object], object]) -> Callable[[Path], object]:
    """A function that reads checkpoint and metrics of a run folder, times left out."""

    def read(folder: Path) -> object:
        checkpoint = torch.load(folder / "checkpoint.pt", weights_only=True)["state"]
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        return bits_of({"checkpoint": checkpoint, "metrics": [json.loads(line) for line in lines]})

    return read
