"""``asga bench``."""

import dataclasses
import json
import sys

import pytest

from asga.bench import runner
from asga.bench.runner import Result, Timing
from asga.cli import main

TIMINGS = {name: Timing(name, False, None, 3, (1e-3,) * 3, (1.0,) * 3, 0, None, None) for name in ("asga", "copy")}
RESULT = Result("core/act-1024/k1/float32", 4096, "steady", "forward", 8192, TIMINGS, {})


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
    arguments += ["--json", str(files[0])]
    shown = run_python(f"from asga.cli import main; assert main({arguments!r}) == 0")
    assert "[1/1] sweep/act-1024/k1/float32" in shown
    assert "best peer" in shown
    (result,) = json.loads(files[0].read_text())["results"]
    assert result["timings"]["asga"]["rounds"] == 3
    assert "torch.compile" not in result["timings"]
    assert files[1].read_bytes().startswith(b"\x89PNG")


def test_what_was_measured_before_an_interrupt_is_kept(monkeypatch, capsys, tmp_path):
    def interrupted(config, progress):
        yield RESULT
        raise KeyboardInterrupt

    monkeypatch.setattr(runner, "run", interrupted)
    assert main(["bench", "--device", "cpu", "--json", str(tmp_path / "out.json")]) == 130
    assert "core/act-1024/k1/float32" in capsys.readouterr().out
    assert len(json.loads((tmp_path / "out.json").read_text())["results"]) == 1


@pytest.mark.parametrize(
    ("options", "drawn"),
    [
        (["--json", "out.json"], "out.png"),
        (["--json", "out"], "out.png"),
        (["--json", "out.png"], "out.png.png"),
        (["--json", "out.json", "--png", "elsewhere.png"], "elsewhere.png"),
        (["--png", "alone.png"], "alone.png"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_where_the_figure_is_drawn(options, drawn, monkeypatch, tmp_path):
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(runner, "run", lambda config, progress: iter([RESULT]))
    assert main(["bench", "--device", "cpu", *options]) == 0
    files = {path.name for path in tmp_path.iterdir()}
    assert files == {drawn, *(options[1:2] if options[0] == "--json" else [])}
    assert (tmp_path / drawn).read_bytes().startswith(b"\x89PNG")


def test_no_figure_of_what_has_no_bandwidth(monkeypatch, tmp_path):
    search = dataclasses.replace(RESULT, case="search/net/default/float32", traffic=None)
    monkeypatch.setattr(runner, "run", lambda config, progress: iter([search]))
    assert main(["bench", "--device", "cpu", "--only", "search/*", "--json", str(tmp_path / "out.json")]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out.json"]


def test_without_matplotlib_a_line_says_that_there_is_no_figure(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(runner, "run", lambda config, progress: iter([RESULT]))
    assert main(["bench", "--device", "cpu", "--json", str(tmp_path / "out.json")]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "figure" in line]
    assert line.startswith(f"no figure beside {tmp_path / 'out.json'}: matplotlib is not available")
    assert 'pip install "asga[report]"' in line
    assert [path.name for path in tmp_path.iterdir()] == ["out.json"]


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
