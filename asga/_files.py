"""Files written so that a reader sees either the old content or the new, never a part; JSON read with clear errors."""

import contextlib
import io
import json
import os
import tempfile
from pathlib import Path

import torch


def write_atomic(path: str | os.PathLike, content: str | bytes | memoryview, *, keep: Path | None = None) -> None:
    """Write `content` to a temporary file beside `path`, flush it to disk and rename it into place.

    Args:
        path: The file.
        content: What it is to hold; text as UTF-8.
        keep: Where the file that was at `path` goes; it, too, has either its old content or that one.

    Raises:
        OSError: The file, which the message names, could not be written, such as when the disk is full. What was there
            before is still there: at `path`, or at `keep` if only the last renaming failed.
    """
    path = Path(path)
    data = content.encode() if isinstance(content, str) else content
    temporary, failing = None, "created"
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        failing = "written"
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            failing = "flushed to disk"
            os.fsync(file.fileno())
        failing = "renamed"
        os.chmod(temporary, 0o666 & ~_umask())
        if keep is not None and path.exists():
            os.replace(path, keep)
        os.replace(temporary, path)
    except BaseException as error:
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
        if isinstance(error, OSError):
            raise _describe(error, path, failing) from error
        raise


def append_line(path: str | os.PathLike, line: str) -> None:
    """Add a line to a file and flush it to disk.

    Raises:
        OSError: It could not be added; the message names the file, which is as long as before.
    """
    path = Path(path)
    size = path.stat().st_size if path.exists() else 0
    try:
        with open(path, "ab") as file:
            file.write(line.encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        with contextlib.suppress(OSError):
            os.truncate(path, size)
        raise _describe(error, path, "extended") from error


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


def save_tensors(path: str | os.PathLike, value: object, *, keep: Path | None = None) -> None:
    """`torch.save`, atomically, of tensors and plain containers: loading is with ``weights_only=True``.

    Raises:
        TypeError: There is something else in it, such as a number of NumPy's, which could not be loaded.
        OSError: As for `write_atomic`.
    """
    # Not to the file itself: where the disk is full, torch's writer says "unexpected pos", not what happened.
    buffer = io.BytesIO()
    torch.save(value, buffer)
    buffer.seek(0)
    foreign = torch.serialization.get_unsafe_globals_in_checkpoint(buffer)
    if foreign:
        raise TypeError(f"{path} would hold more than tensors and plain containers: {', '.join(sorted(foreign))}")
    write_atomic(path, buffer.getbuffer(), keep=keep)


def _describe(error: OSError, path: Path, failing: str) -> OSError:
    """The same error with the file and what failed in its message; the errno chooses the class."""
    return OSError(error.errno, f"{path} could not be {failing}: {error.strerror}")


def _umask() -> int:
    """The process's umask; the only way to read it is to set it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
