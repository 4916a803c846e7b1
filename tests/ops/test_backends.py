"""Choosing a backend, saying which one serves, and saying so when there is none but the reference."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from asga.ops import backend, backends, fake_quant, get_backend, reference, set_backend
from asga.ops.library import OPERATORS

without_cuda = pytest.mark.skipif(torch.version.cuda is not None, reason="this torch has CUDA")
with_cpu_kernels = pytest.mark.skipif(backends.unavailable("cpu") is not None, reason="no CPU kernels here")

SMALL = "torch.tensor([0.1, 0.6, 9.0], requires_grad=True), torch.tensor([0.5])"
USE = f"asga.ops.fake_quant({SMALL}, quant_min=-2, quant_max=1).sum().backward()"


@pytest.fixture(autouse=True)
def _default_backend():
    """The tests start from the default and leave the choice of the session as it was."""
    with backend(None):
        yield


@pytest.fixture
def calls(monkeypatch) -> list[str]:
    """The operators that ran in the reference since its backend was chosen."""
    made = []

    def spy(name):
        run = getattr(reference, name)
        return lambda *args: (made.append(name), run(*args))[1]

    for name in OPERATORS:
        monkeypatch.setattr(reference, name, spy(name))
    return made


def _use_all_operators() -> None:
    x = torch.tensor([0.1, 0.6, 9.0], requires_grad=True)
    one, two = torch.tensor([0.5]), torch.tensor([0.5, 0.25])
    fake_quant(x, one, quant_min=-2, quant_max=1).sum().backward()
    torch.ops.asga.mixed_fake_quant(x, two, two, None, [-2, -4], [1, 3], None).sum().backward()


class TestChoosing:
    def test_the_reference_runs_when_it_is_chosen(self, calls):
        set_backend("reference")
        assert get_backend() == "reference"
        _use_all_operators()
        assert sorted(calls) == sorted(OPERATORS)

    @with_cpu_kernels
    @pytest.mark.parametrize("name", [None, "cpu"], ids=str)
    def test_the_kernels_run_by_default_and_when_they_are_chosen(self, name, calls):
        set_backend("reference")
        set_backend(name)
        assert get_backend() == name
        _use_all_operators()
        assert calls == []

    def test_threads_may_choose_at_the_same_time(self):
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(set_backend, ["reference", None] * 50))
        set_backend(None)
        _use_all_operators()

    def test_a_block_ends_with_the_choice_it_started_from(self, calls):
        set_backend("reference")
        with backend(None):
            assert get_backend() is None
            with backend("reference"):
                assert get_backend() == "reference"
            assert get_backend() is None
        assert get_backend() == "reference"
        _use_all_operators()
        assert sorted(calls) == sorted(OPERATORS)

    def test_a_block_that_raises_ends_like_any_other(self):
        with pytest.raises(KeyError, match="inside"), backend("reference"):
            raise KeyError("inside")
        assert get_backend() is None

    def test_an_unknown_name_is_refused(self):
        set_backend("reference")
        with pytest.raises(ValueError, match=r"'metal'.*cuda, triton, cpu, reference"):
            set_backend("metal")
        assert get_backend() == "reference"

    @without_cuda
    def test_a_backend_that_is_not_there_is_refused_with_the_reason(self, monkeypatch):
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
        set_backend("reference")
        for name in ("cuda", "triton"):
            reason = backends.unavailable(name)
            with pytest.raises(RuntimeError, match=f"'{name}' is not available: {reason}"):
                set_backend(name)
        assert get_backend() == "reference"


class TestEnvironmentVariable:
    def test_chooses_at_import(self, run_python):
        code = "import asga; print(asga.get_backend(), asga.ops.backends.serving('cpu'))"
        assert run_python(code, ASGA_BACKEND="reference") == "reference reference"
        assert run_python(code, ASGA_BACKEND="").startswith("None ")

    def test_an_unknown_name_stops_the_import(self, run_python):
        code = """if True:
            try:
                import asga
            except ValueError as error:
                print(error)
        """
        assert "'metal'" in run_python(code, ASGA_BACKEND="metal")

    @without_cuda
    def test_interpreted_triton_serves_cpu_tensors(self, run_python):
        pytest.importorskip("triton")
        code = f"""import asga, torch, sys
{USE}
print(asga.ops.backends.serving("cpu"), "asga.kernels.fake_quant" in sys.modules)"""
        assert run_python(code, ASGA_BACKEND="triton", TRITON_INTERPRET="1") == "triton True"


class TestServing:
    @pytest.mark.parametrize(
        ("chosen", "missing", "triton", "expected"),
        [
            (None, (), True, {"cpu": "cpu", "cuda": "cuda", "mps": "reference"}),
            (None, ("cpu",), True, {"cpu": "reference", "cuda": "cuda"}),
            (None, ("cuda",), True, {"cpu": "cpu", "cuda": "triton"}),
            (None, ("cpu", "cuda"), False, {"cpu": "reference", "cuda": "reference"}),
            ("reference", (), True, {"cpu": "reference", "cuda": "reference"}),
            ("triton", (), True, {"cpu": "cpu", "cuda": "triton"}),
            ("cpu", ("cuda",), True, {"cpu": "cpu", "cuda": "triton"}),
        ],
        ids=[
            "default",
            "no CPU kernels",
            "no CUDA kernels",
            "nothing",
            "reference chosen",
            "triton chosen",
            "cpu chosen",
        ],
    )
    def test_is_the_fastest_that_is_there(self, chosen, missing, triton, expected, monkeypatch):
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
        monkeypatch.setattr(backends, "_chosen", chosen)
        for device in ("cpu", "cuda"):
            monkeypatch.setitem(backends._library_errors, device, "left out" if device in missing else None)
        monkeypatch.setattr(backends, "_triton_missing", lambda: None if triton else "not installed")
        assert {device: backends.serving(device) for device in expected} == expected

    @without_cuda
    def test_reasons(self, monkeypatch):
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
        assert backends.unavailable("reference") is None
        assert backends.unavailable("cuda") == "this build of torch has no CUDA"
        assert "no CUDA" in backends.unavailable("triton") or "not installed" in backends.unavailable("triton")


# How the CPU library can be out of reach: a preamble for the process, and what the reason must say.
_UNREACHABLE = {
    "missing": ("import sys; sys.modules['asga._C'] = None", "installed without a C++ compiler"),
    "broken": (
        """
import importlib.machinery, sys
class Broken:
    def find_spec(self, name, path=None, target=None):
        return importlib.machinery.ModuleSpec(name, self) if name == "asga._C" else None
    def create_module(self, spec):
        return None
    def exec_module(self, module):
        raise ImportError("undefined symbol: aoti_torch_new")
sys.meta_path.insert(0, Broken())
""",
        "asga._C does not load: undefined symbol: aoti_torch_new",
    ),
}


@pytest.mark.parametrize(("preamble", "reason"), _UNREACHABLE.values(), ids=_UNREACHABLE)
def test_without_kernels_the_reference_serves_and_says_so_once(preamble, reason, run_python):
    code = f"""{preamble}
import warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import asga, torch
    with asga.backend("reference"):
        {USE}
    assert not caught, "chosen by hand, it is no fallback"
    for _ in range(3):
        {USE}
print(len(caught), caught[0].category.__name__, caught[0].message)
print(asga.ops.backends.serving("cpu"))
try:
    asga.set_backend("cpu")
except RuntimeError as error:
    print(error)
"""
    announced, serving, refused = run_python(code).splitlines()
    assert announced.startswith("1 UserWarning asga runs in plain torch on cpu")
    assert reason in announced
    assert serving == "reference"
    assert reason in refused
