"""Files written so that a reader sees either the old content or the new, never a part; JSON read with clear errors."""

import io
import json
import os
import tempfile
from pathlib import Path

import torch


def write_atomic(path: str | os.PathLike, content: str | bytes) -> None:
    """Write `content` to a temporary file beside `path`, flush it to disk and rename it into place."""
    path = Path(path)
    data = content.encode() if isinstance(content, str) else content
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def write_json(path: str | os.PathLike, value: object) -> None:
    """Write `value` as indented JSON. NaN and infinities are refused: they are not JSON."""
    write_atomic(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def read_json(path: str | os.PathLike) -> dict[str, object]:
    """Read a JSON object.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is not JSON, or another JSON value; the message names the file.
    """
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds {type(value).__name__}; a JSON object is needed")
    return value


def save_tensors(path: str | os.PathLike, value: object) -> None:
    """`torch.save`, atomically. Keep to tensors and plain containers: loading is with ``weights_only=True``."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    write_atomic(path, buffer.getvalue())


def _umask() -> int:
    """The process's umask; the only way to read it is to set it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
