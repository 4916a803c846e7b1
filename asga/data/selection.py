"""Which images to use: some of the classes, and a random subset with equally many of each."""

import difflib
from collections.abc import Sequence

import torch
from torch import Tensor


def select(
    labels: Tensor,
    names: Sequence[str],
    *,
    classes: int | Sequence[str] | None = None,
    limit: int | None = None,
    seed: int = 0,
) -> tuple[Tensor, Tensor, tuple[str, ...]]:
    """Choose images by their labels.

    Args:
        labels: int64 ``[N]``, indices into `names`.
        names: The classes.
        classes: How many of the first classes, or the names of those to keep, in their new order. None: all.
        limit: At most this many images. Classes get equal shares, give or take one; what a class is short of
            goes to the others. None: all.
        seed: Of the random choice.

    Returns:
        Ascending indices ``[M]`` into `labels`, the labels ``[M]`` numbered anew, and the names of the
        classes kept.

    Raises:
        ValueError: An unknown or repeated class, a count or limit out of range, or nothing is left.
    """
    kept = _class_indices(names, classes)
    renumbered = torch.full((len(names),), -1)
    renumbered[kept] = torch.arange(len(kept))
    new_labels = renumbered[labels]
    indices = torch.nonzero(new_labels >= 0).flatten()
    kept_names = tuple(names[i] for i in kept)
    if len(indices) == 0:
        raise ValueError(f"there is no image of the classes {', '.join(kept_names)}")
    if limit is not None:
        if limit < 1:
            raise ValueError(f"limit is {limit}; it must be at least 1 image")
        generator = torch.Generator().manual_seed(seed)
        subset = new_labels[indices]
        # Everybody's first image, then everybody's second ...; in a random order of the classes within a
        # round.
        rounds = rank_in_class(subset, generator) * len(kept)
        turn = torch.randperm(len(kept), generator=generator)[subset]
        indices = indices[torch.argsort(rounds + turn)[:limit]].sort().values
    return indices, new_labels[indices], kept_names


def rank_in_class(labels: Tensor, generator: torch.Generator) -> Tensor:
    """Shuffle every class and number its images from 0.

    Args:
        labels: int64 ``[N]``.
        generator: Source of the random order.

    Returns:
        int64 ``[N]``: the place of each image in the random order of its class.
    """
    shuffled = torch.randperm(len(labels), generator=generator)
    by_class = shuffled[torch.argsort(labels[shuffled], stable=True)]
    sizes = torch.bincount(labels)
    starts = torch.cumsum(sizes, 0) - sizes
    ranks = torch.empty_like(labels)
    ranks[by_class] = torch.arange(len(labels)) - starts[labels[by_class]]
    return ranks


def _class_indices(names: Sequence[str], classes: int | Sequence[str] | None) -> list[int]:
    if classes is None:
        return list(range(len(names)))
    if isinstance(classes, int):
        if not 1 <= classes <= len(names):
            raise ValueError(f"classes is {classes}; the data has {len(names)} classes")
        return list(range(classes))
    if isinstance(classes, str) or not classes:
        raise ValueError(f"classes is {classes!r}; give a number or a list of names")
    if len(set(classes)) < len(classes):
        raise ValueError(f"classes names one twice: {', '.join(classes)}")
    index = {name: i for i, name in enumerate(names)}
    for name in classes:
        if name not in index:
            near = difflib.get_close_matches(name, names) or names[:3]
            raise ValueError(f"classes has {name!r}, which the data does not; nearest: {', '.join(near)}")
    return [index[name] for name in classes]
