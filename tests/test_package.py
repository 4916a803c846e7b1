"""The package from outside: what importing it costs, what is built, and that what is built works elsewhere."""

import importlib.util
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest
import setuptools
import torch

import asga

ROOT = Path(__file__).parents[1]
needs_compiler = pytest.mark.skipif(
    shutil.which(os.environ.get("CXX", "c++")) is None, reason="there is no C++ compiler"
)
# Prints the file of the package that was imported, what serves CPU tensors, and a few values.
SMOKE = """
import torch, asga
x = torch.linspace(-2, 2, 100, requires_grad=True)
y = asga.ops.fake_quant(x, torch.tensor([0.5]), quant_min=-2, quant_max=1)
scales, probs = torch.tensor([0.5, 0.25]), torch.tensor([0.5, 0.5])
z = asga.ops.mixed_fake_quant(x, scales, probs, quant_mins=[-2, -8], quant_maxs=[1, 7])
(y + z).sum().backward()
print(asga.__file__, asga.ops.backends.serving("cpu"), sorted(set(y.tolist())), int((x.grad == 0).sum()))
"""
# Of the 100 values, the 7 above 1.75 lie beyond every range and have no gradient.
SMOKE_VALUES = "[-1.0, -0.5, 0.0, 0.5] 7"


class TestImport:
    CODE = """
import sys, torch
initialized, loaded = torch.cuda.is_initialized(), set(sys.modules)
import asga
print(torch.cuda.is_initialized() > initialized, *sorted(set(sys.modules) - loaded))
"""

    # Of the extras, and what is slow: all of these are imported by the function that needs them.
    LATE = ("triton", "matplotlib", "scipy", "sklearn", "PIL", "jinja2", "rich", "torchvision", "transformers", "onnx")

    def test_starts_no_cuda_and_loads_nothing_that_can_wait(self, run_python):
        starts_cuda, *modules = run_python(self.CODE).split()
        assert starts_cuda == "False"
        assert "asga.ops" in modules
        late = tuple(f"{name}." for name in (*self.LATE, "torch._dynamo", "torch._inductor"))
        assert [name for name in modules if f"{name}.".startswith(late)] == []


class TestSetup:
    """The decisions of setup.py: its functions, called without building anything."""

    @pytest.fixture
    def run_setup(self, monkeypatch):
        """Run setup.py up to the call of `setup`; returns its names and the extensions that it would build."""
        for variable in ("ASGA_CPU", "ASGA_CUDA", "CUDA_HOME", "CUDA_PATH", "TORCH_CUDA_ARCH_LIST", "CXX"):
            monkeypatch.delenv(variable, raising=False)

        def run() -> tuple[dict, list[str]]:
            passed = {}
            monkeypatch.setattr(setuptools, "setup", passed.update)
            names = runpy.run_path(str(ROOT / "setup.py"))
            return names, [extension.name for extension in passed["ext_modules"]]

        return run

    @pytest.fixture
    def no_compilers(self, monkeypatch):
        monkeypatch.setattr(shutil, "which", lambda *args, **kwargs: None)

    def test_builds_what_there_are_compilers_for(self, run_setup, monkeypatch):
        monkeypatch.setattr(shutil, "which", lambda name, *args, **kwargs: f"/bin/{name}")
        assert run_setup()[1] == ["asga._C", "asga._C_cuda"]
        monkeypatch.setenv("ASGA_CUDA", "skip")
        assert run_setup()[1] == ["asga._C"]
        monkeypatch.setenv("ASGA_CPU", "skip")
        assert run_setup()[1] == []

    def test_builds_nothing_without_compilers_and_says_so(self, run_setup, no_compilers, capsys):
        assert run_setup()[1] == []
        said = capsys.readouterr().err
        assert "no C++ compiler found" in said
        assert "no nvcc found" in said

    @pytest.mark.parametrize(("variable", "tool"), [("ASGA_CUDA", "nvcc"), ("ASGA_CPU", "C[+][+] compiler")])
    def test_force_without_the_compiler_fails(self, variable, tool, run_setup, no_compilers, monkeypatch):
        monkeypatch.setenv(variable, "force")
        with pytest.raises(SystemExit, match=f"{variable}=force, but {tool} was not found"):
            run_setup()

    @pytest.mark.parametrize("variable", ["ASGA_CUDA", "ASGA_CPU"])
    def test_any_other_setting_is_refused(self, variable, run_setup, monkeypatch):
        monkeypatch.setenv(variable, "yes")
        with pytest.raises(SystemExit, match=f"{variable} is 'yes'; it must be auto, force or skip"):
            run_setup()

    def test_nvcc_is_found_by_cuda_home_before_path(self, run_setup, monkeypatch, tmp_path):
        nvcc = tmp_path / "bin" / "nvcc"
        nvcc.parent.mkdir()
        nvcc.touch()
        monkeypatch.setenv("CUDA_HOME", str(tmp_path))
        assert run_setup()[0]["find_nvcc"]() == str(nvcc)

    def test_architectures_follow_torch_cuda_arch_list(self, run_setup, monkeypatch):
        flags = run_setup()[0]["cuda_architecture_flags"]
        assert [flag for flag in flags() if "code=compute_" in flag] == ["-gencode=arch=compute_120,code=compute_120"]
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0;9.0a+PTX")
        assert flags() == [
            "-gencode=arch=compute_80,code=sm_80",
            "-gencode=arch=compute_90a,code=sm_90a",
            "-gencode=arch=compute_90a,code=compute_90a",
        ]

    @pytest.mark.parametrize(
        ("known", "expected"),
        [
            ("compute_75 compute_80 compute_90", "7.5 8.0 9.0+PTX"),
            ("compute_75 compute_80 compute_90 compute_100 compute_110 compute_120", "7.5 8.0 9.0 10.0 12.0+PTX"),
            ("", "7.5 8.0 9.0 10.0 12.0+PTX"),
        ],
        ids=["older nvcc", "newer nvcc", "one that does not say"],
    )
    def test_the_usual_architectures_are_those_that_nvcc_knows(self, run_setup, tmp_path, monkeypatch, known, expected):
        self._fake_nvcc(tmp_path, monkeypatch, f"echo {known}")
        assert run_setup()[0]["default_architectures"]() == expected

    @pytest.mark.parametrize(
        ("of_torch", "built"), [("13.2", True), (None, True), ("12.8", False)], ids=["same", "none", "other"]
    )
    def test_an_nvcc_of_another_cuda_than_torch_is_left_out(
        self, run_setup, tmp_path, monkeypatch, capsys, of_torch, built
    ):
        self._fake_nvcc(tmp_path, monkeypatch, "echo Cuda compilation tools, release 13.0, V13.0.88")
        monkeypatch.setattr(torch.version, "cuda", of_torch)
        assert ("asga._C_cuda" in run_setup()[1]) is built
        assert ("nvcc is of CUDA 13.0, torch of 12.8, building without" in capsys.readouterr().err) is not built
        monkeypatch.setenv("ASGA_CUDA", "force")
        assert "asga._C_cuda" in run_setup()[1]

    def _fake_nvcc(self, folder: Path, monkeypatch, script: str) -> None:
        nvcc = folder / "nvcc"
        nvcc.write_text(f"#!/bin/sh\n{script}\n")
        nvcc.chmod(0o755)
        monkeypatch.setattr(shutil, "which", lambda name, *args, **kwargs: str(nvcc) if name == "nvcc" else None)

    @pytest.mark.parametrize("entry", ["Ampere", "sm_80", "+PTX"])
    def test_an_architecture_of_another_form_is_refused(self, entry, run_setup, monkeypatch):
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", f"8.0 {entry}")
        with pytest.raises(SystemExit, match=f"TORCH_CUDA_ARCH_LIST has '{re.escape(entry)}'"):
            run_setup()[0]["cuda_architecture_flags"]()


@pytest.mark.skipif(shutil.which("make") is None, reason="there is no make")
class TestSanitizeCuda:
    """What `make sanitize-cuda` does before it builds anything."""

    @pytest.fixture
    def run_make(self, tmp_path):
        """Run it with nothing on PATH but what the Makefile needs and stubs of the programs that are named."""

        def run(**stubs: str) -> subprocess.CompletedProcess:
            for tool in ("make", "sh", "find", "grep", "sed"):
                (tmp_path / tool).symlink_to(shutil.which(tool))
            for name, script in stubs.items():
                (tmp_path / name.replace("_", "-")).write_text(f"#!/bin/sh\n{script}\n")
                (tmp_path / name.replace("_", "-")).chmod(0o755)
            command = ["make", "-C", ROOT, "sanitize-cuda"]
            return subprocess.run(command, env={"PATH": str(tmp_path)}, capture_output=True, text=True)

        return run

    def test_fails_without_compute_sanitizer(self, run_make):
        done = run_make()
        assert done.returncode != 0
        assert "compute-sanitizer is not on PATH; it comes with the CUDA toolkit" in done.stderr

    @pytest.mark.parametrize(
        "stubs", [{}, {"nvidia_smi": "echo No devices were found; exit 6"}], ids=["none", "no GPU"]
    )
    def test_fails_without_a_gpu(self, run_make, stubs):
        done = run_make(compute_sanitizer="exit 0", **stubs)
        assert done.returncode != 0
        assert "nvidia-smi finds no GPU; compute-sanitizer needs one" in done.stderr


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """The folder with what `python -m build --no-isolation` makes: an sdist of the tree, a wheel of that sdist."""
    folder = tmp_path_factory.mktemp("build")
    return _build(_export(folder / "tree"), folder / "dist", ASGA_CPU="force", ASGA_CUDA="skip")


@pytest.fixture(scope="module")
def wheel(built) -> Path:
    (wheel,) = built.glob("*.whl")
    return wheel


@needs_compiler
class TestDistributions:
    def test_the_sdist_holds_what_building_and_testing_need(self, built):
        tree = built.parent / "tree"
        (sdist,) = built.glob("*.tar.gz")
        with tarfile.open(sdist) as archive:
            held = {name.partition("/")[2] for name in archive.getnames()}
        for folder, kinds in {"csrc": ("*.cpp", "*.cu", "*.h"), "kernels": ("*.py",), "tests": ("*.py",)}.items():
            files = {str(path.relative_to(tree)) for kind in kinds for path in (tree / folder).rglob(kind)}
            assert files
            assert files <= held
        assert {"setup.py", "pyproject.toml", "Makefile", "LICENSE", "README.md", "CITATION.cff"} <= held
        assert [name for name in held if name.endswith((".so", ".pyc", ".o"))] == []

    def test_one_wheel_serves_every_python_from_3_10(self, wheel):
        assert re.fullmatch(rf"asga-{re.escape(asga.__version__)}-cp310-abi3-linux_\w+\.whl", wheel.name)
        with zipfile.ZipFile(wheel) as archive:
            names = archive.namelist()
        assert [name for name in names if name.endswith(".so")] == ["asga/_C.abi3.so"]
        assert {"asga/py.typed", "asga/kernels/fake_quant.py", "asga/kernels/mixed_fake_quant.py"} <= set(names)
        assert {name.partition("/")[0] for name in names} == {"asga", f"asga-{asga.__version__}.dist-info"}

    def test_works_in_a_fresh_environment(self, wheel, run_python, tmp_path):
        python = _environment_with_this_torch(tmp_path / "venv")
        pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-index", "--no-deps"]
        subprocess.run([*pip, wheel], check=True, cwd=tmp_path)
        where, values = run_python(SMOKE, python=python, cwd=tmp_path).split(maxsplit=1)
        assert Path(where).is_relative_to(tmp_path / "venv")
        assert values == f"cpu {SMOKE_VALUES}"
        assert (Path(where).parent / "kernels" / "fake_quant.py").is_file()
        assert (python.parent / "asga").is_file()  # the command
        self.check_benchmarks(python, run_python, tmp_path)

    @staticmethod
    def check_benchmarks(python: Path, run_python, folder: Path) -> None:
        """They run from the package that is installed, without the repository."""
        arguments = ["bench", "--quick", "--no-compile", "--rounds", "1", "--device", "cpu"]
        arguments += ["--only", "sweep/act-1024/k1/float32", "--json", "out.json"]
        code = f"import asga.bench; from asga.cli import main; print(asga.bench.__file__, main({arguments}))"
        *_, last = run_python(code, python=python, cwd=folder).splitlines()
        where, status = last.split()
        assert Path(where).is_relative_to(folder / "venv")
        assert status == "0"
        (result,) = json.loads((folder / "out.json").read_text())["results"]
        assert result["timings"]["asga"]["rounds"] == 1
        if importlib.util.find_spec("matplotlib") is not None:
            assert (folder / "out.png").is_file()

    def test_without_a_compiler_the_wheel_is_pure_and_the_operators_work(self, run_python, tmp_path):
        tree = _export(tmp_path / "tree")
        (tree / "asga" / "_C.abi3.so").write_text("left behind by an editable installation")
        dist = _build(tree, tmp_path / "dist", "--wheel", ASGA_CPU="skip", ASGA_CUDA="skip")
        (wheel,) = dist.glob("*.whl")
        assert wheel.name.endswith("-py3-none-any.whl")
        with zipfile.ZipFile(wheel) as archive:
            assert [name for name in archive.namelist() if name.endswith(".so")] == []
            archive.extractall(tmp_path / "site")
        # The finder of an editable installation would offer that one's asga._C.
        alone = "import sys; sys.meta_path[:] = [f for f in sys.meta_path if 'editable' not in f.__module__]\n"
        where, values = run_python(alone + SMOKE, cwd=tmp_path, PYTHONPATH=str(tmp_path / "site")).split(maxsplit=1)
        assert Path(where).is_relative_to(tmp_path / "site")
        assert values == f"reference {SMOKE_VALUES}"


def _export(tree: Path) -> Path:
    """A copy of the repository without anything that was built in it."""
    built = (".git", ".venv", "build", "dist", "runs", "shared", "*.so", "*.egg-info", "__pycache__", ".*_cache")
    shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(*built))
    return tree


def _build(tree: Path, dist: Path, *arguments: str, **env: str) -> Path:
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(dist), *arguments, str(tree)]
    # Not from within the repository: its folder build/ has the name of the module.
    done = subprocess.run(command, cwd=tree.parent, env={**os.environ, **env}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return dist


def _environment_with_this_torch(folder: Path) -> Path:
    """A virtual environment that sees the packages of this one, but runs none of its .pth files.

    So it sees torch, and not the editable installation of this package. Returns its Python.
    """
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    site = Path(sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)}))
    (site / "outer.pth").write_text("\n".join(path for path in sys.path if path.endswith("-packages")))
    return folder / "bin" / "python"
