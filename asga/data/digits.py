"""The handwritten digits that scikit-learn embeds."""

import torch
from torch import Tensor

from asga._extras import require
from asga.data.selection import rank_in_class

_VAL_FRACTION = 0.2
_LARGEST_PIXEL = 16  # Pixels count the ink in 4x4 blocks of a 32x32 bitmap.


def read_digits(split: str) -> tuple[Tensor, Tensor, tuple[str, ...]]:
    """Read the training or the validation split, which are the same on every call.

    Args:
        split: ``train`` (1,438 images) or ``val`` (359): a fixed fifth of every class.

    Returns:
        Images uint8 ``[N, 1, 8, 8]``, labels int64 ``[N]``, class names.

    Raises:
        ImportError: scikit-learn is not installed.

    Source:
        Alpaydin and Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine Learning Repository,
        1998.
    """
    bunch = require("sklearn.datasets", "search").load_digits()
    pixels = torch.from_numpy(bunch.images) * (255 / _LARGEST_PIXEL)
    images = pixels.round().to(torch.uint8).unsqueeze(1)
    labels = torch.from_numpy(bunch.target).to(torch.int64)
    ranks = rank_in_class(labels, torch.Generator().manual_seed(0))
    is_val = ranks < (torch.bincount(labels) * _VAL_FRACTION).round()[labels]
    chosen = is_val if split == "val" else ~is_val
    return images[chosen], labels[chosen], tuple(str(name) for name in bunch.target_names)
