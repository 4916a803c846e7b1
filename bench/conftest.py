from collections.abc import Callable

import pytest
import torch

from asga.bench.inputs import make_inputs
from asga.bench.peers import build
from asga.bench.shapes import Case


@pytest.fixture
def race(benchmark) -> Callable[[Case, str], None]:
    """Time forward and backward of one implementation; those of a case are in one group."""
    device = "cuda" if torch.cuda.is_available() else "cpu"

    def run(case: Case, name: str) -> None:
        try:
            contestant = build(name, make_inputs(case, device))
        except ImportError as error:
            pytest.skip(f"not installed: {error}")

        def step() -> None:
            contestant.forward_backward()
            if device == "cuda":
                torch.cuda.synchronize()

        benchmark.group = case.name
        benchmark.extra_info["traffic"] = case.traffic("forward+backward")
        with contestant.context():
            benchmark(step)

    return run
