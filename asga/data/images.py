"""Images that live in memory, one byte per channel and pixel."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

_RESIZE_CHUNK = 1024  # Images resized at once: at 224x224 a float32 chunk takes 0.6 GB.


@dataclass(frozen=True, eq=False)
class ImageTensor:
    """A labeled set of images of one size, in memory.

    Args:
        images: uint8 ``[N, C, H, W]``.
        labels: int64 ``[N]``, indices into `classes`.
        classes: Their names.
        mirror: Whether a mirrored image keeps its label, so that augmentation may flip it.

    Raises:
        ValueError: A dtype or shape does not fit, or a label is out of range.
    """

    images: Tensor
    labels: Tensor
    classes: tuple[str, ...]
    mirror: bool = True

    def __post_init__(self) -> None:
        images, labels = self.images, self.labels
        if images.dtype != torch.uint8 or images.dim() != 4:
            raise ValueError(f"images is {images.dtype} {tuple(images.shape)}; it must be uint8 [N, C, H, W]")
        if labels.dtype != torch.int64 or labels.shape != images.shape[:1]:
            raise ValueError(f"labels is {labels.dtype} {tuple(labels.shape)}; it must be torch.int64 [{len(images)}]")
        if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < len(self.classes):
            raise ValueError(f"labels are {int(labels.min())} to {int(labels.max())}, with {len(self.classes)} classes")

    def __len__(self) -> int:
        return len(self.images)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height, width."""
        _, channels, height, width = self.images.shape
        return channels, height, width

    @property
    def num_classes(self) -> int:
        """How many classes there are."""
        return len(self.classes)

    def read(self, batches: Iterable[Tensor]) -> Iterator[Tensor]:
        """Yield the images uint8 ``[B, C, H, W]`` of each tensor of indices ``[B]``."""
        for indices in batches:
            yield self.images[indices]

    def statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation of each channel over all images, with pixels from 0 to 1."""
        values = torch.arange(256, dtype=torch.float64) / 255
        means, deviations = [], []
        for channel in self.images.unbind(1):
            # A histogram makes the sums exact whatever the number of images.
            share = torch.bincount(channel.flatten(), minlength=256).to(torch.float64) / channel.numel()
            mean = (share * values).sum()
            means.append(mean.item())
            deviations.append((share * (values - mean) ** 2).sum().sqrt().item())
        return tuple(means), tuple(deviations)

    def resized(self, size: int) -> "ImageTensor":
        """The same images at ``size x size``: bilinear, with antialiasing, rounded to bytes."""
        if self.image_shape[1:] == (size, size):
            return self
        resized = self.images.new_empty(len(self), self.image_shape[0], size, size)
        for source, target in zip(self.images.split(_RESIZE_CHUNK), resized.split(_RESIZE_CHUNK), strict=True):
            pixels = torch.nn.functional.interpolate(
                source.to(torch.float32), size=(size, size), mode="bilinear", antialias=True
            )
            target.copy_(pixels.round().clamp(0, 255))
        return ImageTensor(resized, self.labels, self.classes, self.mirror)
