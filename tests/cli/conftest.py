import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from asga.cli import main

FACTORY = """
from torch import nn


def net(num_classes, in_channels=3):
    return nn.Sequential(
        nn.Conv2d(in_channels, 4, 3, padding=1, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 8, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Dropout(0.1),
        nn.Linear(8, num_classes),
    )
"""

Run = Callable[..., tuple[int, str, str]]


def write_images(root: Path, *, classes: int, side: int, train: int = 8, val: int = 4) -> None:
    """`root/{train,val}/<class>/*.png`; a class has its own brightness."""
    image = pytest.importorskip("PIL.Image")
    rng = np.random.default_rng(0)
    for split, count in (("train", train), ("val", val)):
        for label in range(classes):
            folder = root / split / f"class {label}"
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 100, (side, side, 3)) + label * (155 // classes)
                image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i}.png")


@pytest.fixture(scope="session")
def proxy(tmp_path_factory) -> str:
    """--data of three classes of 8x8 images, in a folder with a space in its name."""
    root = tmp_path_factory.mktemp("proxy of three")
    write_images(root, classes=3, side=8)
    return f"imagefolder:{root}"


@pytest.fixture(scope="session")
def target(tmp_path_factory) -> str:
    """--data of four classes of 12x12 images."""
    root = tmp_path_factory.mktemp("target")
    write_images(root, classes=4, side=12)
    return f"imagefolder:{root}"


@pytest.fixture(scope="session")
def factories(tmp_path_factory) -> Path:
    """A folder with the module ``asga_test_factory``: models are imported from the current directory."""
    folder = tmp_path_factory.mktemp("factories")
    (folder / "asga_test_factory.py").write_text(FACTORY)
    return folder


@pytest.fixture
def run(monkeypatch, capsys, tmp_path, factories) -> Run:
    """Run a command in this process, in an empty directory; gives status, stdout and stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(factories))
    monkeypatch.setenv("COLUMNS", "200")

    def command(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        torch.manual_seed(0)
        status = main([str(argument) for argument in arguments])
        return status, *capsys.readouterr()

    return command


@pytest.fixture
def fails(run) -> Callable[..., str]:
    """Run a command that must end with an explained error; gives the explanation."""

    def command(*arguments: object) -> str:
        status, _, err = run(*arguments)
        assert status == 1
        assert err.startswith("asga: ")
        assert "Traceback" not in err
        return err

    return command


@pytest.fixture
def search_arguments(proxy) -> list[str]:
    return [
        *("search", "--model", "asga_test_factory:net", "--data", proxy, "--budget", "bitops=w4a4"),
        *("--batch-size", "8", "--epochs", "2", "--float-epochs", "2", "--device", "cpu", "--out", "run"),
    ]


@pytest.fixture
def transfer_arguments(policy_file, target) -> list[str]:
    return [
        *("transfer", "--policy", str(policy_file), "--data", target, "--batch-size", "8", "--epochs", "1"),
        *("--float-epochs", "1", "--device", "cpu", "--out", "run"),
    ]


@pytest.fixture
def policy_file(tmp_path) -> Path:
    """As a search of ``asga_test_factory:net`` writes it."""
    bits = {"0": (8, 8), "3": (3, 4), "6": (4, 2), "11": (8, 8)}
    layers = {name: {"weight_bits": weight, "act_bits": act} for name, (weight, act) in bits.items()}
    meta = {"architecture": "asga_test_factory:net"}
    path = tmp_path / "given.json"
    path.write_text(json.dumps({"format": "asga.policy", "version": 1, "layers": layers, "meta": meta}))
    return path
