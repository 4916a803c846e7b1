"""What the processes of a data-parallel training have to agree on: the losses, and whether a step is valid."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from asga.optim._flat import buckets, copy_flat_, flatten

# As large as DDP's: one message takes its full bandwidth, and the copies need little memory.
_BUCKET_BYTES = 25 * 2**20


class Ranks:
    """The processes that train the same weights on batches of their own.

    Gradients are the same on all of them once DDP or FSDP has averaged them. Losses are not, and with them the gap, the
    radius and the decision to skip a step would differ: they are averaged here, in one small all-reduce a step.

    Args:
        group: A process group; None for one process; "auto" for the default group where `torch.distributed` is
            initialized at the time of the step.
    """

    def __init__(self, group: object | None) -> None:
        self._group = group

    @property
    def several(self) -> bool:
        """Whether there is anything to agree on."""
        if self._group is None or not dist.is_available() or not dist.is_initialized():
            return False
        return dist.get_world_size(self._process_group) > 1

    def mean_(self, values: Tensor) -> Tensor:
        """The mean over all processes, in place, the same bits on each; not finite where one of them is not."""
        if self.several:
            dist.all_reduce(values, group=self._process_group)
            values.div_(dist.get_world_size(self._process_group))
        return values

    def average_(self, tensors: Sequence[Tensor]) -> None:
        """Average a list of tensors over all processes, in place: one all-reduce for each bucket of them."""
        if not self.several:
            return
        for bucket in buckets(tensors, _BUCKET_BYTES):
            members = [tensors[index] for index in bucket]
            copy_flat_(members, self.mean_(flatten(members)))

    @property
    def _process_group(self) -> object | None:
        return None if self._group == "auto" else self._group


def add_over_shards(sums: Tensor, shards: tuple[object, ...]) -> Tensor:
    """Add up, over the process groups of the sharded dimensions, what each rank knows of its own shards."""
    for group in shards:
        dist.all_reduce(sums, group=group)
    return sums


def verdict(values: Sequence[Tensor]) -> Tensor:
    """0-dim float64: 0 where all values are finite, else NaN, which survives a mean over processes."""
    finite = torch.stack([torch.isfinite(value).all() for value in values]).all()
    return torch.where(finite, 0.0, torch.nan).to(torch.float64)
