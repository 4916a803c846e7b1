"""The built CPU library and its objects: which symbols they need, and which they share."""

import os
import re
import runpy
import shutil
import subprocess
from pathlib import Path

import pytest
import setuptools

import asga

ROOT = Path(__file__).parents[2]
SOURCES = sorted((ROOT / "csrc" / "cpu" / "vectorized").glob("*.cpp"))

pytestmark = pytest.mark.skipif(shutil.which("nm") is None, reason="nm is not on PATH")


@pytest.fixture(scope="module")
def library() -> Path:
    found = sorted(Path(asga.__file__).parent.glob("_C.*so"))
    if not found:
        if os.environ.get("ASGA_CPU") == "skip" or shutil.which("c++") is None:
            pytest.skip("the CPU library was left out")
        pytest.fail("asga/_C*.so is missing: build it with `pip install --no-build-isolation -e .`")
    return found[0]


class TestLibrary:
    def test_is_named_for_every_python(self, library):
        assert library.name == "_C.abi3.so"

    def test_can_be_imported(self, library):
        """Torch would find its kernels without this function, but `import asga._C` fails without it."""
        assert ("T", "PyInit__C") in _symbols(library, "-D", "--defined-only")

    def test_needs_only_the_stable_interface_of_torch(self, library):
        needed = [name for _, name in _symbols(library, "-D", "--undefined-only")]
        assert "torch_library_impl" in needed
        assert [name for name in needed if re.search(r"\b(at|c10|torch)::", name)] == []

    def test_exports_nothing_else(self, library):
        """Any other exported function could be taken for one of another library, or the other way around."""
        exported = [name for _, name in _symbols(library, "-D", "--defined-only")]
        assert [name for name in exported if "asga::" in name] == []


@pytest.mark.skipif(shutil.which("c++") is None, reason="there is no C++ compiler")
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.name)
def test_instruction_sets_share_no_function(source, tmp_path, monkeypatch):
    """The linker keeps one copy of a function that several objects define: maybe that for AVX-512, which then
    crashes a processor without it. Compiled without inlining, where nothing that could be shared is hidden.
    """
    monkeypatch.setattr(setuptools, "setup", lambda **kwargs: None)
    monkeypatch.setenv("ASGA_CUDA", "skip")
    flags = runpy.run_path(str(ROOT / "setup.py"))["ISA_FLAGS"]
    isa = list(flags)[-1]
    built = tmp_path / "object.o"
    command = ["c++", "-std=c++17", "-O0", "-w", *flags[isa], f"-DASGA_ISA={isa}", "-c", source, "-o", built]
    subprocess.run(command, check=True)
    functions = [name for kind, name in _symbols(built, "--defined-only", "--extern-only") if kind in "TW"]
    assert functions
    assert [name for name in functions if f"asga::{isa}::" not in name] == []


def _symbols(path: Path, *options: str) -> list[tuple[str, str]]:
    """(kind, name) of each symbol, names demangled."""
    output = subprocess.run(["nm", "-C", *options, path], capture_output=True, text=True, check=True).stdout
    return [tuple(line[17:].split(" ", 1)) for line in output.splitlines()]
