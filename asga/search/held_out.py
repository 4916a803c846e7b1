"""Holding out a part of the proxy, to train the logits on other images than the weights."""

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor
from torch.utils.data import DataLoader, RandomSampler, Sampler, SequentialSampler, SubsetRandomSampler

from asga._batches import Batch, Inputs
from asga._random import random_state, set_random_state
from asga.training import batches_from, count_batches

# What a DataLoader over other samples takes from the one it is made of.
_KEPT = (
    *("batch_size", "num_workers", "collate_fn", "pin_memory", "drop_last", "timeout", "worker_init_fn"),
    *("multiprocessing_context", "prefetch_factor", "persistent_workers"),
)


def split_loader(loader: Iterable[Batch], share: float) -> tuple[Iterable[Batch], "HeldOut"]:
    """Split a loader into two over different samples; the same ones every time.

    Args:
        loader: A `torch.utils.data.DataLoader` whose sampler is a usual one; a sequence of batches, which is split
            batch by batch; or anything with `split`, such as `asga.data.Batches`.
        share: Of the samples that are held out, between 0 and 1.

    Returns:
        A loader over the rest, and the batches held out.

    Raises:
        ValueError: The loader cannot be split, or one of the parts would be empty.
    """
    count_batches(loader)
    if hasattr(loader, "iterate") and hasattr(loader, "split"):
        rest, held_out = loader.split(share)
    elif isinstance(loader, DataLoader):
        rest, held_out = _split_data_loader(loader, share)
    elif isinstance(loader, Sequence):
        chosen = set(hold_out(len(loader), share).tolist())
        rest = [batch for index, batch in enumerate(loader) if index not in chosen]
        held_out = [batch for index, batch in enumerate(loader) if index in chosen]
    else:
        raise ValueError(
            f"held_out is {share}, but a {type(loader).__name__} cannot be split: give a DataLoader with its usual "
            f"sampler, a list of batches or asga.data.Batches"
        )
    if len(rest) == 0 or len(held_out) == 0:
        raise ValueError(f"held_out is {share}, which leaves {len(rest)} batches to train on and {len(held_out)} apart")
    return rest, HeldOut(held_out)


def hold_out(count: int, share: float) -> Tensor:
    """Which of `count` samples to hold out: ascending indices, random but always the same ones."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    return order[: round(share * count)].sort().values


class HeldOut:
    """Batches held out, over and over again: which is the next follows from the number of the step alone.

    Args:
        loader: Over the samples held out; its order follows from `set_epoch`.
    """

    def __init__(self, loader: Iterable[Batch]) -> None:
        self._loader, self._length = loader, len(loader)
        self._batches: Iterator[tuple[Inputs, Tensor]] = iter(())
        self._next = -1

    def batch(self, step: int) -> tuple[Inputs, Tensor]:
        """The batch of a step, counted from 0. Random numbers that opening the loader draws are drawn apart."""
        epoch, index = divmod(step, self._length)
        if step != self._next or index == 0:
            before = random_state()
            torch.default_generator.manual_seed(epoch)  # that of the CPU alone
            self._batches = batches_from(self._loader, epoch, index)
            set_random_state(before)
        self._next = step + 1
        return next(self._batches)


class _Shuffled(Sampler[int]):
    """Some indices, every epoch in another order."""

    def __init__(self, indices: Tensor) -> None:
        self._indices, self._epoch = indices, 0

    def set_epoch(self, epoch: int) -> None:
        self._epoch = epoch

    def __len__(self) -> int:
        return len(self._indices)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self._epoch)
        return iter(self._indices[torch.randperm(len(self), generator=generator)].tolist())


def _split_data_loader(loader: DataLoader, share: float) -> tuple[DataLoader, DataLoader]:
    if loader.batch_size is None or not isinstance(loader.sampler, RandomSampler | SequentialSampler):
        raise ValueError(
            f"held_out is {share}, but the DataLoader has a sampler of its own: split its dataset, or leave the "
            f"sampler to the DataLoader (shuffle=True)"
        )
    count, replacement = len(loader.dataset), getattr(loader.sampler, "replacement", False)
    if len(loader.sampler) != count or replacement:
        raise ValueError(
            f"held_out is {share}, but the sampler of the DataLoader draws {len(loader.sampler)} of {count} samples"
            f"{' with replacement' if replacement else ''}: only one that draws each once can be split"
        )
    options = {name: getattr(loader, name) for name in _KEPT}
    held_out = hold_out(count, share)
    rest = torch.ones(count, dtype=torch.bool).index_fill_(0, held_out, False).nonzero().flatten()
    # From the same generator as the loader itself: a resumed epoch draws the same order again.
    shuffles = isinstance(loader.sampler, RandomSampler)
    sampler = SubsetRandomSampler(rest.tolist(), loader.sampler.generator) if shuffles else rest.tolist()
    return (
        DataLoader(loader.dataset, sampler=sampler, generator=loader.generator, **options),
        DataLoader(loader.dataset, sampler=_Shuffled(held_out), **options),
    )
