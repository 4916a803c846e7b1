"""Batches of a dataset, in an order that depends on nothing but the seed and the epoch."""

import copy
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from asga.data.augment import shift_and_flip
from asga.data.files import ImageFiles
from asga.data.images import ImageTensor
from asga.data.selection import rank_in_class


class Batches:
    """Iterates over (images, labels) batches: normalized, on a device, augmented or not.

    Batch i of epoch e is the same whenever it is asked for: its images and their augmentation follow from
    (seed, e, i) alone, and torch's global random state is neither read nor advanced. So a run resumes in the
    middle of an epoch with ``iterate(start)``.

    With `shuffle` (training), the images left over at the end of an epoch are dropped so that all batches
    have one size; a dataset smaller than a batch gives one smaller batch. Without (validation), every image
    comes, in order.

    Args:
        dataset: The images.
        batch_size: Images in a batch.
        shuffle: Whether to draw a new order every epoch.
        augment: Whether to shift, and where the dataset allows it mirror, the images at random.
        seed: Of order and augmentation; not negative.
        mean: Per channel, with pixels from 0 to 1. None: that of `dataset`. A validation loader takes `mean`
            and `std` of its training loader.
        std: Likewise.
        device: Where batches are put, and augmented.

    Attributes:
        dataset: The images.
        mean: Of each channel; subtracted.
        std: Of each channel; divided by.

    Raises:
        ValueError: The dataset is empty, or an argument is out of range.
    """

    def __init__(
        self,
        dataset: ImageTensor | ImageFiles,
        batch_size: int,
        *,
        shuffle: bool,
        augment: bool,
        seed: int = 0,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        if len(dataset) == 0:
            raise ValueError("dataset is empty; there is no batch to make")
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
        if seed < 0:
            raise ValueError(f"seed is {seed}; it must not be negative")
        if (mean is None) != (std is None):
            raise ValueError("mean and std must be given together")
        if mean is None or std is None:
            mean, std = dataset.statistics()
            # A channel of one color carries nothing; it is centered and left at that.
            std = [value if value > 0 else 1.0 for value in std]
        channels = dataset.image_shape[0]
        if len(mean) != channels or len(std) != channels:
            raise ValueError(f"mean has {len(mean)} and std {len(std)} values; images have {channels} channels")
        if not all(value > 0 for value in std):
            raise ValueError(f"std is {tuple(std)}; every value must be positive")
        self.dataset = dataset
        self.mean = tuple(mean)
        self.std = tuple(std)
        self._indices = torch.arange(len(dataset))
        self._batch_size = min(batch_size, len(dataset))
        self._shuffle = shuffle
        self._augment = augment
        self._seed = seed
        self._device = torch.device(device)
        self._epoch = 0

    def __len__(self) -> int:
        whole, left_over = divmod(len(self._indices), self._batch_size)
        return whole + (left_over > 0 and not self._shuffle)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self.iterate()

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next iteration gives; it does not advance by itself."""
        if epoch < 0:
            raise ValueError(f"epoch is {epoch}; it must not be negative")
        self._epoch = epoch

    def with_seed(self, seed: int) -> "Batches":
        """The same images in another order, with another augmentation."""
        if seed < 0:
            raise ValueError(f"seed is {seed}; it must not be negative")
        other = copy.copy(self)
        other._seed = seed
        return other

    def split(self, share: float) -> tuple["Batches", "Batches"]:
        """Two loaders over different images, whatever the seed: most of them, and a share of every class.

        Args:
            share: Of the images of a class that the second one has, between 0 and 1, rounded.

        Raises:
            ValueError: `share` is out of range, or leaves one of them without an image.
        """
        if not 0 < share < 1:
            raise ValueError(f"share is {share}; it must lie between 0 and 1")
        labels = self.dataset.labels[self._indices]
        ranks = rank_in_class(labels, torch.Generator().manual_seed(0))
        second = ranks < (share * torch.bincount(labels)).round()[labels]
        if second.all() or not second.any():
            raise ValueError(f"share is {share}, which leaves one side of {len(labels)} images empty")
        return self._over(self._indices[~second]), self._over(self._indices[second])

    def iterate(self, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Iterate over the batches of the epoch from batch `start` on, as an uninterrupted epoch has them.

        Args:
            start: Batches to pass over, at no cost. ``len(self)`` gives none.

        Returns:
            An iterator over images float32 ``[B, C, H, W]`` and labels int64 ``[B]``, both on the device.

        Raises:
            ValueError: `start` is out of range.
        """
        if not 0 <= start <= len(self):
            raise ValueError(f"start is {start}; an epoch has {len(self)} batches")
        return self._batches(self._epoch, start)

    def _batches(self, epoch: int, start: int) -> Iterator[tuple[Tensor, Tensor]]:
        batches = self._order(epoch).split(self._batch_size)[start : len(self)]
        # Bytes to floats in one multiply-add: (x / 255 - mean) / std.
        factor = self._per_channel(1 / (255 * std) for std in self.std)
        offset = self._per_channel(-mean / std for mean, std in zip(self.mean, self.std, strict=True))
        for index, (indices, images) in enumerate(zip(batches, self.dataset.read(batches), strict=True), start):
            images = images.to(self._device, non_blocking=True)
            if self._augment:
                images = shift_and_flip(images, mirror=self.dataset.mirror, generator=self._generator(epoch, 1 + index))
            labels = self.dataset.labels[indices].to(self._device, non_blocking=True)
            yield torch.addcmul(offset, images.to(torch.float32), factor), labels

    def _over(self, indices: Tensor) -> "Batches":
        other = copy.copy(self)
        other._indices = indices
        other._batch_size = min(self._batch_size, len(indices))
        return other

    def _order(self, epoch: int) -> Tensor:
        if not self._shuffle:
            return self._indices
        return self._indices[torch.randperm(len(self._indices), generator=self._generator(epoch, 0))]

    def _per_channel(self, values: Iterable[float]) -> Tensor:
        return torch.tensor(list(values), dtype=torch.float32, device=self._device).view(-1, 1, 1)

    def _generator(self, epoch: int, stream: int) -> torch.Generator:
        """A generator for (seed, epoch, stream): stream 0 is the order, 1 + i the augmentation of batch i."""
        state = np.random.SeedSequence((self._seed, epoch, stream)).generate_state(1, np.uint64)
        return torch.Generator().manual_seed(int(state[0]))
