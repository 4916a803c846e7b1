import json

import pytest


@pytest.fixture
def trained(run, transfer_arguments, tmp_path):
    assert run(*transfer_arguments)[0] == 0
    return tmp_path / "run"


def test_other_data_of_the_same_classes(run, trained, target):
    assert run("evaluate", trained, "--data", target, "--device", "cpu")[1] == run("evaluate", trained)[1]


def test_data_of_other_classes(fails, trained, proxy):
    assert "model.pt does not hold the weights of this model" in fails("evaluate", trained, "--data", proxy)


def test_no_run(fails, tmp_path):
    assert "holds no run (config.json is missing)" in fails("evaluate", tmp_path)


def test_run_of_another_command(fails, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"command": "search", "options": {}}))
    assert "holds a run of 'asga search'; one of 'asga transfer' is needed" in fails("evaluate", tmp_path)


@pytest.mark.parametrize("content", ["{", "[]", '{"command": "transfer"}', '{"command": "transfer", "options": 3}'])
def test_damaged_configuration(fails, tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    assert "config.json is not the configuration of a run" in fails("evaluate", tmp_path)


@pytest.mark.parametrize("name", ["model.pt", "policy.json"])
def test_unfinished_run(fails, trained, name):
    (trained / name).unlink()
    assert name in fails("evaluate", trained)
