"""Which code runs an operator: compiled C++ or CUDA, Triton, or the plain torch reference.

PyTorch's dispatcher is the table. The reference is registered for every device; the compiled libraries register
themselves for CPU and CUDA when they are loaded; Triton serves CUDA where the CUDA library is missing. Choosing a
backend by hand puts an override on top and takes it away again, so the default costs nothing at run time.
"""

import importlib
import importlib.util
import os
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from asga.ops import checks, reference, sam_library, sam_reference
from asga.ops import library as quantizers
from asga.ops.library import library

BACKENDS = ("cuda", "triton", "cpu", "reference")
# The quantizers and the steps of the optimizer.
OPERATORS = (*quantizers.OPERATORS, *sam_library.OPERATORS)


def set_backend(name: str | None) -> None:
    """Choose the backend of all operators; None is the default, the fastest that is there for each device.

    ``"cpu"`` and ``"cuda"`` are the compiled kernels and concern tensors on that device only; ``"triton"``
    concerns CUDA tensors (and CPU tensors where ``TRITON_INTERPRET=1`` was set before Triton was imported);
    ``"reference"`` is plain torch on every device. The environment variable ``ASGA_BACKEND`` sets it at import.

    Args:
        name: One of `BACKENDS`, or None.

    Raises:
        ValueError: `name` is not a backend.
        RuntimeError: The backend is not there; the message says why.
    """
    if name is not None and name not in BACKENDS:
        raise ValueError(f"backend is {name!r}; it must be one of {', '.join(BACKENDS)}, or None")
    if name is not None and (reason := unavailable(name)) is not None:
        raise RuntimeError(f"backend {name!r} is not available: {reason}")
    with _switching:
        _switch(name)


def _switch(name: str | None) -> None:
    global _override, _chosen
    implementations = {"reference": _reference, "triton": _triton}.get(name)
    keys = ["CUDA", "CPU"]
    if name == "triton" and os.environ.get("TRITON_INTERPRET") != "1":
        keys.remove("CPU")
    if _override is not None:
        _override._destroy()
        _override = None
    if implementations is not None:
        _override = torch.library.Library("asga", "IMPL")
        with warnings.catch_warnings():
            # Torch warns that a kernel is replaced, which is the purpose here.
            warnings.simplefilter("ignore")
            for key in keys:
                _register(_override, implementations, key)
    _chosen = name


def get_backend() -> str | None:
    """The backend chosen by `set_backend` or ``ASGA_BACKEND``; None is the default."""
    return _chosen


@contextmanager
def backend(name: str | None) -> Iterator[None]:
    """`set_backend` for the length of a ``with`` block. The choice is global, not per thread."""
    previous = _chosen
    set_backend(name)
    try:
        yield
    finally:
        set_backend(previous)


def unavailable(name: str) -> str | None:
    """Why a backend cannot be used here, or None if it can. Initializes no device."""
    if name == "reference":
        return None
    if name == "triton":
        return _triton_missing()
    return _library_errors[name]


def serving(device_type: str) -> str:
    """The backend that runs the operators on tensors of a device type, such as ``"cpu"`` or ``"cuda"``."""
    interpreted = device_type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"
    if _chosen == "reference" or (_chosen == "triton" and (device_type == "cuda" or interpreted)):
        return _chosen
    if device_type in ("cpu", "cuda") and _library_errors[device_type] is None:
        return device_type
    return "triton" if device_type == "cuda" and _triton_missing() is None else "reference"


def serves_cpu() -> bool:
    """Whether the compiled kernels run the operators on CPU tensors."""
    return _override is None and _library_errors["cpu"] is None


def _load_cpu() -> str | None:
    """Load the CPU kernels; returns why they cannot be used, or None."""
    if importlib.util.find_spec("asga._C") is None:
        return "the package was installed without a C++ compiler (asga._C is missing)"
    try:
        importlib.import_module("asga._C")
    except ImportError as error:
        return f"asga._C does not load: {error}"
    return None


def _load_cuda() -> str | None:
    """Load the CUDA kernels where torch has CUDA; returns why they cannot be used, or None."""
    if torch.version.cuda is None:
        return "this build of torch has no CUDA"
    found = sorted((Path(__file__).parent.parent).glob("_C_cuda*.so"))
    if not found:
        return "the package was installed without nvcc (asga._C_cuda is missing)"
    try:
        torch.ops.load_library(str(found[0]))
    except OSError as error:
        return f"{found[0].name} does not load: {error}"
    return None


def _triton_missing() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if torch.version.cuda is None and os.environ.get("TRITON_INTERPRET") != "1":
        return "this build of torch has no CUDA"
    return None


def _reference(operator: str) -> Callable:
    return getattr(sam_reference if operator in sam_library.OPERATORS else reference, operator)


def _triton(operator: str) -> Callable:
    """The Triton launcher of an operator; Triton itself is imported by the first call."""
    family = operator.removesuffix("_backward")
    room = "sam" if operator in sam_library.OPERATORS else family
    check = {"fake_quant": _check_quantizer, "mixed_fake_quant": checks.check_mixture}.get(family)

    def launch(*args):
        if check is not None:
            if operator != family:
                checks.check_grad(*args[:2])
            check(*(args if operator == family else args[1:]))
        return getattr(importlib.import_module(f"asga.kernels.{room}"), operator)(*args)

    return launch


def _check_quantizer(input, scale, zero_point, quant_min, quant_max, axis) -> None:
    checks.check_quantizer(input, scale, zero_point, axis)


def _announced_triton(operator: str) -> Callable:
    """Triton where the CUDA library is missing: says so once, with the reason."""
    run = _triton(operator)

    def fallback(*args):
        if "triton" not in _announced:
            _announced.add("triton")
            warnings.warn(
                f"asga runs its Triton kernels on cuda, which compile on first use: {_library_errors['cuda']}. "
                f"`asga info` has details.",
                stacklevel=2,
            )
        return run(*args)

    return fallback


def _announced_reference(operator: str) -> Callable:
    """The reference as the last resort: says once per device, with the reason, that no kernel serves it."""
    run = _reference(operator)

    def fallback(*args):
        device_type = _device_type(args)
        # Tensors without strides come here, too, where kernels are.
        if _library_errors.get(device_type) is not None and device_type not in _announced:
            _announced.add(device_type)
            warnings.warn(
                f"asga runs in plain torch on {device_type}, several times slower than its kernels: "
                f"{_library_errors[device_type]}. `asga info` has details.",
                stacklevel=2,
            )
        return run(*args)

    return fallback


def _device_type(args: tuple[object, ...]) -> str:
    """Of the first tensor, which may be in a list."""
    first = args[0][0] if isinstance(args[0], (list, tuple)) else args[0]
    return first.device.type


def _register(target: torch.library.Library, implementations: Callable[[str], Callable], key: str) -> None:
    for operator in OPERATORS:
        target.impl(operator, implementations(operator), key)


_switching = threading.Lock()
_override: torch.library.Library | None = None
_chosen: str | None = None
_announced: set[str] = set()
_register(library, _announced_reference, "CompositeExplicitAutograd")
_library_errors = {"cpu": _load_cpu(), "cuda": _load_cuda()}
if _library_errors["cuda"] is not None and _triton_missing() is None:
    _register(library, _announced_triton, "CUDA")
if os.environ.get("ASGA_BACKEND"):
    set_backend(os.environ["ASGA_BACKEND"])
