import json

import pytest

from asga.report.run import read_run


def test_epochs_are_grouped_by_stage_and_seed(run_folder):
    run = read_run(run_folder)
    assert {stage: list(seeds) for stage, seeds in run.stages.items()} == {
        "float": [""],
        "search": [""],
        "searched": ["seed0", "seed1"],
    }
    assert [epoch["epoch"] for epoch in run.stages["search"][""]] == [1, 2]
    assert run.last_epoch["stage"] == "searched/seed1"
    assert run.unreadable == 0


@pytest.mark.parametrize("line", ["3", "null", "[]", "{}", '{"event": "epoch", "stage": "float"}', '{"event": "probab'])
def test_lines_that_are_no_records_are_counted(run_folder, line):
    whole = read_run(run_folder)
    with open(run_folder / "metrics.jsonl", "a") as file:
        file.write(line + "\n")
    found = read_run(run_folder)
    assert found.unreadable == 1
    assert found.stages == whole.stages


def test_probabilities_are_those_of_the_last_stage_that_has_some(tmp_path):
    lines = [
        {"event": "probabilities", "stage": stage, "epoch": epoch, "layers": {"conv": {"epoch": epoch}}}
        for stage, epoch in (("warm-up", 1), ("search/seed0", 1), ("search/seed0", 2), ("search/seed1", 1))
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = read_run(tmp_path).probabilities
    assert {seed: list(epochs) for seed, epochs in found.items()} == {"seed0": [1, 2], "seed1": [1]}
    assert found["seed0"][2] == {"conv": {"epoch": 2}}


def test_other_events_are_kept_in_order(tmp_path):
    common = {"stage": "search", "epoch": 1, "epochs": 1, "seconds": 1}
    lines = [{"event": event, **common} for event in ("skipped", "epoch", "recovery")]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert [event["event"] for event in read_run(tmp_path).events] == ["skipped", "recovery"]


def test_a_stage_of_many_parts_keeps_its_name(tmp_path):
    epoch = '{"event": "epoch", "stage": "transfer/uniform w4a4/seed12", "epoch": 1, "epochs": 1, "seconds": 1}\n'
    (tmp_path / "metrics.jsonl").write_text(epoch)
    assert list(read_run(tmp_path).stages) == ["transfer/uniform w4a4"]


def test_the_last_line_of_a_killed_run_is_passed_over(run_folder):
    whole = read_run(run_folder)
    path = run_folder / "metrics.jsonl"
    path.write_text(path.read_text()[:-20])
    cut = read_run(run_folder)
    assert cut.unreadable == 1
    assert list(cut.stages["searched"]) == ["seed0"]
    assert cut.stages["search"] == whole.stages["search"]


def test_missing_files_leave_their_part_empty(tmp_path):
    (tmp_path / "config.json").write_text('{"command": "search"}')
    run = read_run(tmp_path)
    assert (run.policy, run.result, run.stages, run.last_epoch) == (None, None, {}, None)
    assert (run.probabilities, run.events) == ({}, [])


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no run"):
        read_run(tmp_path)


@pytest.mark.parametrize("content", ["{", "[1]"], ids=["not-json", "not-an-object"])
@pytest.mark.parametrize("name", ["config.json", "result.json", "policy.json"])
def test_a_damaged_file_is_named(run_folder, name, content):
    (run_folder / name).write_text(content)
    with pytest.raises(ValueError, match=name):
        read_run(run_folder)
