"""Peak memory of a mixture: its result and a few KiB, forward and backward, whatever the number of candidates."""

import ctypes
import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from asga.bench.measure import is_glibc, peak_memory
from asga.ops import backends, mixed_fake_quant

pytestmark = pytest.mark.skipif(
    backends.unavailable("cpu") is not None, reason=f"no CPU kernels: {backends.unavailable('cpu')}"
)

QUANT_MINS, QUANT_MAXS = [-2, -4, -8, -32, -128], [1, 3, 7, 31, 127]
SHAPE = (8, 64, 56, 56)  # 6 MiB: large beside all that is allowed, and more than a piece of work for every thread
# Name: axis and memory format.
CASES = {
    "per tensor": (None, torch.contiguous_format),
    "per channel": (1, torch.contiguous_format),
    "per channel, channels_last": (1, torch.channels_last),
    "per channel on the first axis": (0, torch.contiguous_format),
}
# Scales, probabilities and offsets with their gradients, 6 * 5 * 64 numbers of 4 bytes, in float32 and once more in
# the tables that the loops read; sums in float64; what Python and autograd keep for the objects involved.
FEW_KIB = 32 * 1024


def _steps(case: str, with_offset: bool):
    """Forward, backward, and the bytes of the input."""
    axis, memory_format = CASES[case]
    shape = (5,) if axis is None else (5, SHAPE[axis])
    x = torch.randn(SHAPE).contiguous(memory_format=memory_format).requires_grad_()
    grad = torch.randn(SHAPE).contiguous(memory_format=memory_format)
    scales = torch.rand(shape).add(0.1).requires_grad_()
    offsets = torch.zeros(shape, requires_grad=True) if with_offset else None
    probs = torch.full((5,), 0.2, requires_grad=True)
    leaves = [x, scales, probs, *([offsets] if with_offset else [])]

    def forward() -> torch.Tensor:
        return mixed_fake_quant(x, scales, probs, offsets, quant_mins=QUANT_MINS, quant_maxs=QUANT_MAXS, axis=axis)

    return forward, lambda y: torch.autograd.grad(y, leaves, grad), x.numel() * x.element_size()


offsets = pytest.mark.parametrize("with_offset", [False, True], ids=["symmetric", "offset"])


@offsets
@pytest.mark.parametrize("case", CASES)
def test_of_tensors(case, with_offset):
    """What torch's own allocator gives out."""
    forward, backward, size = _steps(case, with_offset)
    for peak in peak_memory(forward, backward, torch.device("cpu")):
        assert size <= peak <= size + FEW_KIB, f"{peak - size} bytes more than the result"


@pytest.fixture(scope="module")
def heap_peaks(tmp_path_factory, run_python) -> dict[str, list[int]]:
    """`measure_heap` in a process whose allocator counts; see heap_peak.c."""
    if not is_glibc() or shutil.which("cc") is None:
        pytest.skip("needs glibc and a C compiler")
    if "asan" in os.environ.get("LD_PRELOAD", ""):
        pytest.skip("AddressSanitizer has an allocator of its own")
    library = str(tmp_path_factory.mktemp("heap") / "heap_peak.so")
    source = Path(__file__).with_name("heap_peak.c")
    subprocess.run(["cc", "-O1", "-shared", "-fPIC", "-o", library, source], check=True)
    code = f"import runpy; runpy.run_path({__file__!r})['measure_heap']({library!r})"
    return json.loads(run_python(code, LD_PRELOAD=library))


@offsets
@pytest.mark.parametrize("case", CASES)
def test_of_everything_on_the_heap(case, with_offset, heap_peaks):
    """Working memory of the kernels too, which torch does not see."""
    *peaks, size = heap_peaks[f"{case} {with_offset}"]
    for peak in peaks:
        assert size <= peak <= size + FEW_KIB, f"{peak - size} bytes more than the result"


def measure_heap(library: str) -> None:
    """Print, per case, the peaks of forward and of backward beyond what was there before, and the input's bytes."""
    counter = ctypes.CDLL(library)
    counter.heap_peak.restype = ctypes.c_long
    peaks = {}
    for case in CASES:
        for with_offset in (False, True):
            forward, backward, size = _steps(case, with_offset)
            for _ in range(2):  # the first time, threads start and libraries set themselves up
                counter.heap_peak_start()
                y = forward()
                of_forward = counter.heap_peak()
                counter.heap_peak_start()
                gradients = backward(y)
                peaks[f"{case} {with_offset}"] = [of_forward, counter.heap_peak(), size]
                del y, gradients
    print(json.dumps(peaks))
