"""Images in files: a folder for each class, decoded into memory at once or as they are needed."""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from asga._extras import require
from asga.data.images import ImageTensor

_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
_CHUNK = 64  # Images a thread decodes before it asks for more, and between two reports of progress.
_STATISTICS_SAMPLE = 1024  # At 64x64 pixels already 4 million values a channel.


class ImageFiles:
    """A labeled set of image files, decoded when read, to RGB of one size.

    With `image_size`, the largest centered square of each image is resized to it (bilinear, with
    antialiasing). Without, all images must have the size of the first, which is checked as they are decoded.
    Files are decoded by worker processes.

    Args:
        paths: The files, at least one.
        labels: int64 ``[N]``, indices into `classes`.
        classes: Their names.
        image_size: Height and width, in pixels, or None.
        workers: Processes that decode; 0 decodes in this one. None is one per CPU core.

    Attributes:
        mirror: Always True: a mirrored photograph keeps its label.

    Raises:
        ValueError: The first file cannot be read.
        ImportError: Pillow is not installed.
    """

    mirror = True

    def __init__(
        self,
        paths: Sequence[str],
        labels: Tensor,
        classes: tuple[str, ...],
        *,
        image_size: int | None = None,
        workers: int | None = None,
    ) -> None:
        self.paths = paths
        self.labels = labels
        self.classes = classes
        self.image_size = image_size
        self.workers = _cpu_cores() if workers is None else workers
        width, height = (image_size, image_size) if image_size else _image_size(paths[0])
        self.image_shape = (3, height, width)

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def num_classes(self) -> int:
        """How many classes there are."""
        return len(self.classes)

    @property
    def nbytes(self) -> int:
        """Bytes of all images, decoded."""
        channels, height, width = self.image_shape
        return len(self) * channels * height * width

    def read(self, batches: Iterable[Tensor]) -> Iterator[Tensor]:
        """Yield the images uint8 ``[B, 3, H, W]`` of each tensor of indices ``[B]``, decoded ahead.

        Raises:
            ValueError: A file cannot be read; the message names it.
        """
        loader = DataLoader(
            _BatchDecoder(self),
            batch_size=None,
            sampler=[indices.tolist() for indices in batches],
            num_workers=self.workers,
            # Its own generator: the loader would draw from torch's, and change what a resumed run draws.
            generator=torch.Generator(),
        )
        for images in loader:
            if isinstance(images, Exception):
                raise images
            yield images

    def load(self, progress: Callable[[int, int], None] | None = None) -> ImageTensor:
        """Decode everything into memory, on all CPU cores.

        Args:
            progress: Called with (images done, images in all), from this thread.

        Raises:
            ValueError: A file cannot be read; the message names it.
        """
        images = np.empty((len(self), *self.image_shape), np.uint8)
        chunks = [range(start, min(start + _CHUNK, len(self))) for start in range(0, len(self), _CHUNK)]
        targets = [images[chunk.start : chunk.stop] for chunk in chunks]
        # Threads are enough: Pillow decodes and resizes without holding the interpreter's lock.
        executor = ThreadPoolExecutor(_cpu_cores())
        try:
            for chunk, _ in zip(chunks, executor.map(self._decode, chunks, targets), strict=True):
                if progress:
                    progress(chunk.stop, len(self))
        finally:
            executor.shutdown(cancel_futures=True)
        return ImageTensor(torch.from_numpy(images), self.labels, self.classes, self.mirror)

    def statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and deviation of each channel, with pixels from 0 to 1, over 1,024 files spread evenly."""
        indices = np.linspace(0, len(self) - 1, min(len(self), _STATISTICS_SAMPLE)).astype(int).tolist()
        paths = [self.paths[i] for i in indices]
        sample = ImageFiles(paths, self.labels[indices], self.classes, image_size=self.image_size)
        return sample.load().statistics()

    def _decode(self, indices: Sequence[int], out: np.ndarray) -> None:
        """Decode files into `out` uint8 ``[len(indices), 3, H, W]``."""
        library = require("PIL.Image", "search")
        for row, index in enumerate(indices):
            try:
                out[row] = _decode_image(library, self.paths[index], self.image_shape, self.image_size)
            except Exception as error:  # damaged files raise nearly anything
                raise ValueError(f"cannot use image {self.paths[index]}: {error}") from error


def list_images(root: Path, split: str) -> tuple[list[str], Tensor, tuple[str, ...]]:
    """List ``root/split/<class>/**``, sorted.

    Classes are numbered by the folders of ``root/train`` whichever split is read, so that the labels of both
    agree even where ``val`` lacks a class. Hidden files and files that are no images by their suffix are
    passed over.

    Args:
        root: The folder that holds the splits.
        split: Name of the folder to list.

    Returns:
        Paths, labels int64 ``[N]``, class names.

    Raises:
        FileNotFoundError: ``train`` or the folder of the split is missing.
        ValueError: There is no class, a class has no image, or ``val`` has a class that ``train`` has not.
    """
    names = _class_folders(root, "train")
    index = {name: i for i, name in enumerate(names)}
    paths: list[str] = []
    labels: list[int] = []
    for name in _class_folders(root, split):
        folder = root / split / name
        if name not in index:
            raise ValueError(f"{folder} is a class that {root / 'train'} does not have")
        found = sorted(_walk(folder))
        if not found:
            raise ValueError(f"{folder} has no images ({', '.join(_SUFFIXES)})")
        paths += found
        labels += [index[name]] * len(found)
    return paths, torch.tensor(labels), names


class _BatchDecoder(Dataset):
    """Decodes a batch per item. Errors are returned: raised, they would bring the worker's traceback."""

    def __init__(self, files: ImageFiles) -> None:
        self.files = files

    def __getitem__(self, indices: list[int]) -> Tensor | Exception:
        images = np.empty((len(indices), *self.files.image_shape), np.uint8)
        try:
            self.files._decode(indices, images)
        except ValueError as error:
            return ValueError(str(error))
        return torch.from_numpy(images)


def _class_folders(root: Path, split: str) -> tuple[str, ...]:
    folder = root / split
    if not folder.is_dir():
        there = ", ".join(sorted(entry.name for entry in os.scandir(root))[:8]) or "nothing"
        raise FileNotFoundError(f"{folder} does not exist: {root} must hold train and val, and holds {there}")
    names = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))
    if not names:
        raise ValueError(f"{folder} has no folders: it must hold one folder of images for each class")
    return tuple(names)


def _walk(folder: Path) -> Iterator[str]:
    for parent, _, files in os.walk(folder):
        for file in files:
            if file.lower().endswith(_SUFFIXES) and not file.startswith("."):
                yield os.path.join(parent, file)


def _image_size(path: str) -> tuple[int, int]:
    """Width and height, from the header."""
    library = require("PIL.Image", "search")
    try:
        with library.open(path) as image:
            return image.size
    except Exception as error:  # damaged files raise nearly anything
        raise ValueError(f"cannot use image {path}: {error}") from error


def _decode_image(library: ModuleType, path: str, shape: tuple[int, int, int], image_size: int | None) -> np.ndarray:
    """uint8 ``[3, H, W]``."""
    _, height, width = shape
    with library.open(path) as image:
        if image.mode in ("I", "F") or image.mode.startswith("I;"):
            raise ValueError(f"its pixels have more than 8 bits (mode {image.mode})")
        if image_size is None:
            if image.size != (width, height):
                raise ValueError(
                    f"it has {image.width}x{image.height} pixels, the first image {width}x{height}; "
                    "give an image size to resize all to"
                )
            pixels = image.convert("RGB")
        else:
            # JPEG can decode at 1/2, 1/4 or 1/8; twice the target leaves the filter enough to average.
            image.draft("RGB", (2 * image_size, 2 * image_size))
            side = min(image.size)
            left, top = (image.width - side) / 2, (image.height - side) / 2
            pixels = image.convert("RGB").resize(
                (image_size, image_size),
                library.Resampling.BILINEAR,
                box=(left, top, left + side, top + side),
            )
    return np.asarray(pixels).transpose(2, 0, 1)


def _cpu_cores() -> int:
    """Cores this process may use, which containers and schedulers limit."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
