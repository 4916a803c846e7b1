"""The study of frontiers, on a few digits."""

import json
import re
import statistics

import pytest

from asga.bench import frontier_study, transfer_study


@pytest.mark.filterwarnings("ignore:the policy is not better than uniform bits")
def test_points_stand_beside_searches_of_their_own(tmp_path, monkeypatch, capsys):
    for name in ("_FLOAT_EPOCHS", "_SEARCH_EPOCHS", "_TRANSFER_EPOCHS"):
        monkeypatch.setattr(transfer_study, name, 1)
    monkeypatch.setattr(transfer_study, "_BATCH", 20)

    def study(*seeds: str) -> dict[str, object]:
        data = ["--proxy", "digits", "--target", "digits", "--limit", "40", "--precision", "float32"]
        grid = ["--budgets", "w3a3", "w4a4", "--trained", "w3a3", "--seeds", *seeds]
        frontier_study.main([*data, "--out", str(tmp_path), *grid])
        return json.loads((tmp_path / "frontier.json").read_text())

    found = study("0")
    trained, larger = found["points"]
    assert trained["distance"] == 0
    assert trained["resolved"]["policy"] == trained["own"]["policy"]
    assert trained["resolved"]["loss"] == trained["own"]["loss"]
    assert larger["distance"] > 0
    assert all(0.9 < point[side]["budget_share"] <= 1 for point in (trained, larger) for side in ("resolved", "own"))
    assert trained["own_seconds"] == found["seconds_of_one_search"] > 0
    assert "the same policies" in (tmp_path / "frontier.md").read_text()
    assert capsys.readouterr().out.count("on the target") in (2, 3)  # of the trained budget once
    assert study("0")["points"] == found["points"]
    assert capsys.readouterr().out == ""  # nothing was trained again
    both = study("0", "1")
    assert both["points"][:2] == found["points"]
    assert [(point["seed"], point["budget"]) for point in both["points"][2:]] == [(1, "w3a3"), (1, "w4a4")]
    losses = [point["resolved"]["loss"] for point in both["points"] if point["budget"] == "w4a4"]
    row = (tmp_path / "frontier.md").read_text().splitlines()[3]
    assert f"| 2 | {statistics.fmean(losses):.4f} ± {statistics.stdev(losses):.4f} |" in re.sub(
        r"[\d.]+ ± [\d.]+ % \| ", "", row
    )
