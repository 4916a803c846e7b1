"""How the CUDA kernels cut columns: what they will allocate, computed by the same lines and without a GPU."""

import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="the rule is compared with that of the Triton kernels")

from asga.kernels import layout

CSRC = Path(__file__).parents[2] / "csrc"
THREADS = 256
PROGRAM = f"""
#include "cuda/column_cut.h"
#include <cstdio>
#include <cstdlib>
int main(int, char** argv) {{
  const auto cut = asga::cut_columns(atoll(argv[1]), atoll(argv[2]), atoi(argv[3]), atoll(argv[4]), {THREADS});
  std::printf("%d %lld %lld", cut.width, (long long)cut.height, (long long)cut.slices);
}}
"""
compiler = shutil.which(os.environ.get("CXX", "c++"))
pytestmark = pytest.mark.skipif(compiler is None, reason="there is no C++ compiler")


@pytest.fixture(scope="module")
def cut_columns(tmp_path_factory) -> Callable[..., tuple[int, int, int]]:
    """The function of that name; returns width, height and slices."""
    folder = tmp_path_factory.mktemp("column_cut")
    (folder / "main.cpp").write_text(PROGRAM)
    subprocess.run([compiler, "-std=c++20", f"-I{CSRC}", folder / "main.cpp", "-o", folder / "main"], check=True)

    def run(*arguments: int) -> tuple[int, int, int]:
        shown = subprocess.run([folder / "main", *map(str, arguments)], capture_output=True, text=True, check=True)
        return tuple(map(int, shown.stdout.split()))

    return run


# Outer indices, channels, columns in a vector, bytes of the sums of a channel, and the most bytes of all of them.
PLANS = {
    "one quantizer": (64 * 56 * 56, 64, 8, 4, 2**20),
    "K=5, 64 channels, bfloat16": (64 * 56 * 56, 64, 2, 40, 1.4e6),
    "K=5, 256 channels, bfloat16": (64 * 56 * 56, 256, 2, 40, 1.4e6),
    "K=5, 256 channels, float32": (64 * 56 * 56, 256, 1, 40, 2**20),
    "K=5, 256 channels, zero points": (64 * 56 * 56, 256, 1, 60, 1.1e6),
    "K=5, 2048 channels, bfloat16": (64 * 7 * 7, 2048, 2, 40, 1.4e6),
    "K=8, 2048 channels, zero points": (64 * 7 * 7, 2048, 1, 96, 1.8e6),
    "K=5, 14336 channels": (2048, 14336, 2, 40, 1.8e6),
    # A block for every few columns: one sum for each scale and term.
    "more channels than blocks": (64, 2**17, 2, 40, 40 * 2**17),
}


@pytest.mark.parametrize(("outer", "channels", "vector", "sum_bytes", "most"), PLANS.values(), ids=PLANS)
def test_partial_sums_take_few_bytes_and_leave_enough_blocks(cut_columns, outer, channels, vector, sum_bytes, most):
    width, height, slices = cut_columns(outer, channels // vector, vector, sum_bytes)
    assert slices * height >= outer > (slices - 1) * height
    assert 1 <= width <= THREADS
    assert channels * slices * sum_bytes <= most
    blocks = -(-channels // (vector * width)) * slices
    values_per_block = outer * channels / blocks
    assert blocks >= 0.75 * layout._FEWEST_PROGRAMS or values_per_block <= 16 * THREADS * vector


def test_without_sums_there_are_as_many_blocks_as_ever(cut_columns):
    _, _, with_sums = cut_columns(64 * 56 * 56, 2048, 1, 96)
    width, _, slices = cut_columns(64 * 56 * 56, 2048, 1, 0)
    assert slices > with_sums
    assert -(-2048 // width) * slices > 0.9 * 1024


@pytest.mark.parametrize("vectors", [1, 3, 31, 32, 33, 36, 257, 100_003])
def test_every_column_has_a_thread(cut_columns, vectors):
    width, height, _ = cut_columns(1000, vectors, 1, 40)
    blocks = -(-vectors // width)
    assert width <= 32
    assert (blocks - 1) * width < vectors <= blocks * width
    assert height % (THREADS // width) == 0


def test_the_rule_is_that_of_triton():
    header = (CSRC / "cuda" / "column_cut.h").read_text()
    assert "kPartialBytes = int64_t{1} << 20;" in header
    assert layout._PARTIAL_BYTES == 1 << 20
    four, processors = map(int, re.search(r"kFewestBlocks = (\d+) \* (\d+);", header).groups())
    assert four * processors == layout._FEWEST_PROGRAMS
