"""Benchmarks of operators, optimizer steps and search steps, against every other implementation that is installed.

    asga bench --quick
    asga bench --only "core/*/float32" --json bench/results/cpu.json
    asga bench --only "search/*"

The same cases one by one, with pytest-benchmark (`pip install "asga[bench]"`), from a clone of the repository::

    pytest bench --benchmark-only

Before anything is timed, forward and gradients of every implementation are compared with the reference: one that
computes something else is left out, with the reason.
"""

from asga.bench.runner import Config, Result, Timing, run
from asga.bench.shapes import Case, select

__all__ = ["Case", "Config", "Result", "Timing", "run", "select"]
