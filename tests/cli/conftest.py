import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from asga.cli import main

FACTORY = """
from collections import OrderedDict

from torch import nn


def net(num_classes, in_channels=3):
    return nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(in_channels, 4, 3, padding=1, bias=False),
            bn1=nn.BatchNorm2d(4),
            relu1=nn.ReLU(),
            conv2=nn.Conv2d(4, 8, 3, stride=2, padding=1, bias=False),
            bn2=nn.BatchNorm2d(8),
            relu2=nn.ReLU(),
            conv3=nn.Conv2d(8, 8, 3, padding=1),
            relu3=nn.ReLU(),
            pool=nn.AdaptiveAvgPool2d(1),
            flatten=nn.Flatten(),
            dropout=nn.Dropout(0.1),
            fc=nn.Linear(8, num_classes),
        )
    )


def two_layers(num_classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(432, 8), nn.ReLU(), nn.Linear(8, num_classes))
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
def factories(tmp_path_factory) -> Iterator[None]:
    """The module ``asga_test_factory`` can be imported."""
    folder = tmp_path_factory.mktemp("factories")
    (folder / "asga_test_factory.py").write_text(FACTORY)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        yield


@pytest.fixture(autouse=True)
def without_figures(request, monkeypatch) -> None:
    """Drawing takes longer than the rest of a short run, so only tests marked by the fixture `figures` do."""
    if "figures" not in request.fixturenames:
        monkeypatch.setitem(sys.modules, "asga.report", None)


@pytest.fixture
def figures() -> None:
    """Figures are drawn."""
    pytest.importorskip("matplotlib")
    pytest.importorskip("jinja2")


@pytest.fixture
def run(monkeypatch, capsys, tmp_path, factories) -> Run:
    """Run a command in this process, in an empty directory; gives status, stdout and stderr."""
    monkeypatch.chdir(tmp_path)
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


@pytest.fixture(scope="session")
def search_arguments(proxy) -> list[str]:
    return [
        *("search", "--model", "asga_test_factory:net", "--data", proxy, "--budget", "bitops=w4a4"),
        *("--batch-size", "8", "--epochs", "2", "--float-epochs", "2", "--device", "cpu", "--out", "run"),
    ]


@pytest.fixture(scope="session")
def transfer_arguments(policy_file, target) -> list[str]:
    return [
        *("transfer", "--policy", str(policy_file), "--data", target, "--batch-size", "8", "--epochs", "1"),
        *("--float-epochs", "1", "--device", "cpu", "--out", "run"),
    ]


@pytest.fixture(scope="session")
def policy_file(tmp_path_factory) -> Path:
    """As a search of ``asga_test_factory:net`` writes it."""
    bits = {"conv1": (8, 8), "conv2": (3, 4), "conv3": (4, 2), "fc": (8, 8)}
    layers = {name: {"weight_bits": weight, "act_bits": act} for name, (weight, act) in bits.items()}
    meta = {"architecture": "asga_test_factory:net"}
    path = tmp_path_factory.mktemp("policy") / "policy.json"
    path.write_text(json.dumps({"format": "asga.policy", "version": 1, "layers": layers, "meta": meta}))
    return path
