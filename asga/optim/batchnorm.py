"""Running statistics of normalization layers, kept from moving twice in a step of two forward passes."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from asga.optim._flat import buckets, copy_flat_, flatten

# The names torch.nn gives the running buffers of BatchNorm1d/2d/3d, SyncBatchNorm and InstanceNorm, and that
# their reimplementations keep for the sake of state dicts.
_BUFFER_NAMES = ("running_mean", "running_var", "num_batches_tracked")


class RunningStatistics(NamedTuple):
    """Copies of every running mean, running variance and batch counter of a model.

    Attributes:
        names: Of the buffers, by device and dtype.
        values: For each of these lists the values, one after the other.
    """

    names: list[list[str]]
    values: list[Tensor]


def save_running_statistics(model: nn.Module) -> RunningStatistics:
    """Copy every running mean, running variance and batch counter of `model`.

    Setting the momentum to 0 for the second pass would not do: an infinite batch statistic times 0 is NaN,
    and the batch counter, which makes the average when momentum is None, would still advance. Copies are
    exact, and the buffers are small; all of one device and dtype are copied at once.

    Args:
        model: Any module; layers without running statistics, or in eval mode, do no harm.

    Returns:
        The copies, for `restore_running_statistics`.
    """
    named = [pair for pair in model.named_buffers() if pair[0].rpartition(".")[2] in _BUFFER_NAMES]
    lists = [[named[index] for index in bucket] for bucket in buckets(buffer for _, buffer in named)]
    return RunningStatistics(
        [[name for name, _ in pairs] for pairs in lists],
        [flatten([buffer for _, buffer in pairs]) for pairs in lists],
    )


def choose_running_statistics(condition: Tensor, one: RunningStatistics, other: RunningStatistics) -> RunningStatistics:
    """`one` where `condition`, a 0-dim bool that the host does not read, is true, and else `other`."""
    pairs = zip(one.values, other.values, strict=True)
    return one._replace(values=[torch.where(condition.to(mine.device), mine, yours) for mine, yours in pairs])


@torch.no_grad()
def restore_running_statistics(model: nn.Module, saved: RunningStatistics) -> None:
    """Write copies of the statistics of `model` back, bit for bit."""
    buffers = dict(model.named_buffers())
    for names, values in zip(saved.names, saved.values, strict=True):
        copy_flat_([buffers[name] for name in names], values)
