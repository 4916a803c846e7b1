import json
import pickle

import pytest
import torch

import asga
from asga.runs import RunExistsError, RunFolder

OPTIONS = {"epochs": 3, "data": "digits", "bits": (2, 4)}


def contents(path) -> dict[str, bytes]:
    return {str(file): file.read_bytes() for file in path.rglob("*") if file.is_file()}


@pytest.fixture
def folder(tmp_path):
    return RunFolder(tmp_path / "run", "search", OPTIONS)


class TestConfiguration:
    def test_is_written_where_nothing_was(self, tmp_path):
        RunFolder(tmp_path / "two words" / "run", "search", OPTIONS)
        config = json.loads((tmp_path / "two words" / "run" / "config.json").read_text())
        assert config["command"] == "search"
        assert config["options"] == {"epochs": 3, "data": "digits", "bits": [2, 4]}
        assert config["asga_version"] == asga.__version__
        assert config["torch_version"] == torch.__version__

    def test_another_run_is_refused(self, folder):
        before = contents(folder.path)
        with pytest.raises(RunExistsError, match=r"already holds a run \(search, .*--resume"):
            RunFolder(folder.path, "search", OPTIONS)
        assert contents(folder.path) == before

    def test_same_options_resume(self, folder):
        before = contents(folder.path)
        RunFolder(folder.path, "search", OPTIONS, resume=True)
        assert contents(folder.path) == before

    @pytest.mark.parametrize(
        ("command", "options", "difference"),
        [
            ("search", {**OPTIONS, "epochs": 5}, r"\(epochs: 3 then, 5 now\)"),
            ("search", {**OPTIONS, "limit": 9}, r"\(limit: None then, 9 now\)"),
            ("search", {"epochs": 3, "bits": (2, 4)}, r"\(data: 'digits' then, None now\)"),
            ("transfer", OPTIONS, r"\(command: 'search' then, 'transfer' now\)"),
            ("search", {**OPTIONS, "epochs": 4, "data": "x"}, r"epochs: 3 then, 4 now, data: 'digits' then, 'x' now"),
        ],
        ids=["changed", "added", "missing", "command", "two"],
    )
    def test_other_options_do_not(self, folder, command, options, difference):
        with pytest.raises(RunExistsError, match=difference):
            RunFolder(folder.path, command, options, resume=True)

    def test_options_unknown_to_an_older_version_may_be_unset(self, folder):
        RunFolder(folder.path, "search", {**OPTIONS, "new": None}, resume=True)

    def test_nothing_to_resume(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="holds no run to resume"):
            RunFolder(tmp_path / "run", "search", OPTIONS, resume=True)
        assert not (tmp_path / "run").exists()

    @pytest.mark.parametrize(
        "content", [b"{", b"[]", b'{"command": "search"}', b'{"command": "search", "options": 3}', b"\xff\xfe"]
    )
    @pytest.mark.parametrize("resume", [False, True])
    def test_damaged(self, folder, content, resume):
        (folder.path / "config.json").write_bytes(content)
        with pytest.raises(ValueError, match=r"config\.json is not the configuration of a run"):
            RunFolder(folder.path, "search", OPTIONS, resume=resume)
        assert (folder.path / "config.json").read_bytes() == content

    @pytest.mark.parametrize("left", ["checkpoint", "stage"])
    def test_deleted(self, folder, left):
        """Leftovers would otherwise be taken for this run's."""
        if left == "checkpoint":
            folder.save_checkpoint({})
        else:
            folder.finish("float", {})
        (folder.path / "config.json").unlink()
        with pytest.raises(RunExistsError, match=r"config\.json is missing"):
            RunFolder(folder.path, "search", OPTIONS)

    def test_a_file_is_in_the_way(self, tmp_path):
        (tmp_path / "run").write_text("mine")
        with pytest.raises(FileExistsError):
            RunFolder(tmp_path / "run", "search", OPTIONS)
        assert (tmp_path / "run").read_text() == "mine"


class TestCheckpoint:
    def test_round_trip(self, folder):
        assert folder.load_checkpoint() is None
        folder.save_checkpoint({"weights": torch.arange(3), "lists": [{"lr": 0.1}], "none": None})
        again = RunFolder(folder.path, "search", OPTIONS, resume=True)
        state = again.load_checkpoint()
        assert torch.equal(state.pop("weights"), torch.arange(3))
        assert state == {"lists": [{"lr": 0.1}], "none": None}

    def test_later_metrics_are_dropped(self, folder):
        folder.log(epoch=1)
        folder.save_checkpoint({})
        folder.log(epoch=2)
        folder.load_checkpoint()
        folder.log(epoch=3)
        lines = (folder.path / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(line) for line in lines] == [{"epoch": 1}, {"epoch": 3}]

    def test_without_one_all_metrics_are_dropped(self, folder):
        folder.log(epoch=1)
        assert folder.load_checkpoint() is None
        assert not (folder.path / "metrics.jsonl").exists()

    def test_a_failed_save_keeps_the_last_one(self, folder):
        folder.save_checkpoint({"step": 1})
        with pytest.raises((pickle.PicklingError, AttributeError)):
            folder.save_checkpoint({"step": lambda: 2})
        assert folder.load_checkpoint() == {"step": 1}
        assert sorted(file.name for file in folder.path.iterdir()) == ["checkpoint.pt", "config.json"]

    @pytest.mark.parametrize("damage", ["empty", "cut", "garbage", "other", "object"])
    def test_damaged(self, folder, damage):
        folder.save_checkpoint({"weights": torch.zeros(100)})
        folder.log(epoch=1)
        path = folder.path / "checkpoint.pt"
        if damage == "other":
            torch.save([1, 2], path)
        elif damage == "object":  # unpickling it would call a function
            torch.save({"state": pytest.raises, "metrics_size": 0}, path)
        else:
            whole = path.read_bytes()
            path.write_bytes({"empty": b"", "cut": whole[: len(whole) // 2], "garbage": b"garbage" * 50}[damage])
        before = contents(folder.path)
        with pytest.raises(ValueError, match=r"checkpoint\.pt cannot be read as a checkpoint .* Delete it"):
            folder.load_checkpoint()
        assert contents(folder.path) == before


class TestMetrics:
    def test_are_lines_of_json(self, folder):
        folder.log(event="epoch", loss=0.5, cost={"bitops": 1.0})
        folder.log(event="note")
        lines = (folder.path / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(line) for line in lines] == [
            {"event": "epoch", "loss": 0.5, "cost": {"bitops": 1.0}},
            {"event": "note"},
        ]

    def test_what_json_cannot_hold_is_refused(self, folder):
        folder.log(loss=0.5)
        with pytest.raises(ValueError, match="not JSON compliant"):
            folder.log(loss=float("nan"))
        assert (folder.path / "metrics.jsonl").read_text() == '{"loss": 0.5}\n'


class TestStages:
    def test_finished_are_remembered(self, folder):
        assert folder.finished("float") is None
        folder.finish("float", {"top1": 0.5})
        folder.finish("searched/seed0", {"top1": 0.25})
        again = RunFolder(folder.path, "search", OPTIONS, resume=True)
        assert again.finished("float") == {"top1": 0.5}
        assert again.finished("searched/seed0") == {"top1": 0.25}
        assert again.finished("searched/seed1") is None

    def test_checkpoint_of_a_finished_one_goes(self, folder):
        folder.save_checkpoint({"stage": "float", "weights": torch.zeros(10)})
        folder.log(epoch=1)
        folder.finish("float", {})
        assert folder.load_checkpoint() == {"stage": None}
        assert (folder.path / "metrics.jsonl").exists()

    def test_damaged(self, folder):
        (folder.path / "stages.json").write_text("{")
        with pytest.raises(ValueError, match=r"stages\.json cannot be read"):
            folder.finished("float")
