"""Every launch of every family, compiled for GPUs that need not be there.

Run as a program, this file calls the launchers on CPU tensors while each launch compiles its kernel instead
of running it, and prints what the compiler made of it. So what is tested has the tiles, types and alignments
of a real launch. That needs processes without TRITON_INTERPRET: one for each architecture, for all tests.

With ASGA_TEST_LARGE=1 every input is compiled for every architecture, and the widest with all numbers of candidates.
Without, one architecture gets all inputs, and the others those whose kernels are short of registers.
"""

import ast
import importlib.util
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

# The first test waits for all compilations: a minute on two free cores, several if they are busy or with all of them.
pytestmark = pytest.mark.timeout(900)
LARGE = os.environ.get("ASGA_TEST_LARGE") == "1"
ARCHITECTURES = [80, 90, 100]
# Gets all inputs and dtypes.
THOROUGH = 90
DEFAULT_CANDIDATES = 5
MAX_CANDIDATES = 8
# Name, shape, axis and dtype of an input. All but the last are aligned, as those of most layers are.
INPUTS = [
    ("per tensor, float32", (64, 1024), None, torch.float32),
    ("per tensor, bfloat16", (64, 1024), None, torch.bfloat16),
    ("per channel, float32", (512, 576), 0, torch.float32),
    ("per channel, bfloat16", (512, 576), 0, torch.bfloat16),
    ("channels innermost, float32", (4096, 512), 1, torch.float32),
    ("depthwise, bfloat16", (512, 9), 0, torch.bfloat16),
]
# Those whose kernels keep the most sums.
WIDEST = ("per channel, bfloat16", "channels innermost, float32")
ALL_NUMBERS = [(candidates, offset) for candidates in range(2, MAX_CANDIDATES + 1) for offset in (False, True)]
# Candidates, and whether with zero points, that need the most registers, or for which the compiler left to itself would
# spill. The default number is compiled for every input.
SCARCE = {
    "per channel, float32": [(2, False)],
    "per channel, bfloat16": [(5, True), (7, False), (7, True), (8, False), (8, True)],
    "channels innermost, float32": [(7, True), (8, True)],
    "depthwise, bfloat16": [(5, True), (7, False)],
}
# Architecture, input and bytes of the one kernel that spills: seven candidates with zero points. With more registers it
# would spill on sm_100 instead.
SPILLS = (80, "per channel, bfloat16", 8)
# Dtypes of parameters and gradients of the fused ASGA step, and whether with its more expensive options.
STEPS = [
    ("step, float32", torch.float32, torch.float32, True),
    ("step, bfloat16", torch.bfloat16, torch.bfloat16, False),
    ("step, float64 and float16", torch.float64, torch.float16, True),
]
# Kernels of a few scalars, and those that write nothing but sums.
SCALARS = {"ascent_step_kernel", "coefficients_kernel", "adam_sizes_kernel"}
SUMS = {"norm_kernel", "dots_kernel"}


def _compile_all(architecture: int) -> list[dict]:
    """Compile every launch for an architecture; one record per kernel."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    class Target:
        """As much of a driver as compilation asks for."""

        def __init__(self, architecture: int):
            self.architecture = architecture

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", self.architecture, 32)

        def get_current_device(self) -> int:
            return self.architecture  # the key of Triton's cache of compiled kernels

        def get_current_stream(self, device: int) -> int:
            return 0

    records = {}
    run = JITFunction.run

    def compile_only(function, *args, grid, warmup, **kwargs):
        compiled = run(function, *args, grid=grid, warmup=True, **kwargs)
        if id(compiled) not in records:
            label = dict(kernel=function.__name__, architecture=architecture, input=name)
            records[id(compiled)] = label | _inspect(compiled)

    JITFunction.run = compile_only
    driver.set_active(Target(architecture))
    thorough = LARGE or architecture == THOROUGH
    for name, shape, axis, dtype in INPUTS:  # compile_only reads the name
        if not thorough and name not in SCARCE:
            continue
        x = torch.zeros(shape, dtype=dtype)
        _launch_single(x, axis, offset=dtype == torch.float32)
        for candidates, offset in _numbers(name, dtype):
            # Forward keeps no sums, so that registers are scarce for no number.
            _launch_mixture(x, axis, candidates, offset=offset, forward=LARGE or candidates == DEFAULT_CANDIDATES)
    # Few train in float64: one architecture stands for all.
    for step in STEPS if architecture == THOROUGH else STEPS[: 2 if LARGE else 1]:
        name = step[0]  # compile_only reads it
        _launch_step(*step[1:])
    return list(records.values())


def _numbers(name: str, dtype: torch.dtype) -> list[tuple[int, bool]]:
    """Numbers of candidates to compile for an input, and whether with zero points."""
    if LARGE and name in WIDEST:
        return ALL_NUMBERS
    # float32 with and bfloat16 without zero points: a representative half of the combinations
    return [(DEFAULT_CANDIDATES, dtype == torch.float32), *SCARCE.get(name, [])]


def _launch_single(x: torch.Tensor, axis: int | None, *, offset: bool) -> None:
    from asga.kernels import fake_quant

    scale = torch.ones(() if axis is None else (x.shape[axis],))
    arguments = (scale, torch.ones_like(scale) if offset else None, -8, 7, axis)
    fake_quant.fake_quant(x, *arguments)
    fake_quant.fake_quant_backward(x, x, *arguments)


def _launch_mixture(x: torch.Tensor, axis: int | None, candidates: int, *, offset: bool, forward: bool) -> None:
    from asga.kernels import mixed_fake_quant

    scales = torch.ones(candidates, *(() if axis is None else (x.shape[axis],)))
    zero_points = torch.ones_like(scales) if offset else None
    ranges = ([-(2**k) for k in range(1, candidates + 1)], [2**k - 1 for k in range(1, candidates + 1)])
    arguments = (scales, torch.ones(candidates), zero_points, *ranges, axis)
    if forward:
        mixed_fake_quant.mixed_fake_quant(x, *arguments)
    mixed_fake_quant.mixed_fake_quant_backward(x, x, *arguments)


def _launch_step(dtype: torch.dtype, grad_dtype: torch.dtype, rich: bool) -> None:
    from asga.kernels import sam

    params, backups, first, second = ([torch.zeros(5000, dtype=dtype)] for _ in range(4))
    first_grads, grads = ([torch.zeros(5000, dtype=grad_dtype)] for _ in range(2))
    one, of, counts = torch.zeros((), dtype=torch.float64), torch.zeros(4).double(), torch.zeros(5).long()
    sam.sam_norm(params, grads, [1.0], rich)
    sam.sam_ascent_step(one, one, one if rich else None, 0.1, not rich)
    sam.sam_perturb(params, backups, first_grads if rich else [], grads, one, [1.0], rich)
    sam.sam_dots(params, first_grads, grads, [1.0], rich)
    extra = (one, one) if rich else (None, None)
    options = (2 if rich else 1, 0.4, 1.0 if rich else None, True, 0.01, 0.5)
    sam.sam_coefficients(one, one, of, torch.zeros(2).double(), *extra, one, counts, *options)
    lists = (params, backups, first_grads, grads)
    sam.sam_combine(*lists, of)
    sam.sam_sgd(*lists, first, of, one if rich else None, 0.1, 0.9, 0.01, rich)
    steps = [torch.zeros(())]
    sam.sam_adam(*lists, first, second, steps, of, one if rich else None, 0.1, 0.9, 0.99, 1e-8, 0.01, rich)


def _inspect(compiled) -> dict:
    """Resources of the machine code, and the instructions that the tests ask about."""
    import triton

    with tempfile.TemporaryDirectory() as folder:
        cubin = pathlib.Path(folder, "kernel.cubin")
        cubin.write_bytes(compiled.asm["cubin"])
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", str(cubin)]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    resources = {key.lower(): int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    ptx = compiled.asm["ptx"]
    return dict(
        resources,
        divisions=sorted(set(re.findall(r"\bdiv\.[\w.]*f\d\d", ptx))),
        square_roots=sorted(set(re.findall(r"\bsqrt\.[\w.]*f\d\d", ptx))),
        fused_multiply_adds=len(re.findall(r"\bfma\.", ptx)),
        vector_loads=len(re.findall(r"\bld\.global[\w.]*\.v[24]\.b(?:32|64)", ptx)),
        vector_stores=len(re.findall(r"\bst\.global[\w.]*\.v[24]\.b(?:32|64)", ptx)),
    )


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> list[dict]:
    pytest.importorskip("triton", reason="the Triton kernels need triton")
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    # A cache of its own: a kernel compiled earlier would prove nothing.
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))

    def compile_for(architecture: int) -> list[dict]:
        command = [sys.executable, __file__, str(architecture)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return [record for records in pool.map(compile_for, ARCHITECTURES) for record in records]


def _all_kernels() -> set[str]:
    """Functions named ``..._kernel`` in the sources of asga.kernels."""
    folder = pathlib.Path(importlib.util.find_spec("asga.kernels").origin).parent
    nodes = (node for file in folder.glob("*.py") for node in ast.walk(ast.parse(file.read_text())))
    return {node.name for node in nodes if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel")}


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids="sm_{}".format)
def test_every_kernel_compiles(compiled, architecture):
    kernels = {record["kernel"] for record in compiled if record["architecture"] == architecture}
    assert kernels == _all_kernels()
    assert len(kernels) > 0


def test_nothing_else_spills(compiled):
    backward = [r for r in compiled if r["kernel"] == "_mixed_fake_quant_backward_kernel"]
    for name, _, _, dtype in INPUTS:
        architectures = ARCHITECTURES if LARGE or name in SCARCE else [THOROUGH]
        found = sorted(r["architecture"] for r in backward if r["input"] == name)
        assert found == sorted(architectures * len(_numbers(name, dtype)))
    spilled = [record for record in compiled if record["stack"] or record["local"]]
    assert [(r["architecture"], r["input"], r["stack"]) for r in spilled] in ([SPILLS], [])
    assert all(r["kernel"] == "_mixed_fake_quant_backward_kernel" and not r["local"] for r in spilled)


def test_rounding_is_the_references(compiled):
    # A logarithm in float64 is a function of the compiler's library, which fuses.
    sweeps = [record for record in compiled if record["kernel"] not in SCALARS]
    assert [record for record in sweeps if record["fused_multiply_adds"]] == []
    divisions = {division for record in compiled for division in record["divisions"]}
    assert divisions == {"div.rn.f32", "div.rn.f64"}
    roots = {root for record in compiled for root in record["square_roots"]}
    assert roots == {"sqrt.rn.f32", "sqrt.rn.f64"}


def test_sweeps_over_aligned_tensors_use_vectors(compiled):
    sweeps = [r for r in compiled if "depthwise" not in r["input"] and "finish" not in r["kernel"]]
    sweeps = [r for r in sweeps if r["kernel"] not in SCALARS]
    assert len(sweeps) > 0
    assert [r for r in sweeps if not r["vector_loads"]] == []
    assert [r for r in sweeps if not r["vector_stores"] and r["kernel"] not in SUMS] == []


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(_compile_all(int(sys.argv[1]))))
