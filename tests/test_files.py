import errno
import os
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch

from asga._files import append_line, save_tensors, write_atomic

FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def full_disk(monkeypatch):
    """A function that makes one kind of call fail from now on as on a full disk, after `works` more that work."""

    def fill(call: str, works: int = 0) -> None:
        original, calls = getattr(os, call), []

        def fail(*arguments):
            calls.append(1)
            if len(calls) > works:
                raise FULL
            return original(*arguments)

        monkeypatch.setattr(os, call, fail)

    return fill


class TestWriteAtomic:
    def test_replaces_and_leaves_nothing_else(self, tmp_path):
        write_atomic(tmp_path / "a", "old")
        write_atomic(tmp_path / "a", b"new")
        assert (tmp_path / "a").read_text() == "new"
        assert names(tmp_path) == ["a"]

    def test_keeps_the_old_one(self, tmp_path):
        for content in ("first", "second", "third"):
            write_atomic(tmp_path / "a", content, keep=tmp_path / "b")
        assert [(tmp_path / name).read_text() for name in "ab"] == ["third", "second"]
        assert names(tmp_path) == ["a", "b"]

    def test_permissions_are_those_of_any_new_file(self, tmp_path):
        write_atomic(tmp_path / "a", "")
        (tmp_path / "b").touch()
        assert (tmp_path / "a").stat().st_mode == (tmp_path / "b").stat().st_mode

    @pytest.mark.parametrize(
        ("call", "failing"), [("fsync", "flushed to disk"), ("replace", "renamed"), ("open", "created")]
    )
    def test_a_full_disk_leaves_the_old_content(self, tmp_path, full_disk, call, failing):
        write_atomic(tmp_path / "a", "old")
        full_disk(call)
        with pytest.raises(OSError, match=rf"a could not be {failing}: No space left on device") as error:
            write_atomic(tmp_path / "a", "new", keep=tmp_path / "b")
        assert error.value.errno == errno.ENOSPC
        assert (tmp_path / "a").read_text() == "old"
        assert names(tmp_path) == ["a"]

    def test_or_has_it_where_it_was_to_be_kept(self, tmp_path, full_disk):
        write_atomic(tmp_path / "a", "old")
        full_disk("replace", works=1)
        with pytest.raises(OSError, match="a could not be renamed"):
            write_atomic(tmp_path / "a", "new", keep=tmp_path / "b")
        assert (tmp_path / "b").read_text() == "old"
        assert names(tmp_path) == ["b"]

    def test_a_file_that_grows_too_large(self, tmp_path, size_limit):
        """The operating system itself refuses the write, halfway."""
        write_atomic(tmp_path / "a", "old")
        with size_limit(10_000), pytest.raises(OSError, match="a could not be written: File too large"):
            save_tensors(tmp_path / "a", torch.zeros(100_000))
        assert (tmp_path / "a").read_text() == "old"
        assert names(tmp_path) == ["a"]

    def test_other_errors_keep_their_class(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="could not be created"):
            write_atomic(tmp_path / "nowhere" / "a", "")


class TestSaveTensors:
    def test_round_trip(self, tmp_path):
        value = {"tensors": [torch.arange(3)], "numbers": (1, 0.5, None), "states": OrderedDict(a=torch.zeros(2))}
        save_tensors(tmp_path / "a", value)
        loaded = torch.load(tmp_path / "a", weights_only=True)
        assert loaded["tensors"][0].tolist() == [0, 1, 2]
        assert loaded["numbers"] == (1, 0.5, None)

    @pytest.mark.parametrize(
        "value", [np.float64(1.0), {"a": [np.zeros(2)]}, Path("x")], ids=["number", "list", "path"]
    )
    def test_what_could_not_be_loaded_is_refused(self, tmp_path, value):
        """Now, not when it is needed."""
        save_tensors(tmp_path / "a", 1)
        with pytest.raises(TypeError, match=r"a would hold more than tensors and plain containers: (numpy|pathlib)"):
            save_tensors(tmp_path / "a", value)
        assert torch.load(tmp_path / "a", weights_only=True) == 1
        assert names(tmp_path) == ["a"]


class TestAppendLine:
    def test_makes_the_file_and_extends_it(self, tmp_path):
        append_line(tmp_path / "a", "one")
        append_line(tmp_path / "a", "two")
        assert (tmp_path / "a").read_text() == "one\ntwo\n"

    @pytest.mark.parametrize("kind", ["fsync", "limit"])
    def test_a_full_disk_leaves_whole_lines(self, tmp_path, full_disk, size_limit, kind):
        append_line(tmp_path / "a", "one")
        if kind == "fsync":
            full_disk("fsync")
            with pytest.raises(OSError, match="a could not be extended: No space left"):
                append_line(tmp_path / "a", "two")
        else:
            with size_limit(100), pytest.raises(OSError, match="a could not be extended: File too large"):
                append_line(tmp_path / "a", "x" * 200)
        assert (tmp_path / "a").read_text() == "one\n"
