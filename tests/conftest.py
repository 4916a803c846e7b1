import contextlib
import json
import os
import random
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

# Without a GPU, Triton's kernels run in its interpreter. It reads this when it decorates a kernel, so it must stand
# before the first import of asga.kernels, whichever test that comes from.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Tests in several processes: their threads would wait for each other's cores, which took some of them 20 times as long.
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)

# A shell without job control starts what it puts into the background (`make test &`) with Ctrl-C ignored.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

RunPython = Callable[..., str]
LabeledBatches = Callable[..., list[tuple[Tensor, Tensor]]]


@pytest.fixture(autouse=True)
def _same_random_numbers() -> None:
    """What a test draws does not depend on which tests ran before it."""
    for seed in (torch.manual_seed, np.random.seed, random.seed):
        seed(0)


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


@pytest.fixture(scope="session")
def size_limit() -> Callable[[int], contextlib.AbstractContextManager]:
    """A context in which the operating system lets no file grow beyond so many bytes."""

    @contextlib.contextmanager
    def limit(size: int) -> Iterator[None]:
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    return limit


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


class AnyInputs(nn.Module):
    """A model behind a forward of two arguments that returns a dict, as models of `transformers` do."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, images: Tensor, scale: float = 1.0) -> dict[str, Tensor]:
        return {"logits": self.net(images * scale)}


BATCH_FORMS: dict[str, Callable[[Tensor, Tensor], object]] = {
    "positional": lambda x, y: ((x, 1.0), y),
    "keywords": lambda x, y: [{"images": x, "scale": 1.0}, y],
    "with labels": lambda x, y: {"labels": y, "images": x, "scale": 1.0},
}


@pytest.fixture(params=BATCH_FORMS)
def batch_form(request) -> tuple[type[AnyInputs], Callable[[Tensor, Tensor], object]]:
    """A wrapper of a model, and a function that turns a pair of tensors into a batch for what it makes."""
    return AnyInputs, BATCH_FORMS[request.param]


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
