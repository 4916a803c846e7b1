"""Builds the compiled libraries; everything else about the package is in pyproject.toml.

Two libraries on LibTorch's stable ABI, so that one binary serves every torch >= 2.10 and every CPython >= 3.10:

- ``asga/_C.abi3.so``: CPU kernels, each compiled for several instruction sets and chosen at run time.
- ``asga/_C_cuda.abi3.so``: CUDA kernels, loaded only where torch has CUDA.

Environment variables:
    ASGA_CPU, ASGA_CUDA: ``auto`` (default: build if the compiler is found, and nvcc is for torch's CUDA), ``force``
        (fail without it), ``skip``.
    TORCH_CUDA_ARCH_LIST: architectures such as ``"8.0 9.0+PTX"``, in place of the usual ones.
    MAX_JOBS: parallel compilations (default: the number of cores).
    CUDA_HOME, CXX: where to look for nvcc first; the C++ compiler.
    ASGA_SANITIZE: ``1`` compiles the CPU library with AddressSanitizer and UBSan, for `make sanitize`. Such a library
        loads only in a process that has loaded libasan first.
"""

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
# The oldest torch whose stable ABI is used: 2.10.
TORCH_TARGET = "-DTORCH_TARGET_VERSION=0x020a000000000000"
# One for each generation: the code for 8.0 also runs on 8.6 and 8.9, that for 10.0 on 10.3. Of these, those that nvcc
# knows, the newest also as PTX for GPUs to come.
DEFAULT_CUDA_ARCHITECTURES = ("7.5", "8.0", "9.0", "10.0", "12.0")
# Contraction off: a fused multiply-add rounds once where the definition of the operators rounds twice.
CXX_FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-Wall", "-Wno-psabi"]
# GCC 12 finds its own intrinsics uninitialized (GCC bug 105593).
CXX_FLAGS += ["-Wno-uninitialized", "-Wno-maybe-uninitialized"]
SANITIZE = os.environ.get("ASGA_SANITIZE") == "1"
SANITIZER_FLAGS = ["-fsanitize=address,undefined"] if SANITIZE else []
if SANITIZE:
    # Less optimization: the checks make the loops long, and reports name the lines of the source.
    CXX_FLAGS += [*SANITIZER_FLAGS, "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer", "-O1", "-g1"]
ISA_FLAGS = {"baseline": []}
if platform.machine().lower() in ("x86_64", "amd64"):
    ISA_FLAGS["avx2"] = ["-mavx2", "-mfma", "-mf16c"]
    ISA_FLAGS["avx512"] = [*ISA_FLAGS["avx2"], "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]
    # Without this the compiler splits 512-bit vectors in two on some processors.
    ISA_FLAGS["avx512"] += ["-mprefer-vector-width=512"]


def mode(variable: str) -> str:
    """The value of ASGA_CPU or ASGA_CUDA, checked."""
    value = os.environ.get(variable, "auto")
    if value not in ("auto", "force", "skip"):
        raise SystemExit(f"{variable} is {value!r}; it must be auto, force or skip")
    return value


def find_cxx() -> str | None:
    """The C++ compiler: $CXX, or the first of the usual names that is there."""
    return shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++") or shutil.which("clang++")


def find_nvcc() -> str | None:
    """Nvcc, found without torch: a CPU build of torch reports no CUDA toolkit even where one is installed."""
    for home in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")):
        if home and (Path(home) / "bin" / "nvcc").exists():
            return str(Path(home) / "bin" / "nvcc")
    return shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")


def asked(nvcc: str, option: str) -> str:
    """What nvcc says of itself; nothing where it cannot be run."""
    try:
        return subprocess.run([nvcc, option], capture_output=True, text=True, check=False).stdout
    except OSError:
        return ""


def other_cuda(nvcc: str) -> str | None:
    """Why what nvcc builds may not run where this torch does, or None: the driver may be too old for it."""
    try:
        import torch
    except ImportError:
        return None
    release = re.search(r"release (\d+)\.(\d+)", asked(nvcc, "--version"))
    if torch.version.cuda is None or release is None or release[1] == torch.version.cuda.split(".")[0]:
        return None
    return f"nvcc is of CUDA {release[1]}.{release[2]}, torch of {torch.version.cuda}"


def chosen(variable: str, tool: str, path: str | None) -> bool:
    """Whether to build the library that `variable` is about, given where its compiler was found."""
    setting = mode(variable)
    if setting == "skip":
        return False
    if path is None and setting == "force":
        raise SystemExit(f"{variable}=force, but {tool} was not found")
    if path is None:
        print(
            f"asga: no {tool} found, building without it; `asga info` shows what serves each operator",
            file=sys.stderr,
        )
    elif tool == "nvcc" and setting == "auto" and (reason := other_cuda(path)):
        print(f"asga: {reason}, building without the CUDA library; ASGA_CUDA=force builds it", file=sys.stderr)
        return False
    return path is not None


def default_architectures() -> str:
    """Those of the usual ones that nvcc knows."""
    known = asked(find_nvcc() or "nvcc", "--list-gpu-arch").split()
    usual = [a for a in DEFAULT_CUDA_ARCHITECTURES if not known or f"compute_{a.replace('.', '')}" in known]
    return " ".join(usual) + "+PTX"


def cuda_architecture_flags() -> list[str]:
    """-gencode flags for TORCH_CUDA_ARCH_LIST, in the format that torch uses: "8.0 9.0a 10.0+PTX"."""
    flags = []
    for entry in (os.environ.get("TORCH_CUDA_ARCH_LIST") or default_architectures()).replace(";", " ").split():
        number = entry.removesuffix("+PTX").replace(".", "")
        if not number.rstrip("af").isdigit():
            raise SystemExit(f"TORCH_CUDA_ARCH_LIST has {entry!r}; architectures look like 8.0, 9.0a or 12.0+PTX")
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if entry.endswith("+PTX"):
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


class BuildLibraries(build_ext):
    """Writes one ninja file for a library and runs it: parallel, and only what changed is compiled again."""

    def build_extension(self, ext: Extension) -> None:
        """Build one of the libraries (called by setuptools)."""
        import torch.utils.cpp_extension as torch_extension

        includes = [f"-I{path}" for path in torch_extension.include_paths()]
        library_dir = Path(torch_extension.TORCH_LIB_PATH)
        # Not self.build_temp: an editable install throws that folder away, and would compile everything each time.
        build_dir = ROOT.resolve() / "build" / (f"{ext.name}-sanitized" if SANITIZE else ext.name)
        build_dir.mkdir(parents=True, exist_ok=True)
        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        output.parent.mkdir(parents=True, exist_ok=True)
        rules = cpu_rules(includes, library_dir) if ext.name == "asga._C" else cuda_rules(includes, library_dir)
        (build_dir / "build.ninja").write_text(ninja_file(rules, output))
        jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
        try:
            subprocess.run([ninja(), "-C", str(build_dir), *jobs], check=True)
        except subprocess.CalledProcessError:
            variable = "ASGA_CPU" if ext.name == "asga._C" else "ASGA_CUDA"
            raise SystemExit(
                f"asga: compiling {ext.name} failed (see above). {variable}=skip installs without it."
            ) from None


def cpu_rules(includes: list[str], library_dir: Path) -> dict:
    """Objects (output, source, command) and the link command of the CPU library."""
    cxx = [find_cxx(), *CXX_FLAGS]
    python = [f"-I{sysconfig.get_path('include')}", "-DPy_LIMITED_API=0x030a0000"]
    objects = []
    for source in sorted(ROOT.glob("csrc/*.cpp")):
        objects.append((f"{source.stem}.o", source.relative_to(ROOT), [*cxx, *python]))
    for source in sorted(ROOT.glob("csrc/cpu/*.cpp")):
        objects.append((f"{source.stem}.o", source.relative_to(ROOT), [*cxx, TORCH_TARGET, *includes]))
    for source in sorted(ROOT.glob("csrc/cpu/vectorized/*.cpp")):
        for isa, flags in ISA_FLAGS.items():
            command = [*cxx, *flags, f"-DASGA_ISA={isa}"]
            objects.append((f"{source.stem}.{isa}.o", source.relative_to(ROOT), command))
    link = [find_cxx(), "-shared", *SANITIZER_FLAGS, f"-L{library_dir}", "-Wl,--as-needed", "-ltorch_cpu"]
    return {"objects": objects, "link": link}


def cuda_rules(includes: list[str], library_dir: Path) -> dict:
    """Objects and the link command of the CUDA library; it also builds where torch itself has no CUDA."""
    nvcc = [find_nvcc(), "-std=c++17", "-O3", "--fmad=false", "-Xcompiler=-fPIC,-fvisibility=hidden"]
    nvcc += ["--threads=2", "-Xfatbin=-compress-all", *cuda_architecture_flags(), TORCH_TARGET, "-DUSE_CUDA", *includes]
    objects = [(f"{source.stem}.o", source.relative_to(ROOT), nvcc) for source in sorted(ROOT.glob("csrc/cuda/*.cu"))]
    link = [find_nvcc(), "-shared", *cuda_architecture_flags(), "-cudart=static", f"-L{library_dir}", "-ltorch_cpu"]
    return {"objects": objects, "link": link, "needs_libtorch_cuda": True}


def ninja_file(rules: dict, output: Path) -> str:
    """The text of the build file. Paths in it are absolute: ninja runs in the build folder."""
    lines = [
        "rule compile",
        "  command = $cmd -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
    ]
    lines += ["rule link", "  command = $cmd"]
    objects = []
    for name, source, command in rules["objects"]:
        lines += [
            f"build {name}: compile {ninja_escape(ROOT.resolve() / source)}",
            f"  cmd = {shlex.join(command)}",
        ]
        objects.append(name)
    link, stub = rules["link"], ""
    compiler, *flags = link
    if rules.get("needs_libtorch_cuda"):
        # The library must name libtorch_cuda.so as needed, for the current stream. A CPU build of torch has none: an
        # empty library of that name stands in at link time, and torch's own is found when the library is loaded.
        stub = "libtorch_cuda.so"
        stub_command = [
            find_cxx() or "c++",
            "-shared",
            "-x",
            "c++",
            "/dev/null",
            "-o",
            stub,
            f"-Wl,-soname,{stub}",
        ]
        lines += [f"build {stub}: link", f"  cmd = {shlex.join(stub_command)}"]
        # Some compilers drop libraries that provide no symbol; this one, being empty, provides none.
        flags = [*flags, "-L.", "-Xlinker=--no-as-needed", "-ltorch_cuda"]
    command = shlex.join([compiler, "-o", str(output), *objects, *flags])
    lines += [
        f"build {ninja_escape(output)}: link {' '.join(objects)} {stub and '| ' + stub}",
        f"  cmd = {command}",
        f"default {ninja_escape(output)}",
    ]
    return "\n".join(lines) + "\n"


def ninja_escape(path: Path) -> str:
    """A path as ninja's syntax needs it."""
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def ninja() -> str:
    """The ninja program: on PATH, or the one of the Python package (its scripts folder may not be on PATH)."""
    found = shutil.which("ninja")
    if found:
        return found
    try:
        from ninja import BIN_DIR
    except ImportError:
        raise SystemExit("asga: ninja was not found; pip install ninja") from None
    return str(Path(BIN_DIR) / "ninja")


extensions = []
if chosen("ASGA_CPU", "C++ compiler", find_cxx()):
    extensions.append(Extension("asga._C", ["csrc/module.cpp"], py_limited_api=True))
if chosen("ASGA_CUDA", "nvcc", find_nvcc()):
    extensions.append(Extension("asga._C_cuda", sorted(map(str, Path("csrc/cuda").glob("*.cu"))), py_limited_api=True))

setup(
    ext_modules=extensions,
    cmdclass={"build_ext": BuildLibraries},
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if extensions else {},
)
