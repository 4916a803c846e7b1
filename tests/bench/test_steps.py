import pytest

from asga.bench import steps
from asga.bench.runner import Config, plan, run
from asga.bench.steps import StepCase, select_steps


class TestCases:
    @pytest.mark.parametrize(
        ("network", "tensors", "values"),
        # As torchvision and timm have them.
        [("resnet18", 62, 11_689_512), ("resnet50", 161, 25_557_032), ("vit_b", 152, 86_567_656)],
    )
    def test_have_the_parameters_of_the_networks(self, network, tensors, values):
        (case,) = select_steps([f"step/{network}/gsam-sgd/*"], "cpu")
        assert len(case.shapes) == tensors
        assert case.nbytes == 4 * values

    def test_the_largest_is_for_gpus(self):
        assert "gpt_1b3" not in [case.network for case in select_steps(["step/*"], "cpu")]
        (case,) = select_steps(["step/gpt*/gsam-sgd/*"], "cuda")
        assert 1.3e9 < case.nbytes / 4 < 1.45e9


def test_a_run_gives_results_for_every_pass(monkeypatch):
    small = StepCase("small", ((40, 30), (40,), (7, 40)))
    monkeypatch.setattr(steps, "_cases", lambda: iter([small]))
    config = Config(only=("step/*",), rounds=3, sample_seconds=1e-4, case_seconds=5.0, compiled=False)
    assert [case.name for case, _ in plan(config)] == [small.name]
    results = list(run(config))
    assert [result.passes for result in results] == list(steps.PASSES)
    assert all({"asga", "eager", "foreach", "copy"} <= set(result.timings) for result in results)
    assert results[2].to_dict()["best_peer"] is not None
    assert all(result.bandwidth("asga") > 0 for result in results)
