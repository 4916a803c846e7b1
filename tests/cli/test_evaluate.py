import json
import shutil

import pytest

from asga.steps import evaluate


@pytest.fixture
def trained(run, transfer_arguments, tmp_path):
    assert run(*transfer_arguments)[0] == 0
    return tmp_path / "run"


def test_other_data_of_the_same_classes(run, trained, target):
    assert run("evaluate", trained, "--data", target, "--device", "cpu")[1] == run("evaluate", trained)[1]


def test_other_data_are_normalized_as_the_training_data(run, trained, target, tmp_path):
    """Brighter images of the same classes: normalized by themselves, they would look like those of training."""
    image = pytest.importorskip("PIL.Image")
    root = tmp_path / "brighter"
    shutil.copytree(target.partition(":")[2], root)
    for path in root.rglob("*.png"):
        image.open(path).point(lambda value: min(255, value + 100)).save(path)
    batches = []

    def watch(model, val, **options):
        batches.append(next(iter(val))[0])
        return evaluate(model, val, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("asga.cli.evaluate.evaluate", watch)
        assert run("evaluate", trained, "--data", f"imagefolder:{root}")[0] == 0
        assert run("evaluate", trained)[0] == 0
    brighter, own = batches
    std = json.loads((trained / "result.json").read_text())["normalization"]["std"]
    assert (brighter - own).amax((0, 2, 3)) == pytest.approx([100 / 255 / value for value in std], rel=1e-4)


def test_result_of_an_older_version(fails, trained):
    (trained / "result.json").write_text("{}")
    assert "result.json does not say how images were normalized" in fails("evaluate", trained)


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


@pytest.mark.parametrize("name", ["model.pt", "policy.json", "result.json"])
def test_unfinished_run(fails, trained, name):
    (trained / name).unlink()
    assert name in fails("evaluate", trained)


def test_run_that_was_interrupted(fails, trained):
    """It has none of the files that a finished one leaves."""
    for name in ("model.pt", "policy.json", "result.json"):
        (trained / name).unlink()
    assert "holds a run that is not finished" in fails("evaluate", trained)
