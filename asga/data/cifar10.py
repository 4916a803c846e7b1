"""CIFAR-10 in its official binary and python versions.

The python version is pickled, and unpickling can run any code. Here it cannot: the few names that such a file
needs are replaced by inert stand-ins, and a file that asks for anything else is refused.
"""

import io
import pickle
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")

_PIXELS = 3 * 32 * 32
_TRAIN_BATCHES = tuple(f"data_batch_{i}" for i in range(1, 6))
_TEST_BATCHES = ("test_batch",)


def read_cifar10(path: Path, split: str) -> tuple[Tensor, Tensor, tuple[str, ...]]:
    """Read the training images, or the test images as the validation split.

    Args:
        path: The folder of the batches, or the one that holds ``cifar-10-batches-bin`` or
            ``cifar-10-batches-py``. The binary version is taken where both are there.
        split: ``train`` or ``val``.

    Returns:
        Images uint8 ``[N, 3, 32, 32]``, labels int64 ``[N]``, class names.

    Raises:
        FileNotFoundError: No batches are there, or one is missing.
        ValueError: A file is damaged, has labels beyond 9, or is a pickle that asks for other names than an
            array needs; the message names it.

    Source:
        Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009;
        https://www.cs.toronto.edu/~kriz/cifar.html for both formats.
    """
    folder, suffix = _find_batches(path)
    files = [folder / (name + suffix) for name in (_TRAIN_BATCHES if split == "train" else _TEST_BATCHES)]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise FileNotFoundError(f"CIFAR-10 in {folder} is not complete: {', '.join(missing)} missing")
    batches = [_read_binary(file) if suffix else _read_pickle(file) for file in files]
    for file, (_, labels) in zip(files, batches, strict=True):
        if labels.size and labels.max() >= len(CLASSES):
            raise ValueError(f"{file}: record {labels.argmax()} has label {labels.max()}; labels are 0 to 9")
    images = np.concatenate([images for images, _ in batches]).reshape(-1, 3, 32, 32)
    labels = np.concatenate([labels for _, labels in batches]).astype(np.int64)
    return torch.from_numpy(images), torch.from_numpy(labels), CLASSES


def _find_batches(path: Path) -> tuple[Path, str]:
    """The folder that has batches, and the suffix of their names: ``.bin`` or none."""
    for folder, suffix in (
        (path, ".bin"),
        (path / "cifar-10-batches-bin", ".bin"),
        (path, ""),
        (path / "cifar-10-batches-py", ""),
    ):
        if any((folder / (name + suffix)).is_file() for name in _TRAIN_BATCHES + _TEST_BATCHES):
            return folder, suffix
    raise FileNotFoundError(
        f"no CIFAR-10 in {path}: neither data_batch_1.bin (binary version) nor data_batch_1 (python version) "
        "there, in cifar-10-batches-bin or in cifar-10-batches-py. For folders of images use imagefolder:PATH"
    )


def _read_binary(file: Path) -> tuple[np.ndarray, np.ndarray]:
    """Records of one byte label and 3,072 bytes of pixels: uint8 ``[N, 3072]`` and uint8 ``[N]``."""
    raw = np.fromfile(file, np.uint8)
    if raw.size == 0 or raw.size % (1 + _PIXELS):
        raise ValueError(f"{file} has {raw.size} bytes, not a whole number of records of {1 + _PIXELS} bytes")
    records = raw.reshape(-1, 1 + _PIXELS)
    return records[:, 1:], records[:, 0]


def _read_pickle(file: Path) -> tuple[np.ndarray, np.ndarray]:
    """A dictionary with ``data`` uint8 ``[N, 3072]`` and ``labels``, a list of N integers."""
    try:
        content = _BatchUnpickler(io.BytesIO(file.read_bytes()), encoding="bytes").load()
        data, labels = content[b"data"], content[b"labels"]
    except _RefusedError as error:
        raise ValueError(f"{file} was refused: {error}. It is no CIFAR-10 batch; nothing in it was run") from None
    except Exception as error:  # damaged pickles raise nearly anything
        raise ValueError(f"{file} is not a CIFAR-10 batch or is damaged ({error!r})") from error
    if not isinstance(data, _Array) or data.values.ndim != 2 or data.values.shape[1] != _PIXELS:
        raise ValueError(f"{file}: data is not an array of rows of {_PIXELS} bytes")
    if not isinstance(labels, list) or not all(type(label) is int and 0 <= label < 256 for label in labels):
        raise ValueError(f"{file}: labels is not a list of integers from 0 to 9")
    if len(labels) != len(data.values):
        raise ValueError(f"{file} has {len(data.values)} images but {len(labels)} labels")
    return data.values, np.array(labels, np.uint8)


class _RefusedError(Exception):
    """A pickle asks for something that no batch needs."""


class _Array:
    """Stands for ``numpy.ndarray`` and its ``_reconstruct``: keeps bytes and shape, runs nothing."""

    values: np.ndarray

    def __init__(self, *prototype: object) -> None:
        pass

    def __setstate__(self, state: tuple) -> None:
        _, shape, dtype, fortran_order, raw = state
        if not isinstance(dtype, _Dtype) or dtype.code not in (b"u1", "u1"):
            raise TypeError("the array does not hold bytes")
        self.values = np.frombuffer(raw, np.uint8).reshape(shape, order="F" if fortran_order else "C")


class _Dtype:
    """Stands for ``numpy.dtype``."""

    def __init__(self, code: object, *flags: object) -> None:
        self.code = code

    def __setstate__(self, state: tuple) -> None:
        """Byte order and fields: single bytes have neither."""


def _encode_latin1(text: str, encoding: str) -> bytes:
    """Stands for ``_codecs.encode``, which Python 3 writes for bytes in protocols 0 to 2: always latin1."""
    return text.encode("latin1")


_STAND_INS = {
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Dtype,
    ("numpy.core.multiarray", "_reconstruct"): _Array,
    ("numpy._core.multiarray", "_reconstruct"): _Array,
    ("_codecs", "encode"): _encode_latin1,
}


class _BatchUnpickler(pickle.Unpickler):
    """Resolves names to the stand-ins above, and refuses every other."""

    def find_class(self, module: str, name: str) -> object:
        try:
            return _STAND_INS[module, name]
        except KeyError:
            raise _RefusedError(f"it asks for {module}.{name}") from None
