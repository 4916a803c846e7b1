"""``asga bench``."""

import json

import pytest

from asga.bench import runner
from asga.bench.runner import Result, Timing
from asga.cli import main


def test_runs_a_case_and_writes_both_files(run_python, tmp_path):
    # In a process of its own: the command changes how its process allocates memory.
    pytest.importorskip("matplotlib")
    files = [tmp_path / "out.json", tmp_path / "out.png"]
    arguments = [
        "bench",
        "--quick",
        "--no-compile",
        "--rounds",
        "3",
        "--device",
        "cpu",
        "--only",
        "sweep/act-1024/k1/*32",
    ]
    arguments += ["--json", str(files[0]), "--png", str(files[1])]
    shown = run_python(f"from asga.cli import main; assert main({arguments!r}) == 0")
    assert "[1/1] sweep/act-1024/k1/float32" in shown
    assert "best peer" in shown
    (result,) = json.loads(files[0].read_text())["results"]
    assert result["timings"]["asga"]["rounds"] == 3
    assert "torch.compile" not in result["timings"]
    assert files[1].read_bytes().startswith(b"\x89PNG")


def test_what_was_measured_before_an_interrupt_is_kept(monkeypatch, capsys, tmp_path):
    timings = {name: Timing(name, False, None, 3, (1e-3,) * 3, (1.0,) * 3, 0, None, None) for name in ("asga", "copy")}

    def interrupted(config, progress):
        yield Result("core/act-1024/k1/float32", 4096, "steady", "forward", 8192, timings, {})
        raise KeyboardInterrupt

    monkeypatch.setattr(runner, "run", interrupted)
    assert main(["bench", "--device", "cpu", "--json", str(tmp_path / "out.json")]) == 130
    assert "core/act-1024/k1/float32" in capsys.readouterr().out
    assert len(json.loads((tmp_path / "out.json").read_text())["results"]) == 1


def test_lists_names(capsys):
    assert main(["bench", "--list", "--device", "cpu", "--batch-size", "8", "--only", "core/act-*/k1/*"]) == 0
    assert capsys.readouterr().out.split() == ["core/act-8x64x56x56/k1/float32", "core/act-8x64x56x56/k1/bfloat16"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "nothing"], "no case matches 'nothing'"),
        (["--rounds", "0"], "rounds is 0; it must be positive"),
        (["--json", "no/such/folder/out.json"], "there is no folder no/such/folder"),
        (["--only", "search/*", "--png", "out.png"], "--png is out.png: it draws bandwidths, and searches have none"),
    ],
    ids=["pattern", "rounds", "folder", "no bandwidth"],
)
def test_bad_options(capsys, arguments, message):
    assert main(["bench", "--device", "cpu", *arguments]) == 1
    assert message in capsys.readouterr().err
