"""From what a person types, such as ``imagefolder:photos``, to a dataset."""

from collections.abc import Callable, Sequence
from pathlib import Path

from asga.data.cifar10 import read_cifar10
from asga.data.digits import read_digits
from asga.data.files import ImageFiles, list_images
from asga.data.images import ImageTensor
from asga.data.selection import select

# Beside a model and its activations, 2 GiB of images fit a machine with 8 GiB. It is 700,000 images of 32x32,
# or 14,000 of 224x224.
MAX_BYTES_IN_MEMORY = 2 * 2**30

_SPECS = "digits, imagefolder:PATH or cifar10:PATH"


def open_dataset(
    spec: str,
    split: str,
    *,
    image_size: int | None = None,
    limit: int | None = None,
    classes: int | Sequence[str] | None = None,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> ImageTensor | ImageFiles:
    """Open one split of a dataset.

    ``digits`` are the 1,797 gray 8x8 images that scikit-learn embeds, a fifth of them for validation.
    ``imagefolder:PATH`` has ``PATH/train/<class>/...`` and ``PATH/val/<class>/...``; classes are numbered by
    the sorted names of the folders in ``train``, for both splits. ``cifar10:PATH`` is the official binary or
    python version; its test images are the validation split. The result lives in memory; only folders whose
    pixels take more than `MAX_BYTES_IN_MEMORY` are decoded as they are needed.

    Args:
        spec: ``digits``, ``imagefolder:PATH`` or ``cifar10:PATH``. A leading ``~`` in PATH is the home
            directory.
        split: ``train`` or ``val``.
        image_size: Height and width to resize to, in pixels. None keeps the images as they are.
        limit: Use at most this many images: a random subset with equally many of each class.
        classes: Use the first n classes, or those with these names, numbered in the order given. None: all.
        seed: Of the random subset. The same seed picks the same images, and a smaller limit a part of them.
        progress: Called with (images decoded, images in all) while a folder is read into memory.

    Returns:
        The images: uint8, three channels (one for digits).

    Raises:
        FileNotFoundError: The path, the folder of the split or a file of CIFAR-10 is missing.
        ValueError: An argument is out of range, there is no image, or a file cannot be read; the message
            names it. No file is changed.
        ImportError: Pillow or scikit-learn is needed and missing.
    """
    scheme, path = _parse(spec)
    if split not in ("train", "val"):
        raise ValueError(f"split is {split!r}; it must be 'train' or 'val'")
    if image_size is not None and image_size < 1:
        raise ValueError(f"image_size is {image_size}; it must be at least 1 pixel")

    if scheme == "imagefolder":
        paths, labels, names = list_images(path, split)
        indices, labels, names = select(labels, names, classes=classes, limit=limit, seed=seed)
        files = ImageFiles([paths[i] for i in indices.tolist()], labels, names, image_size=image_size)
        return files.load(progress) if files.nbytes <= MAX_BYTES_IN_MEMORY else files

    images, labels, names = read_digits(split) if scheme == "digits" else read_cifar10(path, split)
    indices, labels, names = select(labels, names, classes=classes, limit=limit, seed=seed)
    # A mirrored digit is another sign: only shifts keep its label.
    dataset = ImageTensor(images[indices], labels, names, mirror=scheme != "digits")
    return dataset if image_size is None else dataset.resized(image_size)


def _parse(spec: str) -> tuple[str, Path]:
    """Split a specification into its scheme and its path, which is checked to be a folder."""
    scheme, _, rest = spec.partition(":")
    if scheme == "digits":
        if rest:
            raise ValueError(f"data {spec!r}: digits come with scikit-learn and take no path")
        return scheme, Path()
    if scheme not in ("imagefolder", "cifar10"):
        hint = f" Did you mean 'imagefolder:{spec}'?" if Path(spec).expanduser().is_dir() else ""
        raise ValueError(f"data {spec!r} is not known; use {_SPECS}.{hint}")
    if not rest:
        raise ValueError(f"data {spec!r} has no path; write {scheme}:PATH")
    path = Path(rest).expanduser()
    if not path.exists():
        raise FileNotFoundError(f"data {spec!r}: {path} does not exist")
    if not path.is_dir():
        raise ValueError(f"data {spec!r}: {path} is not a folder")
    return scheme, path
