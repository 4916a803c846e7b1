"""The built CUDA library: its architectures, registers and symbols. Needs no GPU."""

import functools
import importlib.util
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

import asga

ARCHITECTURES = {"sm_75", "sm_80", "sm_90", "sm_100", "sm_120"}  # setup.py's default list
PTX = {"sm_120"}  # for GPUs newer than the list

pytestmark = [
    pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on PATH"),
    pytest.mark.skipif(os.environ.get("ASGA_CUDA") == "skip", reason="the CUDA library was left out (ASGA_CUDA=skip)"),
]


@pytest.fixture(scope="module")
def library() -> Path:
    found = sorted(Path(asga.__file__).parent.glob("_C_cuda*.so"))
    if not found:
        pytest.fail(
            "nvcc is on PATH but asga/_C_cuda*.so is missing: build it with "
            "`ASGA_CUDA=force pip install --no-build-isolation -e .`, or set ASGA_CUDA=skip to go without"
        )
    return found[0]


def test_holds_the_default_architectures(library):
    if "TORCH_CUDA_ARCH_LIST" in os.environ:
        pytest.skip("TORCH_CUDA_ARCH_LIST replaces the default list")
    assert set(re.findall(r"\.(sm_\w+)\.cubin", _cuobjdump("--list-elf", library))) == ARCHITECTURES
    assert set(re.findall(r"\.(sm_\w+)\.ptx", _cuobjdump("--list-ptx", library))) == PTX


def test_no_kernel_spills_registers(library):
    report = _cuobjdump("--dump-resource-usage", library)
    usage = re.findall(r"Function (\S+):\s*REG:\d+ STACK:(\d+) .*?LOCAL:(\d+)", report)
    names = {name for name, _, _ in usage}
    for family in ("fake_quant", "mixed_fake_quant"):
        for kernel in ("forward", "backward", "finish"):
            assert any(re.search(rf"\d_{family}_cu_\w*{kernel}_kernel", name) for name in names)
    for kernel in ("norm", "perturb", "dots", "finish", "combine", "sgd", "adam_sizes", "adam", "coefficients"):
        assert any(re.search(rf"\d_sam_cu_\w*\d{kernel}_kernel", name) for name in names)
    # The bounds of the loops over candidates, without and with zero points, serve all numbers from 1 to 8.
    for bound in (5, 8):
        for offset in (0, 1):
            assert any(f"Li{bound}ELb{offset}E" in name for name in names)
    assert [name for name, stack, local in usage if (stack, local) != ("0", "0")] == []


def test_multiply_and_add_are_fused_in_sums_only(library):
    """Elsewhere a fused multiply-add would round once where the definition rounds twice.

    Apart from sums only the compiler's own division uses it, and the mixture divides outside its loops: all forward
    kernels of a bound hold the same few for each channel of a thread, and the backward kernels two more for each
    value of a body and candidate.
    """
    functions = _cuobjdump("-sass", "-arch", "sm_90", library).split("Function : ")[1:]
    fused = {"for": {}, "back": {}}
    for function in functions:
        found = re.match(
            r"\S*mixed_fake_quant_cu\S*(for|back)ward_kernelI(\w+?)Li(\d)ELb(\d)ENS_\d+(RowTiles|ColumnTilesILi\d)",
            function,
        )
        if found and found[2] != "d":
            fused[found[1]][found.groups()[1:]] = function.count("FFMA")
    assert len(fused["for"]) == len(fused["back"]) >= 24  # three dtypes, two bounds, both with and without, two cuts
    for (dtype, bound, offset, cut), count in fused["back"].items():
        values = 1 if cut.endswith("Li1") else 2 if cut.endswith("Li2") else 1 + (4 if dtype == "f" else 8)
        assert count - fused["for"][dtype, bound, offset, cut] == 2 * int(bound) * values
    divisions = {}
    for (_, bound, _, cut), count in fused["for"].items():
        divisions.setdefault((bound, cut.endswith("Li2")), set()).add(count)
    assert all(len(counts) == 1 for counts in divisions.values())


def test_the_steps_of_the_optimizer_round_as_the_reference(library):
    """Only Adam divides, for which the compiler fuses in code of its own; not so multiplications and additions."""
    functions = _cuobjdump("-sass", "-arch", "sm_90", library).split("Function : ")[1:]
    kernels = ("norm", "perturb", "dots", "combine", "sgd")
    fused = {}
    for function in functions:
        found = re.match(rf"\S*\d_sam_cu\S*\d({'|'.join(kernels)})_kernelIf\S*FlatTable", function)
        if found:
            fused.setdefault(found[1], []).append(function.count("FFMA"))
    assert set(fused) == set(kernels)
    assert all(count == 0 for counts in fused.values() for count in counts)


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_rows_and_vectors_of_columns_are_read_and_written_16_bytes_at_a_time(library, architecture):
    """Of every dtype, by the kernels that sweep over aligned tensors; single values come before and after them."""
    functions = _cuobjdump("-sass", "-arch", architecture, library).split("Function : ")[1:]
    accesses = {}
    for function in functions:
        found = re.match(
            r"\S*\d_(mixed_fake_quant|fake_quant)_cu\S*?\d(forward|backward)_kernelI(d|f|6__half|13__nv_bfloat16)\w*"
            r"(RowTiles|ColumnTilesILi\d)",
            function,
        )
        if found is None or found[4].endswith("Li1") or (found[1], found[4]) == ("mixed_fake_quant", "ColumnTilesILi2"):
            continue  # columns one by one, or two in 4 bytes for lack of registers
        loads, stores = (len(re.findall(rf"\b{name}\.E\S*\.128\b", function)) for name in ("LDG", "STG"))
        accesses[(*found.groups(), function.partition("\n")[0])] = (loads, stores)
    assert {key[:4] for key in accesses} >= {
        (family, direction, dtype, "RowTiles")
        for family in ("mixed_fake_quant", "fake_quant")
        for direction in ("forward", "backward")
        for dtype in ("d", "f", "6__half", "13__nv_bfloat16")
    }
    assert {key[3] for key in accesses if key[0] == "fake_quant"} == {
        "RowTiles",
        *(f"ColumnTilesILi{width}" for width in (2, 4, 8)),
    }
    # Backward reads the gradient as well.
    wanted = {"forward": 1, "backward": 2}
    assert [key for key, (loads, stores) in accesses.items() if loads < wanted[key[1]] or stores < 1] == []


def test_needs_only_the_stable_interface_of_torch(library):
    if shutil.which("nm") is None:
        pytest.skip("nm is not on PATH")
    symbols = subprocess.run(
        ["nm", "-DC", "--undefined-only", library], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert any("torch_library_impl" in symbol for symbol in symbols)
    assert [symbol for symbol in symbols if re.search(r"\b(at|c10|torch)::", symbol)] == []


def test_finds_the_current_stream_in_libtorch_cuda(library):
    """Without this entry the loader would not look there: torch keeps its symbols to itself."""
    if shutil.which("readelf") is None:
        pytest.skip("readelf is not on PATH")
    entries = subprocess.run(["readelf", "-d", library], capture_output=True, text=True, check=True).stdout
    assert "[libtorch_cuda.so]" in entries


@functools.cache
def _cuobjdump(*arguments: str | Path) -> str:
    tool = shutil.which("cuobjdump")
    triton = importlib.util.find_spec("triton")
    if tool is None and triton is not None:  # its wheel brings the tool
        tool = shutil.which("cuobjdump", path=str(Path(triton.origin).parent / "backends" / "nvidia" / "bin"))
    if tool is None:
        pytest.skip("cuobjdump is neither on PATH nor in an installed triton")
    return subprocess.run([tool, *arguments], capture_output=True, text=True, check=True).stdout
