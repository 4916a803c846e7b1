import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

RunPython = Callable[..., str]


@pytest.fixture(scope="session")
def run_python() -> RunPython:
    """Run code in a Python process of its own and return what it prints; a failure shows its output.

    For what is decided once per process: settings read at import, libraries that load or do not. The process has
    none of this one's settings for asga and Triton, only those that are given.
    """

    def run(code: str, *, python: str | Path = sys.executable, cwd: Path | None = None, **env: str) -> str:
        outer = {k: v for k, v in os.environ.items() if not k.startswith(("ASGA_", "TRITON_", "PYTHONPATH"))}
        done = subprocess.run(
            [python, "-c", code], capture_output=True, text=True, cwd=cwd, env={**outer, **env}, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout.strip()

    return run
