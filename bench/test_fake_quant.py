"""Cases of `fake_quant` for pytest-benchmark: `pytest bench --benchmark-only`. More is in `asga bench`."""

import pytest

from asga.bench.peers import names
from asga.bench.shapes import select

pytest.importorskip("pytest_benchmark")

RACES = [
    (case, name) for case in select(["core/*/k1/float32", "options/*/k1/float32"], 64) for name in names(case, "cpu")
]


@pytest.mark.parametrize(("case", "name"), RACES, ids=[f"{case.name}-{name}" for case, name in RACES])
def test_forward_and_backward(race, case, name):
    race(case, name)
