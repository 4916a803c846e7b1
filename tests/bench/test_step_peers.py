import pytest
import torch

from asga.bench import step_peers, steps
from asga.bench.step_peers import build_steppers, count_calls
from asga.bench.steps import StepCase, Stepper

SHAPES = ((40, 30), (40,), (7, 40))
SMALL = StepCase("small", SHAPES)
METHODS = [StepCase("small", SHAPES, variant=variant, base=base) for variant, base in steps.METHODS]
PEERS = {"pytorch_optimizer", "pytorch_optimizer, fused base"}


@pytest.fixture
def eager_compiler(monkeypatch):
    """torch.compile as it would be if it compiled nothing."""
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)


@pytest.mark.parametrize("together", [1, 2, 16])
@pytest.mark.parametrize("case", METHODS, ids=[case.name for case in METHODS])
def test_all_make_the_same_step(eager_compiler, monkeypatch, case, together):
    monkeypatch.setattr(step_peers, "_COMPILED_TOGETHER", together)
    found, left_out = build_steppers(case, "cpu")
    names = [stepper.name for stepper in found]
    assert names[:4] == ["asga", "eager", "foreach", "torch.compile"]
    assert set(names) | set(left_out) == {*names[:4], *PEERS}
    assert set(left_out.values()) <= {"not installed"}


@pytest.mark.parametrize("case", METHODS, ids=[case.name for case in METHODS])
def test_the_passes_of_asga_make_its_step(case):
    """What is timed as pass A and pass B is what is timed as the step."""
    whole, apart = (step_peers._asga(step_peers.Tensors(case, "cpu")) for _ in range(2))
    before = [w.detach().clone() for w in apart.weights]
    for _ in range(3):
        whole.run["step"]()
        apart.run["pass A"]()
        apart.run["pass B"]()
    assert all(torch.equal(a, b) for a, b in zip(whole.weights, apart.weights, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(apart.weights, before, strict=True))


def test_torch_compile_is_left_out_on_request():
    found, left_out = build_steppers(SMALL, "cpu", compiled=False)
    assert "torch.compile" not in {stepper.name for stepper in found} | set(left_out)


def test_one_that_makes_another_step_is_left_out(monkeypatch):
    def idle(tensors):
        return Stepper("foreach", {"step": lambda: None}, list(tensors.params))

    monkeypatch.setitem(step_peers._BUILDERS, "foreach", idle)
    found, left_out = build_steppers(SMALL, "cpu", compiled=False)
    assert "foreach" not in [stepper.name for stepper in found]
    assert "makes another step" in left_out["foreach"]


@pytest.mark.parametrize("case", METHODS, ids=[case.name for case in METHODS])
def test_what_is_declared_is_what_is_counted(case):
    moved, calls = count_calls(case)
    # The mark of a perturbation is a tensor of one value, read and written, and so is its backup.
    assert moved == case.traffic("step") + 4 * 4
    assert calls == {"gsam": 6, "sam": 5}[case.variant]
