import json
import signal

import pytest

from asga.cli import demo
from asga.cli.console import Console

ARGUMENTS = ("demo", "--seeds", 2, "--out", "run")


@pytest.fixture
def short(monkeypatch):
    """One epoch of everything, on few images, with a tiny model."""
    for name in ("_PROXY_FLOAT_EPOCHS", "_SEARCH_EPOCHS", "_TARGET_FLOAT_EPOCHS", "_TRANSFER_EPOCHS"):
        monkeypatch.setattr(demo, name, 1)
    monkeypatch.setattr(demo, "_MODEL", "asga_test_factory:net")
    monkeypatch.setattr(demo, "_PROXY_IMAGES", 20)
    opened = demo.open_dataset
    monkeypatch.setattr(demo, "open_dataset", lambda *a, **options: opened(*a, **{"limit": 64, **options}))


def test_stopped_and_resumed(run, short, monkeypatch, tmp_path):
    show = Console.progress

    def interrupt(self, state):
        show(self, state)
        if state.stage == "uniform/seed0":
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(Console, "progress", interrupt)
        assert run(*ARGUMENTS)[0] == 130
    status, out, err = run(*ARGUMENTS, "--resume")
    assert (status, err) == (0, "")
    assert "top-1 on all ten classes at 16x16 over 2 seeds" in out
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert [row["name"] for row in result["table"]] == ["float", "uniform w4a4", "searched"]
    assert [row["seeds"] for row in result["table"]] == [2, 2, 2]
    assert result["table"][2]["bitops_share"] <= 1
    assert result["cost_shares"]["policy"]["bitops"] <= 1
    # The time before the stop, too.
    lines = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    assert result["seconds"] == pytest.approx(sum(line["seconds"] for line in lines if line["event"] == "epoch"))
    assert {"policy.json", "search-seed0.json", "search-seed1.json"} <= {p.name for p in (tmp_path / "run").iterdir()}


def test_seeds(fails, tmp_path):
    assert "--seeds is 0; it must be at least 1" in fails("demo", "--seeds", 0, "--out", "run")
    assert not (tmp_path / "run").exists()
