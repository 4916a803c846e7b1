"""Cases of a whole search step for pytest-benchmark: `pytest bench --benchmark-only`. More is in `asga bench`."""

import pytest
import torch

from asga.bench.searches import FIXED_BITS, build_searches, select_searches

pytest.importorskip("pytest_benchmark")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CASES = select_searches(["search/*"], DEVICE)


@pytest.mark.parametrize("name", ["asga", "eager", FIXED_BITS])
@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_step(benchmark, case, name):
    found = {stepper.name: stepper for stepper in build_searches(case, DEVICE, compiled=False)[0]}
    benchmark.group = case.name

    def step() -> None:
        found[name].run["step"]()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark(step)
