"""What this installation has: versions, devices, backends and what serves each operator."""

import importlib.metadata
import platform
import re
from pathlib import Path

import numpy as np
import torch

import asga
from asga.ops.backends import BACKENDS, OPERATORS, get_backend, serving, unavailable

Info = dict[str, object]


def collect() -> Info:
    """Look at the installation. CUDA is initialized only where torch finds a GPU.

    Returns:
        Plain JSON values: ``versions`` by package (null: not there), ``platform``, ``cpu`` (capability as torch names
        it, threads), ``gpus`` (names), ``backends`` (null, or why one cannot be used), ``chosen_backend`` (null: the
        default), ``operators`` (per device type the backend that serves it; null where torch knows no such device),
        ``extras`` (the packages that are missing of each; null: asga itself is not installed as a package) and
        ``libraries`` (paths of the compiled ones).
    """
    has_cuda = torch.version.cuda is not None
    return {
        "versions": {
            "asga": asga.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "triton": _triton_version(),
            "numpy": np.__version__,
        },
        "platform": platform.platform(),
        "cpu": {"capability": torch.backends.cpu.get_cpu_capability(), "threads": torch.get_num_threads()},
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        if torch.cuda.is_available()
        else [],
        "backends": {name: unavailable(name) for name in BACKENDS},
        "chosen_backend": get_backend(),
        "operators": {
            name: {"cpu": serving("cpu"), "cuda": serving("cuda") if has_cuda else None} for name in OPERATORS
        },
        "extras": _extras(),
        "libraries": [str(path) for path in sorted(Path(asga.__file__).parent.glob("_C*.so"))],
    }


def render(info: Info) -> str:
    """What `collect` found, as plain text."""
    operators = {
        name: ", ".join(f"{device}: {backend or 'no such device in this torch'}" for device, backend in serves.items())
        for name, serves in info["operators"].items()
    }
    sections = {
        "versions": {name: version or "not there" for name, version in info["versions"].items()},
        "devices": {
            "platform": info["platform"],
            "cpu": f"{info['cpu']['capability']}, {info['cpu']['threads']} threads",
            "gpu": ", ".join(info["gpus"]) or "none",
        },
        "backends": {
            **{
                name: "available" if reason is None else f"not available: {reason}"
                for name, reason in info["backends"].items()
            },
            "chosen": info["chosen_backend"] or "none: the fastest for each device",
        },
        "operators": operators,
        "extras": _extras_text(info["extras"]),
        "libraries": {Path(path).name: path for path in info["libraries"]} or {"none": "no compiled library is there"},
    }
    width = max(len(name) for section in sections.values() for name in section)
    lines = []
    for title, section in sections.items():
        lines += [title, *(f"  {name:<{width}}  {text}" for name, text in section.items()), ""]
    return "\n".join(lines[:-1])


def _triton_version() -> str | None:
    """From the module: builds of torch bring Triton under several package names."""
    try:
        return importlib.import_module("triton").__version__
    except ImportError:
        return None


def _extras() -> dict[str, list[str]] | None:
    """The missing packages of every extra, from the metadata of the installed package."""
    try:
        requirements = importlib.metadata.requires("asga") or []
    except importlib.metadata.PackageNotFoundError:
        return None
    missing: dict[str, list[str]] = {}
    for requirement in requirements:
        extra = re.search(r"""extra == ["']([\w-]+)["']""", requirement)
        package = re.match(r"[\w.-]+", requirement)[0]
        if extra is not None and package != "asga":
            absent = missing.setdefault(extra[1], [])
            if not _installed(package):
                absent.append(package)
    return missing


def _installed(package: str) -> bool:
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _extras_text(extras: dict[str, list[str]] | None) -> dict[str, str]:
    if extras is None:
        return {"unknown": "asga is imported from a folder, not installed"}
    return {
        extra: f'missing {", ".join(missing)}: pip install "asga[{extra}]"' if missing else "installed"
        for extra, missing in extras.items()
    }
