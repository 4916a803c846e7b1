"""Many small tensors as few large ones: one launch, or one message to other processes, instead of one for each."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor


def buckets(tensors: Iterable[Tensor], nbytes: float = float("inf")) -> list[list[int]]:
    """Positions of the tensors that can lie in one: of one device and dtype, together of at most so many bytes.

    Args:
        tensors: In an order that is kept.
        nbytes: A tensor that is larger has a bucket of its own.
    """
    found: list[list[int]] = []
    last: dict[tuple[torch.device, torch.dtype], tuple[list[int], int]] = {}
    for index, tensor in enumerate(tensors):
        key, size = (tensor.device, tensor.dtype), tensor.numel() * tensor.element_size()
        bucket, filled = last.get(key, (None, 0))
        if bucket is None or filled + size > nbytes:
            bucket, filled = [], 0
            found.append(bucket)
        bucket.append(index)
        last[key] = bucket, filled + size
    return found


def flatten(tensors: Sequence[Tensor]) -> Tensor:
    """A copy of all values, in one dimension."""
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


def copy_flat_(tensors: Sequence[Tensor], flat: Tensor) -> None:
    """Write what `flatten` returned for tensors of these shapes back into them."""
    parts = flat.split([tensor.numel() for tensor in tensors])
    torch._foreach_copy_(list(tensors), [part.view(t.shape) for part, t in zip(parts, tensors, strict=True)])
