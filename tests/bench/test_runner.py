"""Runs, from the plan to the files."""

import json

import pytest

from asga.bench import runner
from asga.bench.roofline import write_png
from asga.bench.runner import Config, Result, plan, report, run

TINY = Config(("sweep/act-1024/*/float32",), rounds=3, sample_seconds=1e-4, compiled=False)


@pytest.fixture(scope="module")
def results() -> list[Result]:
    with pytest.MonkeyPatch.context() as patch:
        # The allocator of this process serves other tests too.
        patch.setattr(runner, "keep_freed_memory", lambda: None)
        return list(run(TINY))


class TestConfig:
    @pytest.mark.parametrize("name", ["batch_size", "rounds", "sample_seconds", "case_seconds"])
    def test_numbers_must_be_positive(self, name):
        with pytest.raises(ValueError, match=rf"{name} is 0; it must be positive"):
            Config(**{name: 0})

    def test_passes_are_known(self):
        with pytest.raises(ValueError, match="'backward'"):
            Config(passes=("backward",))

    def test_devices_are_known(self):
        with pytest.raises(ValueError, match="device is 'tpu'"):
            Config(device="tpu")

    def test_quick_has_few_cases(self):
        assert len(plan(Config.quick())) <= 8


def test_large_tensors_come_first_on_new_pages(monkeypatch):
    monkeypatch.setattr(runner, "is_glibc", lambda: True)
    steps = plan(Config(("core/act-*/k1/float32", "core/weight-64x64x3x3/k1/float32")))
    assert [(case.shape, condition) for case, condition in steps] == [
        ((64, 64, 56, 56), "fresh"),
        ((64, 64, 56, 56), "steady"),
        ((64, 64, 3, 3), "steady"),
    ]


def test_another_allocator_is_taken_as_it_is(monkeypatch):
    monkeypatch.setattr(runner, "is_glibc", lambda: False)
    assert {condition for _, condition in plan(Config())} == {"system"}


def test_what_does_not_fit_is_left_out(monkeypatch):
    monkeypatch.setattr(runner, "available_memory", lambda: 1000)
    lines = []
    assert list(run(TINY, lines.append)) == []
    assert "sweep/act-1024/k1/float32: left out, needs" in lines[0]


def test_every_implementation_is_timed_as_often(results):
    assert [(result.case, result.passes) for result in results] == [
        (f"sweep/act-1024/{operator}/float32", passes)
        for operator in ("k1", "k5")
        for passes in ("forward", "forward+backward")
    ]
    for result in results:
        assert {"asga", "eager LSQ", "torch learnable", "copy"} <= set(result.timings)
        for timing in result.timings.values():
            low, middle, high = timing.seconds
            assert 0 < low <= middle <= high
            assert timing.rounds == 3
        assert result.timings["asga"].speedup == (1.0, 1.0, 1.0)


def test_forward_needs_no_more_memory_than_its_output(results):
    for result in results:
        assert result.timings["asga"].peak_forward_bytes == result.nbytes


def test_report_is_json_with_everything(results):
    found = json.loads(json.dumps(report(TINY, results), allow_nan=False))
    assert (found["format"], found["version"]) == ("asga.bench", 1)
    assert found["config"]["only"] == ["sweep/act-1024/*/float32"]
    assert {"cpu_model", "cores", "memory_bytes", "libc", "cpu", "versions", "gpus"} <= set(found["machine"])
    assert found["machine"]["versions"]["torch"]
    assert found["machine"]["cpu"]["threads"] >= 1
    result = found["results"][-1]
    assert result["case"] == "sweep/act-1024/k5/float32"
    assert result["traffic"] == 5 * result["nbytes"] == 5 * 4096
    assert result["best_peer"] in result["timings"]
    assert result["ratio_to_best_peer"] == result["timings"][result["best_peer"]]["speedup"]
    assert result["bandwidth"]["asga"] == pytest.approx(result["traffic"] / result["timings"]["asga"]["seconds"][1])


def test_figure(results, tmp_path):
    pytest.importorskip("matplotlib")
    write_png(tmp_path / "roofline.png", results)
    assert (tmp_path / "roofline.png").read_bytes().startswith(b"\x89PNG")


def test_figure_of_nothing(tmp_path):
    pytest.importorskip("matplotlib")
    with pytest.raises(ValueError, match="no results"):
        write_png(tmp_path / "roofline.png", [])
    assert not list(tmp_path.iterdir())
