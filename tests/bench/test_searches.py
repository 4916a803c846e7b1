"""Search steps: all make the same one, and that of asga needs little more memory than a step with fixed bits."""

from dataclasses import replace
from functools import partial

import pytest
import torch

from asga.bench import runner, searches
from asga.bench.measure import peak_memory
from asga.bench.peers import lsq
from asga.bench.runner import Config, plan, run
from asga.bench.searches import (
    FIXED_BITS,
    METHODS,
    SearchCase,
    UnequalStepsError,
    check_steps,
    fixed_bits,
    select_searches,
    start,
)
from asga.bench.table import render

# Few and small images: what is compared here does not depend on their number.
SMALL = {method: SearchCase("resnet20", method, torch.float32, batch=2, side=16, classes=10) for method in METHODS}
methods = pytest.mark.parametrize("method", METHODS)


class TestCases:
    def test_names(self):
        assert [case.name for case in select_searches(["search/*/float32"], "cpu")] == [
            "search/resnet20/asga/float32",
            "search/resnet20/sgd/float32",
        ]

    def test_large_images_are_for_gpus(self):
        assert {case.network for case in select_searches(["search/*"], "cuda")} == {"resnet20", "resnet18"}

    def test_sizes(self):
        (case,) = select_searches(["search/resnet20/sgd/bfloat16"], "cpu")
        # Inputs of the stem, of the stages' convolutions (two of them with a shortcut) and of the head.
        inputs = 3 * 32**2 + 16 * 32**2 * (6 + 2) + 32 * 16**2 * (5 + 2) + 64 * 8**2 * 5 + 64
        norms = 2 * (16 * 7 + 32 * 7 + 64 * 7)
        weights = 272_474 - norms - 10
        assert case.nbytes == 2 * (128 * inputs + weights)


class TestSteps:
    @methods
    def test_are_the_same_in_plain_torch(self, method):
        check_steps(SMALL[method], "cpu")

    @pytest.mark.parametrize(
        ("mistake", "what"),
        [
            (("_ScaledGradient.backward", lambda ctx, grad: (grad, None)), "scales"),
            (("lsq", lambda x, scale, low, high: lsq(x, scale, low, high - 1)), "losses"),
            (("PlainSearch._second_pass", lambda self, inputs, labels, loss, first: first), "weights"),
            (("_ascend", lambda params, grads, rho: None), "weights"),
            (("WEIGHT_DECAY", 0.1), "moves of weights"),
            (("LOGIT_LR", 0.02), "moves of logits"),
        ],
        ids=["factor of the scales", "range", "one pass", "no ascent", "decay", "rate of the logits"],
    )
    def test_another_step_is_noticed(self, monkeypatch, mistake, what):
        name, replacement = mistake
        monkeypatch.setattr(f"asga.bench.edmips.{name}", replacement)
        with pytest.raises(UnequalStepsError, match=rf"{what} differ by"):
            check_steps(SMALL["asga"], "cpu")


@methods
def test_peak_memory_is_that_of_fixed_bits(method):
    """At most 1.15 times: of a mixture only its input is kept, whatever the number of candidates."""
    case = replace(SMALL[method], batch=32, side=32)
    search = start(case, "cpu")
    steps = {"asga": partial(search.step, *case.images("cpu")), FIXED_BITS: fixed_bits(case, "cpu").run["step"]}
    peaks = {}
    for name, step in steps.items():
        step()  # the first one makes what stays: momentum, backups
        peaks[name], _ = peak_memory(step, lambda output: None, torch.device("cpu"))
    assert case.nbytes < peaks["asga"] <= 1.15 * peaks[FIXED_BITS]


def test_a_run_gives_one_result_for_each_case(monkeypatch):
    monkeypatch.setattr(searches, "_cases", lambda: iter([SMALL["sgd"]]))
    monkeypatch.setattr(runner, "keep_freed_memory", lambda: None)
    config = Config(only=("search/*",), rounds=3, sample_seconds=1e-4, case_seconds=5.0, compiled=False)
    assert [case.name for case, _ in plan(config)] == ["search/resnet20/sgd/float32"]
    (result,) = run(config)
    assert (result.passes, result.traffic) == ("step", None)
    assert set(result.timings) == {"asga", "eager", FIXED_BITS, "copy"}
    assert result.best_peer.name == "eager"
    assert result.timings["eager"].peak_step_bytes > 2 * result.timings["asga"].peak_step_bytes
    assert result.to_dict()["bandwidth"]["asga"] is None
    assert f"of {FIXED_BITS})" in render([result])
