"""How the CUDA kernels cut rows: what they will allocate, computed by the same lines and without a GPU."""

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

CSRC = Path(__file__).parents[2] / "csrc"
THREADS, WARP = 256, 32
FEWEST_BLOCKS = 4 * 132  # kFewestBlocks in csrc/cuda/column_cut.h
PROGRAM = f"""
#include "cuda/row_cut.h"
#include <cstdio>
#include <cstdlib>
int main(int, char** argv) {{
  const auto cut = asga::cut_rows(atoll(argv[1]), atoll(argv[2]), atoll(argv[3]), atoi(argv[4]), atoll(argv[5]),
                                  {THREADS}, {WARP});
  std::printf("%lld %lld %d %d", (long long)cut.height, (long long)cut.piece, cut.pieces, cut.team);
}}
"""
compiler = shutil.which(os.environ.get("CXX", "c++"))
pytestmark = pytest.mark.skipif(compiler is None, reason="there is no C++ compiler")


@pytest.fixture(scope="module")
def cut_rows(tmp_path_factory) -> Callable[..., tuple[int, int, int, int]]:
    """The function of that name; returns height, piece, pieces and team."""
    folder = tmp_path_factory.mktemp("row_cut")
    (folder / "main.cpp").write_text(PROGRAM)
    subprocess.run([compiler, "-std=c++20", f"-I{CSRC}", folder / "main.cpp", "-o", folder / "main"], check=True)

    def run(*arguments: int) -> tuple[int, int, int, int]:
        shown = subprocess.run([folder / "main", *map(str, arguments)], capture_output=True, text=True, check=True)
        return tuple(map(int, shown.stdout.split()))

    return run


# Outer indices, channels, values in a row, values in a vector, bytes of the sums of a row, and the most bytes of all.
PLANS = {
    "one quantizer, 7x7": (64, 2048, 49, 4, 4, 2**20),
    "K=5, 7x7": (64, 2048, 49, 4, 40, 2**20),
    "K=5, 7x7, bfloat16": (64, 2048, 49, 8, 40, 2**20),
    "K=5, 7x7, bfloat16, large batch": (4096, 2048, 49, 8, 40, 2**20),
    "K=8, 7x7, zero points": (64, 2048, 49, 4, 96, 1.9e6),
    "K=5, 14x14": (256, 1024, 196, 4, 40, 2**20),
    "K=5, 56x56": (64, 256, 3136, 8, 40, 2**20),
    "K=5, 56x56, large batch": (4096, 256, 3136, 8, 40, 2**20),
    # A tile for every row: one sum for each scale and term.
    "more channels than tiles": (8, 2**17, 49, 4, 40, 40 * 2**17),
}


@pytest.mark.parametrize(("outer", "channels", "inner", "vector", "sum_bytes", "most"), PLANS.values(), ids=PLANS)
def test_partial_sums_take_few_bytes_and_leave_enough_blocks(cut_rows, outer, channels, inner, vector, sum_bytes, most):
    height, _, pieces, team = cut_rows(outer, channels, inner, vector, sum_bytes)
    groups = -(-outer // height)
    assert groups * height >= outer > (groups - 1) * height
    assert channels * groups * pieces * sum_bytes <= most
    assert groups * channels * pieces * team / THREADS >= 0.75 * min(FEWEST_BLOCKS, outer * channels * team / THREADS)


@pytest.mark.parametrize("outer", [1, 64, 4096])
@pytest.mark.parametrize("inner", [2, 49, 511, 512, 1024, 40_003])
def test_without_sums_every_row_is_a_tile_of_its_own(cut_rows, outer, inner):
    assert cut_rows(outer, 2048, inner, 4, 0)[0] == 1


@pytest.mark.parametrize("inner", [9, 576, 4608, 50_176])
def test_a_weight_has_one_row_for_each_channel(cut_rows, inner):
    assert cut_rows(1, 2048, inner, 4, 96)[0] == 1


@pytest.mark.parametrize("inner", [2, 31, 49, 508, 512, 513, 3136, 1_000_003, 2**32])
@pytest.mark.parametrize("rows", [(1, 1), (3, 5), (64, 2048)], ids=str)
@pytest.mark.parametrize("vector", [2, 4, 8])
def test_pieces_cover_a_row(cut_rows, inner, rows, vector):
    height, piece, pieces, team = cut_rows(*rows, inner, vector, 40)
    assert (pieces - 1) * piece < inner <= pieces * piece
    assert height == 1 or pieces == 1
    assert pieces == 1 or rows[0] * rows[1] * pieces <= 2048
    assert team in (8, 16, 32, THREADS)
    assert team <= WARP or piece % (THREADS * vector) == 0 or pieces == 1
