"""Run folders: what a long task writes, so that it can be read by a person, interrupted and resumed."""

import json
import os
from datetime import datetime, timezone
from pathlib import Path

import torch

import asga
from asga._files import save_tensors, write_json


class RunExistsError(ValueError):
    """The folder holds a run, and it is not the one that was asked for."""


class RunFolder:
    """A folder with the configuration, the metrics and the checkpoint of one run.

    ``config.json`` has the command, its options and versions; ``metrics.jsonl`` one JSON object per line, as
    they happen; ``checkpoint.pt`` tensors and plain containers, read with ``weights_only=True``.

    Args:
        path: The folder; made if it does not exist.
        command: What runs, such as ``"search"``.
        options: Its options: plain JSON values.
        resume: Go on with the run that is there. Without it, a folder that holds a run is refused.

    Raises:
        RunExistsError: The folder holds a run and `resume` is not set, or it holds one with other options, or
            what is left of one without its configuration.
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
        elif self._checkpoint.exists() or self._stages_path.exists():
            raise RunExistsError(f"{self.path} holds a run whose config.json is missing; choose another folder")
        else:
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

    def log(self, **record: object) -> None:
        """Append one line to ``metrics.jsonl``."""
        line = json.dumps(record, allow_nan=False) + "\n"
        with open(self.path / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(line)

    def save_checkpoint(self, state: dict[str, object]) -> None:
        """Replace the checkpoint. It remembers how long the metrics were, so that resuming drops later lines."""
        save_tensors(self._checkpoint, {"state": state, "metrics_size": self._metrics_size()})

    def load_checkpoint(self) -> dict[str, object] | None:
        """The last checkpoint's state, or None; lines that were logged after it are dropped.

        Raises:
            ValueError: The file cannot be read as a checkpoint.
        """
        metrics = self.path / "metrics.jsonl"
        if not self._checkpoint.exists():
            metrics.unlink(missing_ok=True)
            return None
        try:
            checkpoint = torch.load(self._checkpoint, weights_only=True, map_location="cpu")
            state, size = checkpoint["state"], checkpoint["metrics_size"]
        except Exception as error:  # torch.load raises many types for a damaged file
            raise ValueError(
                f"{self._checkpoint} cannot be read as a checkpoint ({type(error).__name__}). Delete it to begin this "
                f"stage anew"
            ) from error
        if size < self._metrics_size():
            os.truncate(metrics, size)
        return state

    def finished(self, stage: str) -> dict[str, object] | None:
        """What `finish` recorded of a stage, or None if it has not been finished."""
        return self._stages().get(stage)

    def finish(self, stage: str, record: dict[str, object]) -> None:
        """Record that a stage is complete, so that resuming passes over it; its checkpoint goes.

        Args:
            stage: Its name.
            record: What it found: plain JSON values.
        """
        write_json(self._stages_path, {**self._stages(), stage: record})
        self.save_checkpoint({"stage": None})

    @property
    def _checkpoint(self) -> Path:
        return self.path / "checkpoint.pt"

    @property
    def _stages_path(self) -> Path:
        return self.path / "stages.json"

    def _stages(self) -> dict[str, dict[str, object]]:
        if not self._stages_path.exists():
            return {}
        try:
            return json.loads(self._stages_path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{self._stages_path} cannot be read: {error}") from None

    def _metrics_size(self) -> int:
        metrics = self.path / "metrics.jsonl"
        return metrics.stat().st_size if metrics.exists() else 0

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
