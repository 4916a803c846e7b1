import pytest
import torch

from asga.bench import steps
from asga.bench.runner import Config, plan, run
from asga.bench.steps import StepCase, build_steppers, count_calls, select_steps

SMALL = StepCase("small", ((40, 30), (40,), (7, 40)))


class TestCases:
    @pytest.mark.parametrize(
        ("network", "tensors", "values"),
        # As torchvision and timm have them.
        [("resnet18", 62, 11_689_512), ("resnet50", 161, 25_557_032), ("vit_b", 152, 86_567_656)],
    )
    def test_have_the_parameters_of_the_networks(self, network, tensors, values):
        (case,) = select_steps([f"step/{network}/*"], "cpu")
        assert len(case.shapes) == tensors
        assert case.nbytes == 4 * values

    def test_the_largest_is_for_gpus(self):
        assert "gpt_1b3" not in [case.network for case in select_steps(["step/*"], "cpu")]
        (case,) = select_steps(["step/gpt*"], "cuda")
        assert 1.3e9 < case.nbytes / 4 < 1.45e9


class TestSteppers:
    def test_all_make_the_same_step(self):
        found, left_out = build_steppers(SMALL, "cpu", compiled=False)
        names = [stepper.name for stepper in found]
        assert names[:3] == ["asga", "eager", "foreach"]
        assert set(names) | set(left_out) == {"asga", "eager", "foreach", "pytorch_optimizer"}
        assert set(left_out.values()) <= {"not installed"}

    def test_one_that_makes_another_step_is_left_out(self, monkeypatch):
        def idle(tensors):
            return steps.Stepper("foreach", {"step": lambda: None}, list(tensors.params))

        monkeypatch.setitem(steps._BUILDERS, "foreach", idle)
        found, left_out = build_steppers(SMALL, "cpu", compiled=False)
        assert "foreach" not in [stepper.name for stepper in found]
        assert "makes another step" in left_out["foreach"]

    def test_what_is_declared_is_what_is_counted(self):
        moved, calls = count_calls(SMALL)
        # The mark of a perturbation is a tensor of one value, read and written, and so is its backup.
        assert moved == SMALL.traffic("step") + 4 * 4
        assert calls == 6


def test_a_run_gives_results_for_every_pass(monkeypatch):
    monkeypatch.setattr(steps, "_cases", lambda: iter([SMALL]))
    config = Config(only=("step/*",), rounds=3, sample_seconds=1e-4, case_seconds=5.0, compiled=False)
    assert [case.name for case, _ in plan(config)] == [SMALL.name]
    results = list(run(config))
    assert [result.passes for result in results] == list(steps.PASSES)
    assert all({"asga", "eager", "foreach", "copy"} <= set(result.timings) for result in results)
    assert results[2].to_dict()["best_peer"] is not None
    assert torch.tensor([result.bandwidth("asga") for result in results]).gt(0).all()
