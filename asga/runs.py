"""Run folders: what a long task writes, so that it can be read by a person, interrupted and resumed."""

import json
import os
import warnings
import zipfile
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import ClassVar
from weakref import WeakValueDictionary, finalize

import torch

import asga
from asga._files import append_line, save_tensors, write_atomic, write_json

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

# Version 1 had neither a name of the format nor a version in it, and no state of what takes a diverged training back.
_FORMAT, _VERSION = "asga.checkpoint", 2
_CHECKPOINT, _PREVIOUS, _STAGES = "checkpoint.pt", "checkpoint.previous.pt", "stages.json"


class RunExistsError(ValueError):
    """The folder holds a run, and it is not the one that was asked for."""


class RunFolder:
    """A folder with the configuration, the metrics and the checkpoints of one run.

    ``config.json`` has the command, its options and versions; ``metrics.jsonl`` one JSON object per line, as
    they happen; ``checkpoint.pt`` tensors and plain containers, read with ``weights_only=True``;
    ``checkpoint.previous.pt`` the one before, for when the newest is damaged. A checkpoint remembers how long the
    metrics were, so that resuming from either drops what was logged later. Two processes that resumed one run would
    write over each other, so the second is refused (not on Windows).

    Args:
        path: The folder; made if it does not exist.
        command: What runs, such as ``"search"``.
        options: Its options: plain JSON values.
        resume: Go on with the run that is there. Without it, a folder that holds a run is refused.

    Raises:
        RunExistsError: The folder holds a run and `resume` is not set, or it holds one with other options or one that
            another process works on, or what is left of one without its configuration.
        FileNotFoundError: `resume` is set but no run is there.
        ValueError: ``config.json`` cannot be read.
    """

    def __init__(
        self, path: str | os.PathLike, command: str, options: dict[str, object], *, resume: bool = False
    ) -> None:
        self.path = Path(path)
        config_path = self.path / "config.json"
        if config_path.exists():
            self._check_existing(config_path, command, options, resume)
        elif resume:
            raise FileNotFoundError(f"{self.path} holds no run to resume (config.json is missing)")
        else:
            _refuse_remains(self.path)
            self.path.mkdir(parents=True, exist_ok=True)
            write_json(
                config_path,
                {
                    "command": command,
                    "asga_version": asga.__version__,
                    "torch_version": torch.__version__,
                    "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
                    "options": options,
                },
            )
        self._lock = _Lock.of(config_path)

    def log(self, **record: object) -> None:
        """Append one line to ``metrics.jsonl``; every record says of which `stage` it is.

        Raises:
            OSError: It could not be written, such as when the disk is full; earlier lines stay.
        """
        append_line(self._metrics, json.dumps(record, allow_nan=False))

    def metrics_size(self) -> int:
        """How long ``metrics.jsonl`` is, in bytes."""
        return self._metrics.stat().st_size if self._metrics.exists() else 0

    def save_checkpoint(self, state: dict[str, object], metrics_size: int | None = None) -> None:
        """Make `state` the newest checkpoint, and the newest one the previous.

        Args:
            state: Tensors and plain containers.
            metrics_size: How long the metrics were when the state was as it is here; None: as long as they are.

        Raises:
            OSError: It could not be written, such as when the disk is full. The message says which checkpoint stays.
        """
        checkpoint = {
            "format": _FORMAT,
            "version": _VERSION,
            "asga_version": asga.__version__,
            "state": state,
            "metrics_size": self.metrics_size() if metrics_size is None else metrics_size,
        }
        try:
            save_tensors(self._checkpoint, checkpoint, keep=self._previous)
        except OSError as error:
            newest = next((path for path in (self._checkpoint, self._previous) if path.exists()), None)
            before = "there was none before it"
            if newest is not None:
                before = f"the one before it stays, in {newest.name}: make room and resume"
            message = f"{error.strerror}; {before}"
            raise OSError(error.errno, message) from error

    def load_checkpoint(self, check: Callable[[dict[str, object]], object] | None = None) -> dict[str, object] | None:
        """The state of the newest checkpoint that can be read, or None; lines that were logged after it are dropped.

        Args:
            check: Called with the state before anything is changed; what it raises leaves the folder as it is.

        Warns:
            UserWarning: The newest is damaged, and the one before is used.

        Raises:
            ValueError: There are checkpoints, but none that can be read, or one of another version. Nothing has been
                changed.
        """
        found, damaged = self._newest_checkpoint()
        if found is not None and check is not None:
            check(found[0])
        for unfinished in self.path.glob(f".{self._checkpoint.name}.*"):  # a process was killed while it wrote this
            unfinished.unlink()
        for path, reason in damaged:
            # Out of the way: the next checkpoint would else take it for good and put it in the place of this one.
            kept = path.rename(self.path / "checkpoint.damaged.pt")
            warnings.warn(
                f"{path} is damaged ({reason}; now {kept.name}); going on from the one before it", stacklevel=2
            )
        state, metrics_size = found or (None, 0)
        self._drop_metrics(metrics_size)
        return state

    def check_checkpoint(self, check: Callable[[dict[str, object]], object]) -> None:
        """Call `check` with the state that `load_checkpoint` would give, if there is one; nothing is changed.

        Raises:
            ValueError: As `load_checkpoint`.
        """
        found, _ = self._newest_checkpoint()
        if found is not None:
            check(found[0])

    def finished(self, stage: str) -> dict[str, object] | None:
        """What `finish` recorded of a stage, or None if it has not been finished."""
        return self._stages().get(stage)

    def finish(self, stage: str, record: dict[str, object]) -> None:
        """Record that a stage is complete, so that resuming passes over it; its checkpoints go.

        Args:
            stage: Its name.
            record: What it found: plain JSON values.
        """
        write_json(self._stages_path, {**self._stages(), stage: record})
        self.save_checkpoint({"stage": None})
        self._previous.unlink(missing_ok=True)

    def seconds(self) -> float:
        """The time that the finished stages took, interruptions left out: the entries "seconds" of their records."""
        return sum(record["seconds"] for record in self._stages().values())

    @property
    def _checkpoint(self) -> Path:
        return self.path / _CHECKPOINT

    @property
    def _previous(self) -> Path:
        return self.path / _PREVIOUS

    @property
    def _metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def _stages_path(self) -> Path:
        return self.path / _STAGES

    def _newest_checkpoint(self) -> tuple[tuple[dict[str, object], int] | None, list[tuple[Path, str]]]:
        """State and size of the metrics of the newest checkpoint that can be read; newer ones, and why they cannot be.

        Raises:
            ValueError: None of those that are there can be read, or one is of another version.
        """
        damaged: list[tuple[Path, str]] = []
        for path in filter(Path.exists, (self._checkpoint, self._previous)):
            try:
                return _read_checkpoint(path), damaged
            except _DamagedError as error:
                damaged.append((path, str(error)))
        if damaged:
            found = " and ".join(f"{path} ({reason})" for path, reason in damaged)
            raise ValueError(f"{found} cannot be read as a checkpoint. Delete it to begin this stage anew")
        return None, []

    def _stages(self) -> dict[str, dict[str, object]]:
        if not self._stages_path.exists():
            return {}
        try:
            return json.loads(self._stages_path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{self._stages_path} cannot be read: {error}") from None

    def _drop_metrics(self, size: int) -> None:
        """Drop the lines after the first `size` bytes, except those of stages that will not run again."""
        if self.metrics_size() <= size:
            return
        content, finished = self._metrics.read_bytes(), self._stages()
        kept = [line for line in content[size:].splitlines(keepends=True) if _stage_of(line) in finished]
        content = content[:size] + b"".join(kept)
        if content:
            write_atomic(self._metrics, content)
        else:
            self._metrics.unlink()

    def _check_existing(self, config_path: Path, command: str, options: dict[str, object], resume: bool) -> None:
        try:
            config = json.loads(config_path.read_text(encoding="utf-8"))
            found = {"command": config["command"], **config["options"]}
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{config_path} is not the configuration of a run: {error!r}") from None
        if not resume:
            raise RunExistsError(
                f"{self.path} already holds a run ({found['command']}, {config.get('created', 'undated')}). "
                f"Resume it with --resume, or choose another folder"
            )
        wanted = json.loads(json.dumps({"command": command, **options}))
        changed = [key for key in {**found, **wanted} if found.get(key) != wanted.get(key)]
        if changed:
            differences = ", ".join(f"{key}: {found.get(key)!r} then, {wanted.get(key)!r} now" for key in changed)
            raise RunExistsError(f"{self.path} holds a run with other options ({differences})")


def open_folder(folder: RunFolder | str | os.PathLike | None, command: str) -> RunFolder | None:
    """The run folder at a path, new or with a run of this command to go on with; what is one already, or None, stays.

    Raises:
        RunExistsError: The folder holds a run of another command, one that another process works on, or what is left
            of one without its configuration.
        ValueError: Its ``config.json`` cannot be read.
    """
    if folder is None:
        return None
    return existing_folder(folder, command) or RunFolder(folder, command, {})


def existing_folder(folder: RunFolder | str | os.PathLike | None, command: str) -> RunFolder | None:
    """As `open_folder`, but None where there is no run yet: nothing is written."""
    if folder is None or isinstance(folder, RunFolder):
        return folder
    if Path(folder, "config.json").exists():
        return RunFolder(folder, command, {}, resume=True)
    _refuse_remains(Path(folder))
    return None


def _refuse_remains(path: Path) -> None:
    """Refuse a folder with what is left of a run.

    Raises:
        RunExistsError: It is.
    """
    if any((path / name).exists() for name in (_CHECKPOINT, _PREVIOUS, _STAGES)):
        raise RunExistsError(f"{path} holds a run whose config.json is missing; choose another folder")


class _DamagedError(ValueError):
    """A file is no checkpoint, or what is left of one."""


def _read_checkpoint(path: Path) -> tuple[dict[str, object], int]:
    """State and size of the metrics.

    Raises:
        ValueError: The checkpoint is of another version; `_DamagedError`: it cannot be read.
    """
    try:
        # torch does not look at the checksums of what it reads: values may be wrong without one.
        with zipfile.ZipFile(path) as archive:
            wrong = archive.testzip()
        if wrong is not None:
            raise _DamagedError(f"the checksum of its {wrong} is wrong")
        checkpoint = torch.load(path, weights_only=True, map_location="cpu")
    except (_DamagedError, PermissionError, MemoryError):  # the last two say nothing about the file
        raise
    except Exception as error:  # torch.load raises many types for a damaged file
        raise _DamagedError(type(error).__name__) from error
    if isinstance(checkpoint, dict) and checkpoint.get("format") == _FORMAT:
        version = checkpoint.get("version")
    elif isinstance(checkpoint, dict) and checkpoint.keys() == {"state", "metrics_size"}:
        version = 1
    else:
        raise _DamagedError("it holds something else")
    if version != _VERSION:
        writer = f"asga {checkpoint['asga_version']}" if "asga_version" in checkpoint else "an earlier asga"
        raise ValueError(
            f"{path} is of version {version}, written by {writer}; asga {asga.__version__} reads version {_VERSION}. "
            f"Resume with the asga that wrote it, or begin anew in another folder"
        )
    return checkpoint["state"], checkpoint["metrics_size"]


def _stage_of(line: bytes) -> object:
    try:
        return json.loads(line).get("stage")
    except (ValueError, AttributeError):
        return None


class _Lock:
    """The right of a process to work on a run, held as long as one of its run folders refers to it."""

    _held: ClassVar["WeakValueDictionary[Path, _Lock]"] = WeakValueDictionary()

    def __init__(self, config_path: Path) -> None:
        self._descriptor = os.open(config_path, os.O_RDONLY)
        finalize(self, os.close, self._descriptor)
        if fcntl is None:
            return
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunExistsError(
                f"{config_path.parent} is in use by another process; wait for it or stop it first"
            ) from None
        except OSError:  # a file system without locks
            pass

    @classmethod
    def of(cls, config_path: Path) -> "_Lock":
        """The lock of this process on a run, new or held already.

        Raises:
            RunExistsError: Another process holds it.
        """
        key = config_path.resolve()
        lock = cls._held.get(key)
        if lock is None or not os.path.samestat(os.fstat(lock._descriptor), os.stat(key)):
            lock = cls._held[key] = cls(key)
        return lock
