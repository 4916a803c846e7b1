import importlib.metadata
import json

import numpy as np
import pytest
import torch

import asga
from asga.info import collect, render
from asga.ops.backends import BACKENDS, OPERATORS


@pytest.fixture
def info() -> dict[str, object]:
    return {
        "versions": {
            "asga": "1.2.3",
            "python": "3.12.1",
            "torch": "2.11.0",
            "cuda": None,
            "triton": None,
            "numpy": "2.0",
        },
        "platform": "Linux-x86_64",
        "cpu": {"capability": "AVX2", "threads": 4},
        "gpus": [],
        "backends": {"cuda": "this build of torch has no CUDA", "cpu": None, "reference": None},
        "chosen_backend": None,
        "operators": {"fake_quant": {"cpu": "cpu", "cuda": None}},
        "extras": {"search": [], "report": ["jinja2", "matplotlib"]},
        "libraries": ["/usr/lib/asga/_C.abi3.so"],
    }


def _line(text: str, name: str) -> str:
    """What stands behind `name`."""
    return next(line.split(maxsplit=1)[1] for line in text.splitlines() if line.startswith(f"  {name} "))


def test_what_is_collected_is_json_and_complete():
    found = collect()
    assert json.loads(json.dumps(found)) == found
    assert found["versions"]["asga"] == asga.__version__
    assert found["versions"]["torch"] == torch.__version__
    assert found["versions"]["numpy"] == np.__version__
    assert tuple(found["backends"]) == BACKENDS
    assert tuple(found["operators"]) == OPERATORS
    assert found["cpu"]["threads"] == torch.get_num_threads()


def test_operators_follow_the_chosen_backend():
    with asga.backend("reference"):
        found = collect()
    assert found["chosen_backend"] == "reference"
    assert {serves["cpu"] for serves in found["operators"].values()} == {"reference"}


def test_what_serves_an_operator_is_available():
    found = collect()
    for serves in found["operators"].values():
        for backend in filter(None, serves.values()):
            assert found["backends"][backend] is None


def test_device_that_torch_does_not_know_is_served_by_nothing(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    assert {serves["cuda"] for serves in collect()["operators"].values()} == {None}


def test_gpus_are_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"GPU {index}")
    assert collect()["gpus"] == ["GPU 0", "GPU 1"]


def test_no_gpu_is_asked_for_where_there_is_none(monkeypatch):
    def refuse(*_):
        raise AssertionError("CUDA would be initialized")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", refuse)
    assert collect()["gpus"] == []


def test_missing_packages_are_listed_by_extra(monkeypatch):
    requirements = [
        "torch>=2.10",
        'absent-package>=1; extra == "search"',
        'numpy; extra == "search"',
        'numpy; (platform_system == "Linux") and extra == "test"',
        'asga[search]; extra == "test"',
    ]
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: requirements)
    assert collect()["extras"] == {"search": ["absent-package"], "test": []}


def test_extras_are_unknown_without_an_installed_package(monkeypatch):
    def not_installed(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "requires", not_installed)
    found = collect()
    assert found["extras"] is None
    assert "not installed" in render(found)


def test_rendered_for_a_person(info):
    text = render(info)
    assert _line(text, "asga") == "1.2.3"
    assert _line(text, "triton") == "not there"
    assert _line(text, "cpu") == "AVX2, 4 threads"
    assert _line(text, "gpu") == "none"
    assert _line(text, "cuda") == "not there"
    assert _line(text, "fake_quant") == "cpu: cpu, cuda: no such device in this torch"
    assert _line(text, "search") == "installed"
    assert _line(text, "report") == 'missing jinja2, matplotlib: pip install "asga[report]"'
    assert _line(text, "_C.abi3.so") == "/usr/lib/asga/_C.abi3.so"
    assert "not available: this build of torch has no CUDA" in text


def test_rendered_without_compiled_libraries(info):
    assert "no compiled library is there" in render({**info, "libraries": []})
