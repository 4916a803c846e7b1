import pytest
import torch

from asga.bench import step_peers
from asga.bench.step_peers import build_steppers, count_calls
from asga.bench.steps import StepCase, Stepper

SMALL = StepCase("small", ((40, 30), (40,), (7, 40)))


@pytest.fixture
def eager_compiler(monkeypatch):
    """torch.compile as it would be if it compiled nothing."""
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)


@pytest.mark.parametrize("together", [1, 2, 16])
def test_all_make_the_same_step(eager_compiler, monkeypatch, together):
    monkeypatch.setattr(step_peers, "_COMPILED_TOGETHER", together)
    found, left_out = build_steppers(SMALL, "cpu")
    names = [stepper.name for stepper in found]
    assert names[:4] == ["asga", "eager", "foreach", "torch.compile"]
    assert set(names) | set(left_out) == {*names[:4], "pytorch_optimizer"}
    assert set(left_out.values()) <= {"not installed"}


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


def test_what_is_declared_is_what_is_counted():
    moved, calls = count_calls(SMALL)
    # The mark of a perturbation is a tensor of one value, read and written, and so is its backup.
    assert moved == SMALL.traffic("step") + 4 * 4
    assert calls == 6
