import contextlib
import errno
import json
import os
import pickle

import pytest
import torch

import asga
from asga.runs import RunExistsError, RunFolder

OPTIONS = {"epochs": 3, "data": "digits", "bits": (2, 4)}


def contents(path) -> dict[str, bytes]:
    return {str(file): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def steps_of(folder: RunFolder) -> list[int]:
    return [json.loads(line)["step"] for line in (folder.path / "metrics.jsonl").read_text().splitlines()]


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


class TestTwoProcesses:
    RESUME = """
from asga.runs import RunFolder
try:
    RunFolder({!r}, "search", {!r}, resume=True)
    print("resumed")
except ValueError as error:
    print(error)
"""

    def test_a_run_is_for_one_at_a_time(self, tmp_path, run_python):
        path = tmp_path / "run"
        resume = self.RESUME.format(str(path), OPTIONS)
        first = RunFolder(path, "search", OPTIONS)
        second = RunFolder(path, "search", OPTIONS, resume=True)  # the same process may
        before = contents(path)
        refused = f"{path} is in use by another process; wait for it or stop it first"
        assert run_python(resume) == refused
        del first
        assert run_python(resume) == refused
        assert contents(path) == before
        del second
        assert run_python(resume) == "resumed"


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

    def test_the_last_two_are_kept(self, folder):
        for step in (1, 2, 3):
            folder.log(step=step)
            folder.save_checkpoint({"step": step})
        assert sorted(file.name for file in folder.path.glob("*.pt")) == ["checkpoint.previous.pt", "checkpoint.pt"]
        assert folder.load_checkpoint() == {"step": 3}
        (folder.path / "checkpoint.pt").unlink()
        assert folder.load_checkpoint() == {"step": 2}
        assert steps_of(folder) == [1, 2]

    @pytest.mark.parametrize("damage", ["cut", "a value"])
    def test_the_previous_one_is_used_when_the_newest_is_damaged(self, folder, damage):
        folder.log(step=1)
        folder.save_checkpoint({"weights": torch.arange(100)})
        folder.log(step=2)
        folder.save_checkpoint({"weights": torch.arange(100) + 1})
        path = folder.path / "checkpoint.pt"
        content = bytearray(path.read_bytes())
        if damage == "cut":
            content = content[: len(content) // 2]
        else:
            where = content.index(torch.arange(100).numpy()[50:60].tobytes())
            content[where] += 1  # which torch.load would not notice
        path.write_bytes(content)
        with pytest.warns(UserWarning, match=r"checkpoint\.pt is damaged .*going on from the one before it$") as warned:
            state = folder.load_checkpoint()
        assert len(warned) == 1
        assert torch.equal(state["weights"], torch.arange(100))
        assert steps_of(folder) == [1]
        # The damaged one is out of the way: what follows does not push the good one out.
        assert (folder.path / "checkpoint.damaged.pt").read_bytes() == content
        folder.save_checkpoint({"weights": torch.arange(3)})
        path.write_bytes(b"")
        with pytest.warns(UserWarning, match="is damaged"):
            assert len(folder.load_checkpoint()["weights"]) == 100

    def test_one_that_is_refused_changes_nothing(self, folder):
        def refuse(state):
            raise ValueError(f"step {state['step']}")

        for step in (1, 2):
            folder.log(step=step)
            folder.save_checkpoint({"step": step})
        folder.log(step=3)
        (folder.path / "checkpoint.pt").write_bytes(b"")
        before = contents(folder.path)
        for look in (folder.check_checkpoint, folder.load_checkpoint):
            with pytest.raises(ValueError, match="step 1"):
                look(refuse)
            assert contents(folder.path) == before

    @pytest.mark.parametrize("error", [PermissionError, MemoryError])
    def test_one_that_may_not_be_read_is_not_taken_for_damaged(self, folder, monkeypatch, error):
        def refuse(path):
            raise error

        for step in (1, 2):
            folder.save_checkpoint({"step": step})
        before = contents(folder.path)
        monkeypatch.setattr("asga.runs.zipfile.ZipFile", refuse)
        with pytest.raises(error):
            folder.load_checkpoint()
        assert contents(folder.path) == before

    def test_what_a_killed_process_was_writing_is_cleared_away(self, folder):
        folder.save_checkpoint({"step": 1})
        (folder.path / ".checkpoint.pt.a1b2c3").write_bytes(b"half of it")
        assert folder.load_checkpoint() == {"step": 1}
        assert sorted(file.name for file in folder.path.iterdir()) == ["checkpoint.pt", "config.json"]

    @pytest.mark.parametrize("version", [1, 3])
    def test_of_another_version(self, folder, version):
        folder.save_checkpoint({"step": 1})
        folder.save_checkpoint({"step": 2})
        path = folder.path / "checkpoint.pt"
        checkpoint = torch.load(path, weights_only=True)
        if version == 1:
            checkpoint = {name: checkpoint[name] for name in ("state", "metrics_size")}
        else:
            checkpoint = {"format": "asga.checkpoint", "version": 3, "asga_version": "9.0.0", "other": 1}
        torch.save(checkpoint, path)
        folder.log(step=3)
        before = contents(folder.path)
        writer = {1: "an earlier asga", 3: r"asga 9\.0\.0"}[version]
        message = rf"checkpoint\.pt is of version {version}, written by {writer}; .* reads version 2\. Resume with"
        with pytest.raises(ValueError, match=message):
            folder.load_checkpoint()
        assert contents(folder.path) == before

    @pytest.mark.parametrize("kind", ["written", "flushed to disk", "renamed", "renamed, the old one moved"])
    @pytest.mark.parametrize("before", [0, 1, 2])
    def test_full_disk(self, folder, monkeypatch, size_limit, kind, before):
        """The newest good checkpoint stays, and the message says so."""
        for step in range(before):
            folder.save_checkpoint({"step": step})

        def fail(call, works):
            original, calls = getattr(os, call), []

            def replaced(*arguments):
                calls.append(1)
                if len(calls) > works:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                return original(*arguments)

            monkeypatch.setattr(os, call, replaced)

        limit = size_limit(1000) if kind == "written" else contextlib.nullcontext()
        if kind != "written":
            fail("fsync" if kind == "flushed to disk" else "replace", int(kind.endswith("moved") and before > 0))
        stays = "there was none before it"
        if before > 0:
            stays = r"the one before it stays, in checkpoint(\.previous)?\.pt: make room and resume"
        failing = kind.partition(",")[0]
        message = rf"checkpoint\.pt could not be {failing}: (No space left on device|File too large); .*{stays}"
        with limit, pytest.raises(OSError, match=message):
            folder.save_checkpoint({"step": before, "weights": torch.zeros(10_000)})
        monkeypatch.undo()
        assert folder.load_checkpoint() == (None if before == 0 else {"step": before - 1})
        assert not list(folder.path.glob(".*"))

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
        with pytest.raises(ValueError, match=r"checkpoint\.pt \(.*\) cannot be read as a checkpoint\. Delete"):
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

    def test_checkpoints_of_a_finished_one_go(self, folder):
        for _ in range(2):
            folder.save_checkpoint({"stage": "float", "weights": torch.zeros(10)})
        folder.log(epoch=1)
        folder.finish("float", {})
        assert folder.load_checkpoint() == {"stage": None}
        assert sorted(file.name for file in folder.path.glob("*.pt")) == ["checkpoint.pt"]
        assert (folder.path / "metrics.jsonl").exists()

    @pytest.mark.parametrize("left", ["an older checkpoint", "nothing"])
    def test_metrics_of_a_finished_one_stay_without_its_last_checkpoint(self, folder, left):
        folder.log(stage="float", step=1)
        folder.save_checkpoint({"stage": "float"})
        older = (folder.path / "checkpoint.pt").read_bytes()
        folder.log(stage="float", step=2)
        folder.finish("float", {})
        folder.log(stage="search", step=3)
        (folder.path / "checkpoint.pt").unlink()
        if left == "an older checkpoint":
            (folder.path / "checkpoint.previous.pt").write_bytes(older)
        folder.load_checkpoint()
        assert steps_of(folder) == [1, 2]

    def test_seconds_are_those_of_all(self, folder):
        assert folder.seconds() == 0
        folder.finish("float", {"seconds": 1.5})
        folder.finish("search", {"seconds": 0.25})
        assert folder.seconds() == 1.75

    def test_damaged(self, folder):
        (folder.path / "stages.json").write_text("{")
        with pytest.raises(ValueError, match=r"stages\.json cannot be read"):
            folder.finished("float")
