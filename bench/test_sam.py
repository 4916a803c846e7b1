"""Cases of a whole optimizer step for pytest-benchmark: `pytest bench --benchmark-only`. More is in `asga bench`."""

import pytest

from asga.bench.step_peers import build_steppers
from asga.bench.steps import PASSES, select_steps

pytest.importorskip("pytest_benchmark")

CASES = select_steps(["step/resnet18/*", "step/resnet50/*"], "cpu")
NAMES = ("asga", "eager", "foreach", "pytorch_optimizer")


@pytest.mark.parametrize("passes", PASSES)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_step(benchmark, case, name, passes):
    found = {stepper.name: stepper for stepper in build_steppers(case, "cpu", compiled=False)[0]}
    if name not in found or passes not in found[name].run:
        pytest.skip(f"{name} has no {passes} here")
    benchmark.group = f"{case.name}, {passes}"
    benchmark.extra_info["traffic"] = case.traffic(passes)
    benchmark(found[name].run[passes])
